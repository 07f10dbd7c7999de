"""Scoring 20 choices: the prompt read once for all of them, against one pass a choice; and many choices of unlike lengths.

python benchmarks/choices.py --t5 FOLDER
"""

import common
import torch

from alter.nn import LoRA, TaskSelector
from alter.nn import choices as scoring
from alter.nn.choices import choice_log_likelihoods

# tokens of clinc150's 151 choices, with their ends, and how many have so many
INTENTS = {2: 36, 3: 88, 4: 16, 5: 8, 6: 2, 8: 1}


@torch.inference_mode()
def one_pass_a_choice(found, prompts, choices):
    """[batch, choices], each by a pass over prompt and choice."""
    ids, count = prompts["input_ids"], len(prompts["input_ids"])
    scores = []
    for choice in choices:
        target = torch.tensor([choice] * count, device=ids.device)
        if found.is_seq2seq:
            inputs, labels = ids, target
        else:
            inputs = torch.cat([ids, target], 1)
            labels = torch.cat([torch.full_like(ids, -100), target], 1)
        mask = torch.ones_like(inputs)
        out = found({"input_ids": inputs, "attention_mask": mask, "labels": labels, "task_ids": prompts["task_ids"]})
        scores.append(-torch.zeros(count, device=ids.device).index_add(0, out.rows, out.losses))
    return torch.stack(scores, 1)


def scored_whole(found, prompts, intents):
    """All choices filled up to the longest."""
    usual, scoring.MOST_PADDING = scoring.MOST_PADDING, 10**9
    try:
        return choice_log_likelihoods(found, prompts, intents)
    finally:
        scoring.MOST_PADDING = usual


def measure(name, backbone, args):
    """Two rows."""
    found = common.model(backbone, args.precision, 4, LoRA(rank=16), TaskSelector()).eval()
    prompts, g = common.prompts(args.batch, args.length, 4), torch.Generator().manual_seed(1)
    few = [torch.randint(100, 30000, (1 + n % 4,), generator=g).tolist() for n in range(args.choices)]
    intents = [
        torch.randint(100, 30000, (length,), generator=g).tolist() for length, n in INTENTS.items() for _ in range(n)
    ]
    with torch.inference_mode():
        apart = (choice_log_likelihoods(found, prompts, few) - one_pass_a_choice(found, prompts, few)).abs().max()
    print(f"{name}: log-likelihoods differ by {apart:.1e} at most")
    seconds = common.alternate(
        args.rounds,
        shared=lambda: choice_log_likelihoods(found, prompts, few),
        apart=lambda: one_pass_a_choice(found, prompts, few),
    )
    speed = common.ratios(seconds["apart"], seconds["shared"])
    rows = [common.row(f"{name}: {args.choices} choices with a shared prompt over one pass a choice", speed, 3.0)]
    seconds = common.alternate(
        args.rounds,
        groups=lambda: choice_log_likelihoods(found, prompts, intents),
        whole=lambda: scored_whole(found, prompts, intents),
    )
    told = f"{name}: {len(intents)} choices in groups of like length over all as long as the longest"
    return [*rows, common.row(told, common.ratios(seconds["whole"], seconds["groups"]), None)]


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    parser.add_argument("--choices", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    args = parser.parse_args()
    common.both_backbones(measure, args)


if __name__ == "__main__":
    main()

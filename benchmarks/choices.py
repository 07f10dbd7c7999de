"""Scoring 20 choices: the prompt read once for all of them, against one pass a choice.

python benchmarks/choices.py --t5 FOLDER
"""

import common
import torch

from alter.nn import LoRA, TaskSelector
from alter.nn.choices import choice_log_likelihoods


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


def measure(name, backbone, args):
    """One row."""
    found = common.model(backbone, args.precision, 4, LoRA(rank=16), TaskSelector()).eval()
    prompts, g = common.prompts(args.batch, args.length, 4), torch.Generator().manual_seed(1)
    choices = [torch.randint(100, 30000, (1 + n % 4,), generator=g).tolist() for n in range(args.choices)]
    with torch.inference_mode():
        apart = (
            (choice_log_likelihoods(found, prompts, choices) - one_pass_a_choice(found, prompts, choices)).abs().max()
        )
    print(f"{name}: log-likelihoods differ by {apart:.1e} at most")
    seconds = common.alternate(
        args.rounds,
        shared=lambda: choice_log_likelihoods(found, prompts, choices),
        apart=lambda: one_pass_a_choice(found, prompts, choices),
    )
    speed = common.ratios(seconds["apart"], seconds["shared"])
    return [common.row(f"{name}: {args.choices} choices with a shared prompt over one pass a choice", speed, 3.0)]


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

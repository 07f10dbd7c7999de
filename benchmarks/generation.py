"""Generation of a batch of mixed tasks with cached decoding, against the bare backbone on the same batch.

python benchmarks/generation.py --t5 FOLDER
"""

import common
import torch

from alter.nn import LoRA, TaskSelector
from alter.nn.decoding import generate


def measure(name, backbone, args):
    """One row; both sides make just as many tokens."""
    found = common.model(backbone, args.precision, 8, LoRA(rank=16), TaskSelector(), args.layers).eval()
    bare = common.load_backbone(backbone, args.precision)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 30000, (args.batch, args.length), generator=g)
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": torch.arange(args.batch) % 8}
    new = {"max_new_tokens": args.new, "min_new_tokens": args.new}

    def plain():
        with torch.inference_mode():
            bare.generate(input_ids=ids, attention_mask=prompts["attention_mask"], do_sample=False, num_beams=1, **new)

    seconds = common.alternate(args.rounds, mixed=lambda: generate(found, prompts, **new), bare=plain)
    speed = common.ratios(seconds["bare"], seconds["mixed"])
    return [common.row(f"{name} {args.layers}: tokens/s of mixed tasks over the bare backbone", speed, 0.9)]


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", default="last:4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--new", type=int, default=24, help="tokens to make")
    args = parser.parse_args()
    rows = measure("SmolLM2-135M", args.smollm2, args)
    if args.t5:
        rows += measure("T5", args.t5, args)
    common.save(rows, args.out)


if __name__ == "__main__":
    main()

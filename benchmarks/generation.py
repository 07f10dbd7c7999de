"""Generation of a batch of mixed tasks with cached decoding, against the bare backbone on the same batch.

The model is as it is loaded to answer.

python benchmarks/generation.py --t5 FOLDER
"""

import re

import common
import torch
from machine import copied

from alter.nn import LoRA, TaskSelector
from alter.nn.decoding import generate


def measure(name, backbone, args):
    """A row for each size of batch; both sides make just as many tokens."""
    found = common.model(backbone, args.precision, 8, LoRA(rank=16), TaskSelector(), args.layers).eval().settle()
    bare = common.load_backbone(backbone, args.precision).to(common.DEVICE)
    new = {"max_new_tokens": args.new, "min_new_tokens": args.new}
    weights, most = decoder_bytes(bare), copied()
    rows = []
    for batch in args.batch:
        prompts = common.prompts(batch, args.length, 8)
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}

        def plain(inputs=inputs):
            with torch.inference_mode():
                bare.generate(**inputs, do_sample=False, num_beams=1, **new)

        def mixed(prompts=prompts):
            generate(found, prompts, **new)

        def first(prompts=prompts):
            generate(found, prompts, max_new_tokens=1, min_new_tokens=1)

        seconds = common.alternate(args.rounds, mixed=mixed, bare=plain, first=first)
        speed = common.ratios(seconds["bare"], seconds["mixed"])
        called = common.called(name, args.layers, args.precision)
        told = f"{called}, batch of {batch}"
        rows.append(common.row(f"{told}: tokens/s of mixed tasks over the bare backbone", speed, 0.9))
        after = [whole - first for whole, first in zip(seconds["mixed"], seconds["first"], strict=True)]
        moved = [(args.new - 1) * weights / second / 1e9 / most for second in after]
        rows.append(common.row(f"{told}: weights that decoding reads a second, over what a copy moves", moved, None))
    return rows


def decoder_bytes(backbone):
    """What a token reads: the weights of the decoder's blocks and of the head, which may be the embeddings.

    Keys and values of what an encoder has read are made once.
    """
    once = {id(p) for p in backbone.get_input_embeddings().parameters()}
    once |= {id(p) for name, p in backbone.named_parameters() if re.search(r"EncDecAttention\.[kv]\.", name)}
    read = [p for p in backbone.get_decoder().parameters() if id(p) not in once]
    read += backbone.get_output_embeddings().parameters()
    return sum(p.numel() * p.element_size() for p in read)


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", default="last:4")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--new", type=int, default=24, help="tokens to make")
    parser.set_defaults(rounds=15)  # of a second or less each with the T5
    args = parser.parse_args()
    common.both_backbones(measure, args)


if __name__ == "__main__":
    main()

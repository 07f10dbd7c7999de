"""Epochs after the first: the same training steps from cached trunk states and without them.

    python benchmarks/trunk_cache.py --data ROOT

Real batches of the customer-service mixture (of the medical recipe, where no --data is given), the loss at labels alone on
both sides. Beside the measured ratio stands the one that counted multiply-adds allow.
"""

import tempfile

import common
import torch
from mixtures import batches

from alter.nn import LoRA, TaskSelector, TrunkCache


def multiply_adds(found, data, cut, rank):
    """Multiply-adds of one step's matrix products: (whole backbone, from the cut on).

    Forward all blocks that run; backward only through blocks with adapters, whose frozen weights need input gradients
    alone, adapters both; the head forward and backward at the labels.
    """
    config = found.backbone.config
    d, h, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = d * config.num_key_value_heads // config.num_attention_heads
    rows, length = data["input_ids"].shape
    tokens, labels = rows * length, int((data["labels"] != -100).sum())
    block = tokens * (2 * d * d + 2 * d * kv + 3 * d * h + 2 * length * d)
    adapters = tokens * 3 * (d + h) * rank * len(found.tasks)
    head = labels * config.vocab_size * d
    adapted = blocks - cut
    # the first adapted block's attention has nothing below that trains, so nothing goes back through it
    backward = adapted * (block + 2 * adapters) - tokens * (2 * d * d + 2 * d * kv + 2 * length * d)
    upper = adapted * (block + adapters) + backward + 2 * head
    return cut * block + upper, upper


def measure(layers, args):
    """Rows for one placement."""
    count, data = batches(args.smollm2, args.data, args.steps, args.max_tokens)
    expert = LoRA(rank=args.rank)
    plain = common.model(args.smollm2, args.precision, count, expert, TaskSelector(), layers)
    cached = common.model(args.smollm2, args.precision, count, expert, TaskSelector(), layers)
    with tempfile.TemporaryDirectory() as folder:
        assert cached.body.cache_trunks(TrunkCache(folder=folder), "benchmark")
        cut = cached.body.cached["decoder"].trunk.cut
        seconds = common.alternate(
            args.rounds,
            plain=lambda: [common.step(plain, b) for b in data],
            cached=lambda: [common.step(cached, b) for b in data],  # the first, untimed, round fills the cache
        )
        worst = max(
            float((plain(b).losses - cached(b).losses).abs().max()) for b in data[:3]
        )
    name = f"SmolLM2-135M {layers} {args.precision}"
    found = common.ratios(seconds["plain"], seconds["cached"])
    counted = [multiply_adds(plain, b, cut, args.rank) for b in data]
    allowed = sum(whole for whole, _ in counted) / sum(upper for _, upper in counted)
    tokens = sum(int(b["attention_mask"].sum()) for b in data)
    speeds = [f"{name} {tokens / sorted(values)[len(values) // 2]:,.0f} tokens/s" for name, values in seconds.items()]
    print(f"{name}: {', '.join(speeds)}; multiply-adds allow {allowed:.2f}; losses differ by {worst:.1e} at most")
    target = {"last:4": 3.0, "last:2": 5.0}.get(layers)
    return [
        common.row(f"{name}: cached epochs over uncached", found, target),
        common.row(f"{name}: share of the ratio that multiply-adds allow", [r / allowed for r in found], 0.85),
    ]


def main():
    """Both placements."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", nargs="+", default=["last:4", "last:2"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="batches a round")
    parser.add_argument("--max_tokens", type=int, default=1024)
    args = parser.parse_args()
    torch.manual_seed(0)
    common.save([r for layers in args.layers for r in measure(layers, args)], args.out)


if __name__ == "__main__":
    main()

"""Epochs after the first: the same training steps from cached trunk states and without them.

    python benchmarks/trunk_cache.py --data ROOT

Real batches of the mixtures (of the medical recipe, where no --data is given), a LoRA expert a task, the loss at labels
alone on both sides. Beside the measured ratio stands the one that counted multiply-adds allow; clipping and AdamW's step are
measured and not counted.
"""

import tempfile
from functools import partial

import common
import torch
from mixtures import batches, known

from alter.nn import LoRA, TaskSelector, TrunkCache


def multiply_adds(found, data, cut, rank, active):
    """Multiply-adds of one step's matrix products: (whole backbone, from the cut on).

    Forward all blocks that run; backward only through blocks with adapters, whose frozen weights need input gradients
    alone, adapters and attention's scores both sides'; the head forward and backward at the labels.
    """
    config = found.backbone.config
    d, h, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = d * config.num_key_value_heads // config.num_attention_heads
    rows, length = data["input_ids"].shape
    tokens, labels = rows * length, int((data["labels"] != -100).sum())
    adapted = blocks - cut
    projections, scores = tokens * (2 * d * d + 2 * d * kv), tokens * 2 * length * d
    attention, feed_forward = projections + scores, tokens * 3 * d * h
    adapters = tokens * 3 * (d + h) * rank * active
    head = labels * config.vocab_size * d
    # the last block's feed-forward is made for the labels alone
    at_labels = rows * int((data["labels"] != -100).sum(1).max()) / tokens
    full = adapted - 1 + at_labels
    forward = adapted * attention + full * (feed_forward + adapters)
    # what enters the first adapted block's gate and up, with their adapters' first halves, needs no gradient, nor does its attention
    first = (1 if adapted > 1 else at_labels) * tokens * 2 * d * (h + rank * active)
    backward = (adapted - 1) * (projections + 2 * scores) + full * (feed_forward + 2 * adapters) - first
    upper = forward + backward + 2 * head
    return cut * (attention + feed_forward) + upper, upper


def measure(layers, mixture, args):
    """Rows for one placement."""
    count, data = batches(args.smollm2, args.data, args.steps, args.max_tokens, mixture)
    data = [common.placed(batch) for batch in data]
    expert, router = LoRA(rank=args.rank), TaskSelector(hard=args.routing == "hard")
    plain = common.model(args.smollm2, args.precision, count, expert, router, layers)
    cached = common.model(args.smollm2, args.precision, count, expert, router, layers)
    with tempfile.TemporaryDirectory() as folder:
        assert cached.body.cache_trunks(TrunkCache(folder=folder), "benchmark")
        cut = cached.body.cached["decoder"].trunk.cut
        take_plain, take_cached = common.stepper(plain), common.stepper(cached)
        sides = {"plain": take_plain, "cached": take_cached}
        turns = {f"{side} {i}": partial(take, b) for i, b in enumerate(data) for side, take in sides.items()}
        times = common.alternate(args.rounds, **turns)  # step by step; the first, untimed, round fills the cache
        seconds = {
            side: [sum(steps) for steps in zip(*(times[f"{side} {i}"] for i in range(len(data))), strict=True)]
            for side in sides
        }
        worst = max((plain(b).losses - cached(b).losses).detach().abs().max().item() for b in data[:3])
    name = f"SmolLM2-135M {layers} {args.precision}, {mixture}, {args.routing} routing"
    active = 1 if args.routing == "hard" else count
    found = common.ratios(seconds["plain"], seconds["cached"])
    tokens, labels = (
        sum(int((b[key] != none).sum()) for b in data) for key, none in (("attention_mask", 0), ("labels", -100))
    )
    counted = [multiply_adds(plain, b, cut, args.rank, active) for b in data]
    allowed = sum(whole for whole, _ in counted) / sum(upper for _, upper in counted)
    told = {"allowed": allowed, "label_share": labels / tokens}
    speeds = [f"{side} {tokens / sorted(values)[len(values) // 2]:,.0f} tokens/s" for side, values in seconds.items()]
    print(f"{name}: {', '.join(speeds)}; {labels / tokens:.0%} labels, losses differ by {worst:.1e} at most")
    target = {"last:4": 3.0, "last:2": 5.0}.get(layers)
    share = common.row(
        f"{name}: share of the {allowed:.2f} that multiply-adds allow", [r / allowed for r in found], 0.85
    )
    return [common.row(f"{name}: cached epochs over uncached", found, target), {**share, **told}]


def main():
    """Every mixture and placement."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", nargs="+", default=["last:4", "last:2"])
    parser.add_argument("--mixtures", nargs="+", default=["medical", "customer_service", "biomedical"])
    parser.add_argument("--routing", choices=["soft", "hard"], default="hard")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="batches a round, with the epoch's shares of labels")
    parser.add_argument("--max_tokens", type=int, default=1024)
    args = parser.parse_args()
    torch.manual_seed(0)
    mixtures = dict.fromkeys(known(args.data, mixture) for mixture in args.mixtures)
    common.save(
        [row for mixture in mixtures for layers in args.layers for row in measure(layers, mixture, args)], args.out
    )


if __name__ == "__main__":
    main()

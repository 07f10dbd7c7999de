"""A training step in each precision of the backbone: against fp32, and as a share of this machine's matrix product.

    python benchmarks/precisions.py --precisions fp32 bf16 int8

The share counts the multiply-adds of the step's products, as trunk_cache.py does, against a large product in the type that they
are computed in, which runs in turn with the steps; int8 weights are multiplied as bf16's are.
"""

import common
import machine
import torch
from trunk_cache import multiply_adds

from alter.nn import LoRA, TaskSelector
from alter.precision import computes_bf16


def measure(layers, args):
    """Rows for one placement."""
    memory, work, sides = {}, {}, {}
    for precision in args.precisions:
        found = common.model(
            args.smollm2, precision, args.experts, LoRA(rank=args.rank), TaskSelector(hard=True), layers
        )
        data = common.batch(found, args.batch, args.length, args.length // 8)
        cut = found.backbone.config.num_hidden_layers - len(found.layers)
        work[precision] = 2 * multiply_adds(found, data, cut, args.rank, 1)[0]
        take, on_gpu = common.stepper(found), common.DEVICE == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        before -= sum(p.numel() * p.element_size() for p in found.parameters())  # what is left of the other precisions
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        take(data)
        memory[precision] = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0.0
        sides[precision] = lambda take=take, data=data: [take(data) for _ in range(args.repeat)]
    products = {name: machine.product(getattr(torch, name)) for name in ("float32", "bfloat16")}
    rounds = common.alternate(args.rounds, **sides, **{name: run for name, (_, run) in products.items()})
    seconds = {precision: [value / args.repeat for value in rounds[precision]] for precision in args.precisions}
    rows = []
    for precision, values in seconds.items():
        name = f"SmolLM2-135M {layers} {precision}"
        kind = "float32" if precision == "fp32" else "bfloat16"
        peaks = [products[kind][0] / second for second in rounds[kind]]
        tokens = args.batch * args.length / sorted(values)[len(values) // 2]
        print(
            f"{name}: {tokens:,.0f} tokens/s, {work[precision] / 1e12:.3f} TFLOP a step, {memory[precision]:.2f} GiB on the GPU"
        )
        shares = [work[precision] / value / peak for value, peak in zip(values, peaks, strict=True)]
        share = common.row(f"{name}: share of the matrix product's peak", shares, None)
        rows.append({**share, "tokens_per_second": tokens, "peak_memory_gib": memory[precision]})
        if precision != "fp32" and "fp32" in seconds:
            rows.append(common.row(f"{name}: steps/s over fp32", common.ratios(seconds["fp32"], values), None))
    return rows


def main():
    """Every placement."""
    parser = common.options(__doc__)
    fast = ["fp32", "bf16"] if computes_bf16() else ["fp32"]
    parser.add_argument("--precisions", nargs="+", default=fast)
    parser.add_argument("--layers", nargs="+", default=["last:4", "last:12"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64 if common.DEVICE == "cuda" else 8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3, help="steps a round")
    args = parser.parse_args()
    common.save([row for layers in args.layers for row in measure(layers, args)], args.out)


if __name__ == "__main__":
    main()

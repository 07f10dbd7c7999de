"""What eight experts cost over one adapter of the same rank: whole training steps, and forward alone; and stage 2 over stage 1.

python benchmarks/fused_mixture.py --t5 FOLDER
"""

from functools import partial

import common
import torch

from alter.nn import Bottleneck, LoRA, SharedGate, TaskSelector, TokenGate

EXPERTS = {"bottleneck": Bottleneck, "LoRA": LoRA}
ROUTERS = {"hard": TaskSelector(hard=True), "token-level": TokenGate(), "soft": TaskSelector()}
WORK = {"step": common.stepper, "forward": lambda found: lambda data: common.forward(found, data)}
TARGETS = {"step": 1.10, "forward": 1.05}  # of hard and token-level routing


def measure(name, backbone, args):
    """Rows for one backbone."""
    return [row for kind in args.kinds for row in measure_kind(name, backbone, kind, args)]


def measure_kind(name, backbone, kind, args):
    """Rows for one kind of expert."""
    expert = EXPERTS[kind](rank=args.rank)
    called = common.called(name, args.layers, args.precision, args.compile)
    one = made(backbone, 1, expert, TaskSelector(hard=True), args)
    rows = []
    for routing, router in ROUTERS.items():
        many = made(backbone, 8, expert, router, args)
        data = common.batch(many, args.batch, args.length)
        alone = {**data, "task_ids": data["task_ids"] * 0}
        for what, work in WORK.items():
            target = None if routing == "soft" else TARGETS[what]
            title = f"{called}, {kind}, {routing}: {what} of 8 experts over one"
            rows.append(compared(title, partial(work(many), data), partial(work(one), alone), target, args))
    both = made(backbone, 8, expert, ROUTERS["soft"], args)
    both.add_shared(expert, 2, SharedGate(), keep=0.8)
    title = f"{called}, {kind}, soft: step of stage 2, with 2 shared experts, over stage 1's"
    return [
        *rows,
        compared(title, partial(common.stepper(both), data), partial(common.stepper(many), data), None, args),
    ]


def compared(title, ours, other, target, args):
    """One row: two sides in turn."""
    seconds = common.alternate(args.rounds, ours=ours, other=other)
    return common.row(title, common.ratios(seconds["ours"], seconds["other"]), target, at_most=True)


def made(backbone, experts, expert, router, args):
    """The model, its blocks compiled where asked: one at a time, so that those alike are compiled once."""
    found = common.model(backbone, args.precision, experts, expert, router, args.layers)
    if args.compile:
        for stack in {block.stack for block in found.body.adapted}:
            for block in found.backbone.get_submodule(stack):
                block.compile()
    return found


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    # of one step: the ratios are near one, and a machine's speed moves between longer turns
    parser.set_defaults(rounds=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", default="last:4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="the blocks of both sides by torch.compile")
    parser.add_argument("--kinds", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 32  # blocks with and without adapters, with and without gradients
    common.both_backbones(measure, args)


if __name__ == "__main__":
    main()

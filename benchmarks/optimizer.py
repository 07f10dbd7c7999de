"""AdamW's step over the adapters' parameters, as the stages take it (fused) over torch's default.

python benchmarks/optimizer.py --t5 FOLDER
"""

import common
import torch


def measure(name, backbone, args):
    """A row for one backbone."""
    found = common.model(backbone, experts=8, layers=args.layers)
    parameters = [p for p in found.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    sides = {
        "plain": torch.optim.AdamW(parameters, lr=1e-6).step,
        "fused": torch.optim.AdamW(parameters, lr=1e-6, fused=True).step,
    }
    seconds = common.alternate(args.rounds, **sides)
    size = sum(p.numel() for p in parameters) / 1e6
    told = f"{name} {args.layers}, {size:.1f} million parameters: AdamW's step by torch's default over fused"
    return [common.row(told, common.ratios(seconds["plain"], seconds["fused"]), None)]


def main():
    """Both backbones."""
    parser = common.options(__doc__)
    parser.add_argument("--layers", default="last:4")
    args = parser.parse_args()
    common.both_backbones(measure, args)


if __name__ == "__main__":
    main()

"""What this machine can do at most: matrix products and memory traffic. The other numbers are bounded by these.

python benchmarks/machine.py
"""

import statistics
import time

import common
import torch


def median_seconds(run, rounds=15):
    """Median over rounds, after one for warmth."""
    run()
    found = []
    for _ in range(rounds):
        common.wait()
        started = time.perf_counter()
        run()
        common.wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def product(dtype):
    """A large matrix product: its multiplications and additions, and what runs it."""
    size = 8192 if common.DEVICE == "cuda" else 2048
    a, b = (torch.randn(size, size).to(common.DEVICE, dtype) for _ in range(2))
    return 2 * size**3, lambda: a @ b


def peaks():
    """GFLOP/s of a large matrix product in fp32 and bf16, and GB/s of a copy."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        work, run = product(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} matrix product, GFLOP/s"] = work / median_seconds(run) / 1e9
    found["copy, GB/s read and written"] = copied()
    return found


def copied():
    """GB/s of a copy, read and written."""
    source, target = torch.zeros(2**26, device=common.DEVICE), torch.empty(2**26, device=common.DEVICE)
    return 2 * 4 * 2**26 / median_seconds(lambda: target.copy_(source)) / 1e9


def main():
    """Prints them, and writes them where asked."""
    args = common.options(__doc__).parse_args()
    found = peaks()
    for name, value in found.items():
        print(f"{name}: {value:.1f}")
    common.save({"hardware": common.hardware(), **found}, args.out)


if __name__ == "__main__":
    main()

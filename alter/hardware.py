"""What the machine can do, told without importing torch."""

from __future__ import annotations

import re
from pathlib import Path

CPU, NVIDIA = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")
SLOW_BF16 = "this processor has no bf16 instructions, so bf16 is far slower than fp32 here; take --precision fp32"


def computes_bf16() -> bool | None:
    """Whether there is a CUDA device, or a processor with bf16 instructions; None where the system does not say."""
    if NVIDIA.exists():
        return True
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", CPU.read_text())) if CPU.is_file() else None

"""What this process and its machine are, and how much of its memory was taken."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

GPUS = "CUDA_VISIBLE_DEVICES"
# By which torchrun, Lightning, SLURM, LSF and Open MPI number the processes that they start: over all nodes, or in two parts.
RANKS = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")


def is_first() -> bool:
    """Whether this is the one process of a training, or the first of several, which writes; known before any has met another."""
    return rank_variable() is None


def rank_variable() -> str | None:
    """The variable of the environment by which this is not the first of several processes; None where it is."""
    return next((rank for rank in RANKS if os.environ.get(rank, "0") != "0"), None)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Returns the most memory this process ever held at once, in bytes, on the host.

    Child processes, such as a data loader's workers, are not in it: they share most of their pages with this one, so a
    sum would count those twice.
    """
    # On Linux, getrusage starts from the peak of the process that started this one. The kernel's own mark does not.
    try:
        mark = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory_bytes() -> int | None:
    """Returns the most memory torch ever held on the CUDA devices, each device's peak added up; None without CUDA."""
    torch = sys.modules.get("torch")  # what has not been imported has not allocated
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, by what CUDA_VISIBLE_DEVICES calls them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(GPUS)
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def hardware() -> str:
    """The GPU's name where there is one, else the processor's and how many cores it has."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"

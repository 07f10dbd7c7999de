"""Which precision suits this machine, where a recipe leaves that open (``precision: auto``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alter.errors import AlterError, did_you_mean
from alter.nn.backbone import PRECISIONS
from alter.run_folder import has_begun
from alter.yaml_file import read_yaml

AUTO = "auto"
KNOWN = (AUTO, *PRECISIONS)
CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # of x86 and Arm, as Linux writes them


def computes_bf16(accelerator: str = "auto") -> bool | None:
    """Whether bf16 is faster than fp32 here: on a GPU, or a processor with instructions for it; None where that is not known.

    A processor without them takes about ten times as long in bf16.

    Args:
        accelerator: Lightning's; ``cpu`` leaves a GPU out.
    """
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    file = Path("/proc/cpuinfo")
    return not CPU_FLAGS.isdisjoint(file.read_text().split()) if file.is_file() else None


def check_precision(precision: str) -> list[str]:
    """What is wrong with a recipe's ``precision``."""
    if precision in KNOWN:
        return []
    return [f"precision: '{precision}' is not one of {', '.join(KNOWN)}.{did_you_mean(precision, KNOWN)}"]


def choose_precision(config: Mapping[str, Any], here: bool = True) -> str:
    """The precision of a complete recipe's backbone; ``auto`` is bf16 where that is fast, else fp32.

    A run that has begun keeps the precision that it was begun with, on whatever machine it goes on; a backbone that
    trains takes fp32, since bf16 weights cannot take small steps.

    Args:
        config: plain.
        here: whether it runs on this machine; ``auto`` stays open for one that runs on another.
    """
    if config["precision"] != AUTO:
        return str(config["precision"])
    run = Path(config["run"]).expanduser()
    try:
        known = read_yaml(run / "recipe.yaml").get("precision") if has_begun(run) else None
    except (AlterError, AttributeError):
        known = None  # not a recipe; what is done about it is decided where the folder is claimed
    if known in PRECISIONS:
        return str(known)
    if not here:
        return AUTO
    arguments = [config[stage]["model"].get("init_args") or {} for stage in ("stage1", "stage2")]
    trains = any(given.get("backbone_lr") for given in arguments)
    return "bf16" if not trains and computes_bf16(config["trainer"].get("accelerator") or "auto") else "fp32"


def slow_precision(precision: str, accelerator: str = "auto") -> str | None:
    """A sentence for who asked for bf16 on a machine that is slow in it, else None."""
    if precision != "bf16" or computes_bf16(accelerator) is not False:
        return None
    return "bf16 is about ten times slower than fp32 on this machine, which has no instructions for it; take precision: auto."


def answering_precision(precision: str, accelerator: str = "auto") -> str:
    """The precision in which a finished run answers here: its own, or fp32 for bf16 on a machine that is slow in it."""
    return "fp32" if precision == "bf16" and computes_bf16(accelerator) is False else precision

"""ALTER: one small language model, good at all the tasks of a domain."""

from __future__ import annotations

import logging
from typing import Any

# Lightning imports it, and it then warns of a 4-bit kernel that ALTER does not use; and at every int8 matmul of its casts.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds, `alter --help` should not.
    if name == "load":
        from alter.loading import load

        return load
    raise AttributeError(f"module 'alter' has no attribute '{name}'")

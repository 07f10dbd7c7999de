"""Where ALTER keeps what it downloads and makes once."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def alter_home() -> Path:
    """The folder named by ``ALTER_HOME``, by default ``alter`` in the user's cache folder; it may not exist yet."""
    if named := os.environ.get("ALTER_HOME"):
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "alter"

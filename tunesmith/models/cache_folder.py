"""Where what is made once for all runs is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`tunesmith/NAME` in $XDG_CACHE_HOME (which counts only if absolute) or ~/.cache."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_home.is_absolute():
        cache_home = Path.home() / ".cache"
    return cache_home / "tunesmith" / name

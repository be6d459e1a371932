"""What a recipe gives back to Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, the adapter or model at its end and at its best, and the figures of
    summary.json. `best` is None without validation rows."""

    run: Path
    final: Path
    best: Path | None
    summary: dict[str, Any]

"""Where the time from the start of the process to the first optimiser step goes: a stop watch. It imports
nothing slow, since it runs before torch is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

# What a config asks to be done before training; the rest of the way to the first step is start-up.
BEFORE_TRAINING = ("evaluation before training", "answers before training")


class Startup:
    """`stages`: seconds by stage, in the order of the first mark of each. They follow one another without a
    gap, so they add up to the time from the start to the last mark."""

    def __init__(self) -> None:
        age = process_age()
        self.sees_process = age is not None
        self.stages: dict[str, float] = {}
        self._marked_at = time.perf_counter() - (age or 0.0)
        self.mark("Python")

    def mark(self, stage: str) -> None:
        """The time since the mark before went to `stage`, beside what earlier marks gave it."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._marked_at
        self._marked_at = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last mark."""
        return sum(self.stages.values())

    @property
    def alone(self) -> float:
        """The total without what the config asks to be done before training."""
        return self.total - sum(self.stages.get(stage, 0.0) for stage in BEFORE_TRAINING)


def process_age() -> float | None:
    """Seconds since this process was made, to the hundredth that Linux keeps; None where /proc does not say.

    A program that was started by `exec` has the age of the process that called it."""
    try:
        # proc(5): field 22; the second one is the program's name in brackets, which may hold anything.
        fields = (
            Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        started_at = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started_at
    except (OSError, IndexError, ValueError, AttributeError):
        return None
    return age if started_at and age >= 0 else None  # a sandbox's /proc may hold a zero

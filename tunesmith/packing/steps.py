"""Which rows each optimiser step holds, as places in the order of an epoch: the next `batch_size` of them, or
fewer while the batch size warms up; the last step of an epoch holds what is left.

    warm-up of 5 steps from 2 to 8, 20 rows an epoch        2 3 4 5 6 | 8 8 4 | 8 8 4 ...
                                                            epoch 0     1       2

Where a step lies is an index: a small table for the steps of the warm-up, and arithmetic behind it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepRows:
    """The steps of a run over epochs of `num_rows` rows. In the first `warmup_steps` steps a step has from
    `warmup_start` rows growing evenly up to, with the step after them, `batch_size`."""

    num_rows: int
    batch_size: int
    warmup_start: int = 1
    warmup_steps: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch after the warm-up."""
        return max(1, math.ceil(self.num_rows / self.batch_size))

    def place(self, step: int) -> tuple[int, int, int]:
        """(epoch, first row, row after the last) of a step, counted from 0."""
        table = self._warmup
        if step < len(table.places):
            return table.places[step]
        after = step - len(table.places)
        if after < table.steps_left:
            return table.epoch, *self._rows(table.offset, after)
        epochs, in_epoch = divmod(after - table.steps_left, self.steps_per_epoch)
        return table.epoch + 1 + epochs, *self._rows(0, in_epoch)

    def first_step(self, epoch: int) -> int:
        """Steps before an epoch."""
        table = self._warmup
        if epoch <= table.epoch:
            return table.first_steps[epoch]
        return len(table.places) + table.steps_left + (epoch - table.epoch - 1) * self.steps_per_epoch

    def epochs(self, step: int) -> float:
        """Passes over the rows when so many steps are done, a step of an epoch counting like another."""
        epoch = self.place(step)[0]
        first, end = self.first_step(epoch), self.first_step(epoch + 1)
        return epoch + (step - first) / (end - first)

    def ends_epoch(self, step: int) -> bool:
        """Whether the last row of an epoch is in the step that is the `step`-th, counted from 1."""
        return self.place(step)[1] == 0

    def num_steps(self, epochs: float) -> int:
        """Steps of so many passes over the rows, at least one."""
        if not self.warmup_steps:
            return max(1, round(epochs * self.steps_per_epoch))
        whole = int(epochs)
        first, end = self.first_step(whole), self.first_step(whole + 1)
        return max(1, round(first + (epochs - whole) * (end - first)))

    def num_rows_before(self, step: int) -> int:
        """Rows of all steps before this one."""
        epoch, first, _ = self.place(step)
        return epoch * self.num_rows + first

    def starts(self, epoch: int, num_steps: int) -> tuple[NDArray[np.int64], int]:
        """([steps] the first row of each step of an epoch, the row after the last), in a run of
        `num_steps`."""
        first, end = self.first_step(epoch), min(self.first_step(epoch + 1), num_steps)
        if first >= end:
            return np.empty(0, dtype=np.int64), 0
        starts = [place[1] for place in self._warmup.places[first:end]]
        rest = end - first - len(starts)
        offset = self.place(first + len(starts))[1] if rest else 0
        grid = offset + self.batch_size * np.arange(rest, dtype=np.int64)
        return np.concatenate([np.array(starts, dtype=np.int64), grid]), self.place(end - 1)[2]

    def _rows(self, offset: int, steps: int) -> tuple[int, int]:
        start = offset + steps * self.batch_size
        return start, min(start + self.batch_size, self.num_rows)

    @functools.cached_property
    def _warmup(self) -> _Warmup:
        places, first_steps, epoch, offset = [], [0], 0, 0
        for step in range(self.warmup_steps if self.num_rows else 0):
            size = self.warmup_start + (self.batch_size - self.warmup_start) * step // self.warmup_steps
            end = min(offset + size, self.num_rows)
            places.append((epoch, offset, end))
            offset = end
            if end == self.num_rows:
                epoch, offset = epoch + 1, 0
                first_steps.append(step + 1)
        left = math.ceil((self.num_rows - offset) / self.batch_size)
        return _Warmup(places, first_steps, epoch, offset, max(1, left))


@dataclass(frozen=True)
class _Warmup:
    """places: of each step of the warm-up. first_steps: the first step of each epoch up to the one it ends
    in. epoch, offset: where the step behind it begins. steps_left: how many that epoch has behind it."""

    places: list[tuple[int, int, int]]
    first_steps: list[int]
    epoch: int
    offset: int
    steps_left: int

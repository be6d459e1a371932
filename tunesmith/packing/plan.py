"""The step plan: which rows each optimiser step holds, and how a step is split into forward passes.

    rows of an epoch     a permutation, a pure function of (seed, epoch)
    a step               the next `batch_size` of them; the last step of an epoch holds what is left
    a forward pass       some examples of the step, at most `micro_batch_tokens` tokens in all

Every step has the same number of passes on every rank, so that transformers' gradient accumulation, DDP and
FSDP work unmodified; a pass may be empty where a step has fewer examples than passes. Packing, pass size and
rank count never change which rows a step holds. Position in the plan is an index: nothing is replayed to get
there.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowSource:
    """Rows [start, end) of the training set, and how often an epoch holds them (1: once; 0.5: a random
    half)."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class StepPlan:
    """The plan of a run.

    lengths: [N] tokens of each example. row_starts: [R + 1]; row r owns examples row_starts[r]:row_starts[r +
    1] (several where a template is expanded per turn). passes: forward passes per step and rank."""

    lengths: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    sources: tuple[RowSource, ...]
    batch_size: int
    num_ranks: int
    seed: int
    passes: int
    steps_per_epoch: int
    shuffle: bool

    def rows_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """[rows] the order of one epoch."""
        return _rows_of_epoch(self.sources, self.seed, epoch, shuffle=self.shuffle)

    def split(self, rows: Sequence[int] | NDArray[np.int64]) -> list[list[list[int]]]:
        """The examples of one step as [rank][pass][example], balanced by token count."""
        examples = _examples_of(rows, self.row_starts)
        bins = _balance(examples, self.lengths, self.num_ranks * self.passes)
        return [bins[rank :: self.num_ranks] for rank in range(self.num_ranks)]


def make_plan(
    lengths: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    *,
    sources: Sequence[RowSource],
    batch_size: int,
    micro_batch_tokens: int,
    num_ranks: int,
    seed: int,
    epochs: float | None,
    max_steps: int | None,
    one_example_a_pass: bool,
    shuffle: bool = True,
) -> StepPlan:
    """Plan a run of `epochs` passes over the rows, or of `max_steps` steps.

    Raises ValueError if an example is longer than `micro_batch_tokens`."""
    if len(lengths) and int(lengths.max()) > micro_batch_tokens:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit in {micro_batch_tokens}")
    num_rows = len(_rows_of_epoch(sources, seed, 0, shuffle=shuffle))
    steps_per_epoch = max(1, math.ceil(num_rows / batch_size))
    num_epochs = math.ceil(epochs) if epochs is not None else math.ceil((max_steps or 1) / steps_per_epoch)
    if one_example_a_pass:
        micro_batch_tokens = 0  # nothing shares a pass
    passes = 1
    for epoch in range(num_epochs):
        rows = _rows_of_epoch(sources, seed, epoch, shuffle=shuffle)
        passes = _passes_needed(
            rows, lengths, row_starts, batch_size, micro_batch_tokens, num_ranks, at_least=passes
        )
    return StepPlan(
        lengths, row_starts, tuple(sources), batch_size, num_ranks, seed, passes, steps_per_epoch, shuffle
    )


def _rows_of_epoch(
    sources: Sequence[RowSource], seed: int, epoch: int, *, shuffle: bool
) -> NDArray[np.int64]:
    rng = np.random.default_rng([seed, epoch])
    parts = []
    for source in sources:
        rows = np.arange(source.start, source.end, dtype=np.int64)
        parts += [rows] * int(source.weight)
        extra = round((source.weight % 1) * len(rows))
        if extra:
            parts.append(rng.permutation(rows)[:extra])
    rows = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return rng.permutation(rows) if shuffle else rows


def _examples_of(rows: Sequence[int] | NDArray[np.int64], row_starts: NDArray[np.int64]) -> list[int]:
    return [example for row in rows for example in range(int(row_starts[row]), int(row_starts[row + 1]))]


def _balance(examples: Sequence[int], lengths: NDArray[np.int32], num_bins: int) -> list[list[int]]:
    """Longest first, each into the bin with the fewest tokens: at most 4/3 of the best possible largest bin
    (Graham 1969). Ties go to the lower bin and the earlier example, so the result is a pure function."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, i) for i in range(num_bins)]
    order = sorted(range(len(examples)), key=lambda k: (-int(lengths[examples[k]]), k))
    for k in order:
        tokens, i = heap[0]
        bins[i].append(examples[k])
        heapq.heapreplace(heap, (tokens + int(lengths[examples[k]]), i))
    return bins


def _passes_needed(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    batch_size: int,
    micro_batch_tokens: int,
    num_ranks: int,
    *,
    at_least: int,
) -> int:
    """The fewest passes with which every step of this epoch keeps within `micro_batch_tokens`.

    Steps are looked at from the one with most tokens down; those that must fit by Graham's bound
    (largest bin <= mean + longest) are not packed to find out."""
    if not len(rows):
        return at_least
    row_tokens = np.add.reduceat(np.append(lengths, 0), row_starts[:-1])
    row_tokens[row_starts[:-1] == row_starts[1:]] = 0
    first_rows = np.arange(0, len(rows), batch_size)
    step_tokens = np.add.reduceat(row_tokens[rows].astype(np.int64), first_rows)
    longest_of_all = int(lengths.max())
    passes = at_least
    for step in np.argsort(-step_tokens, kind="stable"):
        bins = passes * num_ranks
        if step_tokens[step] / bins + longest_of_all <= micro_batch_tokens:
            break  # and so do all the steps after it, which hold fewer tokens
        step_rows = rows[first_rows[step] : first_rows[step] + batch_size]
        examples = _examples_of(step_rows, row_starts)
        if not micro_batch_tokens:
            passes = max(passes, math.ceil(len(examples) / num_ranks))
            continue
        while _largest(examples, lengths, passes * num_ranks) > micro_batch_tokens:
            passes += 1
    return passes


def _largest(examples: list[int], lengths: NDArray[np.int32], num_bins: int) -> int:
    return max(sum(int(lengths[e]) for e in bin_) for bin_ in _balance(examples, lengths, num_bins))


def fill_passes(lengths: NDArray[np.int32], max_tokens: int) -> list[list[int]]:
    """Items grouped into few passes of at most `max_tokens` tokens each (best-fit decreasing over a sorted
    list of free room), for evaluation, where order does not matter. An item longer than that has a pass of
    its own."""
    passes: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pass), sorted
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            passes.append([int(item)])
            bisect.insort(room, (max(0, max_tokens - length), len(passes) - 1))
        else:
            free, index = room.pop(at)
            passes[index].append(int(item))
            bisect.insort(room, (free - length, index))
    return passes

"""The step plan: which rows each optimiser step holds, and how a step is split into forward passes.

    rows of an epoch     a permutation, a pure function of (seed, epoch)
    a step               the next `batch_size` of them, or fewer while that warms up; the last step of an
                         epoch holds what is left (steps.py)
    a forward pass       some examples of the step, at most `micro_batch_tokens` tokens in all, a prefix that
                         they share counted once where passes share prefixes (see `sharing`, `balance`)

Every step has the same number of passes on every rank, so that transformers' gradient accumulation, DDP and
FSDP work unmodified; a pass may be empty where a step has fewer examples than passes. Packing, pass size and
rank count never change which rows a step holds. Position in the plan is an index: nothing is replayed to get
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.blocks import best_fit
from tunesmith.packing.balance import Steps, split_step, sweep
from tunesmith.packing.sharing import Sharing
from tunesmith.packing.steps import StepRows

_CELLS = 1 << 20  # examples of the steps that are looked at together: a few arrays of 8 MiB
_FIRST_STEPS = 64  # of the heaviest steps, which most often decide


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
    1] (several where a template is expanded per turn). passes: forward passes per step and rank. sharing:
    what the examples have in common, where passes compute a common prefix once."""

    lengths: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    sources: tuple[RowSource, ...]
    steps: StepRows
    num_ranks: int
    seed: int
    passes: int
    shuffle: bool
    sharing: Sharing | None = None

    @property
    def batch_size(self) -> int:
        """Rows of a step, but for the last one of an epoch and those of a warm-up."""
        return self.steps.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, but for those in which the batch size warms up."""
        return self.steps.steps_per_epoch

    def rows_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """[rows] the order of one epoch."""
        return _rows_of_epoch(self.sources, self.seed, epoch, shuffle=self.shuffle)

    def drawn(self, num_steps: int) -> list[tuple[int, int]]:
        """Of each source the rows that so many steps hold, and their tokens, however often each is drawn."""
        counts = np.zeros(len(self.row_starts) - 1, dtype=np.int64)
        for epoch in range(math.ceil(num_steps / self.steps_per_epoch)):
            rows = self.rows_of_epoch(epoch)
            num_rows = (num_steps - epoch * self.steps_per_epoch) * self.batch_size
            counts += np.bincount(rows[:num_rows], minlength=len(counts))
        tokens = counts * _row_tokens(self.lengths, self.row_starts)
        spans = [slice(source.start, source.end) for source in self.sources]
        return [(int(counts[span].sum()), int(tokens[span].sum())) for span in spans]

    def split(self, rows: Sequence[int] | NDArray[np.int64]) -> list[list[list[int]]]:
        """The examples of one step as [rank][pass][example], balanced by what the passes cost. Where sharing
        is known, those of a pass are in rank order: examples that begin alike lie side by side."""
        examples = _examples_of(np.asarray(rows, dtype=np.int64), self.row_starts)
        common = None
        if self.sharing is not None:
            examples, common = self.sharing.in_order(examples)
        bins = split_step(
            self.lengths[examples].tolist(),
            None if common is None else common.tolist(),
            self.num_ranks * self.passes,
        )
        names = examples.tolist()
        named = [[names[n] for n in bin_] for bin_ in bins]
        return [named[rank :: self.num_ranks] for rank in range(self.num_ranks)]

    def tokens_of(self, num_steps: int) -> float:
        """Tokens of so many steps: as many a row as the first epoch has on average."""
        rows = self.rows_of_epoch(0)
        before = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        tokens = before[self.row_starts[rows + 1]] - before[self.row_starts[rows]]
        return float(tokens.mean() * self.steps.num_rows_before(num_steps)) if len(rows) else 0.0

    def pass_tokens(self, examples: Sequence[int]) -> int:
        """Tokens of one pass, shared ones once (at most a few more than there are)."""
        chosen = np.array(examples, dtype=np.int64)
        tokens = int(self.lengths[chosen].sum())
        return tokens if self.sharing is None else tokens - int(self.sharing.in_order(chosen)[1].sum())


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
    sharing: Sharing | None = None,
    batch_size_warmup: tuple[int, int] | None = None,
) -> StepPlan:
    """Plan a run of `max_steps` steps or, without, of `epochs` passes over the rows.

    batch_size_warmup: (rows of the first step, steps until there are `batch_size`).
    sharing: common prefixes of the examples, if a pass computes each of its prefixes once. `passes` is the
    fewest with which no pass of any step of the run goes over `micro_batch_tokens`: one fewer, and some step
    would.

    Raises ValueError if an example is longer than `micro_batch_tokens`."""
    if len(lengths) and int(lengths.max()) > micro_batch_tokens:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit in {micro_batch_tokens}")
    step_rows = StepRows(_rows_in_epoch(sources), batch_size, *(batch_size_warmup or ()))
    num_steps = max_steps or step_rows.num_steps(1 if epochs is None else epochs)
    if one_example_a_pass:
        sharing = None

    def plan(passes: int) -> StepPlan:
        return StepPlan(
            lengths,
            row_starts,
            tuple(sources),
            step_rows,
            num_ranks,
            seed,
            passes,
            shuffle,
            sharing,
        )

    def epochs_of_run() -> Iterator[_Epoch]:
        for epoch in range(step_rows.place(num_steps - 1)[0] + 1):
            starts, end = step_rows.starts(epoch, num_steps)
            if end:
                rows = _rows_of_epoch(sources, seed, epoch, shuffle=shuffle)[:end]
                yield _Epoch(rows, starts, lengths, row_starts, micro_batch_tokens, sharing)

    passes = 1
    if one_example_a_pass:
        for epoch in epochs_of_run():
            passes = max(passes, math.ceil(int(epoch.num_examples.max()) / num_ranks))
        return plan(passes)
    for epoch in epochs_of_run():
        passes = _enough_passes(epoch, num_ranks, at_least=passes)
    if sharing is not None:
        while passes > 1 and all(_fits(epoch, (passes - 1) * num_ranks) for epoch in epochs_of_run()):
            passes -= 1
    return plan(passes)


def _rows_in_epoch(sources: Sequence[RowSource]) -> int:
    sizes = [(source.end - source.start, source.weight) for source in sources]
    return sum(int(weight) * size + round((weight % 1) * size) for size, weight in sizes)


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


def _examples_of(rows: NDArray[np.int64], row_starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The examples of the rows, in their order."""
    starts = row_starts[rows]
    counts = row_starts[rows + 1] - starts
    if (counts == 1).all():
        return starts
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - ends + counts, counts)


def _row_tokens(lengths: NDArray[np.int32], row_starts: NDArray[np.int64]) -> NDArray[np.int64]:
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens: NDArray[np.int64] = before[row_starts[1:]] - before[row_starts[:-1]]
    return tokens


class _Epoch:
    """The steps of one epoch, and how many tokens and examples each has: int64 [steps]."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        first_rows: NDArray[np.int64],
        lengths: NDArray[np.int32],
        row_starts: NDArray[np.int64],
        micro_batch_tokens: int,
        sharing: Sharing | None,
    ) -> None:
        self.rows = rows
        self.lengths = lengths
        self.row_starts = row_starts
        self.first_rows = first_rows
        self.num_rows = np.diff(np.append(first_rows, len(rows)))
        self.micro_batch_tokens = micro_batch_tokens
        self.sharing = sharing
        self.num_tokens = np.add.reduceat(_row_tokens(lengths, row_starts)[rows], first_rows)
        self.num_examples = np.add.reduceat(np.diff(row_starts)[rows], first_rows)

    def heaviest_first(self) -> Iterator[NDArray[np.int64]]:
        """The steps by falling number of tokens, some at a time: few at first, then as many as fit."""
        order = np.argsort(-self.num_tokens, kind="stable")
        at, limit = 0, _FIRST_STEPS
        while at < len(order):
            steps = order[at : at + limit]
            cells = np.maximum.accumulate(self.num_examples[steps]) * np.arange(1, len(steps) + 1)
            steps = steps[: max(1, int(np.searchsorted(cells, _CELLS, side="right")))]
            yield steps
            at += len(steps)
            limit *= 4

    def lay_out(self, steps: NDArray[np.int64], bins: int) -> Steps:
        """Those of the steps that may not fit in so many bins."""
        in_step = np.arange(self.num_rows[steps].max())
        row_numbers = self.first_rows[steps][:, None] + in_step
        inside = in_step < self.num_rows[steps][:, None]
        examples = _examples_of(self.rows[row_numbers[inside]], self.row_starts)
        num_examples = self.num_examples[steps]
        place = np.arange(num_examples.max()) < num_examples[:, None]
        lengths = np.zeros(place.shape, dtype=np.int64)
        lengths[place] = self.lengths[examples]
        # Graham: no bin of the longest-first split holds more than the mean and the longest example.
        doubtful = (num_examples > bins) & (
            self.num_tokens[steps] / bins + lengths.max(axis=1) > self.micro_batch_tokens
        )
        lengths = lengths[doubtful]
        if self.sharing is None:
            return Steps(np.ascontiguousarray(lengths.T), None, self.micro_batch_tokens)
        # In rank order; what fills up a short step comes last.
        ranks = np.full(place.shape, len(self.sharing), dtype=np.int64)
        ranks[place] = self.sharing.rank[examples]
        ranks = ranks[doubtful]
        order = np.argsort(ranks, axis=1, kind="stable")
        ranks = np.take_along_axis(ranks, order, axis=1)
        lengths = np.take_along_axis(lengths, order, axis=1)
        common = np.zeros_like(lengths)
        common[:, 1:] = np.minimum(self.sharing.between(ranks[:, :-1], ranks[:, 1:]), lengths[:, 1:])
        return Steps(np.ascontiguousarray(lengths.T), np.ascontiguousarray(common.T), self.micro_batch_tokens)


def _enough_passes(epoch: _Epoch, num_ranks: int, *, at_least: int) -> int:
    """The fewest passes with which each step fits by its contiguous pieces or by the longest-first split with
    no prefix counted as shared. Both can only fit better in more bins (of the second: by induction, the k-th
    fullest bin never grows), so this is found by bisection, and holds for all greater numbers too."""
    passes, longest = at_least, int(epoch.lengths.max(initial=0))
    for block in epoch.heaviest_first():
        bins = passes * num_ranks
        if epoch.num_tokens[block[0]] / bins + longest <= epoch.micro_batch_tokens:
            break  # and so do all that come after it, which hold fewer tokens
        steps = epoch.lay_out(block, bins)
        enough = -(-steps.bins_enough() // num_ranks)
        too_few, fewest = passes - 1, int(enough.max(initial=passes))
        while fewest - too_few > 1:
            # What was enough so far comes first: mostly it still is.
            tried = passes if too_few < passes else (too_few + fewest) // 2
            fails = enough > tried
            fails[fails] = steps.select(fails).largest_unshared(tried * num_ranks) > epoch.micro_batch_tokens
            if fails.any():
                too_few, steps, enough = tried, steps.select(fails), enough[fails]
            else:
                fewest = tried
        passes = fewest
    return passes


def _fits(epoch: _Epoch, bins: int) -> bool:
    """Whether each step fits in so many bins as `split_step` will split it."""
    longest = int(epoch.lengths.max(initial=0))
    for block in epoch.heaviest_first():
        if epoch.num_tokens[block[0]] / bins + longest <= epoch.micro_batch_tokens:
            break
        steps = epoch.lay_out(block, bins)
        steps = steps.select(steps.bins_enough() > bins)
        steps = steps.select(steps.largest_unshared(bins) > epoch.micro_batch_tokens)
        if (steps.largest_shared(bins) > epoch.micro_batch_tokens).any():
            return False
    return True


def fill_passes(
    lengths: NDArray[np.int32], max_tokens: int, sharing: Sharing | None = None
) -> list[list[int]]:
    """Items grouped into few passes of at most `max_tokens` tokens each, for evaluation, where order does not
    matter. An item longer than that has a pass of its own.

    Best-fit decreasing; or, if that takes no more passes, neighbours in rank
    order together, each prefix counted once. Where sharing is known, a pass is in rank order."""
    order, starts = best_fit(np.clip(lengths, 1, max_tokens), max_tokens)
    passes = [order[start:end].tolist() for start, end in pairwise(starts.tolist())]
    if sharing is None:
        return passes
    items, common = sharing.in_order(np.arange(len(lengths)))
    names = items.tolist()
    pieces = sweep(lengths[items].tolist(), common.tolist(), max_tokens)
    if len(pieces) <= len(passes):
        return [[names[n] for n in piece] for piece in pieces]
    return [sorted(a_pass, key=sharing.rank.__getitem__) for a_pass in passes]

"""Where rows are while training asks for them: prepared on disk, raw on disk, or in a stream.

All three give the same thing, a `PreparedRow` an index; they differ in when a row is tokenised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import cache
from tunesmith.data.blocks import best_fit
from tunesmith.data.prepare import PreparedRow, Preparer
from tunesmith.data.records import Example, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.data.sources import Position
from tunesmith.errors import DataError

_ROWS_AT_ONCE = 256  # tokenised together


class Rows(Protocol):
    """Training or validation rows. Item i is example i of the plan's `lengths`, or row i where those are
    unknown."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PreparedRow: ...


class CachedRows:
    """Examples on disk; item i is one example."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("numpy")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> PreparedRow:
        row = self._dataset[int(index)]
        return PreparedRow(str(row["place"]), (cache.read_example(row),))

    def column(self, name: str) -> NDArray[Any]:
        """One number of every example."""
        values = self._dataset.with_format("arrow")[name]
        return np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)

    def token_chunks(
        self,
    ) -> tuple[list[tuple[NDArray[np.int32], NDArray[np.int32]]], NDArray[np.int64] | None]:
        """The tokens of all examples where they lie on disk, none of them copied: (values, offsets) of each
        Arrow chunk, row r being values[offsets[r] : offsets[r + 1]]; and, after `select`, the row that each
        example is, counted through all chunks (None: the rows are the examples)."""
        chunks = [
            (chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy(zero_copy_only=True))
            for chunk in self._dataset.data.column("input_ids").chunks
        ]
        # `select` of scattered rows leaves the table as it is and keeps a table of indices beside it, which
        # datasets has no public name for; reading through it would copy the tokens.
        indices = self._dataset._indices
        return chunks, None if indices is None else indices.column(0).to_numpy().astype(np.int64)

    def last_tokens(self) -> set[int]:
        """The ids that examples end in."""
        chunks, items = self.token_chunks()
        last = np.concatenate([values[offsets[1:] - 1] for values, offsets in chunks])
        return set(np.unique(last if items is None else last[items]).tolist())

    def fingerprints(self) -> NDArray[np.uint64]:
        return self.column("fingerprint")

    def select(self, indices: NDArray[np.int64]) -> CachedRows:
        return CachedRows(self._dataset.select(indices))


class AnswerRows:
    """Pairs of answers, or labelled ones, on disk; item i is row i with the examples of all its answers.

    row_starts [R + 1]: row r owns the examples row_starts[r]:row_starts[r + 1]. With `mismatched` each row
    comes with its prompt and the next row's answer, the last one with that of the first. `reference` and
    `mismatched_reference` hold what a reference model says of each target, if one was asked."""

    def __init__(
        self, examples: CachedRows, row_starts: NDArray[np.int64], *, mismatched: bool = False
    ) -> None:
        self.examples = examples
        self.row_starts = row_starts
        self.is_mismatched = mismatched
        of_examples = np.concatenate([[0], np.cumsum(examples.column("num_targets"), dtype=np.int64)])
        self.target_starts = of_examples[row_starts]
        # The next row's last answer, which may be one of several examples.
        last = row_starts[1:] - 1
        of_mismatched = np.roll(of_examples[last + 1] - of_examples[last], -1)
        self.mismatched_starts = np.concatenate([[0], np.cumsum(of_mismatched, dtype=np.int64)])
        self.reference: NDArray[np.float32] | None = None
        self.mismatched_reference: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def __getitem__(self, index: int) -> PreparedRow:
        items = [self.examples[item] for item in range(self.row_starts[index], self.row_starts[index + 1])]
        examples = tuple(example for item in items for example in item.examples)
        row = PreparedRow(
            items[0].place, examples, reference=_between(self.reference, self.target_starts, index)
        )
        if not self.is_mismatched:
            return row
        other = self.examples[self.row_starts[(index + 1) % len(self) + 1] - 1].examples[0]
        mismatched = PreparedRow(
            row.place,
            (_with_answer_of(examples[-1], other),),
            reference=_between(self.mismatched_reference, self.mismatched_starts, index),
        )
        return replace(row, mismatched=mismatched)


def _between(
    values: NDArray[np.float32] | None, starts: NDArray[np.int64], index: int
) -> NDArray[np.float32] | None:
    return None if values is None else np.array(values[starts[index] : starts[index + 1]])


def _with_answer_of(example: Example, other: Example) -> Example:
    """The prompt of one example, up to its first target, with the other's first to last target."""
    prompt = example.input_ids[: int(np.argmax(example.token_weights() > 0))]
    weights = other.token_weights()
    (targets,) = np.nonzero(weights)
    answer = slice(int(targets[0]), int(targets[-1]) + 1)
    (runs,) = np.nonzero(np.diff(weights[answer], prepend=0, append=0))
    bounds = np.stack([runs[:-1], runs[1:]], axis=1)
    spans = bounds[weights[answer][bounds[:, 0]] > 0]
    return Example(
        np.concatenate([prompt, other.input_ids[answer]]),
        (spans + len(prompt)).astype(np.int32),
        weights[answer][spans[:, 0]],
    )


class JoinedRows:
    """Documents on disk joined and cut every `size` tokens, whatever ends or begins there; item i is one
    block, an example that sees all of itself. The last block of a source is what is left. Blocks are put
    together when they are fetched, from the pieces of documents as they lie on disk.

    lengths [N]: of the pieces. bounds: first piece and the one after the last, of each source. `starts` and
    `ends` [B] say where each block lies among the tokens of all pieces, `blocks` how many a source has."""

    def __init__(
        self, pieces: CachedRows, lengths: NDArray[np.int32], bounds: Sequence[tuple[int, int]], size: int
    ) -> None:
        self._pieces = pieces
        self._ends = np.cumsum(lengths, dtype=np.int64)
        before = np.concatenate([[0], self._ends])
        spans = [(int(before[first]), int(before[end])) for first, end in bounds]
        starts = [np.arange(start, end, size) for start, end in spans]
        self.starts = np.concatenate([np.empty(0, np.int64), *starts])
        self.ends = np.concatenate(
            [np.empty(0, np.int64)]
            + [np.minimum(at + size, end) for at, (_, end) in zip(starts, spans, strict=True)]
        )
        self.blocks = [len(at) for at in starts]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> PreparedRow:
        start, end = int(self.starts[index]), int(self.ends[index])
        at, place, parts = int(np.searchsorted(self._ends, start, side="right")), "", []
        while start < end:
            piece = self._pieces[at]
            place = place or piece.place
            ids = piece.examples[0].input_ids
            begun = int(self._ends[at]) - len(ids)
            parts.append(ids[start - begun : end - begun])
            start, at = int(self._ends[at]), at + 1
        return PreparedRow(place, (_whole(np.concatenate(parts)),))


def _whole(ids: NDArray[np.int32]) -> Example:
    """Tokens that are all targets, but for the first."""
    return Example(ids, np.asarray([[0, len(ids)]], dtype=np.int32), np.ones(1, dtype=np.float32))


class LazyRows:
    """Raw rows on disk, tokenised when fetched; item i is one row."""

    def __init__(
        self,
        datasets: list[Any],
        preparers: list[Preparer],
        *,
        skip_bad_rows: bool,
        items: NDArray[np.int64] | None = None,
    ) -> None:
        self._datasets = [dataset.with_format("arrow") for dataset in datasets]
        self._preparers = preparers
        self._skip_bad_rows = skip_bad_rows
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self._items = np.arange(self._ends[-1]) if items is None else items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> PreparedRow:
        item = int(self._items[index])
        source = int(np.searchsorted(self._ends, item, side="right"))
        offset = item - (int(self._ends[source - 1]) if source else 0)
        raw = {
            key: column[0].as_py()
            for key, column in zip(*_columns(self._datasets[source][offset]), strict=True)
        }
        row = cache.unpack_raw(**raw)
        (outcome,) = self._preparers[source].prepare([row])
        return _usable(outcome, self._skip_bad_rows)

    def select(self, indices: NDArray[np.int64]) -> LazyRows:
        return LazyRows(
            self._datasets, self._preparers, skip_bad_rows=self._skip_bad_rows, items=self._items[indices]
        )


def _columns(table: Any) -> tuple[list[str], list[Any]]:
    return table.column_names, table.columns


def _usable(outcome: PreparedRow, skip_bad_rows: bool) -> PreparedRow:
    if outcome.problem is not None and not skip_bad_rows:
        raise DataError(
            f"{outcome.place}: {outcome.problem}. Mend it, or leave such rows out: data.on_bad_row=skip."
        )
    return outcome


# (position) -> rows from there on, each with the position behind it.
RowsFrom = Callable[[Position], Iterator[tuple[Position, RawRow]]]


class StreamedRows:
    """Rows read in file order, one of each source in turn while it has any, again from the start when all are
    read. They are taken in windows of `buffer` rows, or fewer where all have been read, so that every row
    comes once before any comes again. A window is all that must be read to get at a row:

        item i is a row     shuffled within its window, by a permutation of the window's own; rows that are
                            not asked for are not tokenised
        item i is a block   with `blocks`: of a window's documents, tokenised and grouped; blocks are shuffled

    Items can only be fetched going forward, but for the window before and the last `keep` items."""

    def __init__(
        self,
        sources: list[tuple[RowsFrom, Preparer]],
        *,
        length: int,
        buffer: int,
        seed: int,
        skip_bad_rows: bool,
        blocks: BlockMaker | None = None,
        keep: int = 0,
    ) -> None:
        self._preparers = [preparer for _, preparer in sources]
        self._sources = [rows for rows, _ in sources]
        self._length = length
        self._buffer = buffer
        self._seed = seed
        self._skip_bad_rows = skip_bad_rows
        self._make_blocks = blocks
        self._keep = keep
        self._start: dict[str, Any] | None = None
        self._turns: _Turns | None = None
        self._windows: deque[_Window] = deque()

    def __len__(self) -> int:
        return self._length

    def start_at(self, place: dict[str, Any] | None) -> None:
        """Begin to read where `PreparedRow.stream` of an earlier item says, instead of at the start. Items
        before its window can no longer be fetched without reading from the start."""
        self._start, self._turns = place, None
        self._windows.clear()

    def __getitem__(self, index: int) -> PreparedRow:
        window = self._window(index)
        item = window.items[index - window.first]
        row = item if isinstance(item, PreparedRow) else self._prepared([item])[0]
        return replace(row, stream=window.place)

    def _window(self, index: int) -> _Window:
        """The one that holds this item."""
        for window in self._windows:
            if window.first <= index < window.end:
                return window
        if self._turns is None or index < self._windows[-1].first:
            start = self._start if self._start is not None and self._start["first"] <= index else None
            self._windows.clear()
            self._turns = _Turns(self._sources, start)
            number, first = (start["window"], start["first"]) if start is not None else (0, 0)
        else:
            number, first = self._windows[-1].place["window"] + 1, self._windows[-1].end
        while True:
            window = self._read_window(self._turns, number, first)
            self._windows.append(window)
            while len(self._windows) > 2 and window.end - self._windows[1].first >= self._keep:
                self._windows.popleft()
            number, first = number + 1, window.end
            if index < window.end:
                return window

    def _read_window(self, turns: _Turns, number: int, first: int) -> _Window:
        place = {"window": number, "first": first, **turns.place()}
        rows: Sequence[Any] = []
        rounds = turns.rounds
        while not rows:
            rows = turns.take(self._buffer)
            if self._make_blocks is not None:
                rows = self._make_blocks(self._prepared(rows))
            # The first round may have begun in the middle.
            if not rows and turns.rounds > rounds + 1:
                raise DataError("data.train: no document of it can be trained on.")
        order = np.random.default_rng([self._seed, number]).permutation(len(rows))
        return _Window(place, first, first + len(rows), [rows[i] for i in order])

    def _prepared(self, rows: Sequence[tuple[int, RawRow]]) -> list[PreparedRow]:
        """In order; of each source as many together as a tokenizer likes to be given."""
        found: dict[int, PreparedRow] = {}
        for source, preparer in enumerate(self._preparers):
            numbers = [number for number, (of, _) in enumerate(rows) if of == source]
            for at in range(0, len(numbers), _ROWS_AT_ONCE):
                some = numbers[at : at + _ROWS_AT_ONCE]
                outcomes = preparer.prepare([rows[number][1] for number in some])
                found |= dict(zip(some, outcomes, strict=True))
        return [_usable(found[number], self._skip_bad_rows) for number in range(len(rows))]


@dataclass(frozen=True)
class _Window:
    """Items [first, end), and where to begin to read to get them again."""

    place: dict[str, Any]
    first: int
    end: int
    items: list[Any]


@dataclass(frozen=True)
class BlockMaker:
    """Makes blocks of `size` tokens of prepared documents: by `best_fit`, each document an example, or joined
    and cut (`joins`), each block an example."""

    size: int
    joins: bool

    def __call__(self, documents: Sequence[PreparedRow]) -> list[PreparedRow]:
        """The account of the documents comes in `counts` of the first block; of a window every block is
        fetched once, if all are."""
        counts = SourceReport("", "text")
        for document in documents:
            counts.add(document)
        pieces = [(document.place, example) for document in documents for example in document.examples]
        ids = [example.input_ids for _, example in pieces]
        ends = np.cumsum([0, *map(len, ids)])
        blocks: list[tuple[str, tuple[Example, ...]]] = []
        if self.joins:
            joined = np.concatenate([np.empty(0, np.int32), *ids])
            for at in range(0, len(joined), self.size):
                place = pieces[int(np.searchsorted(ends, at, side="right")) - 1][0]
                blocks.append((place, (_whole(joined[at : at + self.size]),)))
        else:
            order, starts = best_fit(np.diff(ends).astype(np.int32), self.size)
            for start, end in pairwise(starts.tolist()):
                chosen = [pieces[i] for i in order[start:end]]
                blocks.append((chosen[0][0], tuple(example for _, example in chosen)))
        return [
            PreparedRow(place, examples, counts=SourceReport("", "text") if number else counts)
            for number, (place, examples) in enumerate(blocks)
        ]


class _Turns:
    """(source, row): one row of each source in turn, from `place` on or from the start."""

    def __init__(self, sources: list[RowsFrom], place: dict[str, Any] | None) -> None:
        self._sources = sources
        self._streams: list[Iterator[tuple[Position, RawRow]] | None] = [None] * len(sources)
        # Of each source where it is, or None when it has been read to its end.
        self._positions: list[Position | None] = [(0, 0)] * len(sources)
        self._turn = 0
        self.rounds = 0  # times that all were read
        if place is not None:
            self._positions = [p if p is None else (p[0], p[1]) for p in place["positions"]]
            self._turn = place["turn"]
        self._has_rows = place is not None

    def place(self) -> dict[str, Any]:
        """What begins here again: file and row of each source, and whose turn it is."""
        return {"positions": list(self._positions), "turn": self._turn}

    def take(self, number: int) -> list[tuple[int, RawRow]]:
        """The next `number` rows, or fewer where all have been read; never none."""
        rows: list[tuple[int, RawRow]] = []
        while len(rows) < number:
            for _ in self._sources:
                source, self._turn = self._turn, (self._turn + 1) % len(self._sources)
                if (row := self._next_of(source)) is not None:
                    rows.append((source, row))
                    break
            else:
                if not rows and not self._has_rows:
                    raise DataError("data.train: there is no row in it.")
                self._has_rows = False
                self.rounds += 1
                self._positions = [(0, 0)] * len(self._sources)
                self._turn = 0
                if rows:
                    return rows
        self._has_rows = True
        return rows

    def _next_of(self, source: int) -> RawRow | None:
        position = self._positions[source]
        if position is None:
            return None
        stream = self._streams[source]
        if stream is None:
            stream = self._streams[source] = self._sources[source](position)
        found = next(stream, None)
        if found is None:
            self._positions[source] = self._streams[source] = None
            return None
        self._positions[source], row = found
        return row

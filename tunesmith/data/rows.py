"""Where rows are while training asks for them: prepared on disk, raw on disk, or in a stream.

All three give the same thing, a `PreparedRow` an index; they differ in when a row is tokenised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import cache
from tunesmith.data.prepare import PreparedRow, Preparer
from tunesmith.data.records import RawRow
from tunesmith.data.sources import Position
from tunesmith.errors import DataError


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

    def fingerprints(self) -> NDArray[np.uint64]:
        return self.column("fingerprint")

    def select(self, indices: NDArray[np.int64]) -> CachedRows:
        return CachedRows(self._dataset.select(indices))


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
    read. They are shuffled in blocks of `buffer` rows, each by a permutation of its own, so that a block is
    all that must be read to get at a row. Item i can only be fetched going forward, but for the block before;
    rows that are not asked for are not tokenised."""

    def __init__(
        self,
        sources: list[tuple[RowsFrom, Preparer]],
        *,
        length: int,
        buffer: int,
        seed: int,
        skip_bad_rows: bool,
    ) -> None:
        self._preparers = [preparer for _, preparer in sources]
        self._sources = [rows for rows, _ in sources]
        self._length = length
        self._buffer = buffer
        self._seed = seed
        self._skip_bad_rows = skip_bad_rows
        self._start: dict[str, Any] | None = None
        self._turns: _Turns | None = None
        self._blocks: deque[_Block] = deque(maxlen=2)

    def __len__(self) -> int:
        return self._length

    def start_at(self, place: dict[str, Any] | None) -> None:
        """Begin to read where `PreparedRow.stream` of an earlier row says, instead of at the start. Items
        before its block can no longer be fetched without reading from the start."""
        self._start, self._turns = place, None
        self._blocks.clear()

    def __getitem__(self, index: int) -> PreparedRow:
        number, offset = divmod(index, self._buffer)
        block = self._block(number)
        source, row = block.rows[block.order[offset]]
        (outcome,) = self._preparers[source].prepare([row])
        return replace(_usable(outcome, self._skip_bad_rows), stream=block.place)

    def _block(self, number: int) -> _Block:
        for block in self._blocks:
            if block.place["block"] == number:
                return block
        if self._turns is None or number < self._blocks[-1].place["block"]:
            start = self._start if self._start is not None and self._start["block"] <= number else None
            self._blocks.clear()
            self._turns = _Turns(self._sources, start)
            first = start["block"] if start is not None else 0
        else:
            first = self._blocks[-1].place["block"] + 1
        for at in range(first, number + 1):
            place = {"block": at, **self._turns.place()}
            rows = [next(self._turns) for _ in range(self._buffer)]
            order = np.random.default_rng([self._seed, at]).permutation(self._buffer)
            self._blocks.append(_Block(place, rows, order))
        return self._blocks[-1]


@dataclass(frozen=True)
class _Block:
    place: dict[str, Any]
    rows: list[tuple[int, RawRow]]
    order: NDArray[np.int64]


class _Turns:
    """(source, row): one row of each source in turn, from `place` on or from the start."""

    def __init__(self, sources: list[RowsFrom], place: dict[str, Any] | None) -> None:
        self._sources = sources
        self._streams: list[Iterator[tuple[Position, RawRow]] | None] = [None] * len(sources)
        # Of each source where it is, or None when it has been read to its end.
        self._positions: list[Position | None] = [(0, 0)] * len(sources)
        self._turn = 0
        if place is not None:
            self._positions = [p if p is None else (p[0], p[1]) for p in place["positions"]]
            self._turn = place["turn"]
        self._has_rows = place is not None

    def place(self) -> dict[str, Any]:
        """What begins here again: file and row of each source, and whose turn it is."""
        return {"positions": list(self._positions), "turn": self._turn}

    def __next__(self) -> tuple[int, RawRow]:
        while True:
            for _ in self._sources:
                source, self._turn = self._turn, (self._turn + 1) % len(self._sources)
                if (row := self._next_of(source)) is not None:
                    self._has_rows = True
                    return source, row
            if not self._has_rows:
                raise DataError("data.train: there is no row in it.")
            self._has_rows = False
            self._positions = [(0, 0)] * len(self._sources)
            self._turn = 0

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

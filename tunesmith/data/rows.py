"""Where rows are while training asks for them: prepared on disk, raw on disk, or in a stream.

All three give the same thing, a `PreparedRow` an index; they differ in when a row is tokenised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import cache
from tunesmith.data.prepare import PreparedRow, Preparer
from tunesmith.data.records import RawRow
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


class StreamedRows:
    """Rows read in file order through a shuffle buffer, one of each source in turn while it has any, again
    from the start when all are read. Item i can only be fetched going forward; rows passed over
    are not tokenised."""

    def __init__(
        self,
        sources: list[tuple[Callable[[], Iterator[RawRow]], Preparer]],
        *,
        length: int,
        buffer: int,
        seed: int,
        skip_bad_rows: bool,
    ) -> None:
        self._sources = sources
        self._length = length
        self._buffer = buffer
        self._seed = seed
        self._skip_bad_rows = skip_bad_rows
        self._stream: Iterator[tuple[RawRow, Preparer]] | None = None
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> PreparedRow:
        if self._stream is None or index < self._position:
            self._stream, self._position = self._shuffled(), 0
        row, preparer = next(islice(self._stream, index - self._position, None))
        self._position = index + 1
        (outcome,) = preparer.prepare([row])
        return _usable(outcome, self._skip_bad_rows)

    def _in_order(self) -> Iterator[tuple[RawRow, Preparer]]:
        while True:
            found = False
            streams = [(rows(), preparer) for rows, preparer in self._sources]
            while streams:
                for stream in list(streams):
                    row = next(stream[0], None)
                    if row is None:
                        streams.remove(stream)
                    else:
                        found = True
                        yield row, stream[1]
            if not found:
                raise DataError("data.train: there is no row in it.")

    def _shuffled(self) -> Iterator[tuple[RawRow, Preparer]]:
        rng = random.Random(self._seed)
        source = self._in_order()
        held = list(islice(source, self._buffer))
        for row in source:
            i = rng.randrange(len(held))
            yield held[i]
            held[i] = row

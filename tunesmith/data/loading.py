"""From a config to rows ready for training: cached, lazy or streaming, with an account of every row.

All three give the same thing, an indexable of `PreparedRow`; they differ in when a row is tokenised and in
what is known beforehand. Cached rows have lengths, so passes can be filled to the brim; for the others
`data.max_length` stands for each row's length.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.config import Config, SourceConfig
from tunesmith.config.schema import Format
from tunesmith.data import cache
from tunesmith.data.formats import detect_format
from tunesmith.data.prepare import PreparedRow, PrepareOptions, Preparer
from tunesmith.data.records import BadRow, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.data.sources import decode, fingerprint_files, iter_rows, resolve_files
from tunesmith.errors import DataError

_SAMPLE_ROWS = 32  # looked at to find the format
_PARALLEL_FROM_BYTES = 16 * 2**20
Say = Callable[[str], None]


class Rows(Protocol):
    """Training or validation rows. Item i is example i of the plan's `lengths`, or row i where those are
    unknown."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PreparedRow: ...


@dataclass
class RowSet:
    """Rows and what the step plan needs to know of them.

    lengths [N]: tokens of each item. row_starts [R + 1]: row r owns items row_starts[r]:row_starts[r + 1].
    bounds: first row, row after the last, and weight, of each source."""

    rows: Rows
    lengths: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    bounds: list[tuple[int, int, float]]
    reports: list[SourceReport]

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


@dataclass
class Data:
    """What a recipe trains and evaluates on. `overlap` counts validation examples that stand in the training
    set too, token for token (None where loading does not know)."""

    train: RowSet
    valid: RowSet | None
    overlap: int | None = None
    duplicates: int | None = None
    _reports: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """The content of `data_report.json`."""
        return {
            "train": [report.as_dict() for report in self.train.reports],
            "valid": [report.as_dict() for report in self.valid.reports] if self.valid else [],
            "train_rows": self.train.num_rows,
            "valid_rows": self.valid.num_rows if self.valid else 0,
            "valid_examples_also_in_train": self.overlap,
            "train_examples_seen_before": self.duplicates,
        }


def load_data(config: Config, tokenizer: Any, say: Say = lambda _: None) -> Data:
    """Rows of `data.train` and `data.valid`.

    Raises DataError for what cannot be read or trained on, TemplateError where exact masks are impossible."""
    load = {"cached": _load_cached, "lazy": _load_lazy, "streaming": _load_streaming}[config.data.loading]
    sources = config.data.train
    train = load(sources, config, tokenizer, say)
    if isinstance(config.data.valid, float):
        data = Data(*_split(train, config.data.valid, config.run.seed))
    elif config.data.valid is not None:
        # Validation is small, and is gone through again and again: always cached.
        data = Data(train, _load_cached(config.data.valid, config, tokenizer, say))
    else:
        data = Data(train, None)
    if not data.train.num_rows:
        raise DataError("data.train: no row is left to train on. " + _account(train.reports))
    if data.valid is not None and not data.valid.num_rows:
        raise DataError("data.valid: no row is left to evaluate on. " + _account(data.valid.reports))
    if isinstance(data.train.rows, CachedRows):
        seen = data.train.rows.fingerprints()
        data.duplicates = len(seen) - len(np.unique(seen))
        if data.valid is not None and isinstance(data.valid.rows, CachedRows):
            data.overlap = int(np.isin(data.valid.rows.fingerprints(), seen).sum())
    return data


def _account(reports: list[SourceReport]) -> str:
    return "; ".join(
        f"{r.path}: {r.rows_read} rows read, {r.rows_bad} bad, {r.rows_too_long} over data.max_length"
        for r in reports
    )


# --- one source


def _open_source(
    source: SourceConfig, config: Config, say: Say
) -> tuple[Callable[[], Iterator[RawRow]], PrepareOptions, SourceReport]:
    """Its rows (to iterate as often as wanted), how to prepare them, and an empty report."""
    columns = source.columns or config.data.columns
    limit = config.data.max_row_bytes

    def rows() -> Iterator[RawRow]:
        return iter_rows(source, max_row_bytes=limit)

    name = source.format if source.format != "auto" else config.data.format
    if name == "auto":
        name = _detect(rows, source.path, columns)
        say(f"{source.path}: format {name}, found from its first rows")
    options = PrepareOptions(
        format=name,
        columns=columns,
        system=config.data.system,
        train_on=config.data.train_on,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
    )
    return rows, options, SourceReport(source.path, name)


def _detect(rows: Callable[[], Iterator[RawRow]], path: str, columns: dict[str, str]) -> Format:
    sample, problems = [], []
    for row in islice(rows(), _SAMPLE_ROWS):
        try:
            decoded = decode(row)
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
            continue
        sample.append({columns.get(key, key): value for key, value in decoded.items()})
    if not sample:
        found = "\n".join(problems[:20]) if problems else f"{path}: there is no row in it."
        raise DataError(found)
    return detect_format(sample, path)


def _source_fingerprint(source: SourceConfig) -> str | None:
    """Hash of the files' content; None for a hub data set, whose name and revision stand for it."""
    return fingerprint_files(resolve_files(source.path)) if not _is_hub(source.path) else None


def _is_hub(path: str) -> bool:
    try:
        resolve_files(path)
    except DataError:
        return True
    return False


def _workers(config: Config, source: SourceConfig) -> int:
    if config.data.workers is not None:
        return config.data.workers
    size = 0 if _is_hub(source.path) else sum(file.stat().st_size for file in resolve_files(source.path))
    if size < _PARALLEL_FROM_BYTES:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_dir(config: Config) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else cache.default_cache_dir()


# --- cached


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

    def fingerprints(self) -> NDArray[np.uint64]:
        return self.column("fingerprint")

    def select(self, indices: NDArray[np.int64]) -> CachedRows:
        return CachedRows(self._dataset.select(indices))


def _load_cached(sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say) -> RowSet:
    from datasets import concatenate_datasets

    datasets, reports, bounds, starts = [], [], [], [np.zeros(1, dtype=np.int64)]
    num_rows = num_examples = 0
    for source in sources:
        rows, options, report = _open_source(source, config, say)
        key = cache.cache_key(
            _source_fingerprint(source) or "hub",
            tokenizer,
            options,
            path=source.path,
            on_bad_row=config.data.on_bad_row,
            max_row_bytes=config.data.max_row_bytes,
        )
        prepared = cache.open_or_prepare(
            _cache_dir(config) / key,
            rows,
            Preparer(tokenizer, options),
            report,
            workers=_workers(config, source),
            refuse_bad_rows=config.data.on_bad_row == "error",
            progress=lambda _: None,
        )
        datasets.append(prepared.dataset)
        reports.append(prepared.report)
        row_of = CachedRows(prepared.dataset).column("row")
        ends = (
            np.flatnonzero(np.append(np.diff(row_of), 1)) + 1 if len(row_of) else np.empty(0, dtype=np.int64)
        )
        starts.append(num_examples + ends)
        bounds.append((num_rows, num_rows + len(ends), source.weight))
        num_rows += len(ends)
        num_examples += len(row_of)
    together = CachedRows(concatenate_datasets(datasets))
    lengths = together.column("length").astype(np.int32)
    return RowSet(together, lengths, np.concatenate(starts), bounds, reports)


def _split(rows: RowSet, fraction: float, seed: int) -> tuple[RowSet, RowSet]:
    """Two row sets: the rest, and `fraction` of the rows (at least one), drawn by the seed."""
    drawn = np.random.default_rng([seed, 0x5EED]).permutation(rows.num_rows)
    is_valid = np.zeros(rows.num_rows, dtype=bool)
    is_valid[drawn[: max(1, round(fraction * rows.num_rows))]] = True
    return _take(rows, ~is_valid), _take(rows, is_valid)


def _take(rows: RowSet, chosen: NDArray[np.bool_]) -> RowSet:
    counts = np.diff(rows.row_starts)
    items = np.flatnonzero(np.repeat(chosen, counts))
    before = np.concatenate([[0], np.cumsum(chosen)])
    assert isinstance(rows.rows, (CachedRows, LazyRows))
    return RowSet(
        rows.rows.select(items),
        rows.lengths[items],
        np.concatenate([[0], np.cumsum(counts[chosen])]),
        [(int(before[start]), int(before[end]), weight) for start, end, weight in rows.bounds],
        rows.reports,
    )


# --- lazy


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


def _load_lazy(sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say) -> RowSet:
    datasets, preparers, reports, bounds, num_rows = [], [], [], [], 0
    for source in sources:
        rows, options, report = _open_source(source, config, say)
        key = _source_fingerprint(source) or "hub-" + source.path.replace("/", "--").replace(":", "--")
        dataset = cache.write_raw(_cache_dir(config) / f"raw-{key}-{config.data.max_row_bytes}", rows)
        datasets.append(dataset)
        preparers.append(Preparer(tokenizer, options))
        reports.append(report)
        bounds.append((num_rows, num_rows + len(dataset), source.weight))
        num_rows += len(dataset)
    lazy = LazyRows(datasets, preparers, skip_bad_rows=config.data.on_bad_row == "skip")
    return RowSet(
        lazy, np.full(num_rows, config.data.max_length, np.int32), np.arange(num_rows + 1), bounds, reports
    )


# --- streaming


class StreamedRows:
    """Rows read in file order through a shuffle buffer, source by source in turn by their order in the
    config, again from the start when all are read. Item i can only be fetched going forward; rows passed over
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
            for rows, preparer in self._sources:
                for row in rows():
                    found = True
                    yield row, preparer
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


def _load_streaming(sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say) -> RowSet:
    opened = [_open_source(source, config, say) for source in sources]
    assert config.train.max_steps is not None  # the config's checks see to it
    num_rows = config.train.max_steps * config.train.batch_size
    rows = StreamedRows(
        [(rows, Preparer(tokenizer, options)) for rows, options, _ in opened],
        length=num_rows,
        buffer=config.data.shuffle_buffer,
        seed=config.run.seed,
        skip_bad_rows=config.data.on_bad_row == "skip",
    )
    lengths = np.full(num_rows, config.data.max_length, np.int32)
    return RowSet(
        rows, lengths, np.arange(num_rows + 1), [(0, num_rows, 1.0)], [report for _, _, report in opened]
    )


def write_report(data: Data, file: Path) -> None:
    """Write `data_report.json`."""
    file.write_text(json.dumps(data.report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""From a config to rows ready for training: cached, lazy or streaming, with an account of every row.

All three give the same thing, an indexable of `PreparedRow`; they differ in when a row is tokenised and in
what is known beforehand. Cached rows have lengths, so passes can be filled to the brim; for the others
`data.max_length` stands for each row's length.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.config import Config, SourceConfig
from tunesmith.config.preferences import PREFERENCES
from tunesmith.config.schema import Format
from tunesmith.data import cache
from tunesmith.data.blocks import blocks_of_sources
from tunesmith.data.cache import Progress
from tunesmith.data.decode import decode
from tunesmith.data.formats import PREFERENCE_FORMATS, detect_format, fitting_format
from tunesmith.data.prepare import PrepareOptions, Preparer
from tunesmith.data.records import BadRow, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.data.rows import AnswerRows, BlockMaker, CachedRows, JoinedRows, LazyRows, Rows, StreamedRows
from tunesmith.data.sources import fingerprint_files, is_hub_id, iter_rows, iter_rows_from, resolve_files
from tunesmith.errors import DataError

_SAMPLE_ROWS = 32  # looked at to find the format
_PARALLEL_FROM_BYTES = 16 * 2**20
Say = Callable[[str], None]
# Prepares a source that is not in the cache: (source, config, how to make a Preparer, report that takes the
# counts, what is told of rows done, folder for the shards).
Engine = Callable[[SourceConfig, Config, Callable[[], Preparer], SourceReport, Progress, Path], None]


def local_engine(
    source: SourceConfig,
    config: Config,
    make_preparer: Callable[[], Preparer],
    report: SourceReport,
    progress: Progress,
    folder: Path,
) -> None:
    """Prepares in `data.workers` processes of this machine."""
    rows = iter_rows(source, max_row_bytes=config.data.max_row_bytes)
    workers = _workers(config, source)
    cache.write_here(folder, rows, make_preparer, report, workers=workers, progress=progress)


@dataclass
class RowSet:
    """Rows and what the step plan needs to know of them.

    lengths [N]: tokens of each item. row_starts [R + 1]: row r owns items row_starts[r]:row_starts[r + 1].
    bounds: first row, row after the last, and weight, of each source. block_size: most tokens of a row, where
    rows are blocks."""

    rows: Rows
    lengths: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    bounds: list[tuple[int, int, float]]
    reports: list[SourceReport]
    block_size: int | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def fill(self) -> float | None:
        """Tokens of all blocks over the room in them; None where rows are no blocks, or are not known yet."""
        if self.block_size is None or isinstance(self.rows, StreamedRows):
            return None
        return float(self.lengths.sum(dtype=np.int64) / (self.num_rows * self.block_size))

    @property
    def unit(self) -> str:
        """What a row is called."""
        return "rows" if self.block_size is None else "blocks"

    def lines(self) -> Iterator[str]:
        """The account of it, for a reader."""
        for report in self.reports:
            yield from report.lines()
        if self.fill is not None:
            yield f"{self.num_rows:,} blocks of {self.block_size:,} tokens, {100 * self.fill:.1f} % full"


@dataclass
class Data:
    """What a recipe trains and evaluates on. `overlap` counts validation examples that stand in the training
    set too, token for token (None where loading does not know). `drawn` says of each training source what the
    run draws of it, once its steps are planned."""

    train: RowSet
    valid: RowSet | None
    overlap: int | None = None
    duplicates: int | None = None
    drawn: list[dict[str, Any]] | None = None

    def report(self) -> dict[str, Any]:
        """The content of `data_report.json`."""
        return {
            "train": [report.as_dict() for report in self.train.reports],
            "valid": [report.as_dict() for report in self.valid.reports] if self.valid else [],
            "train_rows": self.train.num_rows,
            "valid_rows": self.valid.num_rows if self.valid else 0,
            "valid_examples_also_in_train": self.overlap,
            "train_examples_seen_before": self.duplicates,
            "block_size": self.train.block_size,
            "block_fill": self.train.fill,
            "drawn": self.drawn,
        }


def load_data(
    config: Config, tokenizer: Any, say: Say = lambda _: None, engine: Engine = local_engine
) -> Data:
    """Rows of `data.train` and `data.valid`; `engine` prepares cached rows that are not in the cache.

    Raises DataError for what cannot be read or trained on, TemplateError where exact masks are impossible."""
    cached = partial(_load_cached, engine=engine)
    ways: dict[str, Callable[..., RowSet]] = {
        "cached": cached,
        "lazy": _load_lazy,
        "streaming": _load_streaming,
    }
    load = ways[config.data.loading]
    sources = config.data.train
    train = load(sources, config, tokenizer, say)
    if isinstance(config.data.valid, float):
        data = Data(*_split(train, config.data.valid, config.run.seed))
    elif config.data.valid is not None:
        # Validation is small, and is gone through again and again: always cached.
        data = Data(train, cached(config.data.valid, config, tokenizer, say))
    else:
        data = Data(train, None)
    if not data.train.num_rows:
        raise DataError("data.train: no row is left to train on. " + _account(train.reports))
    if data.valid is not None and not data.valid.num_rows:
        raise DataError("data.valid: no row is left to evaluate on. " + _account(data.valid.reports))
    if isinstance(data.train.rows, CachedRows):
        seen = _fingerprints(data.train, config)
        data.duplicates = len(seen) - len(np.unique(seen))
        if data.valid is not None and isinstance(data.valid.rows, CachedRows):
            data.overlap = int(np.isin(_fingerprints(data.valid, config), seen).sum())
    if config.run.recipe == "prefer":
        return _in_answers(data, config)
    return _in_blocks(data, config) if config.run.recipe == "pretrain" else data


def _fingerprints(rows: RowSet, config: Config) -> NDArray[np.uint64]:
    """Of each example; of each row where answers are judged, since one answer stands in many pairs."""
    assert isinstance(rows.rows, CachedRows)
    found = rows.rows.fingerprints()
    if config.run.recipe != "prefer" or not len(found):
        return found
    # Odd factors keep the sides apart: chosen and rejected are not what rejected and chosen are.
    factors = (2 * rows.rows.column("side") + 1).astype(np.uint64)
    return np.add.reduceat(found * factors, rows.row_starts[:-1])


# --- answers that are judged


def _in_answers(data: Data, config: Config) -> Data:
    """The same for preference tuning, where a row stays whole."""
    valid = None if data.valid is None else _whole_rows(data.valid, config)
    return replace(data, train=_whole_rows(data.train, config), valid=valid)


def _whole_rows(rows: RowSet, config: Config) -> RowSet:
    assert isinstance(rows.rows, CachedRows)
    assert config.prefer.method is not None
    wants = PREFERENCES[config.prefer.method].data
    for report in rows.reports:
        if (report.format == "labelled") != (wants == "labelled"):
            raise DataError(_other_method(report.path, report.format, config.prefer.method))
    answers = AnswerRows(rows.rows, rows.row_starts, mismatched=wants == "labelled")
    tokens = np.add.reduceat(rows.lengths, rows.row_starts[:-1]).astype(np.int32)
    return replace(rows, rows=answers, lengths=tokens, row_starts=np.arange(rows.num_rows + 1))


def _other_method(path: str, name: str, method: str) -> str:
    if name == "labelled":
        return (
            f"{path}: its rows are answers with a label, and prefer.method {method} learns from pairs of "
            "answers. Set prefer.method to kto."
        )
    return (
        f"{path}: its rows are pairs of answers ({name}), and prefer.method {method} learns from single "
        "answers with a label. Set prefer.method to dpo, or give each answer a row with a label."
    )


# --- blocks


def _in_blocks(data: Data, config: Config) -> Data:
    """The same for pretraining, where a row that is drawn is a block. Validation documents stay rows, unless
    documents are joined."""
    size = config.data.max_length
    if config.data.packing == "concatenate":
        valid = None if data.valid is None else _joined(data.valid, size)
        return replace(data, train=_joined(data.train, size), valid=valid)
    return replace(data, train=_best_fit(data.train, size))


def _best_fit(rows: RowSet, size: int) -> RowSet:
    """The documents' pieces in few blocks, each piece an example of its own."""
    if not isinstance(rows.rows, CachedRows):
        return rows
    order, starts, blocks = blocks_of_sources(rows.lengths, _item_bounds(rows), size)
    bounds = [(*block, weight) for block, (_, _, weight) in zip(blocks, rows.bounds, strict=True)]
    return RowSet(rows.rows.select(order), rows.lengths[order], starts, bounds, rows.reports, size)


def _joined(rows: RowSet, size: int) -> RowSet:
    """The documents of each source joined and cut every `size` tokens."""
    if not isinstance(rows.rows, CachedRows):
        return rows
    joined = JoinedRows(rows.rows, rows.lengths, _item_bounds(rows), size)
    ends = np.cumsum([0, *joined.blocks]).tolist()
    bounds = [(*block, weight) for block, (_, _, weight) in zip(pairwise(ends), rows.bounds, strict=True)]
    lengths = (joined.ends - joined.starts).astype(np.int32)
    # They lie on disk in pieces, but that is not what is trained on.
    reports = [replace(report, rows_split=0, pieces=0) for report in rows.reports]
    return RowSet(joined, lengths, np.arange(len(joined) + 1), bounds, reports, size)


def _item_bounds(rows: RowSet) -> list[tuple[int, int]]:
    """First item and the one after the last of each source."""
    return [(int(rows.row_starts[start]), int(rows.row_starts[end])) for start, end, _ in rows.bounds]


def _account(reports: list[SourceReport]) -> str:
    return "; ".join(
        f"{r.path}: {r.rows_read} rows read, {r.rows_bad} bad, {r.rows_too_long} over data.max_length"
        for r in reports
    )


# --- one source


def open_source(
    source: SourceConfig, config: Config, say: Say
) -> tuple[Callable[[], Iterator[RawRow]], PrepareOptions, SourceReport]:
    """Its rows (to iterate as often as wanted), how to prepare them, and an empty report."""
    columns = source.columns or config.data.columns
    limit = config.data.max_row_bytes

    def rows() -> Iterator[RawRow]:
        return iter_rows(source, max_row_bytes=limit)

    name = source.format if source.format != "auto" else config.data.format
    recipe = config.run.recipe
    if name == "auto":
        name = _detect(rows, source.path, columns, recipe)
        say(f"{source.path}: format {name}, found from its first rows")
    if (recipe == "prefer") != (name in PREFERENCE_FORMATS):
        raise DataError(_other_verb(source.path, name, recipe))
    if recipe == "pretrain" and name != "text":
        raise DataError(
            f"{source.path}: its rows are {name}, and `tunesmith pretrain` trains on raw text. Name the "
            "column that holds it, such as columns: {content: text}, or tune with `tunesmith sft`."
        )
    options = PrepareOptions(
        format=name,
        columns=columns,
        system=config.data.system,
        train_on=config.data.train_on,
        max_length=config.data.max_length,
        too_long=config.data.too_long or "drop",
    )
    return rows, options, SourceReport(source.path, name)


def _fingerprint(source: SourceConfig) -> str:
    """Hash of the files' content, which reads them to the end; empty for a hub data set, which has its name
    for one."""
    return "" if is_hub_id(source.path) else fingerprint_files(resolve_files(source.path))


def _detect(
    rows: Callable[[], Iterator[RawRow]], path: str, columns: dict[str, str], recipe: str | None
) -> Format:
    """The format that the first rows fit; for pretraining it is text wherever one of them has some."""
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
    if recipe == "pretrain" and any("text" in row for row in sample):
        return "text"
    judged, plain = (fitting_format(sample, of_preferences=judged) for judged in (True, False))
    if recipe == "prefer":
        return judged or plain or detect_format(sample, path, of_preferences=True)
    # A column called `label` may mean anything; beside turns, true and false mean thumbs up and down.
    if judged == "labelled" and not all(isinstance(row.get("label"), bool) for row in sample):
        judged = None
    return judged or detect_format(sample, path)


def _other_verb(path: str, name: str, recipe: str | None) -> str:
    """Why rows of this format are no rows for this recipe, and what takes them."""
    if recipe == "prefer":
        return (
            f"{path}: its rows are {name}, and `tunesmith prefer` learns from answers that were judged: "
            "chosen and rejected, a label, or a ranking (pairs, labelled, ranked; docs/data.md has a row of "
            "each). Train on these rows with `tunesmith sft`, or name the columns with columns: {...}."
        )
    return (
        f"{path}: its rows are {name}, answers that were judged, and `tunesmith {recipe}` would learn the "
        "bad ones as the good ones. Train on them with `tunesmith prefer`, or say which of their columns to "
        "learn as they are by naming the format, such as format: messages."
    )


def _workers(config: Config, source: SourceConfig) -> int:
    if config.data.workers is not None:
        return config.data.workers
    size = 0 if is_hub_id(source.path) else sum(file.stat().st_size for file in resolve_files(source.path))
    if size < _PARALLEL_FROM_BYTES:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell_now_and_then(path: str, say: Say) -> Callable[[int], None]:
    """Takes numbers of rows prepared and says how many there are, every ten seconds."""
    done, told_at = 0, time.monotonic()

    def add(rows: int) -> None:
        nonlocal done, told_at
        done += rows
        if time.monotonic() - told_at >= 10:
            told_at = time.monotonic()
            say(f"{path}: {done:,} rows prepared")

    return add


def cache_dir(config: Config) -> Path:
    """Where prepared data lies."""
    return Path(config.data.cache_dir) if config.data.cache_dir else cache.default_cache_dir()


# --- cached


def _load_cached(
    sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say, engine: Engine
) -> RowSet:
    from datasets import concatenate_datasets

    datasets, reports, bounds, starts = [], [], [], [np.zeros(1, dtype=np.int64)]
    num_rows = num_examples = 0
    for source in sources:
        _, options, report = open_source(source, config, say)
        report.fingerprint = _fingerprint(source)
        key = cache.cache_key(
            report.fingerprint or "hub",
            tokenizer,
            options,
            path=source.path,
            sample_by=source.sample_by,
            on_bad_row=config.data.on_bad_row,
            max_row_bytes=config.data.max_row_bytes,
        )
        write = partial(
            engine,
            source,
            config,
            partial(Preparer, tokenizer, options),
            report,
            _tell_now_and_then(source.path, say),
        )
        prepared = cache.open_or_prepare(
            cache_dir(config) / key, write, report, refuse_bad_rows=config.data.on_bad_row == "error"
        )
        datasets.append(prepared.dataset)
        reports.append(prepared.report)
        row_of = CachedRows(prepared.dataset).column("row")
        ends = _row_ends(row_of, CachedRows(prepared.dataset).column("side"))
        starts.append(num_examples + ends)
        bounds.append((num_rows, num_rows + len(ends), source.weight))
        num_rows += len(ends)
        num_examples += len(row_of)
    together = CachedRows(concatenate_datasets(datasets))
    lengths = together.column("length").astype(np.int32)
    return RowSet(together, lengths, np.concatenate(starts), bounds, reports)


def _row_ends(row_of: NDArray[np.int64], side_of: NDArray[np.int8]) -> NDArray[np.int64]:
    """Behind the last example of each row: where the next is of another row of the file, or of the next pair
    of a ranked row, whose examples lie chosen, rejected, chosen, rejected."""
    is_last = (np.diff(row_of) != 0) | (np.diff(side_of) < 0)
    return np.flatnonzero(np.append(is_last, len(row_of) > 0)) + 1


def _split(rows: RowSet, fraction: float, seed: int) -> tuple[RowSet, RowSet]:
    """Two row sets: the rest, and `fraction` of the files' rows (at least one), drawn by the seed."""
    file_row = _file_rows(rows)
    num_file_rows = int(file_row[-1]) + 1 if len(file_row) else 0
    drawn = np.random.default_rng([seed, 0x5EED]).permutation(num_file_rows)
    is_drawn = np.zeros(num_file_rows, dtype=bool)
    is_drawn[drawn[: max(1, round(fraction * num_file_rows))]] = True
    is_valid = is_drawn[file_row]
    # The account of the sources stays with the training rows: they were read once.
    return _take(rows, ~is_valid, rows.reports), _take(rows, is_valid, [])


def _file_rows(rows: RowSet) -> NDArray[np.int64]:
    """The kept row of the files that each row is of, counted from 0: the pairs of one ranking have one
    prompt, which must not be trained and evaluated on."""
    if not isinstance(rows.rows, CachedRows):
        return np.arange(rows.num_rows)
    row_of = rows.rows.column("row")[rows.row_starts[:-1]]
    is_first = np.append(True, np.diff(row_of) != 0)[: rows.num_rows]
    is_first[[start for start, end, _ in rows.bounds if start < end]] = True
    return np.cumsum(is_first) - 1


def _take(rows: RowSet, chosen: NDArray[np.bool_], reports: list[SourceReport]) -> RowSet:
    counts = np.diff(rows.row_starts)
    items = np.flatnonzero(np.repeat(chosen, counts))
    before = np.concatenate([[0], np.cumsum(chosen)])
    assert isinstance(rows.rows, (CachedRows, LazyRows))
    return RowSet(
        rows.rows.select(items),
        rows.lengths[items],
        np.concatenate([[0], np.cumsum(counts[chosen])]),
        [(int(before[start]), int(before[end]), weight) for start, end, weight in rows.bounds],
        reports,
    )


# --- lazy


def _load_lazy(sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say) -> RowSet:
    datasets, preparers, reports, bounds, num_rows = [], [], [], [], 0
    for source in sources:
        rows, options, report = open_source(source, config, say)
        report.fingerprint = _fingerprint(source)
        key = report.fingerprint or "hub-" + source.path.replace("/", "--").replace(":", "--")
        key = f"raw-{key}-{config.data.max_row_bytes}-{source.sample_by}"
        dataset = cache.write_raw(cache_dir(config) / key, rows)
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


def _load_streaming(sources: list[SourceConfig], config: Config, tokenizer: Any, say: Say) -> RowSet:
    opened = [open_source(source, config, say) for source in sources]
    limit = config.data.max_row_bytes
    assert config.train.max_steps is not None  # the config's checks see to it
    num_rows = config.train.max_steps * config.train.batch_size
    size, is_corpus = config.data.max_length, config.run.recipe == "pretrain"
    rows = StreamedRows(
        [
            (partial(iter_rows_from, source, max_row_bytes=limit), Preparer(tokenizer, options))
            for source, (_, options, _) in zip(sources, opened, strict=True)
        ],
        length=num_rows,
        buffer=config.data.shuffle_buffer,
        seed=config.run.seed,
        skip_bad_rows=config.data.on_bad_row == "skip",
        blocks=BlockMaker(size, joins=config.data.packing == "concatenate") if is_corpus else None,
        keep=config.train.batch_size,
    )
    return RowSet(
        rows,
        np.full(num_rows, size, np.int32),
        np.arange(num_rows + 1),
        [(0, num_rows, 1.0)],
        [report for _, _, report in opened],
        size if is_corpus else None,
    )

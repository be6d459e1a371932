"""Prepared examples on disk: tokenised once, in parallel, and memory-mapped ever after.

    raw rows --chunks--> worker processes --Arrow batches + counts--> one file --rename--> cache/KEY/

KEY covers everything that decides the result: content of the files, tokenizer, template, options and the code
of this room. A folder is complete or absent: it is written under a temporary name and renamed. A lock lets
one process work while the others wait. The examples are those of all its shards, `examples*.arrow`, in the
order of their names: one here, many where a cluster wrote them (ray_engine.py).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.prepare import PrepareOptions, Preparer
from tunesmith.data.records import BadRow, Example, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.errors import DataError

_CHUNK_ROWS = 256
_CHUNK_BYTES = 1 << 20  # of the rows of a chunk, if it has more than one; some documents are books
_IN_FLIGHT_PER_WORKER = 4  # chunks; bounds memory when reading outruns tokenising

Progress = Callable[[int], None]


def default_cache_dir() -> Path:
    """`tunesmith/data` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "data"


def cache_key(files_fingerprint: str, tokenizer: Any, options: PrepareOptions, **more: Any) -> str:
    """A name for the result of preparing these files this way."""
    parts = {
        "files": files_fingerprint,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "template": tokenizer.chat_template,
        "options": asdict(options),
        "code": code_version(),
        **more,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def code_version() -> str:
    """Hash of this room's source: a change of code never meets data that older code prepared."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """One source, prepared: its `datasets.Dataset` on disk and its report."""

    dataset: Any
    report: SourceReport


def open_or_prepare(
    folder: Path, write: Callable[[Path], None], report: SourceReport, *, refuse_bad_rows: bool
) -> Prepared:
    """What lies in `folder`; if it is not there yet, `write` is called to put shards into a folder and their
    counts into `report`.

    Raises DataError for bad rows when `refuse_bad_rows`, and what `write` raises; nothing is left behind
    then."""
    from datasets import Dataset, concatenate_datasets

    def build(building: Path) -> None:
        write(building)
        if refuse_bad_rows:
            report.refuse_bad_rows()
        (building / "report.json").write_text(json.dumps(report.as_dict()), encoding="utf-8")

    _build_once(folder, build)
    shards = [Dataset.from_file(str(shard)) for shard in sorted(folder.glob("examples*.arrow"))]
    return Prepared(
        concatenate_datasets(shards),
        SourceReport.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8"))),
    )


def _build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` make the folder unless it is there: one process at a time, whole or not at all."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            build(building)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "spans": pa.list_(pa.int32()),  # start, end, start, end, ...
            "span_weights": pa.list_(pa.float32()),
            "row": pa.int64(),
            "length": pa.int32(),
            "num_targets": pa.int32(),
            "fingerprint": pa.uint64(),  # of input_ids and spans: equal examples have equal fingerprints
            "place": pa.string(),
            "side": pa.int8(),  # of a preference row: 0 chosen or desirable, 1 rejected or undesirable
            "margin": pa.float32(),  # of the pair
        }
    )


def write_here(
    folder: Path,
    rows: Iterator[RawRow],
    make_preparer: Callable[[], Preparer],
    report: SourceReport,
    *,
    workers: int,
    progress: Progress,
) -> None:
    """Prepare all rows to one shard, in this process or in `workers` processes of this machine."""
    prepared = _prepare_all(chunks_of(rows), make_preparer, report, workers)
    write_shard(folder / "examples.arrow", prepared, report, progress)


def write_shard(
    file: Path, prepared: Iterable[tuple[bytes, SourceReport]], report: SourceReport, progress: Progress
) -> None:
    """The examples of prepared chunks as one file, and their counts into `report`."""
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as stream:
        for batch, counts in prepared:
            for record_batch in pa.ipc.open_stream(batch):
                stream.write_batch(record_batch)
            report.merge(counts)
            progress(counts.rows_read)


Chunk = tuple[int, list[RawRow]]


def chunks_of(rows: Iterator[RawRow], first: int = 0) -> Iterator[Chunk]:
    """Rows that are prepared together, with the number of the first; `first` is that of the first of all."""
    size = 0
    chunk: list[RawRow] = []
    for row in rows:
        row_size = size_of(row)
        if chunk and (len(chunk) == _CHUNK_ROWS or size + row_size > _CHUNK_BYTES):
            yield first, chunk
            first, size, chunk = first + len(chunk), 0, []
        chunk.append(row)
        size += row_size
    if chunk:
        yield first, chunk


def size_of(row: RawRow) -> int:
    """Bytes of a row, about."""
    if isinstance(row.payload, bytes):
        return len(row.payload)
    if isinstance(row.payload, dict):
        return sum(len(value) for value in row.payload.values() if isinstance(value, str))
    return 0


def _prepare_all(
    chunks: Iterator[Chunk], make_preparer: Callable[[], Preparer], report: SourceReport, workers: int
) -> Iterator[tuple[bytes, SourceReport]]:
    """Each chunk's Arrow stream and counts, in order."""
    empty = SourceReport(report.path, report.format)
    if not workers:
        preparer = make_preparer()
        for chunk in chunks:
            yield prepare_chunk(preparer, empty, chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fork would copy the locks of torch's and the tokenizer's threads in whatever state they are.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(pickle.dumps(make_preparer), empty),
    )
    pending: deque[Future[tuple[bytes, SourceReport]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_in_worker, chunk))
            if len(pending) >= workers * _IN_FLIGHT_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{report.path}: a worker process died while preparing it, most likely for want of memory. "
            f"Use fewer than data.workers={workers}."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_state: list[Any] = []  # (Preparer, empty report) of this worker process


def _start_worker(make_preparer: bytes, empty: SourceReport) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_state[:] = [make_in_worker(make_preparer), empty]


def make_in_worker(make_preparer: bytes) -> Preparer:
    """The Preparer of a process that does nothing else. `make_preparer` comes pickled, so that this runs
    before transformers is imported for it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # transformers imports torch where it finds it: 200 MB a worker, for text that needs none.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]
    preparer: Preparer = pickle.loads(make_preparer)()
    _return_freed_memory()
    return preparer


def _end_with_parent() -> None:
    """A killed parent cannot end its workers; each would wait for ever for its next chunk."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _return_freed_memory() -> None:
    """Give back to the system what reading a tokenizer took for a moment: 80 MB for Qwen's, in each
    worker."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _in_worker(chunk: Chunk) -> tuple[bytes, SourceReport]:
    return prepare_chunk(_worker_state[0], _worker_state[1], chunk)


def prepare_chunk(preparer: Preparer, empty: SourceReport, chunk: Chunk) -> tuple[bytes, SourceReport]:
    """One chunk of rows as an Arrow stream of its examples, and its counts."""
    import pyarrow as pa

    first, rows = chunk
    counts = SourceReport(empty.path, empty.format)
    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for i, outcome in enumerate(preparer.prepare(rows)):
        counts.add(outcome)
        for example in outcome.examples:
            columns["input_ids"].append(example.input_ids)
            columns["spans"].append(example.spans.reshape(-1))
            columns["span_weights"].append(example.span_weights)
            columns["row"].append(first + i)
            columns["length"].append(len(example.input_ids))
            columns["num_targets"].append(example.num_targets)
            columns["fingerprint"].append(fingerprint(example))
            columns["place"].append(outcome.place)
            columns["side"].append(example.side)
            columns["margin"].append(example.margin)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _schema()) as stream:
        if columns["row"]:
            arrays = [
                _lists(columns[field.name], field.type)
                if pa.types.is_list(field.type)
                else pa.array(columns[field.name], type=field.type)
                for field in _schema()
            ]
            stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_schema()))
    return sink.getvalue().to_pybytes(), counts


def _lists(arrays: list[NDArray[Any]], kind: Any) -> Any:
    """A column of lists, without a Python object for each token."""
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)), type=kind)


def fingerprint(example: Example) -> int:
    """64 bits that are equal for equal tokens with equal targets."""
    digest = hashlib.blake2b(example.input_ids.tobytes(), digest_size=8)
    digest.update(example.spans.tobytes())
    return int.from_bytes(digest.digest(), "little")


def read_example(row: dict[str, Any]) -> Example:
    """An example from a row of the prepared data set (numpy format)."""
    return Example(
        np.asarray(row["input_ids"], dtype=np.int32),
        np.asarray(row["spans"], dtype=np.int32).reshape(-1, 2),
        np.asarray(row["span_weights"], dtype=np.float32),
        side=int(row["side"]),
        margin=float(row["margin"]),
    )


def write_raw(folder: Path, rows: Callable[[], Iterator[RawRow]]) -> Any:
    """The undecoded rows as a memory-mapped data set, for `loading: lazy`: random access without
    tokenising."""
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema({"place": pa.string(), "payload": pa.large_binary(), "problem": pa.string()})

    def build(building: Path) -> None:
        with (
            pa.OSFile(str(building / "rows.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as stream,
        ):
            for _, chunk in chunks_of(rows()):
                columns = zip(*map(pack_raw, chunk), strict=True)
                arrays = [
                    pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)
                ]
                stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))

    _build_once(folder, build)
    return Dataset.from_file(str(folder / "rows.arrow"))


def pack_raw(row: RawRow) -> tuple[str, bytes, str | None]:
    """A raw row as plain columns: place, JSON bytes, and the problem a reader met (reason and detail as
    JSON)."""
    if isinstance(row.payload, BadRow):
        return row.place, b"", json.dumps([row.payload.reason, row.payload.detail])
    if isinstance(row.payload, bytes):
        return row.place, row.payload, None
    return row.place, json.dumps(row.payload, ensure_ascii=True).encode(), None


def unpack_raw(place: str, payload: bytes, problem: str | None) -> RawRow:
    """The inverse of `pack_raw`."""
    return RawRow(place, BadRow(*json.loads(problem)) if problem else payload)

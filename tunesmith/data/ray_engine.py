"""Preparing on the machines of a Ray cluster: the same rows, examples and account as on one machine.

    driver            groups of files --> a reader each; merges the accounts, in order
    reader (a task)   its files' rows --chunks--> parts; hands each to a worker, passes on its account
    worker (a task)   part --> examples-GROUP-PART.arrow in the cache folder, and its account

Rows go from reader to worker and examples from worker to disk: neither passes through the driver. What is
being worked on at a time is bounded by `data.workers` parts, or two for each CPU. Rows are numbered through
all files, so the rows of every group but the last are counted first.

Plain tasks and not Ray Data: each shard must be written under its own name, and its account come back in the
order of the files. A task that is lost with its machine is run again by Ray and writes the same shard again.

All machines see the working directory, the sources and `data.cache_dir` under the same paths, and have the
same tunesmith.
"""

from __future__ import annotations

import os
import pickle
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.config import Config, SourceConfig
from tunesmith.data import cache
from tunesmith.data.prepare import Preparer
from tunesmith.data.records import RawRow
from tunesmith.data.report import SourceReport
from tunesmith.data.sources import is_hub_id, iter_rows, resolve_files
from tunesmith.errors import ConfigError, DataError, MissingExtraError, TunesmithError

_PARTS_PER_CPU = 8  # at least, of what is large enough: the last part of all keeps few waiting
# Bytes of rows of a part, which a worker holds in memory. Shards of a terabyte are 16,000 files.
_LEAST_PART, _LARGEST_PART = 1 << 20, 64 << 20


@contextmanager
def ray_cluster(address: str | None, workers: int | None) -> Iterator[None]:
    """Connected to the cluster at `address` (HOST:PORT, or auto: one that was started on this machine), else
    to the one that RAY_ADDRESS names; without either Ray is started here, with `workers` processes or one a
    core, and stopped afterwards.

    Raises MissingExtraError without ray, ConfigError where no cluster can be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers unless told
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray", "ray", "ray") from error
    if workers == 0:
        raise ConfigError("data.workers=0 asks for none, and --engine ray has rows prepared by workers.")
    if ray.is_initialized():
        yield  # by whoever calls us from Python; it is not ours to stop
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: Ray's client protocol is not supported. Run this on a machine of the "
            "cluster, with --ray-address auto."
        )
    if address is not None and address != "auto":
        _knock(address)
    here: dict[str, Any] = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**({"address": address} if address else here), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"--ray-address {address or 'none'}: no Ray cluster can be used there: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]} Start one with `ray start --head`, or "
            "leave the address out to start Ray on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise ConfigError where nothing listens at HOST:PORT; Ray itself would try for five minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster can be reached there: {error}. Expected HOST:PORT as "
            "`ray start --head` prints it, or auto."
        ) from error


@dataclass(frozen=True)
class _Job:
    """What every task of a source is told. `make_preparer` is a reference to the pickled callable, in a
    tuple, so that only a process that has no Preparer yet fetches it."""

    path: str
    format: str
    folder: Path
    working_directory: Path
    code: str
    max_row_bytes: int
    part_bytes: int
    make_preparer: tuple[Any]


_Group = list[SourceConfig]  # a file each


def ray_engine(
    source: SourceConfig,
    config: Config,
    make_preparer: Callable[[], Preparer],
    report: SourceReport,
    progress: cache.Progress,
    folder: Path,
) -> None:
    """Prepares on the cluster that this process is connected to (`ray_cluster`); an `Engine` of loading.py.

    Raises what preparing here does, and DataError where a machine of the cluster lacks what it needs or tasks
    die."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_once = config.data.workers or 2 * cpus
    files, sizes = _files(source)
    part_bytes = min(max(sum(sizes) // (_PARTS_PER_CPU * cpus), _LEAST_PART), _LARGEST_PART)
    job = _Job(
        source.path,
        report.format,
        folder.absolute(),
        Path.cwd(),
        cache.code_version(),
        config.data.max_row_bytes,
        part_bytes,
        (ray.put(pickle.dumps(make_preparer)),),
    )
    count = ray.remote(num_cpus=1)(_count)
    read = ray.remote(num_cpus=0, num_returns="streaming", scheduling_strategy="SPREAD")(_read)
    groups = _groups(files, sizes, part_bytes)
    counted = [count.remote(job, group) for group, _ in groups[:-1]]
    readers: deque[tuple[Any, int]] = deque()  # and how many parts each may have in the works

    def collect() -> None:
        for account in readers[0][0]:
            counts = ray.get(account)
            report.merge(counts)
            progress(counts.rows_read)
        readers.popleft()

    try:
        with _in_our_words(source.path):
            first = 0
            for number, (group, size) in enumerate(groups):
                share = at_once if is_hub_id(source.path) else min(at_once, -(-size // part_bytes) or 1)
                while readers and sum(each for _, each in readers) + share > at_once:
                    collect()
                readers.append((read.remote(job, group, number, first, share), share))
                first += ray.get(counted[number]) if number < len(counted) else 0
            while readers:
                collect()
    finally:
        for task in [*counted, *(reader for reader, _ in readers)]:
            ray.cancel(task)
        # Their files lie in a folder that is about to be removed.
        ray.wait([reader.completed() for reader, _ in readers], num_returns=len(readers), timeout=10)
    for left_over in folder.glob("*.tmp"):
        left_over.unlink()
    if not report.rows_read:
        cache.write_shard(folder / "examples.arrow", (), report, progress)


def _files(source: SourceConfig) -> tuple[list[SourceConfig], list[int]]:
    """Each file as a source of its own, and its bytes; a hub data set, whose bytes nobody knows, is one."""
    if is_hub_id(source.path):
        return [source], [0]
    files = resolve_files(source.path)
    return (
        [source.model_copy(update={"path": str(file)}) for file in files],
        [file.stat().st_size for file in files],
    )


def _groups(files: list[SourceConfig], sizes: list[int], least: int) -> list[tuple[_Group, int]]:
    """Files that follow one another and have `least` bytes together, with their bytes; the last may have
    less."""
    groups: list[tuple[_Group, int]] = []
    group: _Group = []
    total = 0
    for file, size in zip(files, sizes, strict=True):
        group.append(file)
        total += size
        if total >= least or file is files[-1]:
            groups.append((group, total))
            group, total = [], 0
    return groups


@contextmanager
def _in_our_words(path: str) -> Iterator[None]:
    """Ray's errors as ours: what a task raised itself, and DataError for what befell one."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # a reader's may hold a worker's
            cause = cause.cause
        if isinstance(cause, ray.exceptions.RayError):
            said = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no reason given'])[0]}"
            raise DataError(
                f"{path}: a Ray task died while preparing it, and so did those that tried again ({said}). If "
                "it was for want of memory, use fewer at a time: data.workers."
            ) from error
        if isinstance(cause, TunesmithError):
            raise cause from None
        raise


# --- what runs on the cluster


def _settle(job: _Job) -> None:
    """Make this process see what the driver sees. Raises DataError where it cannot."""
    machine = socket.gethostname()
    if cache.code_version() != job.code:
        raise DataError(
            f"{machine}: the data room of its tunesmith differs from that of the machine that asks. Install "
            "the same version on all machines of the cluster."
        )
    for folder, name in ((job.working_directory, "working directory"), (job.folder, "data.cache_dir")):
        if not folder.is_dir():
            raise DataError(
                f"{machine}: does not see the folder {folder}. The working directory, data.cache_dir and the "
                f"sources must lie on a disk that all machines of the cluster share; here it is the {name}."
            )
    os.chdir(job.working_directory)  # so that relative paths, which stand in every place, mean the same


def _rows(job: _Job, group: _Group) -> Iterator[RawRow]:
    return chain.from_iterable(iter_rows(file, max_row_bytes=job.max_row_bytes) for file in group)


def _count(job: _Job, group: _Group) -> int:
    """The number of rows of a group of files."""
    _settle(job)
    return sum(1 for _ in _rows(job, group))


def _read(job: _Job, group: _Group, number: int, first: int, at_once: int) -> Iterator[SourceReport]:
    """Read a group of files, the first row of which is row `first` of the source, have its parts prepared,
    `at_once` of them at a time, and yield the account of each, in order."""
    import ray

    _settle(job)
    prepare = ray.remote(num_cpus=1)(_prepare)
    accounts: deque[Any] = deque()  # of parts, in order
    running: list[Any] = []
    for part_number, part in enumerate(_parts(cache.chunks_of(_rows(job, group), first), job.part_bytes)):
        while len(running) >= at_once:
            _, running = ray.wait(running)
        account = prepare.remote(job, f"examples-{number:06}-{part_number:06}.arrow", part)
        accounts.append(account)
        running.append(account)
        while accounts and ray.wait([accounts[0]], timeout=0)[0]:
            yield ray.get(accounts.popleft())
    while accounts:
        yield ray.get(accounts.popleft())


def _parts(chunks: Iterator[cache.Chunk], part_bytes: int) -> Iterator[list[cache.Chunk]]:
    """Chunks that one task prepares: of `part_bytes` or a little more."""
    part: list[cache.Chunk] = []
    size = 0
    for chunk in chunks:
        part.append(chunk)
        size += sum(map(cache.size_of, chunk[1]))
        if size >= part_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _prepare(job: _Job, shard: str, part: list[cache.Chunk]) -> SourceReport:
    """Prepare a part to a shard of the cache folder; its account."""
    _settle(job)
    preparer, empty = _preparer(job), SourceReport(job.path, job.format)
    report = SourceReport(job.path, job.format)
    prepared = (cache.prepare_chunk(preparer, empty, chunk) for chunk in part)
    # A task that was taken for lost may still be writing.
    unfinished = job.folder / f"{shard}.{uuid.uuid4().hex}.tmp"
    cache.write_shard(unfinished, prepared, report, lambda _: None)
    unfinished.replace(job.folder / shard)
    return report


_held: dict[str, Preparer] = {}  # the one of this process, by the reference it was made from


def _preparer(job: _Job) -> Preparer:
    import ray

    (made_from,) = job.make_preparer
    if made_from.hex() not in _held:
        _held.clear()
        _held[made_from.hex()] = cache.make_in_worker(ray.get(made_from))
    return _held[made_from.hex()]

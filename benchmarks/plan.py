"""The step plan at 1e3 to 1e7 examples: planning, splitting a step, finding shared prefixes, fetching rows.

    python -m benchmarks.plan [--out benchmarks/plan.json]

Lengths are drawn evenly from 20 to 999 tokens; steps of 32 rows, passes of 8192 tokens, one rank, one epoch.
Shared prefixes are looked for in examples of 300 random tokens, and in examples that go on from one prefix of
600 tokens with 50 of their own, in Arrow chunks of 256 rows as the cache has them. Rows are fetched through
the loader from an Arrow file of 64 tokens a row, steps in the order of the plan, no worker process. Memory is
the peak of what numpy and Python allocate while planning, over the inputs. One thread. Prints and writes one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.rows import CachedRows
from tunesmith.packing.collate import collate_flat
from tunesmith.packing.loader import plan_loader
from tunesmith.packing.plan import RowSource, StepPlan, make_plan
from tunesmith.packing.sharing import Sharing

_BATCH_SIZE = 32
_CHUNK_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("plan.json"))
    out = parser.parse_args().out
    result = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "datasets": datasets.__version__,
        "planning": [_planning(10**power) for power in range(3, 8)],
        "sharing": [
            _sharing(10**power, prefix, own) for prefix, own in ((0, 300), (600, 50)) for power in range(3, 7)
        ],
        "loading": [_loading(10**power) for power in (3, 6)],
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _planning(num_examples: int) -> dict[str, Any]:
    lengths = np.random.default_rng(0).integers(20, 1000, num_examples).astype(np.int32)
    plan, plan_s = _plan(lengths, None)
    tracemalloc.start()
    _plan(lengths, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "examples": num_examples,
        "passes": plan.passes,
        "plan_s": round(plan_s, 4),
        "plan_peak_mib": round(peak / 2**20, 1),
        "split_us_per_step": _split_us(plan),
    }


def _sharing(num_examples: int, prefix: int, own: int) -> dict[str, Any]:
    chunks = list(_chunks(num_examples, prefix, own))
    start = time.perf_counter()
    sharing = Sharing.of_tokens(chunks)
    build_s = time.perf_counter() - start
    plan, plan_s = _plan(np.full(num_examples, prefix + own, np.int32), sharing)
    return {
        "examples": num_examples,
        "common_prefix": prefix,
        "own_tokens": own,
        "build_s": round(build_s, 4),
        "plan_s": round(plan_s, 4),
        "split_us_per_step": _split_us(plan),
    }


def _loading(num_rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.arrow"
        _write(file, num_rows)
        rows = CachedRows(datasets.Dataset.from_file(str(file)))
        plan, _ = _plan(rows.column("length").astype(np.int32), None)
        loader, _ = plan_loader(
            rows,  # type: ignore[arg-type]
            plan,
            rank=0,
            collate=collate_flat,
            workers=0,
            pin_memory=False,
        )
        seconds, fetched = [], 0
        for _ in range(6):  # the same 25 steps again and again; the first time the file is read from disk
            passes = iter(loader)
            next(passes)  # the order of the epoch is drawn here
            start = time.perf_counter()
            packs = list(islice(passes, 25 * plan.passes))
            seconds.append(time.perf_counter() - start)
            fetched = sum(len(pack["rows"]) for pack in packs)
        return {"rows": num_rows, "us_per_row": round(1e6 * sorted(seconds[1:])[2] / fetched, 1)}


def _plan(lengths: NDArray[np.int32], sharing: Sharing | None) -> tuple[StepPlan, float]:
    row_starts = np.arange(len(lengths) + 1)
    start = time.perf_counter()
    plan = make_plan(
        lengths,
        row_starts,
        sources=[RowSource(0, len(lengths))],
        batch_size=_BATCH_SIZE,
        micro_batch_tokens=8192,
        num_ranks=1,
        seed=0,
        epochs=1.0,
        max_steps=None,
        one_example_a_pass=False,
        sharing=sharing,
    )
    return plan, time.perf_counter() - start


def _split_us(plan: StepPlan) -> float:
    """Median over the first steps of an epoch."""
    rows = plan.rows_of_epoch(0)
    seconds = []
    for step in range(min(2000, len(rows) // _BATCH_SIZE)):
        step_rows = rows[step * _BATCH_SIZE : (step + 1) * _BATCH_SIZE]
        start = time.perf_counter()
        plan.split(step_rows)
        seconds.append(time.perf_counter() - start)
    return round(1e6 * float(np.median(seconds)), 1)


def _chunks(
    num_examples: int, prefix: int, own: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    rng = np.random.default_rng(0)
    common = rng.integers(0, 50_000, prefix, dtype=np.int32)
    for start in range(0, num_examples, _CHUNK_ROWS):
        size = min(_CHUNK_ROWS, num_examples - start)
        tokens = np.empty((size, prefix + own), dtype=np.int32)
        tokens[:, :prefix] = common
        tokens[:, prefix:] = rng.integers(0, 50_000, (size, own), dtype=np.int32)
        yield tokens.reshape(-1), np.arange(0, tokens.size + 1, prefix + own, dtype=np.int32)


def _write(file: Path, num_rows: int) -> None:
    """A file of the columns that a prepared data set has."""
    stream = None
    with pa.OSFile(str(file), "wb") as sink:
        for n, (values, offsets) in enumerate(_chunks(num_rows, 0, 64)):
            size = len(offsets) - 1
            first = n * _CHUNK_ROWS
            spans = pa.array(np.tile(np.array([32, 64], np.int32), size))
            batch = pa.RecordBatch.from_pydict(
                {
                    "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
                    "spans": pa.ListArray.from_arrays(np.arange(0, 2 * size + 1, 2, dtype=np.int32), spans),
                    "span_weights": pa.ListArray.from_arrays(
                        np.arange(size + 1, dtype=np.int32), pa.array(np.ones(size, np.float32))
                    ),
                    "row": np.arange(first, first + size),
                    "length": np.full(size, 64, np.int32),
                    "num_targets": np.full(size, 32, np.int32),
                    "fingerprint": np.arange(first, first + size, dtype=np.uint64),
                    "place": [f"rows.jsonl:{first + i}" for i in range(size)],
                    "side": np.zeros(size, np.int8),
                    "margin": np.zeros(size, np.float32),
                }
            )
            stream = stream or pa.ipc.new_stream(sink, batch.schema)
            stream.write_batch(batch)
        assert stream is not None
        stream.close()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()

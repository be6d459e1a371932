"""Preparing a large file: rows/s, tokens/s and memory, on generated conversations.

    python -m benchmarks.prepare TOKENIZER [--gigabytes 1] [--workers 2]

Writes a jsonl of the size asked for (seeded; about 900 bytes a row), prepares it as `data.loading: cached`
does, opens it again from the cache, and prints one JSON object. Memory is the peak of the resident memory of
this process, of its largest worker, and of all together, sampled twice a second; and together with pages that
processes share counted once (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tunesmith.config import load_config
from tunesmith.data.loading import load_data
from tunesmith.data.tokenizer import load_tokenizer

_WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
]


def write_rows(file: Path, size: int) -> int:
    """Write at least `size` bytes of conversations; returns the number of rows."""
    rng = random.Random(0)
    rows = written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            turns = [" ".join(rng.choices(_WORDS, k=rng.randint(10, 120))) for _ in range(2)]
            messages = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]
            written += stream.write(json.dumps({"messages": messages}) + "\n")
            rows += 1
    return rows


class PeakMemory:
    """Resident memory of this process and its children, sampled in a thread."""

    def __init__(self) -> None:
        self.own = self.worker = self.together = self.proportional = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.5):
            children, shares = [], []
            for child in process.children(recursive=True):
                try:
                    children.append(child.memory_info().rss)
                    shares.append(child.memory_full_info().pss)
                except psutil.NoSuchProcess:
                    continue
            own = process.memory_info().rss
            self.proportional = max(self.proportional, process.memory_full_info().pss + sum(shares))
            self.own = max(self.own, own)
            self.worker = max([self.worker, *children])
            self.together = max(self.together, own + sum(children))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = write_rows(file, int(options.gigabytes * 2**30))
        config = load_config(
            {
                "model": {"path": options.tokenizer},
                "data": {
                    "train": str(file),
                    "cache_dir": f"{folder}/cache",
                    "workers": options.workers,
                },
            }
        )
        tokenizer = load_tokenizer(config)
        with PeakMemory() as memory:
            start = time.perf_counter()
            data = load_data(config, tokenizer)
            seconds = time.perf_counter() - start
        (report,) = data.train.reports
        assert report.rows_kept == rows
        start = time.perf_counter()
        load_data(config, tokenizer)
        again = time.perf_counter() - start
        result = {
            "bytes": file.stat().st_size,
            "rows": rows,
            "tokens": report.tokens,
            "workers": options.workers,
            "cores": os.cpu_count(),
            "seconds": round(seconds, 1),
            "rows_per_s": round(rows / seconds),
            "tokens_per_s": round(report.tokens / seconds),
            "seconds_from_cache": round(again, 2),
            "peak_gib": {
                "this process": round(memory.own / 2**30, 3),
                "largest worker": round(memory.worker / 2**30, 3),
                "together": round(memory.together / 2**30, 3),
                "together, shared pages once": round(memory.proportional / 2**30, 3),
            },
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

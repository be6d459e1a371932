"""How long training stands still for a checkpoint, saved in its own thread and beside it.

    python -m benchmarks.checkpoint_stall [--parameters 50] [--saves 5] [--folder DIR]

A checkpoint of so many million trained float32 parameters with AdamW's two moments is saved below DIR
(default: here). Between two saves a fixed number of matrix products stands for training. Printed as JSON,
medians in seconds: `stall_s`, the time until training goes on; `work_s`, the products alone;
`work_while_saving_s`, the products while the checkpoint is written, where that is beside them; `save_s`, from
the call until the checkpoint is complete.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.saving import Saver
from tunesmith.training.state_files import Files, state_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=50, help="millions")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    weights = {str(i): torch.randn(1000, 1000) for i in range(max(1, round(options.parameters)))}
    moments = {name: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for name, w in weights.items()}
    files: Files = {
        "model.safetensors": weights_file(weights),
        "optimizer.safetensors": state_file({"state": moments}),
        "scheduler.safetensors": state_file({}),
        "rng-0.safetensors": state_file({}),
        "trainer_state.json": b"{}",
        "progress.json": b"{}",
    }
    size = sum(map(len, files.values()))
    results = {
        name: _measure(files, options, asynchronous=asynchronous)
        for name, asynchronous in (("in training's thread", False), ("asynchronous", True))
    }
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "checkpoint_mib": round(size / 2**20, 1),
                "results": results,
            },
            indent=2,
        )
    )


def _measure(files: Files, options: Any, *, asynchronous: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {"stall_s": [], "work_s": [], "work_while_saving_s": [], "save_s": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = Saver(
            Checkpoints(Path(folder) / "checkpoints", keep=1),
            Path(folder) / "metrics.jsonl",
            asynchronous=asynchronous,
            on_error="stop",
            say=print,
        )
        for step in range(1, options.saves + 1):
            times["work_s"].append(_work())
            start = time.perf_counter()
            saver.save(step, files, {"ranks": 1}, best=None)
            times["stall_s"].append(time.perf_counter() - start)
            times["work_while_saving_s"].append(_work())
            saver.finish()
            times["save_s"].append(time.perf_counter() - start)
    if not asynchronous:
        times["save_s"] = times["stall_s"]
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def _work() -> float:
    matrix = torch.ones(1024, 1024)
    start = time.perf_counter()
    for _ in range(40):
        matrix @ matrix
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

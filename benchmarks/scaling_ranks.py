"""How much faster two processes of one thread are than one, on the real demo model.

    python -m benchmarks.scaling_ranks MODEL ROWS.jsonl [--steps 4] [--repeats 2] [--strategy ddp]

Runs both in turns, `--repeats` times, each over the same rows; tokens/s is the median over the steps but the
first. Printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from tunesmith.training.run_folder import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    options = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for ranks in speeds:
                run = f"{ranks}-{repeat}"
                config = {
                    "run": {"name": run, "output_dir": folder},
                    "model": {"path": options.model},
                    "data": {"train": options.rows, "max_length": 1024, "cache_dir": f"{folder}/cache"},
                    "train": {"max_steps": options.steps, "batch_size": 16, "micro_batch_tokens": 1024},
                    "checkpoint": {"every_steps": 1000},
                    "distributed": {"strategy": options.strategy if ranks > 1 else "ddp"},
                }
                file = Path(folder, f"{run}.yaml")
                file.write_text(yaml.safe_dump(config), encoding="utf-8")
                subprocess.run(
                    [sys.executable, "-m", "tunesmith", "launch", "--nproc", str(ranks), "sft", str(file)],
                    check=True,
                    stdout=sys.stderr,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
                steps = [line for line in read_metrics(Path(folder, run, "metrics.jsonl")) if "loss" in line]
                speeds[ranks].append(statistics.median(line["tokens_per_s"] for line in steps[1:]))
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "strategy": options.strategy,
                "tokens_per_s": {str(ranks): values for ranks, values in speeds.items()},
                "ratio_of_medians": statistics.median(speeds[2]) / statistics.median(speeds[1]),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()

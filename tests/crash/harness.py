"""Kills a run at a point, starts the same command again, and looks at what came of it.

Driver            starts runs in processes of their own (driver.py)
train_untouched   the run that nothing happens to, and its file operations
operation_points, time_points     where to kill
try_point         kill, look, go on, compare --> Outcome
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import conversations, make_tiny_model, write_rows

from tunesmith.inspect.verify_resume import metrics_without_times, read_tensors
from tunesmith.training.checkpoints import Checkpoints

# name -> sections that differ from _BASE: 10 steps in two epochs, checkpoints at 3, 6, 9 and 10, evaluations
# at 4, 8 and 10.
SCENARIOS: dict[str, dict[str, dict[str, Any]]] = {
    "LoRA": {},
    "asynchronous": {"checkpoint": {"asynchronous": True}},
    "full, NEFTune": {
        "adapter": {"method": "none"},
        "train": {"learning_rate": 1e-3, "neftune_alpha": 5.0, "gradient_checkpointing": True},
    },
    "streaming, unpacked": {
        "data": {"loading": "streaming", "shuffle_buffer": 5, "packing": "none"},
        "train": {"epochs": None, "max_steps": 10},
    },
}
_BASE: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_length": 256},
    "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "micro_batch_tokens": 512},
    "eval": {"every_steps": 4},
    "checkpoint": {"every_steps": 3, "keep": 2},
}


def scenario_config(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The config of a scenario, with its model and data in `folder`."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        write_rows(folder / "train.jsonl", conversations(20))
        write_rows(folder / "valid.jsonl", conversations(4, seed=11))
    config = {section: dict(values) for section, values in _BASE.items()}
    changes = SCENARIOS[name]
    if changes.get("adapter") == {"method": "none"}:
        config["adapter"] = {}
    for section, values in changes.items():
        config[section] |= values
    config["model"]["path"] = str(folder / "model")
    config["data"] |= {
        "train": str(folder / "train.jsonl"),
        "valid": str(folder / "valid.jsonl"),
        "cache_dir": str(folder / "cache"),
    }
    config["run"] = {"output_dir": str(folder / "runs" / name.replace(", ", "-")), "seed": 3}
    return config


class Driver:
    """A process that starts runs, one at a time."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tests.parent)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        assert json.loads(self._answers.readline()) == "ready"

    def run(self, config: dict[str, Any], log: Path, **kill: Any) -> tuple[int, float, list[list[str]]]:
        """`tunesmith sft` on a config: exit status, seconds, and the file operations it began."""
        file, operations = log.with_suffix(".yaml"), log.with_suffix(".operations")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        order = {"arguments": ["sft", str(file)], "log": str(log), "operations": str(operations), **kill}
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        answer = json.loads(self._answers.readline())
        begun = [json.loads(line) for line in operations.read_text(encoding="utf-8").splitlines()]
        return answer["status"], answer["seconds"], begun

    def close(self) -> None:
        self._orders.close()
        self._process.wait()
        self._answers.close()


@dataclass(frozen=True)
class Untouched:
    """The run that nothing happened to."""

    scenario: str
    config: dict[str, Any]
    folder: Path
    operations: list[list[str]]
    seconds: float


@dataclass(frozen=True)
class Point:
    """Before the file operation of this number, counted from 1, or in its midst; or at a time."""

    operation: int | None = None
    is_midway: bool = False
    after_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a point. `found` is what the next start had before it; `fault` is None if that run ended
    as the untouched one did."""

    scenario: str
    point: str
    what: str
    found: str
    fault: str | None


def train_untouched(driver: Driver, scenario: str, folder: Path) -> Untouched:
    """Twice: the first run also fills the caches, which the time points must not wait for."""
    config = scenario_config(scenario, folder)
    for name in ("warm", "untouched"):
        run = Path(config["run"]["output_dir"]) / name
        run.parent.mkdir(parents=True, exist_ok=True)
        named = config | {"run": config["run"] | {"name": name}}
        status, seconds, operations = driver.run(named, run.with_suffix(".log"))
        assert status == 0, run.with_suffix(".log").read_text()
    if (problem := difference(run.with_name("warm"), run)) is not None:
        raise AssertionError(f"two untouched runs differ: {problem}")
    return Untouched(scenario, config, run, operations, seconds)


def operation_points(untouched: Untouched) -> list[Point]:
    """Before every file operation, and in the midst of those that are not done in one instant."""
    points = []
    for number, (name, path) in enumerate(untouched.operations, 1):
        points.append(Point(number))
        if name == "write" or (name == "remove" and Path(path).name.endswith((".gone", ".old"))):
            points.append(Point(number, is_midway=True))
    return points


def time_points(untouched: Untouched, number: int) -> list[Point]:
    """Spread evenly over the run."""
    return [Point(after_s=untouched.seconds * (i + 1) / (number + 1)) for i in range(number)]


def spread(points: Sequence[Point], number: int) -> list[Point]:
    """So many of them, evenly."""
    return [points[i * len(points) // number] for i in range(min(number, len(points)))]


def try_point(driver: Driver, untouched: Untouched, point: Point, name: str) -> Outcome:
    """Kill a run of this name at the point, and go on with the same command."""
    config = untouched.config | {"run": untouched.config["run"] | {"name": name}}
    run = untouched.folder.with_name(name)
    log = run.with_suffix(".log")
    status, _, begun = driver.run(
        config, log, kill_at=point.operation, is_midway=point.is_midway, kill_after_s=point.after_s
    )
    found, fault = _found(run, begun)
    if point.operation is not None and status != -signal.SIGKILL:
        fault = f"was not killed, but ended with {status}"
    if fault is None:
        status, _, _ = driver.run(config, log)
        fault = f"ended with {status}: {_last_line(log)}" if status else difference(untouched.folder, run)
    if fault is None:
        shutil.rmtree(run)
    return Outcome(untouched.scenario, *_described(point, begun, run), found, fault)


def _described(point: Point, begun: list[list[str]], run: Path) -> tuple[str, str]:
    """Where a run was killed, and at what, for the report."""
    if point.operation is None:
        return f"{point.after_s:.2f} s", f"after {len(begun)} file operations"
    operation, path = begun[-1]
    place = Path(path).relative_to(run.parent).as_posix().removeprefix(f"{run.name}/")
    when = "in the midst of" if point.is_midway else "before"
    return str(point.operation), f"{when} {operation} {place}"


def _found(run: Path, begun: list[list[str]]) -> tuple[str, str | None]:
    """What the next start finds, in words, and what should not be so: a folder with the name of a checkpoint
    that is damaged, or an older newest checkpoint than was renamed into place."""
    if not run.exists():
        return "nothing", None
    newest, problems = Checkpoints(run / "checkpoints", keep=9).newest()
    step = newest.step if newest else 0
    renamed = [Path(path).name for name, path in begun[:-1] if name == "rename"]
    complete = max((int(name[5:]) for name in renamed if name.startswith("step-")), default=0)
    left = [*run.glob(".*"), *(run / "checkpoints").glob(".*")]
    found = f"step {step}" if step else "no checkpoint"
    found += "".join(f", {path.name}" for path in sorted(left))
    if problems:
        return found, "; ".join(problems)
    return found, f"step {complete} had been complete" if complete > step else None


def difference(one: Path, other: Path) -> str | None:
    """What differs between two runs that have ended, or None: every tensor of best/, final/ and the last
    checkpoint, what its state holds beside tensors, the metrics but for times, and that no checkpoint is
    missing."""
    kept = [sorted(folder.name for folder in (run / "checkpoints").iterdir()) for run in (one, other)]
    # A kill after the last save and before its deletions leaves an older checkpoint too; nothing saves again.
    if not set(kept[0]) <= set(kept[1]) or kept[0][-1] != kept[1][-1]:
        return f"checkpoints {kept[1]}, not {kept[0]}"
    for folder in ("best", "final", f"checkpoints/{kept[0][-1]}"):
        names = [sorted(file.name for file in (run / folder).iterdir()) for run in (one, other)]
        if names[0] != names[1]:
            return f"files of {folder}: {names[1]}, not {names[0]}"
        for name in (name for name in names[0] if name.endswith(".safetensors")):
            first, second = (read_tensors(run / folder / name) for run in (one, other))
            if first[1] != second[1] or first[0].keys() != second[0].keys():
                return f"{folder}/{name}: what it holds beside tensors"
            for tensor in first[0]:
                if not torch.equal(first[0][tensor], second[0][tensor]):
                    return f"{folder}/{name}: {tensor}"
    lines = [metrics_without_times(run) for run in (one, other)]
    for number, (a, b) in enumerate(zip(*lines, strict=False), 1):
        if a != b:
            return f"metrics.jsonl, line {number}: {b}, not {a}"
    if len(lines[0]) != len(lines[1]):
        return f"metrics.jsonl has {len(lines[1])} lines, not {len(lines[0])}"
    return None


def _last_line(log: Path) -> str:
    return ([line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or [""])[-1]

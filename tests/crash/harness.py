"""Kills a run at a point, starts the same command again, and looks at what came of it.

Driver            starts runs in processes of their own (driver.py)
train_untouched   the run that nothing happens to, and the places it came to
operation_points, training_points, time_points, points_of_one_rank, points_killed_twice     where to kill
try_point         kill, look, go on, compare --> Outcome
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tiny import conversations, judged_pairs, labelled_answers, make_tiny_model, write_rows

from tunesmith.inspect.verify_resume import metrics_without_times, read_tensors
from tunesmith.training.checkpoints import Checkpoints

Sections = dict[str, dict[str, Any]]
_TRAINING = ("rows", "pass", "update", "evaluation")  # of the places that driver.py lists


@dataclass(frozen=True)
class Scenario:
    """Sections of the config that differ from _BASE, and the number of processes."""

    sections: Sections
    ranks: int = 1


# 12 steps in two epochs, of which the last one of each holds 2 rows and not 4; checkpoints at 3, 6, 9 and 12,
# evaluations at 0, 4, 8 and 12, and two passes a step.
_BASE: Sections = {
    "model": {"dtype": "float32"},
    "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_length": 256},
    "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "micro_batch_tokens": 256},
    "eval": {"every_steps": 4},
    "checkpoint": {"every_steps": 3, "keep": 2},
}
SCENARIOS = {
    "LoRA": Scenario({}),
    "asynchronous": Scenario({"checkpoint": {"asynchronous": True}}),
    "full, NEFTune": Scenario(
        {
            "adapter": {"method": "none"},
            "train": {"learning_rate": 1e-3, "neftune_alpha": 5.0, "gradient_checkpointing": True},
        }
    ),
    "streaming, unpacked": Scenario(
        {
            "data": {"loading": "streaming", "shuffle_buffer": 5, "packing": "none"},
            "train": {"epochs": None, "max_steps": 12},
        }
    ),
    "lazy, 2 loader workers": Scenario({"data": {"loading": "lazy"}, "train": {"loader_workers": 2}}),
    "2 ranks": Scenario({}, ranks=2),
    "preference": Scenario({"prefer": {"method": "dpo"}, "train": {"learning_rate": 3e-3}}),
}


def scenario_config(sections: Sections, folder: Path) -> Sections:
    """_BASE with these sections, and its model and data in `folder`."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        write_rows(folder / "train.jsonl", conversations(22))
        write_rows(folder / "valid.jsonl", conversations(6, seed=11))
    config = {section: dict(values) for section, values in _BASE.items()}
    if sections.get("adapter", {}).get("method") == "none":
        config["adapter"] = {}
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    config["model"]["path"] = str(folder / "model")
    config["data"] |= {
        "train": str(folder / "train.jsonl"),
        "valid": str(folder / "valid.jsonl"),
        "cache_dir": str(folder / "cache"),
    }
    config["run"] = {"output_dir": str(folder / "runs"), "seed": 3}
    if method := sections.get("prefer", {}).get("method"):
        config["run"]["recipe"] = "prefer"
        for part, number in (("train", 22), ("valid", 6)):
            rows = labelled_answers(number) if method == "kto" else judged_pairs(number, seed=number)
            config["data"][part] = str(write_rows(folder / f"{part}-{method}.jsonl", rows))
    return config


@dataclass(frozen=True)
class Point:
    """At the place of this number, counted from 1, or in its midst; or at a time. `rank` is the one whose
    places are counted; it is killed together with the others, or alone. `then`: where what goes on is killed
    again."""

    number: int | None = None
    is_midway: bool = False
    after_s: float | None = None
    rank: int = 0
    is_alone: bool = False
    then: Point | None = None

    def kills(self) -> Iterator[Point]:
        """This one, and those that follow it."""
        yield self
        if self.then is not None:
            yield from self.then.kills()


class Ended(NamedTuple):
    """What became of a run: per rank the exit status and the places it came to, each [name, what]."""

    statuses: list[int]
    places: list[list[list[str]]]
    is_hung: bool
    seconds: float


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

    def run(
        self,
        config: Sections,
        log: Path,
        *,
        ranks: int = 1,
        point: Point | None = None,
        kill_before: Sequence[str] | None = None,
    ) -> Ended:
        """What a config is for (sft, unless it says); killed at a point, or before the first place of this
        name."""
        point = point or Point()
        file, places = log.with_suffix(".yaml"), log.with_suffix(".places")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        order = {
            "arguments": [config["run"].get("recipe", "sft"), str(file)],
            "log": str(log),
            "places": str(places),
            "ranks": ranks,
            "kill_at": point.number or kill_before,
            "is_midway": point.is_midway,
            "rank": point.rank,
            "is_alone": point.is_alone,
            "kill_after_s": point.after_s,
        }
        listed = [places, *(places.with_name(f"{places.name}.{rank}") for rank in range(1, ranks))]
        for list_ in listed:
            list_.write_bytes(b"")  # a rank may be killed before it makes it
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        answer = json.loads(self._answers.readline())
        begun = [[json.loads(line) for line in list_.read_bytes().splitlines()] for list_ in listed]
        return Ended(answer["statuses"], begun, answer["is_hung"], answer["seconds"])

    def close(self) -> None:
        self._orders.close()
        self._process.wait()
        self._answers.close()


@dataclass(frozen=True)
class Untouched:
    """The run that nothing happened to. `places` are those of each rank."""

    scenario: str
    config: Sections
    ranks: int
    folder: Path
    places: list[list[list[str]]]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a point. `kind` is what it is counted by, `point` and `what` where it was, `found` what
    the next start had before it; `fault` is None if that run ended as the untouched one did."""

    scenario: str
    kind: str
    point: str
    what: str
    found: str
    fault: str | None


def train_untouched(driver: Driver, scenario: str, folder: Path) -> Untouched:
    """Twice: the first run also fills the caches, which the time points must not wait for."""
    ranks = SCENARIOS[scenario].ranks
    config = scenario_config(SCENARIOS[scenario].sections, folder)
    config["run"]["output_dir"] += "/" + scenario.replace(", ", "-").replace(" ", "-")
    for name in ("warm", "untouched"):
        run = Path(config["run"]["output_dir"]) / name
        run.parent.mkdir(parents=True, exist_ok=True)
        named = config | {"run": config["run"] | {"name": name}}
        ended = driver.run(named, run.with_suffix(".log"), ranks=ranks)
        assert not any(ended.statuses), run.with_suffix(".log").read_text()
    if (problem := difference(run.with_name("warm"), run)) is not None:
        raise AssertionError(f"two untouched runs differ: {problem}")
    return Untouched(scenario, config, ranks, run, ended.places, ended.seconds)


# --- where to kill


def operation_points(untouched: Untouched) -> list[Point]:
    """Before every file operation, and in the midst of those that are not done in one instant."""
    points = []
    for number, (name, what) in enumerate(untouched.places[0], 1):
        if name not in _TRAINING:
            points.append(Point(number))
            is_slow = name == "remove" and Path(what).name.endswith((".gone", ".old"))
            if name in ("write", "append") or is_slow:
                points.append(Point(number, is_midway=True))
    return points


def training_points(untouched: Untouched, rank: int = 0) -> list[Point]:
    """Before every fetch of a step's rows, pass, update and pass of an evaluation."""
    places = enumerate(untouched.places[rank], 1)
    return [Point(number, rank=rank) for number, (name, _) in places if name in _TRAINING]


def time_points(untouched: Untouched, number: int) -> list[Point]:
    """Spread evenly over the run."""
    return [Point(after_s=untouched.seconds * (i + 1) / (number + 1)) for i in range(number)]


def points_of_one_rank(untouched: Untouched, number: int) -> list[Point]:
    """Half in rank 0, which writes, half in the last one; the other is left to itself."""
    last = untouched.ranks - 1
    points = spread([*operation_points(untouched), *training_points(untouched)], number - number // 2)
    points += spread(training_points(untouched, last), number // 2)
    return [replace(point, is_alone=True) for point in points]


def points_killed_twice(untouched: Untouched, number: int) -> list[Point]:
    """Kills all over the run; each run that goes on from there is killed again, at its beginning or later."""
    last = len(untouched.places[0])
    points = []
    for i in range(number):
        first = last * (i + 1) // (number + 1)
        # What goes on has at least the rest of the places before it.
        second = 1 + (last - first - 1) * (i % 4) // 4 + i
        points.append(Point(first, then=Point(min(second, last - first))))
    return points


def spread(points: Sequence[Point], number: int) -> list[Point]:
    """So many of them, evenly."""
    number = min(number, len(points))
    return [points[i * len(points) // number] for i in range(number)]


# --- kill, look, go on, compare


def try_point(driver: Driver, untouched: Untouched, point: Point, name: str) -> Outcome:
    """Kill a run of this name at the point, and go on with the same command."""
    config = untouched.config | {"run": untouched.config["run"] | {"name": name}}
    run = untouched.folder.with_name(name)
    log = run.with_suffix(".log")
    kinds, points, seen, founds = [], [], [], []
    step, fault = 0, None
    for kill in point.kills():
        ended = driver.run(config, log, ranks=untouched.ranks, point=kill)
        kind, where, what = _described(kill, ended, run)
        step, found, fault = _found(run, ended.places[0], step)
        for collected, text in zip((kinds, points, seen, founds), (kind, where, what, found), strict=True):
            collected.append(text)
        if kill.number is not None and ended.statuses[kill.rank] != -signal.SIGKILL:
            fault = f"was not killed, but ended with {ended.statuses}"
        if fault is not None:
            break
    if fault is None:
        ended = driver.run(config, log, ranks=untouched.ranks)
        if ended.is_hung or any(ended.statuses):
            fault = f"ended with {ended.statuses}{' after it hung' * ended.is_hung}: {_last_line(log)}"
        else:
            fault = difference(untouched.folder, run)
    if fault is None:
        shutil.rmtree(run)
    kind = kinds[0] if point.then is None else "twice"
    return Outcome(
        untouched.scenario, kind, *(", then ".join(texts) for texts in (points, seen, founds)), fault
    )


def _described(kill: Point, ended: Ended, run: Path) -> tuple[str, str, str]:
    """How a kill is counted, where it was, and at what."""
    begun = ended.places[kill.rank]
    alone = f" of rank {kill.rank} alone" if kill.is_alone else ""
    others = [status for rank, status in enumerate(ended.statuses) if rank != kill.rank]
    left = f"; the other one {'hung' if ended.is_hung else f'ended with {others[0]}'}" if alone else ""
    if kill.number is None:
        return "at a time", f"{kill.after_s:.2f} s", f"after {len(begun)} places"
    name, place = begun[-1] if begun else ("nothing", "")
    if name not in _TRAINING:
        place = Path(place).relative_to(run.parent).as_posix().removeprefix(f"{run.name}/")
    when = "in the midst of" if kill.is_midway else "before"
    if name == "pass":
        place = f"{begun.count([name, place])} of {place}"
    is_last = " of a last, partial step" if name in ("rows", "pass", "update") and "last" in place else ""
    return f"{when} {name}{is_last}{alone}", str(kill.number), f"{when} {name} {place}{left}"


def _found(run: Path, begun: list[list[str]], before: int) -> tuple[int, str, str | None]:
    """The step that the next start finds, what else in words, and what should not be so: a folder with the
    name of a checkpoint that is damaged, or an older newest checkpoint than was renamed into place, or than
    was found `before` an earlier kill."""
    if not run.exists():
        return 0, "nothing", None
    newest, problems = Checkpoints(run / "checkpoints", keep=9).newest()
    step = newest.step if newest else 0
    renamed = [Path(path).name for name, path in begun[:-1] if name == "rename"]
    complete = max((int(name[5:]) for name in renamed if name.startswith("step-")), default=before)
    left = [*run.glob(".*"), *(run / "checkpoints").glob(".*")]
    found = f"step {step}" if step else "no checkpoint"
    found += "".join(f", {path.name}" for path in sorted(left))
    if problems:
        return step, found, "; ".join(problems)
    return step, found, f"step {complete} had been complete" if complete > step else None


def difference(one: Path, other: Path) -> str | None:
    """What differs between two runs that have ended, or None: every tensor of best/, final/ and the last
    checkpoint, what its state holds beside tensors, the metrics but for times, and that there are the
    same checkpoints."""
    kept = [sorted(folder.name for folder in (run / "checkpoints").iterdir()) for run in (one, other)]
    if kept[0] != kept[1]:
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

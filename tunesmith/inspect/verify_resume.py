"""`tunesmith verify-resume`: whether this config, on this machine, goes on from a checkpoint as if it had
never stopped.

    straight   a short run from its first step to its last
    resumed    the same, killed when the checkpoint of a step is complete, and gone on with

Each is the verb of run.recipe (`tunesmith sft`, if it does not say) in a process of its own, in a temporary
folder.
Compared bit by bit: the checkpoint at the stop, every line of metrics.jsonl but for times, and the last
checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from safetensors import safe_open

from tunesmith.config import Config, dump_config, load_config
from tunesmith.errors import CheckpointError, ConfigError, TrainingError
from tunesmith.models.save import WEIGHTS
from tunesmith.training.checkpoints import (
    OPTIMIZER,
    PROGRESS,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    Checkpoints,
    random_state_file,
)
from tunesmith.training.run_folder import read_metrics

# Measured on the machine, so never the same twice.
TIMES = frozenset({"tokens_per_s", "target_tokens_per_s", "mfu", "peak_memory_gib", "step_s", "eval_s"})
_POLL_S = 0.02
_PARTS = {
    "weights": WEIGHTS,
    "optimiser": (OPTIMIZER,),
    "schedule": (SCHEDULER,),
    "loss scale": (SCALER,),
    "random state": (random_state_file(0),),
    "counters": (TRAINER_STATE, PROGRESS),
}

Line = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What differs: by part of the checkpoint at the stop and of the last one, a sentence each; and the first
    pair of metrics lines that do."""

    at_stop: dict[str, str]
    at_end: dict[str, str]
    lines: tuple[Line | None, Line | None] | None


def verify_resume(config: Config, *, at: int, steps: int | None, console: Console | None = None) -> None:
    """Train `steps` steps (default: twice `at`) straight, and stopped after step `at` and resumed. Raises
    CheckpointError with the first difference and its likely cause, ConfigError where `at` or `steps` cannot
    be, TrainingError if a run fails."""
    steps = steps or 2 * at
    if not 1 <= at < steps:
        raise ConfigError(f"--at {at} --steps {steps}: expected a step before the last one, and after 0.")
    out = console or Console()

    def say(message: str) -> None:
        out.print(Text(message), soft_wrap=True, highlight=False)

    folder = Path(tempfile.mkdtemp(prefix="tunesmith-verify-"))
    is_kept = False
    try:
        findings, compared = _run_both(shortened(config, folder, at, steps), folder, at, steps, say)
        if (message := verdict(findings, at)) is not None:
            is_kept = True
            raise CheckpointError(f"{message}\nBoth runs are kept in {folder}.")
        say(f"identical: {compared}")
    finally:
        if not is_kept:
            shutil.rmtree(folder)


def shortened(config: Config, folder: Path, at: int, steps: int) -> Config:
    """The config of both runs: the user's, but for its length, what it writes and where."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"output_dir": str(folder), "resume": "auto"},
        "train": {"epochs": None, "max_steps": steps, "log_every_steps": 1},
        "checkpoint": {"every_steps": at, "keep": steps, "on_save_error": "stop"},
        "tracking": {"report_to": []},
    }
    if config.data.valid is not None:
        sections["eval"] = {"every_steps": at, "early_stopping_patience": None, "answer_rows": 0}
    values = config.model_dump()
    for section, changed in sections.items():
        values[section] |= changed
    return Config.model_validate(values)


def _run_both(
    config: Config, folder: Path, at: int, steps: int, say: Callable[[str], None]
) -> tuple[Findings, str]:
    """Train, compare; returns what differs and, in words, what was compared."""
    straight, resumed = folder / "straight", folder / "resumed"
    say(f"1 of 3: {steps} steps straight")
    file = folder / "straight.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    _train(file, "run.name=straight")
    # With what the straight run chose, such as the size of passes, which may not come out the same twice.
    file = straight / "config.yaml"
    say(f"2 of 3: the same, killed when step {at} is saved")
    _train(file, "run.name=resumed", until=_checkpoint(resumed, at))
    at_stop = _compare_checkpoints(_checkpoint(straight, at), _checkpoint(resumed, at))
    say(f"3 of 3: going on from step {at}")
    _train(file, "run.name=resumed", f"run.resume={at}")
    last = [_last_checkpoint(run) for run in (straight, resumed)]
    at_end = _compare_checkpoints(*last)
    lines = [metrics_without_times(run) for run in (straight, resumed)]
    tensors = sum(len(read_tensors(file)[0]) for file in last[0].glob("*.safetensors"))
    compared = (
        f"{tensors} tensors of weights, optimiser, schedule and random state after {steps} steps, the "
        f"counters, and {len(lines[0])} lines of metrics (without times)"
    )
    return Findings(at_stop, at_end, first_difference(*lines)), compared


def _train(file: Path, *overrides: str, until: Path | None = None) -> None:
    """The recipe of the config, in a process of its own; killed when the folder `until` is there."""
    recipe = load_config(file).run.recipe or "sft"
    command = [sys.executable, "-m", "tunesmith", recipe, str(file), *overrides]
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (until and until.exists()):
                time.sleep(_POLL_S)
        finally:  # also where the user interrupts us
            is_killed = process.poll() is None
            process.kill()
            process.wait()
    if process.returncode and not is_killed:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise TrainingError(
            f"{' '.join(command[2:])} ended with exit code {process.returncode}:\n" + "\n".join(said)
        )


def _checkpoint(run: Path, step: int) -> Path:
    return Checkpoints(run / "checkpoints", keep=1).folder_of(step)


def _last_checkpoint(run: Path) -> Path:
    newest, problems = Checkpoints(run / "checkpoints", keep=1).newest()
    if newest is None or problems:
        raise CheckpointError("; ".join(problems) or f"{run}: no checkpoint was saved")
    return newest.folder


def _compare_checkpoints(one: Path, other: Path) -> dict[str, str]:
    """What differs between two checkpoints: part -> the first difference in it."""
    found: dict[str, str] = {}
    for part, names in _PARTS.items():
        for name in names:
            difference = _compare_files(one / name, other / name)
            if difference is not None:
                found.setdefault(part, difference)
    return found


def _compare_files(one: Path, other: Path) -> str | None:
    if not one.exists() and not other.exists():
        return None
    if not (one.exists() and other.exists()):
        return f"only one of them has {one.name}"
    if one.suffix == ".json":
        same = _without_times(json.loads(one.read_bytes())) == _without_times(json.loads(other.read_bytes()))
        return None if same else f"{one.name} differs"
    (tensors, plain), (others, other_plain) = read_tensors(one), read_tensors(other)
    if tensors.keys() != others.keys():
        return f"{one.name}: the names of its tensors"
    for name, tensor in tensors.items():
        if not torch.equal(tensor, others[name]):
            return f"{one.name}: tensor {name}{_how_far(tensor, others[name])}"
    return None if plain == other_plain else f"{one.name}: values beside its tensors"


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and what stands in its header beside them."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _how_far(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape:
        return f" has shape {list(one.shape)} and {list(other.shape)}"
    return f", by at most {float((one.double() - other.double()).abs().max()):.3g}" if one.numel() else ""


def metrics_without_times(run: Path) -> list[Line]:
    """The lines of a run's metrics.jsonl that do not depend on how fast the machine was."""
    return _without_times(read_metrics(run / "metrics.jsonl"))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def first_difference(lines: Sequence[Line], others: Sequence[Line]) -> tuple[Line | None, Line | None] | None:
    """The first pair of lines that are not the same; None for one that is missing."""
    for i in range(max(len(lines), len(others))):
        pair = (lines[i] if i < len(lines) else None, others[i] if i < len(others) else None)
        if pair[0] != pair[1]:
            return pair
    return None


# --- what it means


def verdict(found: Findings, at: int) -> str | None:
    """What differs first and what most likely made it so, for a reader; None if nothing does."""
    if not (found.at_stop or found.at_end or found.lines):
        return None
    if found.at_stop:
        where = f"at step {at}, before the stop"
        what = "; ".join(f"{part} ({difference})" for part, difference in found.at_stop.items())
    elif found.lines:
        where, what = _line_in_words(found.lines)
    else:
        where, what = "in the last checkpoint", ""
    parts = ", ".join(found.at_end) or "nothing"
    return (
        f"the resumed run differs {where}{': ' if what else ''}{what}\n"
        f"In the last checkpoint differ: {parts}"
        + "".join(f"\n  {part}: {difference}" for part, difference in found.at_end.items())
        + f"\nLikely cause: {likely_cause(found, at)}"
    )


def _line_in_words(lines: tuple[Line | None, Line | None]) -> tuple[str, str]:
    one, other = lines
    line = one or other or {}
    where = f"at step {line.get('step')}"
    if one is None or other is None:
        return where, f"only the {'resumed' if one is None else 'straight'} run has this line of metrics"
    keys = _changed_keys(one, other)
    return where, ", ".join(f"{key} {one.get(key)} straight, {other.get(key)} resumed" for key in keys)


def _changed_keys(one: Line, other: Line) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def likely_cause(found: Findings, at: int) -> str:
    """From what differs and what does not. In this order: whatever comes first also changes what follows."""
    if found.at_stop:
        return (
            "not the resume. The same steps gave other numbers before anything was stopped: operations that "
            "add in another order each time (some CUDA kernels, another number of threads), or data that "
            "changed meanwhile."
        )
    one, other = found.lines or (None, None)
    if one is not None and other is not None:
        keys = set(_changed_keys(one, other))
        is_first = one["step"] == at + 1
        if keys & {"rows", "tokens", "target_tokens"}:
            return "the place in the data: other rows were trained after the stop."
        if "learning_rate" in keys:
            return "the schedule: the learning rate does not go on where it was."
        if "random state" in found.at_end:
            return (
                "the random state: dropout, NEFTune or whatever else draws random numbers drew other ones "
                "after the stop."
            )
        if is_first and "loss" in keys:
            return "the weights: the first step after the stop began with others than were saved."
        if "loss" in keys or keys & {"eval_loss"}:
            return (
                "the optimiser: the first loss after the stop is the same, what the steps made of it is not."
            )
        if "grad_norm" in keys:
            return "gradients: the loss is the same; operations of the backward pass add in another order."
    if "random state" in found.at_end:
        return "the random state alone: nothing drew on it in these steps; a longer run may differ."
    if "optimiser" in found.at_end or "weights" in found.at_end:
        return "the optimiser, or operations that add in another order each time, in the last step alone."
    return "the counters: what was counted or evaluated, not what was trained."

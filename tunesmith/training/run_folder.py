"""The run folder: everything one run writes, where it lies, and whether a run may go on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.config import Config, dump_config
from tunesmith.data.loading import Data
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.training import durable_files
from tunesmith.training.checkpoints import Checkpoint, Checkpoints
from tunesmith.training.environment import environment, versions
from tunesmith.training.launch import LOGS, run_path
from tunesmith.training.lock import LOCK, Lock
from tunesmith.training.ranks import meet

Say = Callable[[str], None]
_BLOCK = 1 << 16  # bytes of metrics.jsonl looked at in one go

# Settings that may change between a stop and going on: they change what is written, how long the run is, or
# how the same result is computed, not what is trained up to here.
FREE_TO_CHANGE = (
    "run.resume",
    "run.resume_anyway",
    "run.output_dir",
    "checkpoint",
    "distributed",
    "tracking",
    "eval",
    "train.epochs",
    "train.max_steps",
    "train.on_bad_step",
    "train.spike_factor",
    "train.log_every_steps",
    "train.loader_workers",
    "data.workers",
    "data.cache_dir",
)

# Settings that tunesmith chose where the config left them open.
_CHOSEN = ("train.micro_batch_tokens",)


class RunFolder:
    """`output_dir/name` and the files in it. As a context manager it gives up the lock that `find_start`
    takes."""

    def __init__(self, config: Config) -> None:
        self.path = run_path(config)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.bad_steps = self.path / "bad_step.json"
        self.best = self.path / "best"
        self.final = self.path / "final"
        self.summary = self.path / "summary.json"
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.checkpoint.keep)
        # The size of passes that this run had before it was stopped.
        self.pass_tokens_before: int | None = None
        # Fingerprints of what is trained on; known once it has been read.
        self.inputs: dict[str, str] = {}
        self._resume_anyway = config.run.resume_anyway
        self._lock = Lock(self.path / LOCK)
        self._made: list[Path] = []  # folders that were not there, the innermost first
        # Of many ranks the first one writes; torchrun says which that is.
        self._is_main = int(os.environ.get("RANK", "0")) == 0

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        for folder in self._made:  # the run came to nothing
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def find_start(self, config: Config, say: Say) -> Checkpoint | None:
        """The checkpoint to go on from, or None to start afresh, by `run.resume`. The folder is this
        process's from here on.

        Raises ConfigError if the folder holds something that this run may not go on in or another process is
        at work in it, CheckpointError if the checkpoint asked for, or every one there is, is damaged."""
        resume = config.run.resume
        holds_something = self._holds_something()
        if holds_something and resume == "never":
            raise ConfigError(
                f"run.resume=never, but {self.path} already holds something. "
                "Choose another run.name, or remove it."
            )
        is_run = (self.path / "config.yaml").is_file() or self._lock.file.exists()
        if holds_something and not is_run:
            raise ConfigError(
                f"{self.path} is not empty and is no run (it has no config.yaml). "
                "Choose another run.name or output_dir."
            )
        if isinstance(resume, int) and not holds_something:
            raise ConfigError(f"run.resume={resume}: there is no run in {self.path}.")
        if self._is_main:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            durable_files.clean(self.path)
            self.checkpoints.clean()
        # One that looks sooner may miss a checkpoint that `clean` brings back.
        meet(config.distributed.timeout_s)
        if isinstance(resume, int):
            start: Checkpoint | None = self.checkpoints.at(resume)
        else:
            start = self._newest(say)
        if start is None:
            self._refuse_to_overwrite()
        else:
            self._compare_with(start, config, say)
            if resume == "auto" and self._is_main:
                # A kill between the last save and its deletions leaves what no later save would delete.
                for checkpoint in self.checkpoints.superseded(start.step, start.facts()["best_step"]):
                    durable_files.discard(checkpoint.folder)
        return start

    def check_inputs(self, inputs: dict[str, str], start: Checkpoint | None, say: Say) -> None:
        """Take note of what is trained on. Raises ConfigError if it is not what it was, as `find_start` does
        for settings."""
        self.inputs = inputs
        if start is not None:
            self._refuse_changes("base weights, data or tokenizer", start.facts()["inputs"], inputs, say)

    def begin(self, config: Config, start: Checkpoint | None, data: Data) -> None:
        """Write config.yaml, environment.json and data_report.json; remove what steps after the start had
        left."""
        durable_files.replace_file(self.path / "config.yaml", dump_config(config).encode())
        write_json(self.path / "environment.json", environment() | {"inputs": self.inputs})
        write_json(self.path / "data_report.json", data.report())
        self.summary.unlink(missing_ok=True)
        if start is None:
            durable_files.remove(self.best)
            self.bad_steps.unlink(missing_ok=True)
        self.cut_metrics(start.step if start else -1)

    def cut_metrics(self, step: int) -> None:
        """Drop lines of steps that will be trained again, from metrics and samples."""
        for file in (self.metrics, self.samples):
            _keep_lines_until(file, step)

    def _holds_something(self) -> bool:
        own = {self._lock.file.name, durable_files.temporary(self._lock.file).name, LOGS}
        return self.path.exists() and any(item.name not in own for item in self.path.iterdir())

    def _newest(self, say: Say) -> Checkpoint | None:
        newest, damaged = self.checkpoints.newest()
        if damaged and newest is None:
            raise CheckpointError(
                "no checkpoint of this run is undamaged:\n  "
                + "\n  ".join(damaged)
                + f"\nTo start afresh, remove {self.path}, or choose another run.name."
            )
        for problem in damaged:
            say(f"warning: damaged checkpoint passed over: {problem}")
        return newest

    def _refuse_to_overwrite(self) -> None:
        if self.final.exists():
            raise ConfigError(
                f"{self.path} holds a run that has ended, and no checkpoint to go on from. Choose another "
                "run.name, or remove it."
            )

    def _compare_with(self, start: Checkpoint, config: Config, say: Say) -> None:
        facts = start.facts()
        before, now = _flat(facts["config"]), _flat(config.model_dump(mode="json"))
        compared = [
            key
            for key in before.keys() | now.keys()
            if not (key in _CHOSEN and now.get(key) is None)
            and not any(key == k or key.startswith(k + ".") for k in FREE_TO_CHANGE)
        ]
        old, new = ({key: part.get(key) for key in compared} for part in (before, now))
        self._refuse_changes("settings", old, new, say)
        if old == new:
            self.pass_tokens_before = before.get("train.micro_batch_tokens")
        for package, version in versions().items():
            if (then := facts["versions"].get(package)) != version:
                say(
                    f"warning: {package} was {then} when step {start.step} was saved and is {version} now; "
                    "the result may not be the same to the last bit"
                )

    def _refuse_changes(self, what: str, before: dict[str, Any], now: dict[str, Any], say: Say) -> None:
        changes = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes and not self._resume_anyway:
            raise ConfigError(
                f"{self.path} holds a run with other {what}, so going on would give neither run:\n  "
                + "\n  ".join(changes)
                + "\nChoose another run.name, set these back, or go on all the same: run.resume_anyway=true."
            )
        for change in changes:
            say(f"warning: going on with other {what}: {change}")


def write_json(file: Path, content: Any) -> None:
    """Replace a file by this content as JSON."""
    durable_files.replace_file(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def eval_losses(lines: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """(loss, step) of each evaluation but that of the untouched model; the least is the best step's."""
    return [(line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line and line["step"]]


def _keep_lines_until(file: Path, step: int) -> None:
    """Cut metrics.jsonl behind the last line of a step up to this one. Looks at its end alone, so that it
    takes no longer for a long run."""
    if not file.is_file():
        return
    with file.open("r+b") as stream:
        at, open_line = stream.seek(0, os.SEEK_END), b""
        while at:
            size = min(_BLOCK, at)
            at -= size
            stream.seek(at)
            block = stream.read(size) + open_line
            # A block begins somewhere within a line, but for the first one.
            first = 0 if at == 0 else (block.find(b"\n") + 1 or len(block))
            end = at + len(block)
            for line in reversed(block[first:].splitlines(keepends=True)):
                if _is_line_until(line, step):
                    stream.truncate(end)
                    return
                end -= len(line)
            open_line = block[:first]
        stream.truncate(0)


def _is_line_until(line: bytes, step: int) -> bool:
    """Whether it is whole (a kill may have cut it short) and of a step up to this one."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"section.key": value}."""
    if not isinstance(values, dict) or (not values and prefix):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat

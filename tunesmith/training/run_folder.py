"""The run folder: everything one run writes, where it lies, and whether a run may go on in it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tunesmith.config import Config, dump_config
from tunesmith.data.loading import Data
from tunesmith.errors import ConfigError
from tunesmith.training.checkpoints import Checkpoint, Checkpoints

Say = Callable[[str], None]
_PACKAGES = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
)

# Settings that may change between a stop and going on: they change what is written, how long the run is, or
# how the same result is computed, not what is trained up to here.
FREE_TO_CHANGE = (
    "run.resume",
    "run.output_dir",
    "checkpoint",
    "tracking",
    "eval",
    "train.epochs",
    "train.max_steps",
    "train.log_every_steps",
    "train.loader_workers",
    "data.workers",
    "data.cache_dir",
)

# Settings that tunesmith chose where the config left them open.
_CHOSEN = ("train.micro_batch_tokens",)


class RunFolder:
    """`output_dir/name` and the files in it."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.output_dir) / (config.run.name or "run")
        self.metrics = self.path / "metrics.jsonl"
        self.best = self.path / "best"
        self.final = self.path / "final"
        self.summary = self.path / "summary.json"
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.checkpoint.keep)
        # The size of passes that this run had before it was stopped.
        self.pass_tokens_before: int | None = None

    def find_start(self, config: Config, say: Say) -> Checkpoint | None:
        """The checkpoint to go on from, or None to start afresh, by `run.resume`.

        Raises ConfigError if the folder holds something that this run may not go on in, CheckpointError if
        the checkpoint asked for is damaged."""
        resume = config.run.resume
        config_file = self.path / "config.yaml"
        if not self.path.exists() or not any(self.path.iterdir()):
            if isinstance(resume, int):
                raise ConfigError(f"run.resume={resume}: there is no run in {self.path}.")
            return None
        if resume == "never":
            raise ConfigError(
                f"run.resume=never, but {self.path} already holds something. "
                "Choose another run.name, or remove it."
            )
        if not config_file.is_file():
            raise ConfigError(
                f"{self.path} is not empty and is no run (it has no config.yaml). "
                "Choose another run.name or output_dir."
            )
        before = _flat(yaml.safe_load(config_file.read_text(encoding="utf-8")) or {})
        self._refuse_other_config(config, before)
        self.pass_tokens_before = before.get("train.micro_batch_tokens")
        self.checkpoints.clean()
        if isinstance(resume, int):
            return self.checkpoints.at(resume)
        newest, damaged = self.checkpoints.newest()
        for problem in damaged:
            say(f"warning: damaged checkpoint passed over: {problem}")
        return newest

    def _refuse_other_config(self, config: Config, before: dict[str, Any]) -> None:
        now = _flat(config.model_dump(mode="json"))
        changed = [
            f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not (key in _CHOSEN and now.get(key) is None)
            and not any(key == k or key.startswith(k + ".") for k in FREE_TO_CHANGE)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with other settings, so going on would give neither run:\n"
                + "\n".join(changed)
                + "\nChoose another run.name, or set these back."
            )

    def begin(self, config: Config, start: Checkpoint | None, *, template: str | None, data: Data) -> None:
        """Create the folder, write config.yaml, environment.json and data_report.json, cut metrics.jsonl back
        to the start."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        reports = [*data.train.reports, *(data.valid.reports if data.valid else ())]
        inputs = {
            "chat_template_sha256": hashlib.sha256((template or "").encode()).hexdigest(),
            "data": {report.path: report.fingerprint for report in reports},
        }
        write_json(self.path / "environment.json", environment() | inputs)
        write_json(self.path / "data_report.json", data.report())
        self.summary.unlink(missing_ok=True)
        _keep_metrics_until(self.metrics, start.step if start else -1)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _keep_metrics_until(file: Path, step: int) -> None:
    """Drop lines of steps that will be trained again."""
    kept = [line for line in read_metrics(file) if line["step"] <= step]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions, hardware and code state that a result depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions,
        "git": _git_state(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the folder the run was started in; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "uncommitted": status.stdout.splitlines()}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"section.key": value}."""
    if not isinstance(values, dict) or (not values and prefix):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat

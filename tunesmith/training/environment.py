"""What a result depends on beside the config: versions, hardware, code, and the content of the data."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.data.loading import Data
from tunesmith.data.sources import is_hub_id, resolve_files
from tunesmith.models.load import weights_fingerprint

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


def environment() -> dict[str, Any]:
    """Versions, hardware and code state that a result depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions(),
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


@functools.cache
def versions() -> dict[str, str]:
    """Of the packages that compute the result."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def inputs(config: Config, tokenizer: Any, data: Data) -> dict[str, str]:
    """Fingerprints of what a run begins with: the base weights, the tokenizer, its template, and the data
    files. Of files that are streamed, names and sizes only, since they are never read as a whole; of a hub
    data set none."""
    found = {
        "model": weights_fingerprint(config, tokenizer),
        "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
        "chat_template": _sha256(tokenizer.chat_template or ""),
    }
    for name, rows in (("train", data.train), ("valid", data.valid)):
        for report in rows.reports if rows is not None else ():
            found[f"data.{name}: {report.path}"] = report.fingerprint or _listing(report.path)
    return found


def _listing(path: str) -> str:
    if is_hub_id(path):
        return ""
    return _sha256("\n".join(f"{file.name} {file.stat().st_size}" for file in resolve_files(path)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Checkpoints that are complete or absent.

    checkpoints/.step-000100.tmp/   being written; never looked at, removed at the next start
    checkpoints/step-000100/        renamed into place after its manifest, which lists every file's size and
    SHA-256

A kill at any instant leaves the newest complete checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
# Without any one of these a run would go on with a fresh optimiser, schedule or dropout, and end elsewhere.
_REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and the optimiser steps that led to it."""

    folder: Path
    step: int


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def building(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it is complete."""
        return self.folder / f".step-{step:06d}.tmp"

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` in."""
        folder = self.building(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, **facts: Any) -> Checkpoint:
        """Make what was written complete: files to disk, manifest, rename; then delete what `keep` does not
        cover."""
        building, final = self.building(step), self.folder / f"step-{step:06d}"
        files = {
            str(file.relative_to(building)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(building.rglob("*"))
            if file.is_file()
        }
        (building / MANIFEST).write_text(
            json.dumps({"step": step, **facts, "files": files}, indent=2), encoding="utf-8"
        )
        for file in building.rglob("*"):
            _sync(file)
        _sync(building)
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        _sync(self.folder)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old.folder)
        return Checkpoint(final, step)

    def clean(self) -> None:
        """Remove what interrupted saves left behind."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def complete(self) -> list[Checkpoint]:
        """Checkpoints that have a manifest, oldest first; their hashes are not looked at."""
        found = [
            Checkpoint(folder, int(match[1]))
            for folder in self.folder.glob("step-*")
            if (match := _NAME.fullmatch(folder.name)) and (folder / MANIFEST).is_file()
        ]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is undamaged, and what is wrong with each newer one."""
        problems: list[str] = []
        for checkpoint in reversed(self.complete()):
            problem = find_damage(checkpoint.folder)
            if problem is None:
                return checkpoint, problems
            problems.append(f"{checkpoint.folder}: {problem}")
        return None, problems

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of this very step. Raises CheckpointError if it is not there or is damaged."""
        for checkpoint in self.complete():
            if checkpoint.step == step:
                if (problem := find_damage(checkpoint.folder)) is not None:
                    raise CheckpointError(f"{checkpoint.folder}: {problem}")
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.complete()) or "none"
        raise CheckpointError(
            f"{self.folder}: no complete checkpoint of step {step}. Complete ones: {steps}."
        )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of the manifest is there, as long and as it
    was."""
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({error})"
    for pattern in _REQUIRED:
        if not any(Path(name).match(pattern) for name in files):
            return f"its manifest names no {pattern}"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} differs from what was saved (SHA-256)"
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to disk. Folders cannot be opened on Windows; there the rename alone must do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

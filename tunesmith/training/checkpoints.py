"""Checkpoints that are complete or absent.

    checkpoints/.step-000100.tmp/   being written; never looked at, removed at the next start
    checkpoints/step-000100/        renamed into place when all of it is on disk and has been read back

A kill at any instant leaves the newest complete checkpoint as it was. What a checkpoint holds:

    adapter_model or model.safetensors, and its config   weights, as PEFT or transformers load them
    optimizer, scheduler, scaler.safetensors             (the last one with float16 only)
    rng-0.safetensors, rng-1.safetensors, ...            random generators of each rank
    trainer_state.json, progress.json                    transformers' counters, and ours
    manifest.json                                        see manifest.py
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError
from tunesmith.models.save import WEIGHTS, split_name
from tunesmith.training import durable_files
from tunesmith.training.manifest import MANIFEST, find_damage, read_manifest, write_manifest
from tunesmith.training.state_files import Files

# Weights and optimiser may be split, as model-00001-of-00002.safetensors, where several ranks share them.
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.safetensors"
SCALER = "scaler.safetensors"
TRAINER_STATE = "trainer_state.json"
PROGRESS = "progress.json"
# Without any one of these a run would go on with a fresh optimiser, schedule or dropout, and end elsewhere.
_REQUIRED = (SCHEDULER, TRAINER_STATE, PROGRESS)  # and the optimiser, and random states
_NAME = re.compile(r"step-(\d{6,})")


def random_state_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and the optimiser steps that led to it."""

    folder: Path
    step: int

    def facts(self) -> dict[str, Any]:
        """Its manifest. Raises OSError or ValueError if that is damaged."""
        return read_manifest(self.folder)

    def log_history(self) -> list[dict[str, Any]]:
        """The evaluations up to this step."""
        return list(json.loads((self.folder / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"])

    def damage(self) -> str | None:
        """What is wrong with it, or None. Reads all of it."""
        if (problem := find_damage(self.folder)) is not None:
            return problem
        facts = self.facts()
        if facts.get("step") != self.step:
            return f"it is of step {facts.get('step')}, not {self.step}"
        ranks, shards = facts.get("ranks", 1), facts.get("shards", 1)
        for name in (
            *_REQUIRED,
            *(split_name(OPTIMIZER, part, shards) for part in range(shards)),
            *map(random_state_file, range(ranks)),
        ):
            if name not in facts["files"]:
                return f"it was saved without {name}"
        for name in WEIGHTS:
            for number in {1, shards}:
                if all(split_name(name, part, number) in facts["files"] for part in range(number)):
                    return None
        return "it was saved without weights"


def write_files(folder: Path, files: Files) -> dict[str, tuple[int, str]]:
    """Write files and force them to disk; returns size and SHA-256 of each. Raises OSError if there is not so
    much room, before anything is written."""
    durable_files.refuse_full_disk(folder, sum(map(len, files.values())))
    return {
        name: durable_files.write(
            folder / name, [content] if isinstance(content, bytes) else content.chunks()
        )
        for name, content in files.items()
    }


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def begin(self, step: int) -> None:
        """Make an empty folder to write a step into, for as many ranks as have a share of it."""
        if not self.folder.exists():
            durable_files.make_folder(self.folder)
            durable_files.sync(self.folder.parent)
        building = durable_files.temporary(self.folder_of(step))
        durable_files.remove(building)
        durable_files.make_folder(building)

    def write(
        self,
        step: int,
        files: Files,
        facts: Mapping[str, Any],
        *,
        best: int | None,
        others: Callable[[Path], dict[str, tuple[int, str]]] | None = None,
    ) -> Checkpoint:
        """Save a step; when what was written has been read back, delete what `keep` does not cover, but for
        the step `best`. `others` waits for what other ranks write into the folder that `begin` made, and says
        what it is.

        Raises OSError if it cannot be written whole. The checkpoints before it are then as they were."""
        final = self.folder_of(step)
        building = durable_files.temporary(final)
        if others is None:
            self.begin(step)
        try:
            written = write_files(building, files)
            if others is not None:
                written |= others(building)
            write_manifest(building, {"step": step, **facts}, written)
            if (problem := find_damage(building)) is not None:
                raise OSError(errno.EIO, f"what was written does not read back: {problem}", str(building))
            durable_files.publish(final)
        except OSError:
            durable_files.remove(building)  # a full disk has no room for half a checkpoint
            raise
        # Later steps are of a run that was taken back to an earlier one; they go once one after it is safe.
        later = [one for one in self.complete() if one.step > step and one.step != best]
        for given_up in (*self.superseded(step, best), *later):
            durable_files.discard(given_up.folder)
        return Checkpoint(final, step)

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is complete."""
        return self.folder / f"step-{step:06d}"

    def superseded(self, newest: int, best: int | None) -> list[Checkpoint]:
        """What `keep` does not cover once step `newest` is safe, but for the step `best`."""
        until = [checkpoint for checkpoint in self.complete() if checkpoint.step <= newest]
        return [checkpoint for checkpoint in until[: -self.keep] if checkpoint.step != best]

    def clean(self) -> None:
        """Remove what interrupted saves left behind."""
        durable_files.clean(self.folder)

    def found(self) -> list[Checkpoint]:
        """Every folder by the name of a checkpoint, oldest first, complete or not."""
        folders = [(folder, _NAME.fullmatch(folder.name)) for folder in self.folder.glob("step-*")]
        found = [Checkpoint(folder, int(match[1])) for folder, match in folders if match]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def complete(self) -> list[Checkpoint]:
        """Checkpoints that have a manifest, oldest first; their hashes are not looked at."""
        return [checkpoint for checkpoint in self.found() if (checkpoint.folder / MANIFEST).is_file()]

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is undamaged, and what is wrong with each newer one."""
        problems: list[str] = []
        for checkpoint in reversed(self.found()):
            problem = checkpoint.damage()
            if problem is None:
                return checkpoint, problems
            problems.append(f"{checkpoint.folder}: {problem}")
        return None, problems

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of this very step. Raises CheckpointError if it is not there or is damaged."""
        for checkpoint in self.complete():
            if checkpoint.step == step:
                if (problem := checkpoint.damage()) is not None:
                    raise CheckpointError(f"{checkpoint.folder}: {problem}")
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.complete()) or "none"
        raise CheckpointError(
            f"{self.folder}: no complete checkpoint of step {step}. Complete ones: {steps}."
        )

"""`tunesmith checkpoints`: what there is to go on from in a run folder.

    RUN --list_checkpoints--> [Listed] --> table | JSON

Reads only. Without `verify` names and sizes are compared with each manifest; with it every byte is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.durable_files import folder_bytes, in_words
from tunesmith.training.lock import LOCK, Lock
from tunesmith.training.manifest import MANIFEST, find_damage_by_size
from tunesmith.training.run_folder import eval_losses, read_metrics

# What a save or a deletion under way calls its folder (durable_files.py).
_UNDER_WAY = {"tmp": "being written", "old": "being replaced", "gone": "being deleted"}


@dataclass(frozen=True)
class Listed:
    """A checkpoint as it is shown. `problem` says what is damaged. `loss` and `eval_loss` are those of its
    very step, in nats, None where that was not logged. `is_verified` is None if the hashes were not asked
    for."""

    step: int | None
    folder: str
    state: str
    problem: str | None
    bytes: int
    loss: float | None
    eval_loss: float | None
    is_best: bool
    is_verified: bool | None


def checkpoints(run: str, *, verify: bool, as_json: bool, console: Console | None = None) -> None:
    """List the checkpoints of a run folder. Raises ConfigError if it is none, and with `verify`
    CheckpointError if one is damaged."""
    listed = list_checkpoints(_run_folder(run), verify=verify)
    if as_json:
        sys.stdout.write(json.dumps([dataclasses.asdict(one) for one in listed], indent=2) + "\n")
    else:
        _draw(listed, console or Console())
    damaged = [one for one in listed if one.state == "damaged"]
    if verify and damaged:
        sys.stdout.flush()
        steps = ", ".join(f"step {one.step}" for one in damaged)
        raise CheckpointError(
            f"{run}: damaged: {steps}. Going on passes over them, to the newest that is whole."
        )


def list_checkpoints(run: Path, *, verify: bool) -> list[Listed]:
    """The checkpoints of a run folder, oldest first, then what is no checkpoint yet or no more."""
    lines = read_metrics(run / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    _, best = min(eval_losses(lines), default=(None, None))
    listed = []
    for checkpoint in Checkpoints(run / "checkpoints", keep=1).found():
        problem = checkpoint.damage() if verify else _damage_by_size(checkpoint.folder)
        listed.append(
            Listed(
                step=checkpoint.step,
                folder=str(checkpoint.folder),
                state="damaged" if problem else "complete",
                problem=problem,
                bytes=folder_bytes(checkpoint.folder),
                loss=losses.get(checkpoint.step),
                eval_loss=evals.get(checkpoint.step),
                is_best=checkpoint.step == best,
                is_verified=problem is None if verify else None,
            )
        )
    is_running = Lock(run / LOCK).holder() is not None
    for folder in sorted((run / "checkpoints").glob(".step-*")):
        state = _UNDER_WAY.get(folder.suffix[1:])
        if state is not None:
            if not is_running:
                state = "left by a kill; the next start sees to it"
            listed.append(
                Listed(None, str(folder), state, None, folder_bytes(folder), None, None, False, None)
            )
    return listed


def _run_folder(run: str) -> Path:
    folder = Path(run)
    if not folder.is_dir():
        names = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names, n=1)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise ConfigError(f"{run}: no such run folder.{hint}")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run folder (it has no config.yaml).")
    return folder


def _damage_by_size(folder: Path) -> str | None:
    return find_damage_by_size(folder) if (folder / MANIFEST).exists() else f"it has no {MANIFEST}"


def _draw(listed: list[Listed], console: Console) -> None:
    if not listed:
        console.print("no checkpoints yet")
        return
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("step", "right"), ("size", "right"), ("loss", "right"), ("eval loss", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for heading in ("", "verified", "state"):
        table.add_column(heading, overflow="fold")
    for one in listed:
        verified = {None: "-", True: "yes", False: "no"}[one.is_verified]
        table.add_row(
            "" if one.step is None else f"{one.step:,}",
            in_words(one.bytes),
            _loss(one.loss),
            _loss(one.eval_loss),
            "best" if one.is_best else "",
            verified,
            Text(f"{one.state}: {one.problem}" if one.problem else one.state),
        )
    console.print(table, highlight=False)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

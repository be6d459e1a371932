"""What the reference model, the one that training begins with, says of each target: computed once, kept
beside the prepared data, and read by every epoch and every run that begins with the same model and rows.

    cache/reference-KEY/targets.f32       float32, a number for each target of each row, in their order; NaN
                                          where nobody has asked yet
    cache/reference-KEY/mismatched.f32    the same of the rows' mismatched answers

Numbers are written where they belong as they come, so that a run that is killed goes on with the rest. Which
rows are asked about together does not depend on what is there, so that it finds the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from numpy.typing import NDArray

from tunesmith.config import Config
from tunesmith.config.methods import METHODS
from tunesmith.data.loading import cache_dir
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.rows import AnswerRows
from tunesmith.errors import CheckpointError
from tunesmith.models.fuse import inward
from tunesmith.packing.plan import StepPlan
from tunesmith.training.preference import target_logps
from tunesmith.training.trainer import PackTrainer

Say = Callable[[str], None]
Float32s = NDArray[np.float32]
# (rows of a pass) -> what the model says of each of their targets.
Ask = Callable[[Sequence[PreparedRow]], Float32s]
_ROUNDS = 16  # passes of each rank between two writes
_TELL_S = 10.0


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The model as it is without its adapter."""
    adapted = next(inner for inner in inward(model) if hasattr(inner, "disable_adapter"))
    with adapted.disable_adapter():
        yield model


def ask_model(
    trainer: PackTrainer, config: Config, rows: Sequence[PreparedRow], *, is_resumed: bool
) -> Float32s:
    """What the model that the run began with says of each target of the rows, in one pass.

    Raises CheckpointError where it is gone: of a run that goes on, engines that share a model out have given
    it the checkpoint's weights by now, and only some adapters can be switched off."""
    assert config.adapter.method is not None
    is_off = config.adapter.method != "none" and not METHODS[config.adapter.method].no_off_switch
    if is_resumed and not is_off and trainer.strategy.is_shared_out:
        raise CheckpointError(
            "the reference log-probabilities of this run are no longer in data.cache_dir, and the model is "
            "not what it was when it began. Begin anew: run.resume=never and another run.name."
        )
    with adapter_off(trainer.model) if is_off else nullcontext():
        found: Float32s = trainer.ask(rows, target_logps).float().cpu().numpy()
    return found


def reference_folder(config: Config, model_fingerprint: str, rows: AnswerRows) -> Path:
    """Where what the model of this config says of these rows is kept."""
    decides = config.model.model_dump(
        include={"dtype", "quantization", "double_quantization", "rope_scaling"}
    )
    assert config.adapter.method is not None
    if METHODS[config.adapter.method].no_off_switch:  # it begins as another model than its base
        decides |= {"adapter": config.adapter.model_dump(), "seed": config.run.seed}
    digest = hashlib.sha256(json.dumps([decides, model_fingerprint], sort_keys=True).encode())
    digest.update(rows.examples.fingerprints().tobytes())
    digest.update(rows.row_starts.tobytes())
    return cache_dir(config) / f"reference-{digest.hexdigest()[:32]}"


def planned_passes(plan: StepPlan, num_steps: int) -> Iterator[list[int]]:
    """The rows of each pass of a run, those of all ranks in turn."""
    rows, rows_of = np.empty(0, np.int64), -1
    for step in range(num_steps):
        epoch, start, end = plan.steps.place(step)
        if epoch != rows_of:
            rows, rows_of = plan.rows_of_epoch(epoch), epoch
        for passes in zip(*plan.split(rows[start:end]), strict=True):
            yield from passes


def ask_reference(
    rows: AnswerRows,
    passes: Iterable[Sequence[int]],
    folder: Path,
    ask: Ask,
    *,
    rank: int,
    ranks: int,
    say: Say,
) -> None:
    """Give `rows` what the reference says of those in `passes`, asking for what `folder` does not hold yet.

    Rows are asked about in the passes in which training first meets them: in bfloat16 a pass of others would
    round otherwise, and the first loss would not be that of a model that is its own reference."""
    passes = list(passes)
    rows.reference = _fill(
        folder / "targets.f32",
        rows.target_starts,
        passes,
        lambda items: ask([rows[item] for item in items]),
        rank,
        ranks,
        say,
    )
    if rows.is_mismatched:
        rows.mismatched_reference = _fill(
            folder / "mismatched.f32",
            rows.mismatched_starts,
            passes,
            lambda items: ask([row for item in items if (row := rows[item].mismatched) is not None]),
            rank,
            ranks,
            say,
        )


def _fill(
    file: Path,
    starts: NDArray[np.int64],
    passes: Sequence[Sequence[int]],
    ask: Callable[[Sequence[int]], Float32s],
    rank: int,
    ranks: int,
    say: Say,
) -> Float32s:
    values = _open(file, int(starts[-1]))
    todo, known = _unknown(values, starts, passes)
    if ranks > 1:  # each machine has its own folder
        said = [(todo, known)]
        broadcast_object_list(said)
        todo, known = said[0]
    num_rows, started_at = sum(map(len, todo)), time.monotonic()
    told_at, done = started_at, 0
    for first in range(0, len(todo), ranks * _ROUNDS):
        some = todo[first : first + ranks * _ROUNDS]
        found = []
        for at in range(0, len(some), ranks):  # all ranks ask as often: a model that is shared out needs all
            items = some[at + rank] if at + rank < len(some) else []
            found.append((items, ask(items)))
        for items, of_pass in gather_object(found) if ranks > 1 else found:
            at = 0
            for item in items:
                count = int(starts[item + 1] - starts[item])
                if not known[item]:
                    values[starts[item] : starts[item + 1]] = of_pass[at : at + count]
                    known[item] = True
                at += count
        done += sum(map(len, some))
        if time.monotonic() - told_at > _TELL_S:
            told_at = time.monotonic()
            say(f"reference log-probabilities: {done:,} of {num_rows:,} rows")
    values.flush()
    if todo:
        seconds = time.monotonic() - started_at
        where = f"kept in {file.parent}"
        say(f"reference log-probabilities of {num_rows:,} rows computed in {seconds:.0f} s, {where}")
    elif passes:
        say(f"reference log-probabilities: read from {file.parent}")
    return values


def _unknown(
    values: Float32s, starts: NDArray[np.int64], passes: Sequence[Sequence[int]]
) -> tuple[list[list[int]], NDArray[np.bool_]]:
    """The passes that hold a row which neither the values nor a pass before say anything of; and which rows
    the values do."""
    missing = np.concatenate([[0], np.cumsum(np.isnan(values), dtype=np.int64)])
    known = missing[starts[1:]] == missing[starts[:-1]]
    todo, met = [], known.copy()
    for items in passes:
        if not met[items].all():
            todo.append(list(items))
            met[items] = True
    return todo, known


def _open(file: Path, size: int) -> np.memmap[Any, np.dtype[np.float32]]:
    """The file, made of NaN where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            building = file.with_name(f"{file.name}.tmp")
            np.full(size, np.nan, dtype=np.float32).tofile(building)
            building.replace(file)
    return np.memmap(file, dtype=np.float32, mode="r+", shape=(size,))

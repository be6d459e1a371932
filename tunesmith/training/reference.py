"""What the reference model, the one that training begins with, says of each target: computed once, kept beside
the prepared data, and read by every epoch and every run that begins with the same model and rows.

    cache/reference-KEY/targets.f32       float32, a number for each target of each row, in their order; NaN
                                          where nobody has asked yet
    cache/reference-KEY/mismatched.f32    the same of the rows' mismatched answers

Numbers are written where they belong as they come, so that a run that is killed goes on with the rest. Which rows
are asked about together depends on the rows alone, so that it finds the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from numpy.typing import NDArray

from tunesmith.config import Config
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.rows import AnswerRows
from tunesmith.models.fuse import inward
from tunesmith.packing.answers import plan_answers
from tunesmith.packing.balance import sweep
from tunesmith.packing.plan import StepPlan

Say = Callable[[str], None]
Float32s = NDArray[np.float32]
# (rows of a pass) -> what the model says of each of their targets.
Ask = Callable[[Sequence[PreparedRow]], Float32s]
# What these begin with is not the base with something beside it that is nothing yet.
_CHANGE_THE_BASE = ("pissa", "olora", "loftq")
_ROUNDS = 16  # passes of each rank between two writes
_TELL_S = 10.0


def can_be_switched_off(config: Config) -> bool:
    """Whether the model without its adapter is the one that training began with, at any time."""
    return config.adapter.method not in ("none", "bottleneck", *_CHANGE_THE_BASE)


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The model as it is without its adapter."""
    adapted = next(inner for inner in inward(model) if hasattr(inner, "disable_adapter"))
    with adapted.disable_adapter():
        yield model


def reference_key(config: Config, model_fingerprint: str, rows: AnswerRows) -> str:
    """A name for what the model of this config says of these rows."""
    decides = config.model.model_dump(
        include={"dtype", "quantization", "double_quantization", "rope_scaling"}
    )
    if config.adapter.method in _CHANGE_THE_BASE:
        decides |= {"adapter": config.adapter.model_dump(), "seed": config.run.seed}
    digest = hashlib.sha256(json.dumps([decides, model_fingerprint], sort_keys=True).encode())
    digest.update(rows.examples.fingerprints().tobytes())
    digest.update(rows.row_starts.tobytes())
    return digest.hexdigest()[:32]


def drawn_rows(plan: StepPlan, num_steps: int) -> NDArray[np.int64]:
    """The rows that a run of so many steps draws, in the order in which it first does."""
    last_epoch, _, end = plan.steps.place(num_steps - 1)
    epochs = [plan.rows_of_epoch(epoch) for epoch in range(last_epoch + 1)]
    epochs[-1] = epochs[-1][:end]
    drawn = np.concatenate(epochs)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)]


def ask_reference(
    rows: AnswerRows,
    wanted: NDArray[np.int64],
    folder: Path,
    ask: Ask,
    *,
    pass_tokens: int,
    tree: bool,
    rank: int,
    ranks: int,
    say: Say,
) -> None:
    """Give `rows` what the reference says of those wanted, asking for what `folder` does not hold yet."""
    lengths, sharing = plan_answers(rows, tree=tree)
    order, common = wanted, np.zeros(len(wanted), dtype=np.int32)
    if sharing is not None:
        order, common = sharing.in_order(wanted)
    rows.reference = _fill(
        folder / "targets.f32",
        rows.target_starts,
        [order[piece] for piece in sweep(lengths[order].tolist(), common.tolist(), pass_tokens)],
        lambda items: ask([rows[item] for item in items]),
        rank,
        ranks,
        say,
    )
    if rows.is_mismatched:
        lengths = lengths + np.roll(lengths, -1)
        rows.mismatched_reference = _fill(
            folder / "mismatched.f32",
            rows.mismatched_starts,
            [order[piece] for piece in sweep(lengths[order].tolist(), common.tolist(), pass_tokens)],
            lambda items: ask([row.mismatched for item in items if (row := rows[item]).mismatched]),
            rank,
            ranks,
            say,
        )


def _fill(
    file: Path,
    starts: NDArray[np.int64],
    passes: Sequence[NDArray[np.int64]],
    ask: Callable[[NDArray[np.int64]], Float32s],
    rank: int,
    ranks: int,
    say: Say,
) -> Float32s:
    values = _open(file, int(starts[-1]))
    unknown = np.concatenate([[0], np.cumsum(np.isnan(values), dtype=np.int64)])
    todo = [items for items in passes if (unknown[starts[items + 1]] > unknown[starts[items]]).any()]
    if ranks > 1:  # each machine has its own folder
        said = [todo]
        broadcast_object_list(said)
        todo = said[0]
    num_rows, started_at = sum(map(len, todo)), time.monotonic()
    told_at, done = started_at, 0
    for first in range(0, len(todo), ranks * _ROUNDS):
        some = todo[first : first + ranks * _ROUNDS]
        found = []
        for at in range(0, len(some), ranks):  # all ranks ask as often: a model that is shared out needs all
            items = some[at + rank] if at + rank < len(some) else np.empty(0, np.int64)
            found.append((items, ask(items)))
        for items, of_pass in gather_object(found) if ranks > 1 else found:
            of_rows = np.split(of_pass, np.cumsum(starts[items + 1] - starts[items])[:-1])
            for item, of_row in zip(items, of_rows, strict=True) if len(items) else ():
                values[starts[item] : starts[item + 1]] = of_row
        done += sum(map(len, some))
        if time.monotonic() - told_at > _TELL_S:
            told_at = time.monotonic()
            say(f"reference log-probabilities: {done:,} of {num_rows:,} rows")
    values.flush()
    if todo:
        seconds = time.monotonic() - started_at
        say(
            f"reference log-probabilities of {num_rows:,} rows computed in {seconds:.0f} s, kept in {file.parent}"
        )
    elif len(passes):
        say(f"reference log-probabilities: read from {file.parent}")
    return values


def _open(file: Path, size: int) -> np.memmap[Any, np.dtype[np.float32]]:
    """The file, made of NaN where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            building = file.with_name(f"{file.name}.tmp")
            np.full(size, np.nan, dtype=np.float32).tofile(building)
            building.replace(file)
    return np.memmap(file, dtype=np.float32, mode="r+", shape=(size,))

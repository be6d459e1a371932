"""`tunesmith generate`: answers to the rows of a file, in batches of like length, that a kill does not lose.

    rows --read_asked--> prompts --batches--> FILE.part (a line for each batch that is done) --> FILE

Which rows make a batch follows from the rows and settings alone, so that a run that was stopped goes on with
the same batches, and ends with the same file as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.artifacts.found import Found, Say, find_model
from tunesmith.artifacts.tuned import Tuned, load_tuned
from tunesmith.config.schema import Format
from tunesmith.errors import ConfigError
from tunesmith.inference.asked import Asked, prompts, read_asked
from tunesmith.training import durable_files
from tunesmith.training.answers import Written, continue_together

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Manner:
    """How answers are written. `temperature` 0 takes the likeliest token; else tokens are drawn by `seed`,
    from the likeliest whose probabilities add up to `top_p`. `batch_tokens` bounds rows times the tokens that
    each may come to have: prompt and answer."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    batch_tokens: int = 16384

    def check(self) -> None:
        """Raise ConfigError for a setting out of its range."""
        for name, value, least in (
            ("max-new-tokens", self.max_new_tokens, 1),
            ("batch-tokens", self.batch_tokens, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"--{name} {value}: expected {least} or more.")
        check_drawing(self.temperature, self.top_p)


def check_drawing(temperature: float | None, top_p: float | None) -> None:
    """Raise ConfigError for values out of their range, and for a top_p where nothing is drawn."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {temperature}: expected a number of 0 or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}: expected a number above 0 and up to 1.")
    if top_p is not None and temperature == 0:
        raise ConfigError("--top-p is of drawn tokens: give --temperature too, such as 0.7.")


def generate(
    model: str,
    *,
    input: str,
    output: Path,
    manner: Manner,
    format: Format = "auto",
    columns: Sequence[str] = (),
    say: Say,
) -> None:
    """Write the model's answer to every row of `input` to `output`, in the order of the rows. A run of it
    that was stopped goes on where it was.

    Raises ConfigError for settings out of range or an output that is there, DataError, ModelError and
    TemplateError for what cannot be read, loaded or rendered."""
    manner.check()
    if output.exists():
        raise ConfigError(f"--output {output}: is there already. Name another file, or remove it.")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}.")
    asked = read_asked(input, format=format, columns=columns)
    is_chat = any(row.prompt.is_chat for row in asked)
    tuned = load_tuned(find_model(model, say), say, needs_template=is_chat)
    ids = prompts(asked, tuned.preparer_of(system=system_of(tuned, say), train_on="last"))
    journal = output.with_name(f"{output.name}.part")
    written = answer_all(tuned, tuned.model, ids, manner, journal, say)
    lines = [line_of(row, answer) for row, answer in zip(asked, written, strict=True)]
    durable_files.replace_file(output, "".join(lines).encode())
    durable_files.remove(journal)
    ended = sum(answer.is_ended for answer in written)
    say(f"{output}: {len(written):,} answers, {ended:,} of which ended by themselves")


def system_of(tuned: Tuned, say: Say) -> str | None:
    """The system prompt that the run gave every conversation in training, and a word on it."""
    run = tuned.found.run
    if run is None or run.data.system is None:
        return None
    say("with the system prompt of the run")
    return run.data.system


def line_of(asked: Asked, written: Written) -> str:
    """A row's line in the output."""
    content = {
        "row": asked.place,
        **asked.shown,
        "answer": written.text,
        "finish": "stop" if written.is_ended else "length",
        "answer_tokens": written.num_tokens,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def answer_all(
    tuned: Tuned, model: Any, ids: Sequence[NDArray[np.int32]], manner: Manner, journal: Path, say: Say
) -> list[Written]:
    """What `model` (the tuned one, or its base) writes after each prompt, in order. Each batch is on disk
    when it is done; those that `journal` has already are not written anew.

    Raises ConfigError for a journal of other prompts, settings or weights."""
    facts = {"manner": asdict(manner), "prompts": _hash(ids), "model": _identity(tuned.found)}
    groups = batches([len(prompt) for prompt in ids], manner)
    written: dict[int, Written] = {}
    with _open_journal(journal, facts) as (done, append):
        for number, group in enumerate(groups):
            if number in done:
                written |= dict(zip(group, done[number], strict=True))
        if done:
            say(f"{journal}: goes on after {len(written):,} of {len(ids):,} rows")
        tell = _progress(len(ids), say)
        for number, group in enumerate(groups):
            if number in done:
                continue
            torch.manual_seed(manner.seed + number)  # so that a batch does not depend on those before it
            given = continue_together(
                model,
                tuned.tokenizer,
                [ids[i] for i in group],
                max_new_tokens=manner.max_new_tokens,
                stop_ids=tuned.stop_ids,
                temperature=manner.temperature,
                top_p=manner.top_p,
            )
            append(number, given)
            written |= dict(zip(group, given, strict=True))
            tell(len(given), sum(answer.num_tokens for answer in given), len(written))
    return [written[i] for i in range(len(ids))]


def batches(lengths: Sequence[int], manner: Manner) -> list[list[int]]:
    """Which prompts are continued together: of like length, the longest first, so that memory that does not
    suffice is found out at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        room = manner.batch_tokens // (lengths[groups[-1][0]] + manner.max_new_tokens) if groups else 0
        if groups and len(groups[-1]) < room:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# --- the journal


Append = Callable[[int, Sequence[Written]], None]


@contextlib.contextmanager
def _open_journal(file: Path, facts: dict[str, Any]) -> Iterator[tuple[dict[int, list[Written]], Append]]:
    """The batches that are in the file, and how to add one. Its first line says what it is of; a line that a
    kill cut off is taken for missing."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if lines and json.loads(lines[0]) != facts:
        before = json.loads(lines[0])
        other = ", ".join(name for name in facts if before.get(name) != facts[name])
        raise ConfigError(
            f"{file}: was begun with another {other}. Finish it by the same command as before, or remove it."
        )
    done = {}
    for line in map(json.loads, lines[1:]):
        done[int(line["batch"])] = [Written(**answer) for answer in line["answers"]]
    with file.open("r+b" if lines else "wb") as stream:
        stream.truncate(sum(map(len, lines)))
        stream.seek(0, os.SEEK_END)

        def write(content: dict[str, Any]) -> None:
            stream.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

        if not lines:
            write(facts)
        yield done, lambda number, given: write({"batch": number, "answers": [asdict(one) for one in given]})


def _hash(ids: Sequence[NDArray[np.int32]]) -> str:
    digest = hashlib.sha256()
    for prompt in ids:
        digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i4").tobytes())
    return digest.hexdigest()


def _identity(found: Found) -> dict[str, Any]:
    """What is another after the model was tuned or saved anew."""
    files = sorted(Path(found.home).glob("*.safetensors")) if Path(found.home).is_dir() else []
    return {"path": found.home, "saved_at_ns": [file.stat().st_mtime_ns for file in files]}


def _progress(num_rows: int, say: Say) -> Callable[[int, int, int], None]:
    """Takes rows and tokens of a batch and the rows that are done in all; says how it goes now and then."""
    started_at = told_at = time.monotonic()
    rows = tokens = 0

    def tell(more_rows: int, more_tokens: int, num_done: int) -> None:
        nonlocal told_at, rows, tokens
        rows, tokens = rows + more_rows, tokens + more_tokens
        now = time.monotonic()
        if now - told_at >= _SECONDS_BETWEEN_LINES and num_done < num_rows:
            told_at = now
            left = (num_rows - num_done) * (now - started_at) / rows
            speed = tokens / (now - started_at)
            say(f"{num_done:,} of {num_rows:,} rows, {speed:,.0f} tokens/s, {left:.0f} s left")

    return tell

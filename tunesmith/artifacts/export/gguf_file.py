"""`tunesmith export gguf`: one file for llama.cpp, or an adapter's alone, kept only if it is the model."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.artifacts.export.check import Reference, check_metadata, check_served, reference_model
from tunesmith.artifacts.export.commands import llama_server
from tunesmith.artifacts.export.convert import GgufType, convert, convert_lora
from tunesmith.artifacts.export.plain import plain_folder
from tunesmith.artifacts.export.texts import rows_of
from tunesmith.artifacts.export.tools import Tools, find_tools
from tunesmith.artifacts.found import Found, Say, find_model
from tunesmith.artifacts.tuned import load_own_tokenizer, preparer_for
from tunesmith.errors import ExportError, ModelError

_ROWS = 64  # of the run's own, whose texts are among those compared


def export_gguf(
    name: str, out: Path, type_: GgufType, say: Say, *, lora: bool = False, tools: Path | None = None
) -> Path:
    """Write the model of a run, adapter or model folder as a GGUF file, or with `lora` its adapter alone.

    It is written beside its place, read back by llama.cpp, compared, and only then put there. Raises
    ModelError for a model that cannot be exported, ExportError if what was written is not the model."""
    out = out.expanduser()
    refuse_existing(out)
    found = find_model(name, say)
    programs = find_tools(tools, say)
    with work_folder(out) as work:
        if lora:
            written = _write_lora(found, work, programs, say)
        else:
            written, _ = write_gguf(found, work, type_, programs, say)
        written.replace(out)
    say(f"{out}: {out.stat().st_size / 1e6:,.0f} MB")
    if not lora:
        say(llama_server(out))
    return out


def write_gguf(found: Found, work: Path, type_: GgufType, tools: Tools, say: Say) -> tuple[Path, Reference]:
    """A checked file in `work`, and what it was checked against."""
    folder = plain_folder(found, work, say)
    file = work / "model.gguf"
    say(f"converting to {type_}")
    convert(folder, file, type_, tools)
    reference = reference_of(found, reference_model(folder), say)
    say("reading it back")
    check_metadata(file, reference, type_, tools)
    say(str(check_served(file, reference, type_, tools)))
    return file, reference


def _write_lora(found: Found, work: Path, tools: Tools, say: Say) -> Path:
    """The adapter's file, checked on the base model's in f16."""
    if found.adapter is None:
        raise ModelError(f"{found.base} is a whole model; --lora exports an adapter. Leave it out.")
    folder = plain_folder(Found(found.base), work, say)
    file, base = work / "lora.gguf", work / "base.gguf"
    convert_lora(found, folder, file, work, tools)
    say(f"converting {found.base} to f16, to try the adapter on")
    convert(folder, base, "f16", tools)
    reference = reference_of(found, reference_model(folder, found.adapter), say)
    say("reading it back")
    say(str(check_served(base, reference, "f16", tools, lora=file)))
    return file


def reference_of(found: Found, model: Any, say: Say) -> Reference:
    """What an export is compared with: the model in float32, and what was found with it."""
    tokenizer = load_own_tokenizer(found)
    stops = model.generation_config.eos_token_id
    own_texts, own_chats = rows_of(found.run, _ROWS, say)
    return Reference(
        model,
        tokenizer,
        preparer_for(tokenizer),
        [stops] if isinstance(stops, int) else list(stops or [tokenizer.eos_token_id]),
        found.run.data.system if found.run else None,
        own_texts,
        own_chats,
    )


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on the same disk, that is gone in the end."""
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
    try:
        work.mkdir(parents=True)
        yield work
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise ModelError where something would be overwritten."""
    if os.path.lexists(out):
        raise ModelError(f"{out} exists. Name another file, or delete it.")

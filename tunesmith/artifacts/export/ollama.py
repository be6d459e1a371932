"""`tunesmith export ollama`: a folder with the GGUF file and a Modelfile, for `ollama create`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.artifacts.export import commands
from tunesmith.artifacts.export.check import Reference
from tunesmith.artifacts.export.convert import GgufType
from tunesmith.artifacts.export.gguf_file import refuse_existing, work_folder, write_gguf
from tunesmith.artifacts.export.go_template import TurnShape, go_template, render_go, turn_shape
from tunesmith.artifacts.export.server import serving
from tunesmith.artifacts.export.tools import Tools, find_tools
from tunesmith.artifacts.found import Say, find_model
from tunesmith.errors import ExportError, ModelError, TemplateError

_FILE = "model.gguf"
# Ollama's name of a setting, and that of transformers.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


def export_ollama(name: str, out: Path, type_: GgufType, say: Say, *, tools: Path | None = None) -> Path:
    """Write a folder from which `ollama create` makes the model: its GGUF file, checked as by `export gguf`,
    and a Modelfile with the template, the tokens that end an answer, the system prompt and the sampling.

    Raises TemplateError for a chat template that has no like in Ollama's language, else as `export_gguf`."""
    out = out.expanduser()
    refuse_existing(out)
    found = find_model(name, say)
    programs = find_tools(tools, say)
    with work_folder(out) as work:
        file, reference = write_gguf(found, work, type_, programs, say)
        folder = work / "ollama"
        folder.mkdir()
        file.rename(folder / _FILE)
        template = _checked_template(folder / _FILE, reference, programs, say)
        length = found.run.data.max_length if found.run else None
        (folder / "Modelfile").write_text(modelfile(reference, template, length), encoding="utf-8")
        folder.rename(out)
    say(f"{out}: Modelfile and {_FILE}, {(out / _FILE).stat().st_size / 1e6:,.0f} MB")
    say(commands.ollama(out))
    return out


def _checked_template(file: Path, reference: Reference, tools: Tools, say: Say) -> str:
    """The chat template in Go's language, if every conversation gets its trained token ids by it."""
    if not reference.tokenizer.chat_template:
        raise TemplateError("the model has no chat template, which Ollama asks for. tunesmith export gguf.")
    shape = turn_shape(reference.tokenizer)
    if reference.system and shape.system is None:
        raise TemplateError(
            "the model was trained with a system prompt, which its chat template writes into a user's turn: "
            "Ollama cannot. Serve a GGUF file with llama-server: tunesmith export gguf."
        )
    with serving(file, tools, max_tokens=reference.positions) as server:
        added = server.tokenize("", has_control=True)
        template = go_template(shape, reference.tokenizer.decode(added))
        number = 0
        for messages, ours in reference.chats():
            if not _is_expressible(shape, messages):
                continue
            theirs = server.tokenize(render_go(template, messages), has_control=True)
            if theirs != ours:
                raise ExportError(
                    f"a conversation that ends with {messages[-1]['content'][:60]!a} has other token ids by "
                    "the template for Ollama than in training; llama-server renders the model's own: "
                    "tunesmith export gguf."
                )
            number += 1
    say(f"template for Ollama: token ids of {number} conversations equal the trained ones")
    if shape.trims:
        say("the model's template trims white space around messages; Ollama's language cannot")
    if shape.system is None:
        say("the model's template has no system prompt, or none of its own place: Ollama's will have none")
    return template


def _is_expressible(shape: TurnShape, messages: list[dict[str, Any]]) -> bool:
    is_trimmed = all(message["content"] == message["content"].strip() for message in messages)
    has_system = any(message["role"] == "system" for message in messages)
    return (is_trimmed or not shape.trims) and (shape.system is not None or not has_system)


def modelfile(reference: Reference, template: str, num_ctx: int | None) -> str:
    """The Modelfile of a model; `num_ctx` is the longest text it was trained on, if that is known."""
    lines = [f"FROM ./{_FILE}", f'TEMPLATE """{template}"""']
    if reference.system:
        if '"""' in reference.system:
            raise ModelError('the system prompt holds """, which a Modelfile cannot')
        lines.append(f'SYSTEM """{reference.system}"""')
    for stop in reference.stop_ids:
        lines.append(f'PARAMETER stop "{reference.tokenizer.decode([stop])}"')
    settings = reference.model.generation_config
    if settings.do_sample:
        given = {name: getattr(settings, own, None) for name, own in _SAMPLING.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in given.items() if value is not None]
    else:
        lines.append("PARAMETER temperature 0")
    if num_ctx:
        lines.append(f"PARAMETER num_ctx {num_ctx}")
    return "\n".join(lines) + "\n"

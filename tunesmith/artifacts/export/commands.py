"""Command lines that serve an export."""

from __future__ import annotations

import shlex
from pathlib import Path


def llama_server(file: Path) -> str:
    return f"serve it: llama-server -m {_quoted(file)} --jinja"


def servers(folder: Path) -> str:
    """Those that load a plain transformers folder."""
    quoted, name = _quoted(folder), shlex.quote(folder.resolve().name)
    for_ollama = _quoted(folder.with_name(f"{folder.name}-ollama"))
    return (
        f"vLLM:    vllm serve {quoted} --served-model-name {name}\n"
        f"SGLang:  python -m sglang.launch_server --model-path {quoted} --served-model-name {name}\n"
        f"Ollama:  tunesmith export ollama {quoted} --out {for_ollama}"
    )


def ollama(folder: Path) -> str:
    name = shlex.quote(folder.resolve().name.lower())
    return f"Ollama:  ollama create {name} -f {_quoted(folder / 'Modelfile')} && ollama run {name}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))

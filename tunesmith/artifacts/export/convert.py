"""From a plain folder to GGUF, with llama.cpp's own converters and quantiser, each in its own process."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tunesmith.artifacts.export.server import SCRIPT
from tunesmith.artifacts.export.tools import Tools
from tunesmith.artifacts.found import Found
from tunesmith.errors import ExportError, ModelError

GgufType = Literal["f16", "bf16", "q8_0", "q4_k_m"]
TYPES: tuple[GgufType, ...] = get_args(GgufType)
_FTYPE_Q4_K_M = "15"  # LLAMA_FTYPE_MOSTLY_Q4_K_M

# llama.cpp's names of pre-tokenizers that people make themselves, by what tokenizers calls them. A name is
# tried only on a tokenizer whose hash the converter does not know, and kept only if the ids of every text of
# the check are equal.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ("ByteLevel+regex",): "gpt-2",
    ("Digits", "ByteLevel+regex"): "smollm",
    (_QWEN2, "ByteLevel"): "qwen2",
    (_QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), "ByteLevel"): "llama-bpe",
}


def convert(folder: Path, target: Path, type_: GgufType, tools: Tools) -> None:
    """Write the model of a plain folder as one GGUF file.

    Raises ModelError if llama.cpp does not know its architecture or its tokenizer, ExportError if the
    converter fails otherwise."""
    if type_ == "q4_k_m":
        whole = target.with_name("whole.gguf")
        _convert(folder, whole, _lossless(folder), tools)
        _run("quantise", tools.library, whole, target, _FTYPE_Q4_K_M, torch.get_num_threads())
        whole.unlink()
    else:
        _convert(folder, target, type_, tools)


def _convert(folder: Path, target: Path, type_: str, tools: Tools) -> None:
    pre = pre_tokenizer(folder)
    arguments = [folder, "--outfile", target, "--outtype", type_, "--model-name", folder.resolve().name]
    _run("convert", tools.sources, "convert_hf_to_gguf.py", pre, *arguments)


def convert_lora(found: Found, base: Path, target: Path, work: Path, tools: Tools) -> None:
    """Write the adapter alone as GGUF, in float32.

    `base` is the base model's folder. Raises ModelError for an adapter that llama.cpp cannot have."""
    assert found.adapter is not None
    copy = work / "adapter"
    copy.mkdir()
    settings = json.loads((found.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["lora_alpha"] = _alpha(settings, found.adapter)
    (copy / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copy(found.adapter / "adapter_model.safetensors", copy)
    arguments = [copy, "--base", base, "--outfile", target, "--outtype", "f32"]
    _run("convert", tools.sources, "convert_lora_to_gguf.py", pre_tokenizer(base), *arguments)


def _alpha(settings: dict[str, Any], adapter: Path) -> float:
    """The alpha with which llama.cpp, which multiplies by alpha / r, does what PEFT does."""
    r, alpha = int(settings["r"]), float(settings["lora_alpha"])
    other_kinds = {
        f"peft_type {settings['peft_type']}": settings["peft_type"] != "LORA",
        "use_dora": settings.get("use_dora"),
        "bias": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "alpha_pattern": settings.get("alpha_pattern"),
        "rank_pattern with use_rslora": settings.get("rank_pattern") and settings.get("use_rslora"),
        "modules_to_save": settings.get("modules_to_save"),
        "trainable_token_indices": settings.get("trainable_token_indices"),
        "target_parameters": settings.get("target_parameters"),
    }
    refused = [name for name, has_it in other_kinds.items() if has_it]
    if refused:
        raise ModelError(
            f"{adapter}: its adapter has {', '.join(refused)}, which llama.cpp's LoRA files cannot hold. "
            "Export the whole model: leave out --lora."
        )
    return alpha * math.sqrt(r) if settings.get("use_rslora") else alpha


def read_gguf(file: Path, tools: Tools) -> dict[str, Any]:
    """`fields` of a GGUF file by name, and `tensors`: name -> [type, shape]."""
    return json.loads(_run("read", tools.sources, file))


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for what splits a text before the merges of this folder's tokenizer, or "" if none is
    known."""
    from transformers import AutoTokenizer

    # Loaded, since a class (Qwen2Tokenizer) may put another than the file's in its place.
    backend = getattr(AutoTokenizer.from_pretrained(folder), "backend_tokenizer", None)
    spec = (json.loads(backend.to_str())["pre_tokenizer"] if backend is not None else None) or {}
    parts = spec.get("pretokenizers", [spec])
    return _PRE_TOKENIZERS.get(tuple(map(_part, parts)), "")


def _part(spec: dict[str, Any]) -> str:
    if spec.get("type") == "Split":
        return str(spec["pattern"].get("Regex"))
    has_regex = spec.get("type") == "ByteLevel" and spec.get("use_regex")
    return f"{spec.get('type')}{'+regex' if has_regex else ''}"


def _lossless(folder: Path) -> str:
    """The type that holds a folder's weights as they are, to quantise from."""
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    return {"bfloat16": "bf16", "float16": "f16"}.get(str(dtype), "f32")


def _run(*arguments: object) -> str:
    """The script's output. Raises as `convert` does."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return result.stdout
    said = (result.stderr + result.stdout).strip()
    if "pre-tokenizer was not recognized" in said:
        raise ModelError(
            "llama.cpp has no pre-tokenizer that splits text as this tokenizer does, so its ids would differ "
            "from the trained ones. Serve the model with transformers, vLLM or SGLang: tunesmith export hf."
        )
    if "is not supported" in said:
        raise ModelError(f"llama.cpp does not know this model: {said.splitlines()[-1]}")
    last = "\n".join(said.splitlines()[-5:])
    raise ExportError(f"llama.cpp's {arguments[0]} ended with exit code {result.returncode}:\n{last}")

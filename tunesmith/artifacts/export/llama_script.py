"""Run by itself, in a process of its own: llama.cpp's converters, quantiser, reader of GGUF and server.

    python llama_script.py convert SOURCES SCRIPT PRE [the script's arguments]
    python llama_script.py quantise LIBRARY FROM TO FTYPE THREADS
    python llama_script.py read SOURCES FILE           a JSON object on stdout
    python llama_script.py serve PACKAGES FILE TOKENS THREADS [LORA]    until killed; its address on stdout

It imports nothing of tunesmith: the modules of llama.cpp must be the only ones called `gguf`.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This folder's modules are tunesmith's, and are not to be taken for top-level ones.
sys.path.pop(0)


def convert(sources: str, script: str, pre: str, *arguments: str) -> None:
    """Run one of the converters. `pre` is the name of the pre-tokenizer for a tokenizer that the converter
    does not know by the hash of what it makes of a text."""
    sys.path.insert(0, sources)
    sys.path.insert(0, str(Path(sources) / "gguf-py"))
    sys.path.append(str(Path(sources).parents[1]))  # packages that the user's environment may lack
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def name_of(model: Any, tokenizer: Any) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    TextModel.get_vocab_base_pre = name_of
    path = Path(sources) / script
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


class _QuantiseParams(ctypes.Structure):
    """llama_model_quantize_params of llama.h; room is left for fields that later versions append."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *[
            (name, ctypes.c_bool)
            for name in (
                "allow_requantize",
                "quantize_output_tensor",
                "only_copy",
                "pure",
                "keep_split",
                "dry_run",
            )
        ],
        ("others", ctypes.c_void_p * 12),
    ]


def quantise(library: str, source: str, target: str, ftype: str, threads: str) -> None:
    """llama_model_quantize, as llama-quantize calls it."""
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _QuantiseParams
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), int(threads)
    sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


def read(sources: str, file: str) -> None:
    """Print what a GGUF file says of itself: every field, and name, shape and type of every tensor."""
    sys.path.insert(0, str(Path(sources) / "gguf-py"))
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: [tensor.tensor_type.name, [int(size) for size in tensor.shape]]
        for tensor in reader.tensors
    }
    json.dump({"fields": fields, "tensors": tensors}, sys.stdout, default=str)


def serve(packages: str, file: str, max_tokens: str, threads: str, lora: str = "") -> None:
    """Serve a model on the CPU and the loopback device, one request at a time, with room for `max_tokens`."""
    sys.path.insert(0, packages)
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

    params = CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = int(max_tokens), 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_gpu_layers, params.fit_params, params.warmup = 0, False, False
    params.hostnames, params.port = ["127.0.0.1"], 0
    if lora:
        adapter = CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        params.lora_adapters = [adapter]
    server = Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it closes the pipe, or is gone
    os._exit(0)


if __name__ == "__main__":
    jobs: dict[str, Callable[..., None]] = {
        "convert": convert,
        "quantise": quantise,
        "read": read,
        "serve": serve,
    }
    jobs[sys.argv[1]](*sys.argv[2:])

"""Compiles the C++ of this folder at first use, and keeps the result in the user's cache folder.

Only what PyTorch has no operation for is written here, only for processors that multiply bfloat16
(AVX512-BF16), and only to be faster: without a compiler, or on another processor, the same is computed by
PyTorch's own operations. Nothing of PyTorch's is compiled against; tensors are passed by address."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.cache_folder import cache_folder

# What every processor with AVX512-BF16 has, and not what this one has besides: home folders are shared.
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", *(f"-m{name}" for name in _FEATURES))
_SECONDS = 120


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp, or None where it cannot be had: `missing` says why."""
    return None if missing() else ctypes.CDLL(str(_compiled(name, _compiler())))


@functools.cache
def missing() -> str | None:
    """What native code lacks on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "made for Linux"
    if not torch.cpu._is_avx512_bf16_supported():
        return "made for processors with AVX512-BF16"
    if (compiler := _compiler()) is None:
        return "no C++ compiler was found"
    try:
        for source in Path(__file__).parent.glob("*.cpp"):
            _compiled(source.stem, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        return f"it could not be compiled ({reason})"
    return None


def call(name: str, function: str, *arguments: Any) -> None:
    """Call a function of `name`.cpp. Tensors go by address, whole numbers as int64, others as float, None and
    ctypes' own as they are."""
    native = library(name)
    assert native is not None
    getattr(native, f"tunesmith_{function}")(*map(_argument, arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else value


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


@functools.cache
def _compiled(name: str, compiler: str | None) -> Path:
    """The shared library, compiled if this source was not yet by this compiler. Processes that compile at the
    same time do so side by side, and the last rename stands."""
    source = Path(__file__).with_name(f"{name}.cpp")
    assert compiler is not None
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, timeout=_SECONDS).stdout
    headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    parts = [source.read_bytes(), *headers, " ".join(_FLAGS).encode(), version]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    cache = cache_folder("native")
    target = cache / f"{name}-{key[:16]}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            subprocess.run(
                [compiler, *_FLAGS, str(source), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            built.rename(target)
    return target

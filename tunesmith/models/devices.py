"""What this machine computes with: device, number format, memory that is free, and how fast it multiplies."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import psutil
import torch

from tunesmith.config import ModelConfig


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return accelerator
    return torch.device("cpu")


def compute_dtype(config: ModelConfig) -> tuple[torch.dtype, str]:
    """Number format of matrix products and frozen weights, and why it was chosen."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as model.dtype says"
    device = default_device()
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name()} multiplies it natively"
        return torch.float32, f"{torch.cuda.get_device_name()} has no native bfloat16"
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU multiplies it natively (AVX512-BF16 or AMX)"
        return torch.float32, "this CPU has no native bfloat16"
    return torch.float32, f"bfloat16 on {device.type} is not known to be native"


def free_memory_bytes() -> int:
    """Memory a run could still take on the device it will use."""
    device = default_device()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def steady_memory() -> None:
    """Keep the memory of a process that computes on the CPU from growing and from being cleared anew. To be
    called before anything is computed.

    oneDNN compiles a kernel of about 0.6 MiB for every shape it meets, and packs have ever new lengths: by
    default a thousand kernels are kept, of which a pass needs a few dozen. And by default glibc gives large
    blocks back to the system at once, which then clears every page of the next one: a pass over 2,048 tokens
    of a 135M model met 50,000 page faults, and 19,000 so."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(_KERNELS))
    if default_device().type == "cpu":
        _set_allocator(2**30)


def frugal_memory() -> None:
    """The other way: give every large block back at once. By default glibc keeps what blocks of ever other
    sizes leave behind: merging 320 MB matrix by matrix held 385 MB in the end, and so 81 MB at most.
    `steady_memory` undoes it."""
    _set_allocator(2**20)


def _set_allocator(from_bytes: int) -> None:
    """From which size on a block is the system's own, and how much may be free before some is given back."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, from_bytes)


_KERNELS = 128
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def peak_memory_gib() -> float:
    """Most memory this process has held so far: on the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def matmul_flops_per_second(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The rate of a large matrix product in this format, measured now: the ceiling that MFU is told
    against."""
    device = default_device()
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    torch.mm(a, a)  # first call: kernel choice and thread start-up
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not times:
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)

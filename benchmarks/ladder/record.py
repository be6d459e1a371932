"""What is told of a run beside its losses: memory, involuntary switches, the matmul ceiling, the machine.

Imports torch only where asked to and nothing of tunesmith, since TRL's environment runs it too.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")


def memory_gib(field: str) -> float:
    """A line of /proc/self/status in GiB: VmRSS is resident now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise KeyError(field)


@contextmanager
def watch(record: dict[str, Any]) -> Iterator[None]:
    """Fill in `record` with what the steps inside took: peak memory before (loading) and within, and
    involuntary context switches, which tell whether the machine was shared."""
    record["rss_before_gib"] = memory_gib("VmRSS")
    record["peak_loading_gib"] = memory_gib("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from VmRSS
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    record["seconds"] = time.perf_counter() - start
    record["peak_rss_gib"] = memory_gib("VmHWM")
    record["involuntary_switches"] = after.ru_nivcsw - before.ru_nivcsw
    record["minor_faults"] = after.ru_minflt - before.ru_minflt
    record["user_s"] = after.ru_utime - before.ru_utime
    record["system_s"] = after.ru_stime - before.ru_stime


def matmul_ceiling(dtype: Any, seconds: float = 0.5) -> dict[str, float]:
    """FLOP/s of one layer's large products, by shape [tokens, in] x [out, in]: the fastest call of each.

    The largest is the ceiling that MFU is told against. Several shapes, since which one is fastest depends on
    caches and on the library's kernels."""
    import torch

    rates: dict[str, float] = {}
    with torch.no_grad():
        for rows, inner, outer in (
            (1024, 1024, 1024),
            (2048, 2048, 2048),
            (2048, 576, 1536),
            (1024, 4096, 4096),
        ):
            a = torch.randn(rows, inner, dtype=dtype)
            b = torch.randn(outer, inner, dtype=dtype)
            out = torch.empty(rows, outer, dtype=dtype)
            best, until = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < until:
                start = time.perf_counter()
                torch.mm(a, b.t(), out=out)
                best = min(best, time.perf_counter() - start)
            rates[f"{rows}x{inner}x{outer}"] = 2.0 * rows * inner * outer / best
    return rates


def versions() -> dict[str, str]:
    """Of Python and the packages a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
    }

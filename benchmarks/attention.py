"""Attention of one layer over a pack on the CPU: stock sdpa with the whole mask, and document by document.

    python -m benchmarks.attention [--repeats 15]

SmolLM2-135M's shape (9 query heads, 3 key heads, 64 wide) and Qwen2.5-1.5B's (12, 2, 128), bfloat16. The two
are run in turn; the medians of forward and backward together are printed in milliseconds, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tunesmith.models.attention import packed_attention

_SHAPES = {"SmolLM2-135M": (9, 3, 64), "Qwen2.5-1.5B": (12, 2, 128)}
_PACKS = {"4 x 105": [105] * 4, "10 x 200": [200] * 10, "4 x 512": [512] * 4, "2 x 1024": [1024] * 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    results = []
    for shape, (heads, key_heads, size) in _SHAPES.items():
        module = types.SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True, training=True)
        for name, lengths in _PACKS.items():
            total = sum(lengths)
            tensors = [
                torch.randn(1, h, total, size, dtype=torch.bfloat16, requires_grad=True)
                for h in (heads, key_heads, key_heads)
            ]
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            at = torch.arange(total)
            mask = ((document[:, None] == document[None]) & (at[:, None] >= at[None]))[None, None]

            def stock(
                tensors: list[Tensor] = tensors, mask: Tensor = mask, module: object = module
            ) -> Tensor:
                return sdpa_attention_forward(module, *tensors, mask, scaling=None)[0]

            def ours(
                tensors: list[Tensor] = tensors, positions: Tensor = positions, module: object = module
            ) -> Tensor:
                return packed_attention(module, *tensors, None, position_ids=positions)[0]  # type: ignore[arg-type]

            times: dict[str, list[float]] = {"stock": [], "by document": []}
            for _ in range(repeats + 1):
                for which, run in (("stock", stock), ("by document", ours)):
                    times[which].append(_seconds(run))
            stock_ms, ours_ms = (1000 * statistics.median(t[1:]) for t in times.values())
            results.append(
                {
                    "shape": shape,
                    "pack": name,
                    "stock_ms": round(stock_ms, 2),
                    "by_document_ms": round(ours_ms, 2),
                    "ratio": round(stock_ms / ours_ms, 2),
                }
            )
    print(
        json.dumps(
            {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}, indent=2
        )
    )


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run().sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

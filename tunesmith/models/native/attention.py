"""Attention of a pack by attention.cpp, as an autograd function."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.layout import PackLayout
from tunesmith.models.native.build import address, library

_BLOCK = 64  # keys of a block in attention.cpp


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the native code computes attention of these: bfloat16 [T, heads, D], D a multiple of 32 up to
    256."""
    size = query.shape[-1]
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and size % 32 == 0
        and size <= 256
        and value.shape[-1] == size
        and library("attention") is not None
    )


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, *, window: int | None, scale: float
) -> Tensor:
    """query [T, H, D], key and value [T, K, D] -> [T, H, D]. A query sees the `window` positions up to its
    own (all of its document before it without)."""
    output: Tensor = _NativeAttention.apply(query, key, value, layout, window, scale)  # type: ignore[no-untyped-call]
    return output


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        window: int | None,
        scale: float,
    ) -> Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        call = _Call(query, key, value, layout, window, scale)
        output = torch.empty(query.shape, dtype=query.dtype)
        log_sums = torch.empty(query.shape[1::-1], dtype=torch.float32)
        call.run("forward", 2 * call.of_keys, output, log_sums)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.options = layout, window, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, output, log_sums = ctx.saved_tensors
        call = _Call(query, key, value, *ctx.options)
        inputs = (query, key, value)
        dinputs = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        size = 3 * call.of_keys + 2 * call.of_queries + log_sums.numel()
        call.run("backward", size, *dinputs, before=(grads[0].contiguous(), output), log_sums=log_sums)
        return *dinputs, None, None, None


class _Call:
    """The arguments that both directions have in common."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        window: int | None,
        scale: float,
    ) -> None:
        self.inputs = (query, key, value)
        total, heads, size = query.shape
        key_heads = key.shape[1]
        steps = [stride for x in self.inputs for stride in x.stride()[:2]]
        windowed = window is not None and window <= layout.last_position
        self.blocks = -(-total // _BLOCK)
        pairs = self.blocks * _BLOCK * size // 2
        self.of_keys, self.of_queries = key_heads * pairs, heads * pairs
        self._arguments = (
            (ctypes.c_int64 * 6)(*steps),
            (ctypes.c_int64 * 4)(total, heads, key_heads, size),
            address(layout.subtree_ends),
            address(layout.positions_int32) if windowed else None,
            ctypes.c_int64(window or 0),
            ctypes.c_float(scale),
            ctypes.c_int64(torch.get_num_threads()),
        )

    def run(
        self,
        direction: str,
        scratch_size: int,
        *outputs: Tensor,
        before: tuple[Tensor, ...] = (),
        log_sums: Tensor | None = None,
    ) -> None:
        native = library("attention")
        assert native is not None
        scratch = torch.empty(self.blocks * 4 + scratch_size, dtype=torch.int32)
        getattr(native, f"tunesmith_attention_{direction}")(
            *map(address, (*before, *self.inputs)),
            *self._arguments,
            *([] if log_sums is None else [address(log_sums)]),
            address(scratch),
            *map(address, outputs),
        )

"""Attention of a pack by attention.cpp, as an autograd function."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.layout import PackLayout
from tunesmith.models.native.build import call, library

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
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        output = torch.empty(query.shape, dtype=query.dtype)
        log_sums = torch.empty(query.shape[1::-1], dtype=torch.float32)
        scratch = _scratch(query, key, of_keys=2, of_queries=0)
        common = _common(inputs, layout, window, scale)
        call("attention", "attention_forward", *inputs, *common, scratch, output, log_sums)
        ctx.save_for_backward(*inputs, output, log_sums)
        ctx.options = layout, window, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *inputs, output, log_sums = ctx.saved_tensors
        doutput = grads[0].contiguous()
        dinputs = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        scratch = _scratch(*inputs[:2], of_keys=3, of_queries=2, more=log_sums.numel())
        common = _common(inputs, *ctx.options)
        call(
            "attention", "attention_backward", doutput, output, *inputs, *common, log_sums, scratch, *dinputs
        )
        return *dinputs, None, None, None


def _common(
    inputs: Sequence[Tensor], layout: PackLayout, window: int | None, scale: float
) -> tuple[Any, ...]:
    """What both directions are told of query, key and value: from their steps on to the number of threads."""
    total, heads, size = inputs[0].shape
    steps = [stride for x in inputs for stride in x.stride()[:2]]
    windowed = window is not None and window <= layout.last_position
    return (
        (ctypes.c_int64 * 6)(*steps),
        (ctypes.c_int64 * 4)(total, heads, inputs[1].shape[1], size),
        layout.subtree_ends,
        layout.positions_int32 if windowed else None,
        window or 0,
        scale,
        torch.get_num_threads(),
    )


def _scratch(query: Tensor, key: Tensor, *, of_keys: int, of_queries: int, more: int = 0) -> Tensor:
    """Room for so many packed copies of keys and of queries, four numbers a block of keys, and `more`."""
    total, heads, size = query.shape
    blocks = -(-total // _BLOCK)
    pairs = blocks * _BLOCK * size // 2
    copies = (of_keys * key.shape[1] + of_queries * heads) * pairs
    return torch.empty(4 * blocks + copies + more, dtype=torch.int32)

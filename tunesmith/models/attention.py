"""Attention for packs on a CPU, put under stock models through transformers' attention interface.

B = 1 row, H query heads, K key heads, G = H / K, T tokens of the pack, t of one document, D head size.

Stock CPU attention computes a masked [T, T] over the whole pack, though a document sees itself alone, and its
backward is slow at these sizes (benchmarks/README.md). Here each document is computed by itself: as batched
products over key heads while it is short, by the stock kernel when [t, t] would take memory. Accelerators
keep their own kernels, which transformers tells apart from restarting positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tunesmith_cpu"
# Above this the stock kernel is as fast, and the saved probabilities (H t^2 numbers a layer) take too much
# memory.
_LONGEST_PRODUCT = 512


def use_packed_attention(model: Any) -> None:
    """Let a model that runs on the CPU with transformers' sdpa use this instead."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def uses_sdpa(model: Any) -> bool:
    """Whether transformers chose sdpa, which this stands in for (Gemma 2's soft-capping needs its own)."""
    return getattr(model.config, "_attn_implementation", None) == "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Anything but a pack of documents in training (a cache, a padded batch) is the stock kernel's."""
    total = query.shape[2]
    starts: list[int] = []
    if position_ids is not None and query.shape[0] == 1 and key.shape[2] == total == position_ids.shape[-1]:
        starts = (position_ids.reshape(-1, total)[0] == 0).nonzero()[:, 0].tolist()
    if starts[:1] != [0] or softcap is not None or dropout:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_ids=position_ids,
            sliding_window=sliding_window,
            softcap=softcap,
            **kwargs,
        )
    outputs = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        length = end - start
        q, k, v = (tensor[0, :, start:end] for tensor in (query, key, value))
        window = sliding_window is not None and length > sliding_window
        if length > _LONGEST_PRODUCT or window:
            mask = (
                attention_mask[..., start:end, start:end] if window and attention_mask is not None else None
            )
            output, _ = sdpa_attention_forward(
                module, q[None], k[None], v[None], mask, scaling=scaling, is_causal=mask is None
            )
            outputs.append(output[0])
        else:
            outputs.append(_document(q, k, v, scaling))
    return torch.cat(outputs)[None], None


def _document(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of one document: query [H, t, D], key and value [K, t, D] -> [t, H, D].

    The query heads of one key head are stacked, so that a product serves them all. Scores are rounded to the
    inputs' format before the softmax, as in transformers' eager attention."""
    heads, length, size = query.shape
    groups = heads // key.shape[0]
    scale = size**-0.5 if scaling is None else scaling
    stacked = (query * scale).reshape(key.shape[0], groups * length, size)
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu_(1).repeat(groups, 1)
    probabilities = torch.baddbmm(future, stacked, key.transpose(1, 2)).softmax(-1)
    output = torch.bmm(probabilities, value)
    return output.reshape(heads, length, size).transpose(0, 1)

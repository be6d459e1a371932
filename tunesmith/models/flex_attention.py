"""Attention for prefix-tree packs on a GPU: FlexAttention with the mask that the layout of the pack says.

H query heads, K key heads, T tokens of the pack, D head size, N blocks of 128 tokens.

    query i sees key j   when   j <= i < subtree_ends[j]   (and position i - position j < the sliding window)

FlexAttention is told which [128, 128] blocks of the mask have anything in them and which are full. Both are
known from the least and greatest end in each block: [N, N], where the mask itself would be [T, T]. That is
done once a pass and kept with the layout, for every layer and for the second forward pass of gradient
checkpointing.

Not yet run on a GPU: there was none where this was written. Mask and numbers were compared on a CPU, where
FlexAttention has no backward pass. TODO: delete this paragraph when benchmarks/ holds a GPU run with
data.packing=tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from tunesmith.models.layout import PackLayout

NAME = "tunesmith_flex"
_BLOCK = 128  # FlexAttention's own default


def use_flex_attention(model: Any) -> None:
    """Let a model on a GPU attend by the layout of its pack."""
    AttentionInterface.register(NAME, packed_flex_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    model.set_attn_implementation(NAME)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | BlockMask | None:
    """None for a pack, whose mask comes from its layout; for anything else (a padded batch, a cache) that of
    the attention that will serve it."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        return None
    # Only FlexAttention caps scores.
    make = sdpa_mask if getattr(config, "attn_logit_softcapping", None) is None else flex_attention_mask
    return make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )


def packed_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackLayout | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Without `layout`, documents are where positions begin again. Anything but a pack is left to transformers.
    Raises ValueError on dropout in a pack, which FlexAttention has not."""
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, dropout=dropout
        )
    total = query.shape[2]
    if attention_mask is not None or query.shape[0] != 1 or key.shape[2] != total:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("FlexAttention has no dropout; set attention_dropout of the model to 0")
    if layout is None:
        layout = PackLayout.of_positions(position_ids, total)
    output = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=block_mask(layout, query.device, sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def block_mask(layout: PackLayout, device: torch.device, window: int | None) -> BlockMask:
    """The mask of a pack for FlexAttention, made when it is first asked for."""
    # On the layout itself and not in a table of ours, so that it goes when the pack goes.
    made: dict[Any, BlockMask] = vars(layout).setdefault("_block_masks", {})
    if (device, window) not in made:
        made[device, window] = _block_mask(
            layout.subtree_ends.to(device), layout.position_ids.to(device), window
        )
    return made[device, window]


def _block_mask(subtree_ends: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """subtree_ends, positions: [T], on the device of the mask."""
    total = len(subtree_ends)
    reach = total if window is None else window

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < subtree_ends[key])
        # A path leaves out what lies between its segments: the window counts positions, not places in the
        # pack.
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    lowest_end, highest_end = _block_extremes(subtree_ends.long(), below=total, above=0)
    lowest, highest = _block_extremes(positions, below=total, above=-1)
    first = torch.arange(0, total, _BLOCK, device=subtree_ends.device)
    last = (first + _BLOCK).clamp(max=total) - 1
    # Rows are blocks of queries, columns blocks of keys. A block that only seems to have something in it
    # costs time, not truth: mask_mod decides token by token.
    something = (first[None] <= last[:, None]) & (first[:, None] < highest_end[None])
    something &= lowest[:, None] - highest[None] < reach
    everything = (last[None] <= first[:, None]) & (last[:, None] < lowest_end[None])
    everything &= highest[:, None] - lowest[None] < reach
    everything[last - first + 1 < _BLOCK] = (
        False  # cut off by the end of the pack: torch has none full, either
    )
    return BlockMask.from_kv_blocks(
        *_ordered(something & ~everything),
        *_ordered(everything),
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(total, total),
    )


def _block_extremes(values: Tensor, *, below: int, above: int) -> tuple[Tensor, Tensor]:
    """[N] the least and the greatest of each block of `values` [T], of which none is over `below` or under
    `above`."""
    padding = (0, -len(values) % _BLOCK)
    least = nn.functional.pad(values, padding, value=below).view(-1, _BLOCK).amin(1)
    greatest = nn.functional.pad(values, padding, value=above).view(-1, _BLOCK).amax(1)
    return least, greatest


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of blocks [N, N] as FlexAttention takes it: how many a row has [1, 1, N], and which, those first
    [1, 1, N, N]."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    """Compiled on a GPU; uncompiled FlexAttention makes [T, T] scores, and is for tests."""
    function: Callable[..., Tensor] = flex_attention
    return torch.compile(function) if device_type == "cuda" else function

"""Attention document by document, against torch's own with the whole mask written out."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F

from tunesmith.models.attention import packed_attention

MODULE = types.SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)


def tensors(lengths, *, heads=6, key_heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    query = torch.randn(1, heads, total, size, generator=generator, requires_grad=True)
    key = torch.randn(1, key_heads, total, size, generator=generator, requires_grad=True)
    value = torch.randn(1, key_heads, total, size, generator=generator, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return query, key, value, positions


def whole_mask(lengths, window=None):
    """[1, 1, T, T] bool: the same document, not the future, and within the window."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(sum(lengths))
    mask = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    if window is not None:
        mask &= at[:, None] - at[None] < window
    return mask[None, None]


@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [7], [600, 20], [1, 1, 1]])
@pytest.mark.parametrize("window", [None, 4])
def test_outputs_and_gradients_equal_those_of_the_whole_mask(lengths, window):
    query, key, value, positions = tensors(lengths)
    mask = whole_mask(lengths, window)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    output, _ = packed_attention(
        MODULE, query, key, value, mask, scaling=8**-0.5, position_ids=positions, sliding_window=window
    )
    assert output.shape == expected.shape
    # float32 sums of up to 600 terms in another order
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(output, (query, key, value), upstream), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_changing_one_document_leaves_the_others_outputs_bit_for_bit():
    lengths = [6, 11, 4]
    query, key, value, positions = tensors(lengths)
    before, _ = packed_attention(MODULE, query, key, value, None, scaling=1.0, position_ids=positions)
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[:, :, 6:17].normal_()
    after, _ = packed_attention(MODULE, query, key, value, None, scaling=1.0, position_ids=positions)
    changed = (before != after).any(dim=-1).any(dim=-1)[0]
    assert changed.tolist() == [False] * 6 + [True] * 11 + [False] * 4


def test_a_padded_prompt_is_left_to_the_stock_kernel():
    """Positions of a left-padded prompt do not begin with 0; its mask must count."""
    query, key, value, _ = tensors([6])
    positions = torch.tensor([[1, 1, 0, 1, 2, 3]])
    mask = whole_mask([6]) & torch.tensor([False, False, True, True, True, True])
    mask |= torch.eye(6, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    output, _ = packed_attention(MODULE, query, key, value, mask, scaling=8**-0.5, position_ids=positions)
    assert torch.allclose(output, expected, atol=1e-6)

"""Attention over tiles against a softmax under the whole mask, for any tree of segments."""

from __future__ import annotations

import types
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.models import attention as attention_module
from tunesmith.models.attention import packed_attention, use_packed_attention
from tunesmith.models.layout import PackLayout, Segment

MODULE = types.SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)


@st.composite
def trees(draw):
    """Layouts of a few trees, up to four segments deep."""
    segments = []

    def grow(start, position, depth):
        length = draw(st.integers(1, 80))
        end = subtree_end = start + length
        segments.append(None)
        index = len(segments) - 1
        for _ in range(draw(st.integers(0, 2)) if depth < 3 else 0):
            subtree_end = grow(subtree_end, position + length, depth + 1)
        segments[index] = Segment(start, end, subtree_end, position)
        return subtree_end

    end = 0
    for _ in range(draw(st.integers(1, 3))):
        end = grow(end, 0, 0)
    return PackLayout(tuple(segments))


def whole_mask(layout, window):
    """[T, T] bool, from what layout.py says: query i sees key j when j <= i < subtree_ends[j]."""
    at = torch.arange(layout.num_tokens)
    mask = (at[None] <= at[:, None]) & (at[:, None] < layout.subtree_ends[None])
    if window is not None:
        mask &= layout.position_ids[:, None] - layout.position_ids[None] < window
    return mask


def plain(query, key, value, mask, scale, softcap):
    """query [H, T, D], key and value [K, T, D] -> [T, H, D]; the softmax in float32 at least."""
    groups = len(query) // len(key)
    key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(value.dtype)
    return (probabilities @ value).transpose(0, 1)


def tiled(query, key, value, layout, scale, softcap, window):
    output, _ = packed_attention(
        MODULE, *(x[None] for x in (query, key, value)), None, scaling=scale, softcap=softcap,
        sliding_window=window, layout=layout,
    )  # fmt: skip
    return output[0]


def random_inputs(total, heads, size, large=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, key, value, upstream = (
        torch.randn(number, total, size, generator=generator)
        for number in (heads[0], *heads[1:] * 2, heads[0])
    )
    return [x.to(dtype) for x in (query * large, key, value)], upstream.transpose(0, 1).to(dtype)


def outcome(function, inputs, upstream, *args, dtype=None):
    """Output, and gradients of query, key and value, in float64."""
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    output = function(*inputs, *args)
    gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
    return [x.detach().double() for x in (output, *gradients)]


@given(
    layout=trees(),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    size=st.sampled_from([4, 16, 40]),
    window=st.none() | st.integers(1, 200),
    softcap=st.sampled_from([None, 5.0, 50.0]),
    large=st.sampled_from([1.0, 60.0]),
    chunk_cells=st.sampled_from([1, 2**15, 2**20]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_any_tree_gives_what_a_softmax_under_the_whole_mask_gives(
    layout, heads, size, window, softcap, large, chunk_cells, seed
):
    """To 1e-5 of what a row adds up: float32 sums of some hundred terms in another order. A score s is
    rounded to |s| 2^-24 some times over, and with it the exponent of its probability."""
    inputs, upstream = random_inputs(layout.num_tokens, heads, size, large, seed)
    scale = size**-0.5
    with patch.object(attention_module, "_CHUNK_CELLS", chunk_cells):
        found = outcome(tiled, inputs, upstream, layout, scale, softcap, window)
    mask = whole_mask(layout, window)
    expected = outcome(plain, inputs, upstream, mask, scale, softcap, dtype=torch.float64)
    query, key, value = inputs
    largest = float((query.norm(dim=-1).max() * key.norm(dim=-1).max()) * scale)
    tolerance = 1e-5 + 2**-21 * largest
    # A gradient is a difference of sums, and 0 for a query that sees one key: measured by its terms.
    slope = float(value.norm(dim=-1).max() * upstream.norm(dim=-1).max()) * scale
    terms = [0.0, slope * float(key.abs().max()), slope * float(query.abs().max()), 0.0]
    for ours, theirs, size_of_terms in zip(found, expected, terms, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * max(float(theirs.abs().max()), size_of_terms)


TREE = PackLayout(
    (
        Segment(0, 150, 420),
        Segment(150, 180, 250, 150),
        Segment(180, 250, 250, 180),
        Segment(250, 420, 420, 150),
        Segment(420, 430, 430),
    )
)


@pytest.mark.parametrize("large", [1.0, 60.0])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 20.0)])
def test_in_bfloat16_tiles_are_as_near_to_the_truth_as_the_plain_softmax(large, window, softcap):
    """At most 1.5 times the distance from float64 of products in bfloat16 with the softmax in float32 between
    them, plus one rounding (2^-9)."""
    inputs, upstream = random_inputs(TREE.num_tokens, (6, 2), 16, large, dtype=torch.bfloat16)
    mask = whole_mask(TREE, window)
    found = outcome(tiled, inputs, upstream, TREE, 0.25, softcap, window)
    stock = outcome(plain, inputs, upstream, mask, 0.25, softcap)
    exact = outcome(plain, inputs, upstream, mask, 0.25, softcap, dtype=torch.float64)
    for ours, theirs, truth in zip(found, stock, exact, strict=True):
        our_error, their_error = (float((some - truth).norm() / truth.norm()) for some in (ours, theirs))
        assert our_error <= 1.5 * their_error + 2**-9


def test_a_token_that_sees_only_itself_gets_its_own_value():
    layout = PackLayout.of_lengths([1] * 70)
    (query, key, value), _ = random_inputs(70, (4, 2), 8, 60.0)
    output = tiled(query, key, value, layout, 1.0, None, None)
    assert torch.allclose(output, value.repeat_interleave(2, 0).transpose(0, 1), rtol=1e-6)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=None, pad_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache_gives_sdpas_tokens(padded):
    stock, ours = tiny_llama(), tiny_llama()
    use_packed_attention(ours)
    ids = torch.randint(2, 40, (3 if padded else 1, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for row, pads in enumerate((0, 4, 7)):
            ids[row, :pads], mask[row, :pads] = 1, 0
    tokens = [
        model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        for model in (stock, ours)
    ]
    assert tokens[0].shape == (len(ids), 29)
    assert torch.equal(*tokens)


@torch.no_grad()
def test_a_padded_batch_gets_sdpas_logits():
    stock, ours = tiny_llama(), tiny_llama()
    use_packed_attention(ours)
    ids = torch.randint(2, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logits = [model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for model in (stock, ours)]
    assert torch.equal(*logits)

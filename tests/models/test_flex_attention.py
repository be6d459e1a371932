"""FlexAttention over packs, against torch's own attention with the whole mask written out. On a CPU, where
FlexAttention runs forward only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.models.flex_attention import block_mask, packed_flex_attention, use_flex_attention
from tunesmith.models.layout import PackLayout, Segment

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
TREE = PackLayout(
    (
        Segment(0, 70, 290, 0),
        Segment(70, 100, 100, 70),
        Segment(100, 240, 290, 70),
        Segment(240, 250, 250, 210),
        Segment(250, 290, 290, 210),
        Segment(290, 300, 300, 0),
    )
)
FLAT = PackLayout.of_lengths([3, 200, 1, 96])


def whole_mask(layout, window=None):
    """[T, T] bool."""
    at = torch.arange(layout.num_tokens)
    mask = (at[None] <= at[:, None]) & (at[:, None] < layout.subtree_ends[None])
    if window is not None:
        positions = layout.position_ids
        mask &= positions[:, None] - positions[None] < window
    return mask


def tensors(total, heads=6, key_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, total, size, generator=generator) for h in (heads, key_heads, key_heads)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("layout", [TREE, FLAT], ids=["tree", "flat"])
def test_outputs_equal_those_of_the_whole_mask(layout, window):
    query, key, value = tensors(layout.num_tokens)
    expected = F.scaled_dot_product_attention(
        query, key, value, whole_mask(layout, window), scale=0.3, enable_gqa=True
    )
    output, _ = packed_flex_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, layout=layout, sliding_window=window
    )
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-5)  # float32 sums of up to 290 terms


def test_scores_are_capped_as_gemma_2_says():
    """softcap * tanh(score / softcap), Gemma 2 (arXiv:2408.00118), section 2."""
    query, key, value = tensors(TREE.num_tokens)
    scores = 5 * torch.tanh(query @ key.repeat_interleave(3, 1).transpose(2, 3) / 5)
    scores = scores.masked_fill(~whole_mask(TREE), float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(3, 1)
    output, _ = packed_flex_attention(
        torch.nn.Identity(), query, key, value, None, scaling=1.0, layout=TREE, softcap=5.0
    )
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-5)


def test_without_a_layout_documents_are_where_positions_begin_again():
    query, key, value = tensors(FLAT.num_tokens)
    by_layout, _ = packed_flex_attention(torch.nn.Identity(), query, key, value, None, layout=FLAT)
    by_position, _ = packed_flex_attention(
        torch.nn.Identity(), query, key, value, None, position_ids=FLAT.position_ids[None]
    )
    assert torch.equal(by_layout, by_position)


@st.composite
def layouts(draw):
    """Any tree of segments: each takes a parent among those that can still go on."""
    segments, path = [], []  # path: indices of the segments from the root to the last one
    parents = []
    for i in range(draw(st.integers(1, 7))):
        path = path[: draw(st.integers(0, len(path)))]
        length = draw(st.integers(1, 200))
        parent = path[-1] if path else -1
        position = segments[parent][1] - segments[parent][0] + segments[parent][2] if path else 0
        start = segments[-1][1] if segments else 0
        segments.append((start, start + length, position))
        parents.append(parent)
        path = [*path, i]
    ends = [end for _, end, _ in segments]
    for i in reversed(range(len(segments))):
        if parents[i] >= 0:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    return PackLayout(
        tuple(Segment(start, end, e, at) for (start, end, at), e in zip(segments, ends, strict=True))
    )


def blocks_of(counts, indices):
    """{(block of queries, block of keys)}"""
    return {(q, int(k)) for q, count in enumerate(counts[0, 0].tolist()) for k in indices[0, 0, q, :count]}


@given(layout=layouts(), window=st.sampled_from([None, 1, 60, 130, 400]))
@settings(max_examples=60, deadline=None)
def test_the_blocks_are_those_that_torch_finds_in_the_whole_mask(layout, window):
    ours = block_mask(layout, CPU, window)
    total = layout.num_tokens
    theirs = create_block_mask(ours.mask_mod, 1, 1, total, total, device="cpu")
    i, j = torch.meshgrid(torch.arange(total), torch.arange(total), indexing="ij")
    assert torch.equal(ours.mask_mod(None, None, i, j), whole_mask(layout, window))
    our_full, full = (blocks_of(m.full_kv_num_blocks, m.full_kv_indices) for m in (ours, theirs))
    our_part, part = (blocks_of(m.kv_num_blocks, m.kv_indices) for m in (ours, theirs))
    # Blocks may be looked at in vain, or token by token though they are full; never the other way round.
    assert our_full <= full
    assert not our_full & our_part
    assert part | full <= our_part | our_full
    if window is None:
        assert our_part | our_full == part | full
        assert our_full == full


def test_the_mask_is_made_once_for_a_pass():
    assert block_mask(FLAT, CPU, None) is block_mask(FLAT, CPU, None)
    assert block_mask(FLAT, CPU, None) is not block_mask(FLAT, CPU, 50)


def tiny(family, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 60}), ("gemma2", {"sliding_window": 60})],
)
@torch.no_grad()
def test_a_model_gives_the_rows_of_a_tree_the_logits_they_have_alone(family, settings):
    model = tiny(family, **settings)
    ids = torch.randint(2, 32, (1, TREE.num_tokens), generator=torch.Generator().manual_seed(1))
    paths = [[*range(70), *range(100, 240), *range(250, 290)], [*range(100)], [*range(290, 300)]]
    model.set_attn_implementation("eager")
    alone = [model(ids[:, path], use_cache=False).logits[0] for path in paths]
    use_flex_attention(model)
    logits = model(ids, position_ids=TREE.position_ids[None], layout=TREE, use_cache=False).logits[0]
    for path, expected in zip(paths, alone, strict=True):
        assert torch.allclose(logits[path], expected, atol=1e-4)  # float32, logits of about 3


@torch.no_grad()
def test_padded_prompts_and_caches_are_left_to_transformers():
    model = tiny("llama")
    ids = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    seen = []
    for prepare in (lambda model: None, use_flex_attention):
        prepare(model)
        cache = DynamicCache(config=model.config)
        first = model(ids, attention_mask=mask, past_key_values=cache).logits
        step = model(ids[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache).logits
        seen.append((first[:, 2:], step))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-5)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-5)

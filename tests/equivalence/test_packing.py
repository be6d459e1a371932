"""However rows are packed and split over passes, they give the same loss and the same gradients.

The reference is transformers' own: each row by itself, through eager attention and torch's cross-entropy.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.models.attention import use_packed_attention
from tunesmith.packing.collate import collate_flat, collate_tree
from tunesmith.training.objectives import next_token_loss

# A window of 20 is shorter than the rows and longer than what they share.
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_model(family):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model.train()


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """The model as transformers runs it, and the same one with our attention."""
    stock, ours = tiny_model(request.param), tiny_model(request.param)
    use_packed_attention(ours)
    return stock, ours


@st.composite
def rows_of_a_step(draw):
    """Rows that go on from one another."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    texts = [np.zeros(0, np.int32)]
    for _ in range(draw(st.integers(2, 7))):
        stem = texts[draw(st.integers(0, len(texts) - 1))]
        stem = stem[: draw(st.integers(0, len(stem)))]
        more = rng.integers(0, 40, draw(st.integers(1, 30))).astype(np.int32)
        texts.append(np.concatenate([stem, more]))
    rows = []
    for i, ids in enumerate(texts[1:]):
        start = draw(st.integers(0, len(ids) - 1))
        weights = rng.choice([0.25, 1.0], 2).astype(np.float32)
        middle = (start + len(ids)) // 2
        spans = np.array([[start, middle], [middle, len(ids)]], np.int32)
        rows.append(PreparedRow(f"rows:{i}", (Example(ids, spans, weights),)))
    return rows


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def of_rows_alone(model, rows):
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        (example,) = row.examples
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        nll = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.token_weights()[1:])).sum()
    total.backward()
    return total.item(), gradients(model)


def of_packs(model, packs):
    model.zero_grad()
    total = 0.0
    for pack in packs:
        loss = next_token_loss(model, pack)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@given(rows=rows_of_a_step(), data=st.data())
@settings(max_examples=20, deadline=None)
def test_loss_and_gradients_do_not_depend_on_packing_or_passes(models, rows, data):
    """To 1e-5 of the largest gradient: float32 sums of some hundred terms in another order."""
    stock, ours = models
    loss, expected = of_rows_alone(stock, rows)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    pass_of = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    passes = [[row for row, at in zip(rows, pass_of, strict=True) if at == number] for number in range(3)]
    for collate in (collate_tree, collate_flat):
        for split in ([rows], passes, [[row] for row in rows]):
            total, found = of_packs(ours, [collate(some) for some in split])
            assert total == pytest.approx(loss, rel=1e-5, abs=1e-6)
            for one, other in zip(found, expected, strict=True):
                assert (one - other).abs().max() <= 1e-5 * largest


def row_of(*parts):
    ids = np.concatenate(parts).astype(np.int32)
    span = np.array([[0, len(ids)]], np.int32)
    return PreparedRow("rows", (Example(ids, span, np.ones(1, np.float32)),))


@torch.no_grad()
def test_exchanging_a_row_leaves_the_others_bit_for_bit(models):
    _, ours = models
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 40, 20) for _ in range(5)]
    prefix, a, b, new, apart = tokens
    before, after = (
        collate_tree([row_of(prefix, a), row_of(prefix, branch), row_of(apart)]) for branch in (b, new)
    )
    assert before["layout"].segments == after["layout"].segments
    assert len(before["layout"].segments) == 4
    logits = [
        ours(p["input_ids"], position_ids=p["position_ids"], layout=p["layout"], use_cache=False).logits[0]
        for p in (before, after)
    ]
    (moved,) = torch.nonzero((logits[0] != logits[1]).any(-1), as_tuple=True)
    assert moved.tolist() == list(range(40, 60))

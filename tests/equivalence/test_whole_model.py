"""A model with every fused piece in it against the stock model, row by row: loss and every gradient.

The stock side is transformers' eager attention on each row by itself, PEFT's own LoRA, all logits, and
F.cross_entropy.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import families
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.fuse import PIECES, fuse, loss_head
from tunesmith.packing.collate import collate_flat, collate_tree
from tunesmith.training.objectives import next_token_loss

# What of each family is out of the ordinary is on, and its embeddings are tied.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 20, "tie_word_embeddings": False},
    "gemma": {},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
}


def base_model(family):
    torch.manual_seed(0)
    options = {"tie_word_embeddings": True, **FAMILIES[family]}
    config = CONFIG_MAPPING[family](
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.12 * torch.randn(parameter.shape)
    return model


def pair(family, method):
    """The stock model and the one with all pieces and packed attention."""
    stock = base_model(family)
    if method == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False
        )
        stock = get_peft_model(stock, config)
    ours = copy.deepcopy(stock)
    use_packed_attention(ours.get_base_model() if method == "lora" else ours)
    fuse(ours, PIECES)
    assert loss_head(ours) is not None
    return stock.train(), ours.train()


CASES = [(family, method) for family in FAMILIES for method in ("none", "lora")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def models(request):
    return pair(*request.param)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_rows(model, rows):
    """The stock model's loss and gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        (example,) = row.examples
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.token_weights()[1:])).sum()
    total.backward()
    return total.item(), gradients(model)


def of_pack(model, pack):
    model.zero_grad()
    loss = next_token_loss(model, pack)
    loss.backward()
    return loss.item(), gradients(model)


def prepare(texts, seed=0):
    """Rows of which half the tokens are targets, of two weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, text in enumerate(texts):
        start = int(rng.integers(0, len(text)))
        middle = (start + len(text)) // 2
        spans = np.array([[start, middle], [middle, len(text)]], np.int32)
        weights = rng.choice([0.25, 1.0], 2).astype(np.float32)
        rows.append(PreparedRow(f"rows:{i}", (Example(np.asarray(text, np.int32), spans, weights),)))
    return rows


def some_rows():
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 40, 30).tolist()
    return prepare(
        [stem[:n] + rng.integers(0, 40, more).tolist() for n, more in ((30, 9), (30, 25), (22, 40), (0, 13))]
    )


def assert_same(found, expected):
    """To 1e-5 of the largest gradient: float32 sums of some hundred terms in another order."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert list(found[1]) == list(expected[1])
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, theirs in expected[1].items():
        assert (found[1][name] - theirs).abs().max() <= 1e-5 * largest, name


@given(texts=families(max_size=5), seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_a_pack_of_the_fused_model_equals_rows_of_the_stock_model(models, texts, seed):
    stock, ours = models
    rows = prepare([text for text in texts if len(text) > 1], seed)
    if not rows:
        return
    expected = of_rows(stock, rows)
    for collate in (collate_flat, collate_tree):
        assert_same(of_pack(ours, collate(rows)), expected)


@pytest.mark.parametrize("collate", [collate_flat, collate_tree])
def test_with_gradient_checkpointing_too(models, collate):
    stock, fused = models
    ours = copy.deepcopy(stock)
    use_packed_attention(ours.get_base_model() if hasattr(ours, "get_base_model") else ours)
    fuse(ours, PIECES)
    ours.activation_checkpointing_enable({"use_reentrant": False})
    rows = some_rows()
    found = of_pack(ours, collate(rows))
    assert_same(found, of_rows(stock, rows))
    assert_same(found, of_pack(fused, collate(rows)))


def test_every_kind_of_module_is_fused(models):
    """Otherwise the tests above would compare stock with stock."""
    stock, ours = models
    fused = {name.rsplit(".", 1)[-1] for name, module in ours.named_modules() if "forward" in vars(module)}
    wanted = {"q_proj", "k_proj", "v_proj", "self_attn", "mlp", "input_layernorm", "norm", "lm_head"}
    assert wanted | ({"o_proj"} if hasattr(ours, "peft_config") else set()) <= fused
    assert not any("forward" in vars(module) for module in stock.modules())


def test_an_empty_pack_costs_nothing_and_reaches_every_parameter(models):
    stock, ours = models
    loss, found = of_pack(ours, collate_tree([]))
    assert loss == 0.0
    assert list(found) == list(of_rows(stock, some_rows())[1])
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("pieces", [PIECES, ()], ids=["fused", "unfused"])
def test_under_autocast_the_fused_model_is_as_near_to_the_truth_as_the_stock_one(models, pieces):
    """All gradients as one vector: at most 1.5 times the stock model's distance from float32,
    plus one rounding (2^-9)."""
    stock, _ = models
    ours = copy.deepcopy(stock)
    use_packed_attention(ours.get_base_model() if hasattr(ours, "get_base_model") else ours)
    fuse(ours, pieces)
    rows = some_rows()
    exact = of_rows(stock, rows)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = of_rows(stock, rows), of_pack(ours, collate_tree(rows))
    truth, theirs_flat, ours_flat = (
        torch.cat([gradient.flatten() for gradient in some[1].values()]) for some in (exact, theirs, found)
    )
    our_error, their_error = (
        float((some - truth).norm() / truth.norm()) for some in (ours_flat, theirs_flat)
    )
    assert our_error <= 1.5 * their_error + 2**-9
    assert found[0] == pytest.approx(exact[0], rel=2**-7)

"""What each architecture may be given in one pass, under stock attention and under ours."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.models.attention import use_packed_attention
from tunesmith.models.packable import attends_like, possible_packing

_DECODER = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "head_dim": 8,
}
_SETTINGS = {
    "gpt2": {"n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "phi3": {"sliding_window": 20},
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def tiny(family, attention=None, dtype=torch.float32):
    torch.manual_seed(0)
    own = _SETTINGS.get(family, {})
    sizes = {} if family in ("gpt2", "bloom", "mamba") else _DECODER
    config = CONFIG_MAPPING[family](
        vocab_size=40, hidden_size=32, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        **{**sizes, **own},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "gpt2"]
)
def test_attention_that_knows_the_layout_lets_rows_share_prefixes(family):
    model = tiny(family)
    use_packed_attention(model)
    assert attends_like(model, "eager")
    assert possible_packing(model) == "tree"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2"])
def test_stock_attention_takes_rows_side_by_side(family, attention):
    assert possible_packing(tiny(family, attention)) == "flat"


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_recurrence_and_position_biases_take_one_row_at_a_time(family):
    assert possible_packing(tiny(family)) == "none"


def test_a_layout_that_is_refused_is_no_error():
    model = tiny("llama", "sdpa")
    forward = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: forward(
        input_ids, position_ids=position_ids, use_cache=use_cache
    )
    assert possible_packing(model) == "flat"


def test_branches_that_see_each_other_are_found_out():
    def leaky(module, query, key, value, mask, layout=None, **kwargs):
        at = torch.arange(query.shape[2])
        if layout is not None:
            mask = (at[None] <= at[:, None]) & (layout.position_ids[None] <= layout.position_ids[:, None])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("leaky", leaky)
    model = tiny("llama", "sdpa")
    model.set_attn_implementation("leaky")
    assert possible_packing(model) != "tree"


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_counted_along_the_pack_are_found_out(family):
    def by_place(module, query, key, value, mask, layout=None, sliding_window=None, scaling=None, **kwargs):
        total = query.shape[2]
        at = torch.arange(total)
        ends = torch.full((total,), total) if layout is None else layout.subtree_ends
        mask = (at[None] <= at[:, None]) & (at[:, None] < ends)
        if sliding_window is not None:
            mask &= at[:, None] - at[None] < sliding_window
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)

    AttentionInterface.register("by_place", by_place)
    model = tiny(family, "eager")
    model.set_attn_implementation("by_place")
    assert possible_packing(model) == "none"


def test_attention_that_forgets_a_window_is_unlike_stock():
    def forgetful(module, query, key, value, mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)

    AttentionInterface.register("forgetful", forgetful)
    for family, alike in (("llama", True), ("mistral", False)):
        model = tiny(family, "sdpa")
        model.set_attn_implementation("forgetful")
        assert attends_like(model, "eager") is alike
        assert model.config._attn_implementation == "forgetful"


def test_sinks_are_beyond_our_attention():
    model = tiny("gpt_oss", "eager")
    use_packed_attention(model)
    assert not attends_like(model, "eager")


def test_asking_changes_nothing():
    model = tiny("mistral", "sdpa").train()
    possible_packing(model)
    assert model.training
    assert model.config.sliding_window == 20
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_let_off_its_rounding():
    model = tiny("llama", dtype=torch.bfloat16)
    assert possible_packing(model) == "flat"
    use_packed_attention(model)
    assert possible_packing(model) == "tree"

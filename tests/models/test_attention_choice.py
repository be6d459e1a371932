"""Which attention is chosen for what, and that ours gives way where it would be wrong."""

from __future__ import annotations

import pytest
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.config import load_config
from tunesmith.models.attention_choice import Abilities, choose_attention, set_attention

ALL = Abilities("sdpa", flex=True, flash=True)
BARE = Abilities("sdpa")


@pytest.mark.parametrize(
    ("requested", "device", "packing", "abilities", "expected"),
    [
        ("auto", "cpu", "tree", BARE, "tunesmith_cpu"),
        ("auto", "cpu", "none", BARE, "tunesmith_cpu"),
        ("auto", "cpu", "flat", Abilities("eager"), "tunesmith_cpu"),  # Gemma 2: caps its scores
        ("auto", "cpu", "tree", Abilities("sdpa", drops=True), "sdpa"),
        ("sdpa", "cpu", "tree", BARE, "sdpa"),
        ("auto", "cuda", "tree", ALL, "tunesmith_flex"),
        ("auto", "cuda", "tree", Abilities("sdpa", drops=True, flex=True, flash=True), "flash_attention_2"),
        ("auto", "cuda", "tree", Abilities("sdpa", flash=True), "flash_attention_2"),
        ("auto", "cuda", "tree", BARE, "sdpa"),
        ("auto", "cuda", "flat", ALL, "flash_attention_2"),
        ("auto", "cuda", "flat", Abilities("sdpa", flex=True), "sdpa"),
        ("auto", "cuda", "none", ALL, "sdpa"),
        ("eager", "cuda", "tree", Abilities("eager", flex=True, flash=True), "eager"),
        ("auto", "mps", "tree", ALL, "sdpa"),
    ],
)
def test_the_choice(requested, device, packing, abilities, expected):
    name, why = choose_attention(requested, device, packing, abilities)
    assert name == expected
    assert why


def loaded(folder, **settings):
    said = []
    config = load_config(
        {
            "model": {"path": str(folder), "dtype": "float32"} | settings,
            "data": {"train": "none.jsonl"},
        }
    )
    options = {} if config.model.attention == "auto" else {"attn_implementation": config.model.attention}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    set_attention(model, config, said.append)
    return model.config._attn_implementation, said


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_on_the_cpu_is_given_ours(tmp_path, family):
    folder = make_tiny_model(tmp_path / family, family)
    assert loaded(folder)[0] == "tunesmith_cpu"
    assert loaded(folder, attention="eager") == ("eager", ["attention eager: as model.attention says"])


def test_ours_gives_way_where_a_model_asks_for_more(tmp_path):
    """gpt-oss adds a sink to every softmax."""
    config = CONFIG_MAPPING["gpt_oss"](
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    name, said = loaded(tmp_path)
    assert name == "eager"
    assert "asks more" in said[0]

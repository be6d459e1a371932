"""Number formats, gradient checkpointing: what is loaded is what the config says."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.config import load_config
from tunesmith.models.adapt import build_model, count_parameters
from tunesmith.models.cost import enable_gradient_checkpointing, training_cost


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def config_of(folder, **sections):
    return load_config({"model": {"path": str(folder)}, "data": {"train": "none.jsonl"}} | sections)


def built(folder, **sections):
    sections["model"] = {"path": str(folder)} | sections.get("model", {})
    config = config_of(folder, **sections)
    return build_model(config, AutoTokenizer.from_pretrained(folder), lambda _: None)


def gradients(model):
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 60)[None]
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_frozen_weights_have_the_compute_format_and_trained_ones_float32(model_folder):
    model = built(model_folder, model={"dtype": "bfloat16"})
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    model = built(model_folder, model={"dtype": "bfloat16"}, adapter={"method": "none"})
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32)}


def test_trained_parameters_are_what_the_arithmetic_of_lora_says(model_folder):
    trained, total = count_parameters(built(model_folder, adapter={"r": 4}))
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]  # q k v o gate up down
    assert trained == 2 * sum(4 * (a + b) for a, b in shapes)
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert total == base + trained


def test_gradient_checkpointing_changes_no_gradient(tmp_path, model_folder):
    plain = built(model_folder, model={"dtype": "float32"})
    recomputed = built(model_folder, model={"dtype": "float32"})
    enable_gradient_checkpointing(recomputed)
    first, second = gradients(plain), gradients(recomputed)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-7) for name in first)


def test_the_cost_of_a_token_is_four_times_the_frozen_matrices_and_six_times_the_trained(model_folder):
    cost = training_cost(built(model_folder, adapter={"r": 4}))
    frozen = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    trained = 2 * 4 * (128 + 96 + 96 + 128 + 160 + 160 + 160)
    assert cost.per_token == 4 * frozen + 6 * trained
    assert cost.per_target == 4 * 64 * 259

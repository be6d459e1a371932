"""Quantised bases, number formats, gradient checkpointing: what is loaded is what the config says."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.config import load_config
from tunesmith.errors import MissingExtraError
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


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_evaluating_a_quantised_model_does_not_change_its_gradients(model_folder, quantization):
    """bitsandbytes 0.50 repacks 4-bit weights in an evaluation on some CPUs, after which gradients are
    wrong."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = built(model_folder, model={"quantization": quantization, "dtype": "float32"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(
                    0, 0.1
                )  # zero at the start, which would hide the base's part in the gradient
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(torch.arange(3, 30)[None])
        model.generate(torch.arange(3, 10)[None], max_new_tokens=3)
    after = gradients(model)
    assert len(before) == 28
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_a_four_bit_model_is_near_the_one_it_was_made_of(model_folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    ids = torch.arange(3, 60)[None]
    exact = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model = built(model_folder, model={"quantization": "nf4", "dtype": "float32"}).eval()
    with torch.no_grad():
        difference = model(ids).logits - exact(ids).logits
    # NF4 leaves about a tenth of each weight's spread; two layers of it stay well below the logits' own.
    assert 0 < difference.std() < 0.5 * exact(ids).logits.std()


def test_without_bitsandbytes_the_extra_is_named(model_folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"model.quantization=nf4 needs.*tunesmith\[quant\]"):
        built(model_folder, model={"quantization": "nf4"})


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


def test_a_quantised_run_trains_and_resumes(tmp_path, model_folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from safetensors.torch import load_file
    from tiny import conversations, write_rows

    config = {
        "run": {"output_dir": str(tmp_path), "name": "straight"},
        "model": {"path": str(model_folder), "quantization": "nf4", "dtype": "float32"},
        "data": {
            "train": str(write_rows(tmp_path / "t.jsonl", conversations(16))),
            "valid": str(write_rows(tmp_path / "v.jsonl", conversations(4, seed=1))),
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 2},
    }
    straight = tunesmith.sft(config)
    again = tunesmith.sft(config, ["run.resume=2"])
    first = load_file(straight.final / "adapter_model.safetensors")
    assert straight.summary["last_loss"] < straight.summary["first_loss"]
    assert again.summary["last_loss"] == straight.summary["last_loss"]
    assert len(first) == 28

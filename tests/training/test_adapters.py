"""Every method of `adapter.method` trains, is saved, loads in stock PEFT, goes on after a stop, and is merged
or says why it cannot be."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tunesmith
from tunesmith.config.methods import METHODS, can_be_merged
from tunesmith.errors import Interrupted
from tunesmith.models.adapter_folder import load_adapter
from tunesmith.training.callbacks import Schedule
from tunesmith.training.run_folder import read_metrics
from tunesmith.training.session import Session

# What PEFT says of norms, which are what ln_tuning trains.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
IDS = torch.arange(3, 60)[None]
# What a tiny model needs in place of defaults; its random weights have no use for the paper's rates.
OPTIONS = {
    "vera": {"r": 32},
    "oft": {"oft_block_size": 16},
    "bottleneck": {"r": 8},
    "prefix": {"num_virtual_tokens": 5, "encoder_size": 16},
    "prompt": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5, "encoder_size": 16},
    "trainable_tokens": {"trainable_tokens": ["a", "e", "<|im_end|>"]},
}
RATES = {"vera": 5e-2, "prompt": 0.2, "ia3": 5e-2, "ln_tuning": 3e-2, "trainable_tokens": 3e-2}
ADAPTERS = [name for name in METHODS if name != "none"]


def method_config(run_config, family, method, **sections):
    adapter = {"method": method, "r": None, "alpha": None} | OPTIONS.get(method, {})
    if method in ("lora", "dora", "rslora", "pissa", "olora", "loftq", "adalora"):
        adapter |= {"r": 4, "dropout": 0.1}
    model = {"quantization": "nf4"} if method == "loftq" else {}
    train = {"max_steps": 8, "epochs": None, "learning_rate": RATES.get(method, 1e-2)}
    sections["train"] = train | sections.get("train", {})
    return run_config(family, adapter=adapter, model=model, **sections)


@pytest.fixture
def trained_logits(monkeypatch):
    """What the models of runs give for IDS at the end of training."""
    logits = []

    def measure(self):
        logits.append(logits_of(self.trainer.model.eval()))

    monkeypatch.setattr(Session, "measure_tuned", measure)
    return logits


def stop_after(monkeypatch, step):
    original = Schedule.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Schedule, "on_step_end", on_step_end)


def losses(result):
    return [line["loss"] for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]


def base_model(config):
    """Stock, and quantised as it was trained."""
    options, kind = {}, config["model"].get("quantization")
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    elif kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it cannot pack rows of 96, nor in training
    return model


def logits_of(model):
    """At the tokens of IDS, not at virtual ones."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1] :]


def put_on(model, folder, method):
    """Stock PEFT, but for the one method it lacks."""
    return (load_adapter if method == "bottleneck" else PeftModel.from_pretrained)(model, folder).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_method_trains_reloads_resumes_and_merges(run_config, monkeypatch, trained_logits, method, family):
    config = method_config(run_config, family, method)
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    curve = losses(straight)
    assert min(curve[-3:]) < curve[0]

    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted, match="stopped at step 5 of 8"):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)
    (first, second) = (load_file(run.final / "adapter_model.safetensors") for run in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(resumed) == curve

    trained, _ = trained_logits
    base = base_model(config)
    untouched = logits_of(base)
    loaded = put_on(base, straight.final, method)
    # float32 sums in another order: 1e-6 of logits of size 1, with room
    assert torch.allclose(logits_of(loaded), trained, rtol=1e-4, atol=1e-4)
    assert (trained - untouched).abs().max() > 1e-2
    if can_be_merged(method):
        if method == "loftq":  # merging into 4 bits would round what was learnt away
            loaded = put_on(base_model(config).dequantize(), straight.final, method)
        assert torch.allclose(logits_of(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)
    else:
        assert METHODS[method].no_merge
        assert method == "bottleneck" or loaded.active_peft_config.is_prompt_learning

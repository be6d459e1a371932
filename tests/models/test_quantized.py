"""A base in 4 or 8 bits trains as if it were never evaluated, takes the memory that is said, and is loaded
again as it was trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import conversations, make_tiny_model, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import load_own_model, load_own_tokenizer
from tunesmith.config import ModelConfig, load_config
from tunesmith.errors import MissingExtraError, ModelError
from tunesmith.models.adapt import build_model
from tunesmith.models.quantize import as_quantized, is_quantized, quantized_names

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = ["nf4", "int8", "torchao_int8"]
MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # weights of the tiny model's linear layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make_tiny_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "qwen2")}


@pytest.fixture(autouse=True)
def _only_with_its_package(request):
    values = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if "torchao_int8" in values:
        pytest.importorskip("torchao", reason="torchao is not installed")


def built(folder, quantization, say=lambda _: None, dtype="float32", **sections):
    model = {"path": str(folder), "quantization": quantization, "dtype": dtype} | sections.pop("model", {})
    data = {"train": "none.jsonl", "max_length": 512}
    config = load_config({"model": model, "data": data} | sections)
    model = build_model(config, AutoTokenizer.from_pretrained(folder), say)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the base's part in the gradient
                parameter.normal_(0, 0.1)
    return model


def gradients(model):
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 60)[None]
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("quantization", KINDS)
def test_evaluating_a_quantised_model_does_not_change_its_gradients(folders, quantization, family):
    """bitsandbytes 0.50 repacks 4-bit weights in an evaluation on some CPUs, after which gradients are wrong
    (llama) or cannot be computed (qwen2, which has biases)."""
    model = built(folders[family], quantization)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(torch.arange(3, 30)[None])
        model.generate(torch.arange(3, 10)[None], max_new_tokens=3)
    after = gradients(model)
    assert len(before) == 28
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_a_four_bit_model_is_near_the_one_it_was_made_of(folders):
    ids = torch.arange(3, 60)[None]
    exact = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()
    model = built(folders["llama"], "nf4").eval()
    with torch.no_grad(), model.disable_adapter():
        difference = model(ids).logits - exact(ids).logits
    # NF4 leaves about a tenth of each weight's spread; two layers of it stay well below the logits' own.
    assert 0 < difference.std() < 0.5 * exact(ids).logits.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", KINDS)
def test_what_a_weight_stands_for_is_known_without_the_model(folders, quantization, dtype):
    from peft.utils.integrations import dequantize_module_weight

    settings = ModelConfig(path="m", quantization=quantization)
    model = built(folders["qwen2"], quantization, dtype=dtype).get_base_model()
    stored = load_file(folders["qwen2"] / "model.safetensors")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders["qwen2"]))
    names = quantized_names(skeleton, settings, getattr(torch, dtype))
    assert sum(stored[name].numel() for name in names) == MATRICES
    for name in names:
        loaded = dequantize_module_weight(model.get_submodule(name.removesuffix(".weight")).base_layer)
        assert torch.equal(as_quantized(stored[name], settings, getattr(torch, dtype)), loaded), name


@pytest.mark.parametrize(
    ("quantization", "double", "scale_bytes"),
    [
        ("nf4", False, MATRICES // 64 * 4),
        # A byte for 64 weights, and a float for 256 of these in each of the 14 matrices.
        ("nf4", True, MATRICES // 64 + 14 * 4),
        ("int8", True, 2 * 4 * (64 + 32 + 32 + 64 + 96 + 96 + 64)),
        ("torchao_int8", True, 2 * (4 + 1) * (64 + 32 + 32 + 64 + 96 + 96 + 64)),
    ],
)
def test_what_is_not_quantised_is_in_the_compute_format_and_memory_is_said(
    folders, quantization, double, scale_bytes
):
    lines = []
    model = built(
        folders["llama"],
        quantization,
        lines.append,
        dtype="bfloat16",
        model={"double_quantization": double},
    )
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters() if not is_quantized(p)}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    weights = MATRICES // 2 if quantization == "nf4" else MATRICES
    rest = 2 * (259 * 64 + 5 * 64)
    assert (
        f"quantised base: {(weights + scale_bytes) / 2**20:.3f} MiB; norms, embeddings and head: "
        f"{rest / 2**20:.3f} MiB in bfloat16"
    ) in lines


@pytest.mark.parametrize(("kind", "extra"), [("nf4", "quant"), ("torchao_int8", "torchao")])
def test_without_the_package_the_extra_is_named(folders, monkeypatch, kind, extra):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_torchao_available", lambda: False)
    with pytest.raises(MissingExtraError, match=rf"model.quantization={kind} needs.*tunesmith\[{extra}\]"):
        built(folders["llama"], kind)


# --- checkpoints that are quantised already


@pytest.fixture(scope="module")
def stored_nf4(folders, tmp_path_factory):
    """As a hub's `-bnb-4bit` models are."""
    from tunesmith.models.quantize import quantization_config

    folder = tmp_path_factory.mktemp("stored") / "nf4"
    settings = quantization_config(ModelConfig(path="m", quantization="nf4"), torch.float32)
    AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.float32, quantization_config=settings
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(folder)
    return folder


def test_an_adapter_is_trained_on_a_checkpoint_that_bitsandbytes_quantised(folders, stored_nf4):
    model, made_here = built(stored_nf4, "none"), built(folders["llama"], "nf4")
    before = gradients(model)
    with torch.no_grad():
        model.eval()(torch.arange(3, 30)[None])
    after = gradients(model)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(made_here).items())


def test_quantised_checkpoints_that_cannot_be_trained_are_refused_with_what_to_do(
    folders, stored_nf4, tmp_path
):
    with pytest.raises(ModelError, match=r"bitsandbytes in config.json.*in full. Set adapter.method to lora"):
        built(stored_nf4, "none", adapter={"method": "none"})
    with pytest.raises(ModelError, match=r"model.quantization=nf4 would do so again. Remove it"):
        built(stored_nf4, "nf4")
    folder = shutil.copytree(folders["llama"], tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already \(gptq.*Name the model that it was made of"):
        built(folder, "none")


# --- runs


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """Its config, the weights it ended with, and the result."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "run": {"output_dir": str(folder), "name": "straight"},
        "model": {"path": str(folders["llama"]), "quantization": "nf4", "dtype": "float32"},
        "data": {
            "train": str(write_rows(folder / "t.jsonl", conversations(16))),
            "valid": str(write_rows(folder / "v.jsonl", conversations(4, seed=1))),
            "cache_dir": str(folder / "cache"),
            "max_length": 512,
        },
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 2},
    }
    result = tunesmith.sft(config)
    return config, load_file(result.final / "adapter_model.safetensors"), result


def test_a_quantised_run_resumes_bit_for_bit(run):
    config, straight, result = run
    assert result.summary["last_loss"] < result.summary["first_loss"]
    again = tunesmith.sft(config, ["run.resume=2"])
    resumed = load_file(again.final / "adapter_model.safetensors")
    assert len(straight) == 28
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("is_bare", [False, True])
def test_an_adapter_is_loaded_on_its_base_as_it_was_trained(run, folders, tmp_path, is_bare):
    _, weights, result = run
    trained = built(folders["llama"], "nf4", model={"dtype": "float32"}).eval()
    trained.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in weights.items()}, False)
    folder = shutil.copytree(result.final, tmp_path / "adapter") if is_bare else result.final
    found = find_model(str(folder), print)
    assert (found.run is None) == is_bare
    loaded = load_own_model(found, load_own_tokenizer(found), torch.float32, print)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        # The fused norms and rotary embeddings of training round a little otherwise.
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
    assert sum(is_quantized(p) for p in loaded.parameters()) == 14
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in loaded.modules())

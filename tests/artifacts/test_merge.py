"""A merged model is the adapter on its base: the weights by hand, the predictions by stock PEFT, the memory
by a process of its own; and what is not so is not kept."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import conversations, make_tiny_model, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.artifacts import merge as merge_module
from tunesmith.artifacts.merge import merge
from tunesmith.artifacts.merged_weights import round_by_chance
from tunesmith.cli import main
from tunesmith.config import ModelConfig
from tunesmith.errors import MergeError, ModelError
from tunesmith.models.quantize import prepare_quantized
from tunesmith.models.save import write_base_settings

IDS = torch.arange(3, 60)[None]
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
ONE = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
# name -> (config, whether head and embedding are two tensors afterwards)
METHODS = {
    "lora": (LoraConfig(**LORA), False),
    "rslora": (LoraConfig(**LORA, use_rslora=True), False),
    "dora": (LoraConfig(**LORA, use_dora=True), False),
    "lora of the embedding": (LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}), True),
    "lora and a trained head": (LoraConfig(**LORA, modules_to_save=["lm_head"]), True),
    "lora and trained tokens": (LoraConfig(**LORA, trainable_token_indices=[3, 5]), False),
    "lora and biases": (LoraConfig(**LORA, bias="all"), False),
    "pissa": (LoraConfig(**LORA | {"init_lora_weights": "pissa"}), False),
    "trained tokens": (peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 5]), False),
    "ia3": (
        peft.IA3Config(
            **ONE | {"target_modules": ["k_proj", "down_proj"]}, feedforward_modules=["down_proj"]
        ),
        False,
    ),
    "vera": (peft.VeraConfig(**ONE, r=4), False),
    "oft": (peft.OFTConfig(**ONE, oft_block_size=16, r=0), False),
    "adalora": (peft.AdaLoraConfig(**ONE, total_step=10), False),
    "norms": (peft.LNTuningConfig(task_type="CAUSAL_LM"), False),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings.*:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


def quiet(_):
    pass


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """What quantises; the files are float32."""
    monkeypatch.setattr(merge_module, "compute_dtype", lambda _: (torch.float32, "for the test"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: make_tiny_model(tmp_path_factory.mktemp(name) / "base", name) for name in ("llama", "qwen2")
    }


def make_adapter(base, folder, config=None, quantization="none", seed=1):
    """As stock PEFT saves it, with all that is trained moved from where it began."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        copy.deepcopy(config or LoraConfig(**LORA)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    model.save_pretrained(folder)
    write_base_settings(folder, ModelConfig(path="m", quantization=quantization))
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def on_base(base, adapter, **options):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    prepare_quantized(model)  # or bitsandbytes takes a kernel that rounds
    return logits(PeftModel.from_pretrained(model, adapter))


def stock(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_predicts_what_its_adapter_does(folders, tmp_path, method, family):
    config, unties = METHODS[method]
    adapter = make_adapter(folders[family], tmp_path / "adapter", config)
    merged = merge(adapter, tmp_path / "merged", say=quiet)
    expected, base = on_base(folders[family], adapter), stock(folders[family])
    assert (expected - base).abs().max() > 1e-3
    # Logits of some 5; float32 sums in another order.
    torch.testing.assert_close(stock(merged.folder), expected, rtol=0, atol=1e-4)
    assert merged.agreement.kl < 1e-9
    if method != "lora and biases":  # PEFT cannot take those out again to ask for the effect
        assert merged.agreement.effect_kl > 1000 * merged.agreement.kl
    written = AutoConfig.from_pretrained(merged.folder)
    assert written.tie_word_embeddings == (not unties)
    assert ("lm_head.weight" in load_file(merged.folder / "model.safetensors")) == unties


def test_each_matrix_is_the_base_plus_alpha_over_r_times_b_a(folders, tmp_path):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter", LoraConfig(**LORA, lora_alpha=12))
    merge(adapter, tmp_path / "merged", say=quiet)
    base, merged = (load_file(f / "model.safetensors") for f in (folders["llama"], tmp_path / "merged"))
    tuned = load_file(adapter / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    num_adapted = 0
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tuned:
            weight = weight + 12 / 4 * tuned[f"{stem}.lora_B.weight"] @ tuned[f"{stem}.lora_A.weight"]
            num_adapted += 1
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
    assert num_adapted == 14


def test_an_adapter_of_a_four_bit_base_is_merged_into_what_it_was_trained_on(folders, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from tunesmith.models.quantize import quantization_config

    settings = quantization_config(ModelConfig(path="m", quantization="nf4"), torch.float32)
    # Only q_proj is adapted: the rest of the base was in 4 bits all the same.
    adapter = make_adapter(
        folders["qwen2"],
        tmp_path / "a",
        LoraConfig(**LORA | {"target_modules": ["q_proj"]}, lora_alpha=16),
        "nf4",
    )
    lines = []
    merge(adapter, tmp_path / "dequantized", say=lines.append)
    merge(adapter, tmp_path / "original", base="original", say=lines.append)
    expected = on_base(folders["qwen2"], adapter, quantization_config=settings)
    torch.testing.assert_close(stock(tmp_path / "dequantized"), expected, rtol=0, atol=1e-4)
    assert (stock(tmp_path / "original") - expected).abs().max() > 0.1
    torch.testing.assert_close(
        stock(tmp_path / "original"), on_base(folders["qwen2"], adapter), rtol=0, atol=1e-4
    )
    assert [line.split(":")[0] for line in lines if "KL" in line] == [
        "against the adapter on its base",
        "against the adapter on its base",
        "against the adapter on the base as it was trained",
    ]
    config = json.loads((tmp_path / "dequantized/config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"


def test_a_base_that_is_stored_in_four_bits_is_dequantised_too(folders, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from tunesmith.models.quantize import quantization_config

    settings = quantization_config(ModelConfig(path="m", quantization="nf4"), torch.float32)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.float32, quantization_config=settings
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(base)
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    merge(adapter, tmp_path / "merged", say=quiet)
    torch.testing.assert_close(
        stock(tmp_path / "merged"),
        on_base(folders["llama"], adapter, quantization_config=settings),
        rtol=0,
        atol=1e-4,
    )
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    with pytest.raises(ModelError, match="quantised as it is stored; there are no others"):
        merge(adapter, tmp_path / "other", base="original", say=quiet)


def test_shards_hold_what_one_file_does(folders, tmp_path):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    merge(adapter, tmp_path / "one", say=quiet)
    merge(adapter, tmp_path / "many", shard_bytes=70_000, say=quiet)
    parts = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == whole.keys()
    for name, part in index.items():
        assert torch.equal(load_file(tmp_path / "many" / part)[name], whole[name])
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "many" / part).values()) for part in parts]
    assert max(sizes) <= 70_000
    assert torch.equal(stock(tmp_path / "many"), stock(tmp_path / "one"))


def test_rows_of_added_tokens_come_along(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.add_tokens(["<tool>", "<end>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(base, LoraConfig(**LORA, trainable_token_indices=[len(tokenizer) - 1]))
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].normal_()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", say=quiet)
    rows = load_file(tmp_path / "merged/model.safetensors")["model.embed_tokens.weight"]
    tuned = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (trained,) = (tensor for name, tensor in tuned.items() if "token_adapter" in name or "embed" in name)
    old = load_file(folders["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(rows[: len(old)], old)
    assert torch.equal(rows[-1:], trained)
    torch.testing.assert_close(rows[-2], old.mean(0))
    assert len(rows) == len(old) + 2 == AutoConfig.from_pretrained(tmp_path / "merged").vocab_size


# --- what is kept, and what is refused


def test_what_is_farther_from_the_adapter_than_the_tolerance_is_not_kept(folders, tmp_path):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"was not kept: KL .* the tolerance is 1e-09 nats a token"):
        merge(adapter, tmp_path / "merged", dtype="bfloat16", tolerance=1e-9, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert merge(adapter, tmp_path / "merged", dtype="bfloat16", say=quiet).dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_merge_that_forgets_the_adapter_is_found_out(folders, tmp_path, monkeypatch):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
    with pytest.raises(MergeError, match="does not predict what the adapter does"):
        merge(adapter, tmp_path / "merged", dtype="bfloat16", say=quiet)


def test_what_cannot_be_merged_is_refused_with_what_to_do(folders, tmp_path):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    prefix = make_adapter(
        folders["llama"], tmp_path / "p", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(
        ModelError, match=r"PREFIX_TUNING cannot be merged: its virtual tokens.*Use it as it is"
    ):
        merge(prefix, tmp_path / "out", say=quiet)
    with pytest.raises(ModelError, match="is a whole model already: there is nothing to merge"):
        merge(folders["llama"], tmp_path / "out", say=quiet)
    with pytest.raises(ModelError, match=r"something is there already. Name a new folder"):
        merge(adapter, tmp_path / "p", say=quiet)
    with pytest.raises(ModelError, match="are for several adapters; one is given"):
        merge(adapter, tmp_path / "out", as_adapter=True, say=quiet)
    assert not (tmp_path / "out").exists()


def test_rounding_by_chance_is_right_on_average_where_the_nearest_is_not():
    value = torch.full((100_000,), 1 + 2**-10)  # bfloat16 has 1 and 1 + 2**-7
    assert value.to(torch.bfloat16).unique().tolist() == [1]
    rounded = round_by_chance(value, torch.bfloat16, "w").float()
    assert sorted(rounded.unique().tolist()) == [1, 1 + 2**-7]
    # One in eight goes up: 2**-10 on average, with a standard error of 2**-7 sqrt(7/64/100000) = 8e-6.
    assert abs(rounded.mean() - 1 - 2**-10) < 4e-5
    assert torch.equal(rounded, round_by_chance(value, torch.bfloat16, "w").float())
    exact = torch.tensor([0.0, -1.0, 1.5])
    assert torch.equal(round_by_chance(exact, torch.float16, "w").float(), exact)
    below = round_by_chance(torch.full((1000,), -1 - 2**-10), torch.bfloat16, "w").float()
    assert sorted(below.unique().tolist()) == [-1 - 2**-7, -1]


# --- memory

_MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from tunesmith.artifacts.found import Found
    from tunesmith.artifacts.merged_weights import (
        MergedTensors, Source, hollow_model, put_adapters, write_shards
    )
    from tunesmith.artifacts.stored import stored_tensors
    from transformers import AutoConfig

    def held(name):  # KiB; getrusage would tell of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def stream(base, adapter, out):
        out.mkdir()
        model = hollow_model(AutoConfig.from_pretrained(base), False)
        adapted, names = put_adapters(model, [Found(str(base), adapter)])
        source = Source(stored_tensors(base), set(), lambda t: t, None, frozenset(), 0)
        write_shards(out, MergedTensors(source, adapted, names, None, None), 64_000_000)

    small, big = Path(sys.argv[1]), Path(sys.argv[2])
    stream(small / "base", small / "adapter", small / "streamed")  # imports, and what is made once
    before = held("VmRSS")
    stream(big / "base", big / "adapter", big / "streamed")
    print(held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_merging_takes_the_memory_of_a_layer_and_not_of_the_model(folders, tmp_path):
    """320 MB of weights in shards of at most 64 MB, the largest matrix of 12 MB."""
    config = AutoConfig.from_pretrained(folders["llama"])
    for key, value in {"hidden_size": 1024, "intermediate_size": 3000, "num_hidden_layers": 12}.items():
        setattr(config, key, value)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 16, 64
    big, small = tmp_path / "big", tmp_path / "small"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(big / "base")
    make_adapter(big / "base", big / "adapter")
    small.mkdir()
    (small / "base").symlink_to(folders["llama"])
    make_adapter(folders["llama"], small / "adapter")
    size = (big / "base/model.safetensors").stat().st_size
    assert size > 320e6
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_MEASURE), str(small), str(big)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout.split()[-1])
    written = [file.stat().st_size for file in (big / "streamed").glob("*.safetensors")]
    assert sum(written) > 320e6
    assert len(written) >= 5
    # A matrix in bfloat16, in float32, its update, their sum and a copy to check it: some times 12 MB.
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


# --- runs


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return tunesmith.sft(
        {
            "run": {"output_dir": str(folder), "name": "r"},
            "model": {"path": str(folders["llama"]), "quantization": "nf4", "dtype": "bfloat16"},
            "data": {
                "train": str(write_rows(folder / "t.jsonl", conversations(16))),
                "valid": str(write_rows(folder / "v.jsonl", conversations(4, seed=1))),
                "cache_dir": str(folder / "cache"),
                "max_length": 600,  # stretches the model's 512 positions
            },
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        }
    )


def test_a_run_is_merged_with_all_that_a_model_needs_and_compared_on_its_own_rows(run, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert main(["merge", str(run.run), "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "v.jsonl" in printed
    facts = json.loads((tmp_path / "merged/merge.json").read_text())
    assert facts["base_held_in"] == "nf4"
    assert facts["agreement_with_adapter"]["kl"] < 1e-4 < facts["agreement_with_adapter"]["effect_kl"]
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.max_position_embeddings == 1024
    assert config.rope_parameters["factor"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "<|im_start|>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == 1
    assert main(["merge", str(tmp_path / "merged"), "--out", str(tmp_path / "again")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_rows_to_compare_on_can_be_named(folders, tmp_path, capsys):
    adapter = make_adapter(folders["llama"], tmp_path / "adapter")
    rows = write_rows(tmp_path / "mine.jsonl", conversations(3))
    merged = merge(adapter, tmp_path / "merged", data=str(rows))
    assert f"positions of {rows}" in capsys.readouterr().out
    assert merged.agreement.rows == str(rows)

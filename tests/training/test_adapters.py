"""Every method of `adapter.method` trains, is saved, loads in stock PEFT, goes on after a stop, and is merged
or says why it cannot be."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import conversations, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tunesmith
from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import load_tuned
from tunesmith.config import load_config
from tunesmith.config.methods import METHODS, can_be_merged
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import Interrupted, ModelError
from tunesmith.models.adalora import allocate, budget_state, orthogonality, plan_budget
from tunesmith.models.adapt import adapt_model, count_parameters
from tunesmith.models.adapter_config import peft_config
from tunesmith.models.adapter_folder import load_adapter
from tunesmith.models.load import load_model
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
# The others begin with virtual tokens, or nearer to the weights before rounding than rounded ones are.
IDENTITY_AT_FIRST = set(METHODS) - {"none", "loftq", "prefix", "prompt", "p_tuning"}
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


def stock_loss(model, tokenizer, rows):
    """Mean loss of the tokens of `rows` after their first, one row a pass, by labels."""
    nats = tokens = 0.0
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        labels = ids.clone()
        labels[:, 0] = -100  # nothing of the row stands before it; PEFT would predict it from virtual tokens
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        nats, tokens = nats + float(loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    return nats / tokens


def same_tensors(one, other):
    first, second = (load_file(run.final / "adapter_model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# A second family, which has biases: methods that touch layers in another way each; the others are `long`.
_QUICK = {"lora", "oft", "ia3", "prefix", "bottleneck"}


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, "llama") for method in ADAPTERS]
    + [
        pytest.param(method, "qwen2", marks=[] if method in _QUICK else pytest.mark.long)
        for method in ADAPTERS
    ],
)
def test_a_method_trains_reloads_resumes_and_merges(
    run_config, tmp_path, monkeypatch, trained_logits, method, family
):
    held_out = conversations(5, seed=3)
    valid = str(write_rows(tmp_path / "valid.jsonl", held_out))
    config = method_config(run_config, family, method, data={"valid": valid, "train_on": "all"})
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    curve = losses(straight)
    assert min(curve[-3:]) < curve[0]

    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted, match="stopped at step 3 of 8"):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)
    assert same_tensors(straight, resumed)
    assert losses(resumed) == curve

    trained, _ = trained_logits
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    base = base_model(config)
    untouched = logits_of(base)
    if method in IDENTITY_AT_FIRST:
        before = stock_loss(base, tokenizer, held_out)
        assert straight.summary["eval_loss_before"] == pytest.approx(before, rel=1e-5)
    loaded = put_on(base, straight.final, method)
    # float32 sums in another order: 1e-6 of logits of size 1, with room
    assert torch.allclose(logits_of(loaded), trained, rtol=1e-4, atol=1e-4)
    assert (trained - untouched).abs().max() > 1e-2
    # PEFT's AdaLoRA wants to be trained where it is given labels.
    after = stock_loss(loaded.base_model.model if method == "adalora" else loaded, tokenizer, held_out)
    assert straight.summary["eval_loss"] == pytest.approx(after, rel=1e-5)
    if can_be_merged(method):
        if method == "loftq":  # merging into 4 bits would round what was learnt away
            loaded = put_on(base_model(config).dequantize(), straight.final, method)
        assert torch.allclose(logits_of(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)
    else:
        assert METHODS[method].no_merge
        assert method == "bottleneck" or loaded.active_peft_config.is_prompt_learning


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_method_trains_in_bfloat16_with_recomputed_activations_and_keeps_its_weights_in_float32(
    run_config, trained_logits, method
):
    recomputes = METHODS[method].recomputes
    config = method_config(
        run_config, "llama", method, train={"gradient_checkpointing": True if recomputes else "auto"}
    )
    config["model"]["dtype"] = "bfloat16"
    result = tunesmith.sft(config)
    curve = losses(result)
    assert min(curve[-3:]) < curve[0]
    saved = load_file(result.final / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    if method != "loftq":  # its 4-bit weights are multiplied in another format here
        loaded = put_on(base_model(config).to(torch.bfloat16), result.final, method)
        distance = (logits_of(loaded).float() - trained_logits[0].float()).norm()
        # bfloat16 has 8 bits: 0.4 % a number. OLoRA also rounds what is left of the base: 1.5 % measured.
        assert distance < 0.03 * trained_logits[0].float().norm()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method in ADAPTERS
        for kind in ("nf4", "int8")
        if kind in METHODS[method].quantizations
    ],
)
def test_a_method_goes_with_the_quantisation_it_says(run_config, trained_logits, method, kind):
    pytest.importorskip("bitsandbytes")
    config = method_config(run_config, "llama", method)
    config["model"]["quantization"] = kind
    result = tunesmith.sft(config)
    curve = losses(result)
    assert min(curve[-3:]) < curve[0]
    loaded = logits_of(put_on(base_model(config), result.final, method))
    # Inputs of int8 layers are rounded to 8 bits: a last bit of float32 may become 1 / 127 of a number.
    tolerance = 1e-5 if kind == "nf4" else 5e-3
    assert (loaded - trained_logits[0]).norm() < tolerance * trained_logits[0].norm()


# --- PiSSA and OLoRA


@pytest.mark.parametrize(("method", "decompose"), [("pissa", "eigh"), ("olora", "qr")])
def test_a_run_goes_on_where_weights_are_taken_apart_otherwise(run_config, monkeypatch, method, decompose):
    """Here other directions come first. A checkpoint has those that the run began with."""
    config = method_config(run_config, "llama", method)
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    original = getattr(torch.linalg, decompose)

    def in_another_order(matrix):
        first, second = original(matrix)
        if decompose == "eigh":  # values, vectors
            return first.roll(1), second.roll(1, dims=1)
        return first.roll(1, dims=1), second.roll(1, dims=0)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, decompose, in_another_order)
        resumed = tunesmith.sft(config)
    one, other = (logits_of(put_on(base_model(config), run.final, method)) for run in (straight, resumed))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def adapted(config, tokenizer=None):
    config = load_config(config)
    tokenizer = tokenizer or load_tokenizer(config)
    return adapt_model(load_model(config, tokenizer, print), config, tokenizer)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_pissa_takes_the_largest_singular_directions_out_of_the_base_and_begins_as_they_are(run_config, name):
    config = method_config(run_config, "llama", "pissa")
    layer = adapted(config).get_submodule(f"base_model.model.model.layers.0.{name}")
    weight = base_model(config).get_submodule(f"model.layers.0.{name}").weight.detach()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    largest = u[:, :4] * s[:4] @ vh[:4]
    assert torch.allclose(weight - layer.base_layer.weight, largest, atol=1e-5)
    a, b = (getattr(layer, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
    assert torch.allclose(layer.scaling["default"] * b @ a, largest, atol=1e-5)


def test_olora_takes_out_what_peft_does(run_config):
    config = method_config(run_config, "llama", "olora")
    ours = adapted(config)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": "olora", "target_modules": "all-linear"}
    theirs = get_peft_model(base_model(config), LoraConfig(task_type="CAUSAL_LM", **options))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    one, other = ours.get_submodule(name), theirs.get_submodule(name)
    assert torch.allclose(one.base_layer.weight, other.base_layer.weight, atol=1e-5)
    products = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in (one, other)]
    assert torch.allclose(*products, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_rank_beyond_a_layer_is_an_error_that_says_which(run_config, method):
    config = method_config(run_config, "llama", method)
    config["adapter"]["r"] = 33
    with pytest.raises(ModelError, match=r"adapter.r=33 .* k_proj has 32 outputs"):
        adapted(config)


def test_a_table_of_embeddings_is_no_target_of_pissa(run_config):
    config = method_config(run_config, "llama", "pissa")
    config["adapter"]["target_modules"] = ["q_proj", "embed_tokens"]
    with pytest.raises(ModelError, match=r"takes a part out of linear layers, and model.embed_tokens"):
        adapted(config)


# --- LoftQ


def test_loftq_begins_with_the_best_matrices_of_its_rank_for_what_rounding_loses(run_config):
    """What is left of the error are its smaller singular values (Eckart and Young)."""
    functional = pytest.importorskip("bitsandbytes").functional
    config = method_config(run_config, "llama", "loftq")
    model, exact = adapted(config), AutoModelForCausalLM.from_pretrained(config["model"]["path"])
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        held = layer.base_layer.weight
        error = exact.get_submodule(f"model.layers.1.{name}").weight - functional.dequantize_4bit(
            held.data, held.quant_state
        )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left = (error - layer.scaling["default"] * b @ a).detach().norm()
        expected = torch.linalg.svdvals(error.detach())[4:].square().sum().sqrt()
        assert float(left) == pytest.approx(float(expected), rel=1e-4)
        assert left < 0.95 * error.norm()


# --- AdaLoRA


def test_adalora_ends_with_the_mean_rank_asked_for_and_tells_the_loss_of_the_rows_alone(run_config):
    plain = tunesmith.sft(
        method_config(run_config, "llama", "lora", run={"name": "lora"}, train={"max_steps": 1})
    )
    config = method_config(run_config, "llama", "adalora", train={"max_steps": 20})
    result = tunesmith.sft(config)
    assert losses(result)[0] == pytest.approx(losses(plain)[0], rel=1e-5)  # both change nothing at first
    values = [
        t for name, t in load_file(result.final / "adapter_model.safetensors").items() if "lora_E" in name
    ]
    assert [len(value) for value in values] == [6] * 14  # 1.5 times the rank, two layers of seven
    assert sum(int((value != 0).sum()) for value in values) == 4 * 14


def test_adalora_goes_on_with_the_ranks_it_has_left(run_config, monkeypatch):
    """Of 8 steps the fourth shares out for the last time."""
    config = method_config(run_config, "llama", "adalora", run={"name": "straight"})
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    assert same_tensors(straight, tunesmith.sft(config))


def test_the_penalty_of_adalora_is_what_peft_adds_to_a_loss(run_config):
    model = adapted(method_config(run_config, "llama", "adalora")).eval()
    ours = type(model.base_model).forward(model.base_model, input_ids=IDS, labels=IDS).loss
    without = model(input_ids=IDS, labels=IDS).loss
    assert orthogonality(model).item() == pytest.approx((ours - without).item(), rel=1e-5)


def test_a_step_that_is_left_out_tells_adalora_nothing(run_config):
    model = adapted(method_config(run_config, "llama", "adalora"))
    plan_budget(model, 10)
    allocate(model, 1)
    assert budget_state(model) == {}


# --- virtual tokens


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning"])
def test_a_padded_batch_goes_on_like_each_of_its_rows_alone(run_config, method):
    config = method_config(run_config, "llama", method)
    folder = tunesmith.sft(config).final
    stock, model = put_on(base_model(config), folder, method), load_adapter(base_model(config), folder)
    prompts = [torch.arange(3, 20), torch.arange(40, 50)]
    expected = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(stock(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    input_ids, mask = torch.full((2, 17), 1), torch.zeros(2, 17, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, 17 - len(prompt) :], mask[row, 17 - len(prompt) :] = prompt, 1
    given = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=1,
    )  # fmt: skip
    assert given[:, 17:].tolist() == expected


def test_a_prompt_begins_with_its_text_as_often_as_it_fits(run_config):
    config = method_config(run_config, "llama", "prompt")
    config["adapter"] |= {"init_text": "ab", "num_virtual_tokens": 5}
    model, base = adapted(config), base_model(config)
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    table = base.get_input_embeddings().weight
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[[a, b, a, b, a]])


def test_a_prefix_without_an_encoder_is_trained_itself(run_config):
    config = method_config(run_config, "llama", "prefix")
    config["adapter"]["encoder_size"] = 0
    model = adapted(config)
    # keys and values of 2 layers, 2 heads of 16, for 5 tokens
    assert count_parameters(model)[0] == 5 * 2 * 2 * 2 * 16


def test_room_for_virtual_tokens_is_counted_in_the_length_of_an_example(run_config, capsys):
    config = method_config(run_config, "llama", "prompt", data={"max_length": 510})
    adapted(config)
    assert "data.max_length=510 and 5 virtual tokens exceed the 512 positions" in capsys.readouterr().out


# --- where the others go


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_ia3_and_ln_tuning_find_what_they_are_for_in_the_model(tiny_models, run_config, family):
    def config_of(method):
        config = load_config(method_config(run_config, family, method))
        model = load_model(config, load_tokenizer(config), print)
        return peft_config(model, config.adapter, None)

    ia3 = config_of("ia3")
    assert (ia3.target_modules, ia3.feedforward_modules) == ({"k_proj", "v_proj", "down_proj"}, {"down_proj"})
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    if family == "gemma2":
        norms |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    assert set(config_of("ln_tuning").target_modules) == norms


def test_ia3_tells_the_two_projections_of_gpt2_that_have_one_name_apart(run_config):
    gpt2 = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["gpt2"](vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    )
    adapter = load_config(method_config(run_config, "llama", "ia3")).adapter
    config = peft_config(gpt2, adapter, None)
    assert (config.target_modules, config.feedforward_modules) == ({"c_attn", "mlp.c_proj"}, {"mlp.c_proj"})


def test_weight_decay_leaves_the_factors_of_ia3_alone(run_config):
    """They change nothing at 1: decay towards 0 would switch layers off."""
    runs = [
        tunesmith.sft(
            method_config(
                run_config,
                "llama",
                "ia3",
                run={"name": f"d{decay}"},
                train={"weight_decay": decay, "max_steps": 2},
            )
        )
        for decay in (0.0, 0.9)
    ]
    assert same_tensors(*runs)


def test_the_size_of_a_checkpoint_is_foreseen_with_what_a_method_keeps(run_config, capsys):
    for method in ("pissa", "adalora", "vera", "p_tuning", "bottleneck"):
        config = method_config(run_config, "llama", method, run={"name": method}, train={"max_steps": 4})
        config["checkpoint"] = {"every_steps": 1, "keep": 4}
        folders = (tunesmith.sft(config).run / "checkpoints").iterdir()
        size = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in folders)
        foreseen = float(re.findall(r"a checkpoint takes ([\d.]+) KiB", capsys.readouterr().out)[-1]) * 1024
        assert size < foreseen < size + 2**16


def test_an_oft_block_that_does_not_fit_is_an_error_that_says_where(run_config):
    config = method_config(run_config, "llama", "oft")
    config["adapter"]["oft_block_size"] = 40
    with pytest.raises(ModelError, match=r"oft_block_size=40 does not divide the 64 inputs of .*q_proj"):
        adapted(config)


def test_a_bottleneck_is_its_formula_after_attention_and_feed_forward(run_config):
    model = adapted(method_config(run_config, "llama", "bottleneck"))
    assert count_parameters(model)[0] == 2 * 2 * (2 * 8 * 64 + 8 + 64)  # two a layer
    module = model.model.layers[0].mlp
    with torch.no_grad():
        for parameter in module.bottleneck.parameters():
            parameter.normal_(std=0.1)
        x = torch.randn(1, 3, 64)
        h = module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))
        down, up = module.bottleneck.down, module.bottleneck.up
        inner = h @ down.weight.T + down.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        assert torch.allclose(module(x), h + inner @ up.weight.T + up.bias, atol=1e-6)


def test_a_run_with_bottlenecks_is_found_and_loaded_to_be_talked_to(run_config, trained_logits):
    config = method_config(run_config, "llama", "bottleneck")
    result = tunesmith.sft(config)
    tuned = load_tuned(find_model(str(result.run), print), print)
    distance = (logits_of(tuned.model).float() - trained_logits[0]).norm()
    assert distance < 0.02 * trained_logits[0].norm()  # it may be bfloat16 here
    described = json.loads((result.final / "adapter_config.json").read_text())
    assert (described["peft_type"], described["r"]) == ("TUNESMITH_BOTTLENECK", 8)
    described["r"] = 7
    (result.final / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="weights of the bottlenecks are not those"):
        load_tuned(find_model(str(result.run), print), print)

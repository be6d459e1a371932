"""Fused LoRA against PEFT's own forward: a model with `fuse(model, ["lora"])` and an untouched copy."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.models.fuse import fuse
from tunesmith.models.fused.linear import LinearParts, dropped, linears

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(family="qwen2"):
    """Two layers; Qwen2 has a bias on query, key and value."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def lora_config(targets=ALL, **options):
    # Not `init_lora_weights=True`: with B = 0, A has no gradient.
    return LoraConfig(
        **{
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 6,
            "target_modules": targets,
            "init_lora_weights": False,
            **options,
        }
    )


def pair(family="qwen2", targets=ALL, **options):
    """PEFT's model, and a copy of it that was fused."""
    stock = get_peft_model(base_model(family), lora_config(targets, **options)).train()
    ours = copy.deepcopy(stock)
    fuse(ours, ["lora"])
    return stock, ours


def outcome(model):
    """Logits, and the gradients of the inputs and of every trained parameter."""
    generator = torch.Generator().manual_seed(1)
    model.zero_grad()
    x = torch.randn(2, 11, 32, generator=generator).requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "inputs": x.grad, **gradients}


def assert_same(stock, ours):
    """To 1e-5 of the largest: float32 sums of some hundred terms in another order."""
    expected, found = outcome(stock), outcome(ours)
    assert list(found) == list(expected)
    for name, theirs in expected.items():
        assert (found[name] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    return expected


def fused_names(model):
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "forward" in vars(module)}


# --- the same as PEFT


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("targets", "fused"),
    [
        (ALL, set(ALL)),
        (["q_proj", "v_proj"], {"q_proj", "k_proj", "v_proj"}),  # k has no LoRA but shares the input
        (["o_proj"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["lm_head", "up_proj"], {"q_proj", "k_proj", "v_proj", "lm_head", "up_proj"}),
    ],
)
def test_outputs_and_gradients_are_pefts(family, targets, fused):
    stock, ours = pair(family, targets)
    assert fused_names(ours) == fused
    assert not fused_names(stock)
    expected = assert_same(stock, ours)
    kinds = {name.split(".lora_")[1][0] for name in expected if ".lora_" in name}
    assert kinds == {"A", "B"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_fine_tuning_has_the_same_gradients_of_weights_and_biases(family):
    stock = base_model(family).train()
    ours = copy.deepcopy(stock)
    fuse(ours, ["lora"])
    expected = assert_same(stock, ours)
    assert "model.layers.0.self_attn.k_proj.weight" in expected
    assert ("model.layers.0.self_attn.k_proj.bias" in expected) == (family == "qwen2")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"modules_to_save": ["k_proj", "lm_head"], "targets": ["q_proj", "v_proj"]},
        {"targets": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "targets": ["q_proj", "v_proj"]},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_peft_give_pefts_numbers(options):
    stock, ours = pair(**options)
    expected = assert_same(stock, ours)
    assert any("q_proj.lora_B" in name for name in expected)
    if "modules_to_save" in options:
        assert any("k_proj.modules_to_save" in name for name in expected)


def test_what_is_out_of_the_ordinary_keeps_pefts_forward():
    for options in ({"use_dora": True}, {"lora_bias": True, "targets": ["q_proj", "v_proj"]}):
        _, ours = pair(**options)
        assert not fused_names(ours)
    _, ours = pair(targets=["embed_tokens", "o_proj"])
    assert "embed_tokens" not in fused_names(ours)


def test_rank_stabilised_lora_is_scaled_by_the_root_of_the_rank():
    for use_rslora, scale in ((True, 6 / math.sqrt(4)), (False, 6 / 4)):
        _, ours = pair("llama", ["o_proj"], use_rslora=use_rslora)
        layer = ours.base_model.model.model.layers[0].self_attn.o_proj
        x = torch.randn(3, 32)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        by_hand = x @ (layer.base_layer.weight + scale * b @ a).t()
        assert torch.allclose(layer(x), by_hand, atol=1e-5)  # float32 sums of 32 terms


def test_a_fused_model_follows_what_peft_is_told_later():
    """Adapters switched off and on, merged and not, a second one, two at once."""
    models = pair()
    stock, ours = models

    def both(change):
        for model in models:
            torch.manual_seed(5)  # the second adapter is drawn
            change(model)

    with_adapter = assert_same(stock, ours)["logits"]
    with stock.disable_adapter(), ours.disable_adapter():
        without = assert_same(stock, ours)["logits"]
    assert (with_adapter - without).abs().max() > 0.1
    both(lambda model: model.merge_adapter())
    merged = assert_same(stock, ours)["logits"]
    assert torch.allclose(merged, with_adapter, atol=1e-4)  # W + s B A, rounded once more
    both(lambda model: model.unmerge_adapter())
    both(lambda model: model.add_adapter("second", lora_config(["q_proj", "down_proj"], r=2)))
    assert_same(stock, ours)
    both(lambda model: model.set_adapter("second"))
    second = assert_same(stock, ours)
    assert any("q_proj.lora_A.second" in name for name in second)
    assert not any("lora_A.default" in name for name in second)
    both(lambda model: model.base_model.set_adapter(["default", "second"]))
    together = assert_same(stock, ours)
    assert any("lora_A.default" in name for name in together)
    both(lambda model: model.set_adapter("default"))
    assert torch.allclose(assert_same(stock, ours)["logits"], with_adapter, atol=1e-4)


def test_disabling_a_merged_adapter_takes_it_out_of_the_weights():
    stock, ours = pair()
    for model in (stock, ours):
        model.merge_adapter()
    with stock.disable_adapter(), ours.disable_adapter():
        assert_same(stock, ours)


def test_the_unloaded_model_is_the_one_that_peft_makes():
    stock, ours = pair()
    ids = torch.arange(20)[None]
    merged = [model.merge_and_unload()(ids, use_cache=False).logits for model in (stock, ours)]
    assert torch.equal(*merged)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    stock, ours = pair()
    ours.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(stock, ours)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_lora_is_as_near_to_the_truth_as_pefts(base_dtype):
    """float32 weights under autocast, or a bfloat16 base with PEFT's float32 adapters: at most 1.5 times
    PEFT's own distance from float32, plus one rounding (2^-9)."""
    exact, _ = pair()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    stock = copy.deepcopy(exact)
    for name, parameter in stock.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base_dtype)
    ours = copy.deepcopy(stock)
    fuse(ours, ["lora"])
    expected = outcome(exact)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = outcome(stock), outcome(ours)
    for name, truth in expected.items():
        ours_off, theirs_off = (
            (some[name].float() - truth).norm() / truth.norm() for some in (found, theirs)
        )
        assert ours_off <= 1.5 * theirs_off + 2**-9, name


# --- one layer, in float64


def lora_layer(p=0.0, *, width=6, out=5, r=2, dtype=torch.float64):
    torch.manual_seed(0)
    linear = nn.Linear(width, out)
    config = LoraConfig(r=r, lora_alpha=3, lora_dropout=p, init_lora_weights=False)
    return LoraLinear(linear, "default", config, r=r, lora_alpha=3).to(dtype)


def parts_of(layer, p=0.0):
    return LinearParts(
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        p,
    )


def test_one_layer_equals_pefts_to_the_last_digits_of_float64():
    layer = lora_layer()
    layer.base_layer.weight.requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    trained = [x, layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    runs = [
        (y, *torch.autograd.grad(y, trained, upstream)) for y in (linears(x, [parts_of(layer)])[0], layer(x))
    ]
    for ours, theirs in zip(*runs, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(p):
    """Three layers on one input, of which one has no LoRA and one no bias. Every evaluation draws from the
    same seed: with dropout, the backward pass must draw the masks of the forward pass."""
    sizes = [(5, 6), (5,), (2, 6), (5, 2), (4, 6), (2, 6), (4, 2), (3, 6), (3,)]
    tensors = [torch.randn(4, 6, dtype=torch.float64)] + [torch.randn(s, dtype=torch.float64) for s in sizes]

    def run(x, w1, b1, a1, l1, w2, a2, l2, w3, b3):
        torch.manual_seed(3)
        layers = [
            LinearParts(w1, b1, a1, l1, 0.7, p),
            LinearParts(w2, None, a2, l2, 2.0, p),
            LinearParts(w3, b3),
        ]
        return linears(x, layers)

    # The gradient of a bias is summed in float32: 1e-6 of it is rounding.
    assert torch.autograd.gradcheck(
        run, [tensor.requires_grad_() for tensor in tensors], rtol=1e-5, atol=1e-5
    )


# --- dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_keeps_1_minus_p_of_the_inputs_and_makes_up_for_the_rest(p):
    """p is rounded to 16 bits, and what is kept is multiplied by exactly its inverse. Of 100,001 inputs, the
    share kept lies within five standard deviations."""
    x = torch.ones(100_001, dtype=torch.float64)
    y = dropped(x, p, seed=7)
    exact_p = round(p * 65536) / 65536
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - exact_p)], rel=1e-15)
    share = y.count_nonzero().item() / len(y)
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / len(y))
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / len(y))


def test_neighbours_are_dropped_independently_of_one_another():
    """Four inputs share a random word: no pair of places in it may agree more often than by chance."""
    kept = dropped(torch.ones(40_000), 0.5, seed=1).bool().view(-1, 4).double()
    correlation = torch.corrcoef(kept.t()) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(10_000)
    assert abs(torch.corrcoef(torch.stack((kept[:-1, 0], kept[1:, 0])))[0, 1]) < 5 / math.sqrt(10_000)


def test_in_expectation_a_layer_with_dropout_is_the_layer_without():
    layer = lora_layer(dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.no_grad():
        draws = torch.stack([linears(x, [parts_of(layer, 0.25)])[0] for _ in range(4000)])
        expected = layer(x)
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 5 * standard_error).all()
    assert (draws.std(0) > 0).all()


def test_dropout_spares_what_is_not_lora():
    layer = LinearParts(torch.randn(5, 6), torch.randn(5), torch.randn(2, 6), torch.zeros(5, 2), 1.0, 0.9)
    x = torch.randn(3, 6)
    assert torch.allclose(linears(x, [layer])[0], F.linear(x, layer.weight, layer.bias), atol=1e-6)


def test_masks_come_from_torchs_random_state():
    """So that `manual_seed` and a restored state repeat a run, and the next step draws others."""
    _, ours = pair(lora_dropout=0.3)
    torch.manual_seed(4)
    first, second = outcome(ours), outcome(ours)
    torch.manual_seed(4)
    again = outcome(ours)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits"], second["logits"])


def test_checkpointed_layers_draw_the_same_masks_again():
    _, ours = pair(lora_dropout=0.3)
    checkpointed = copy.deepcopy(ours)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    runs = []
    for model in (ours, checkpointed):
        torch.manual_seed(4)
        runs.append(outcome(model))
    for name, expected in runs[0].items():
        assert torch.allclose(runs[1][name], expected, rtol=1e-5, atol=1e-6), name


def test_nothing_is_dropped_in_evaluation():
    stock, ours = pair(lora_dropout=0.5)
    assert not torch.equal(outcome(ours)["logits"], outcome(ours)["logits"])
    stock.eval()
    ours.eval()
    state = torch.random.get_rng_state()
    assert_same(stock, ours)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- memory


def kept_bytes(function, parameters):
    """Bytes that autograd keeps, each storage once, parameters not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # the tensor, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_layers_on_one_input_keep_it_once_and_a_narrow_product_each(p):
    T, I, r = 50, 64, 4  # noqa: E741
    layers = [lora_layer(width=I, out=32, r=r, dtype=torch.float32) for _ in range(3)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.base_layer.requires_grad_(False)
    x = torch.randn(T, I).requires_grad_()
    size = kept_bytes(lambda: linears(x, [parts_of(layer, p) for layer in layers]), parameters)
    assert size == 4 * (T * I + 3 * T * r)


@pytest.mark.parametrize(("options", "autocast"), [({"lora_dropout": 0.1}, False), ({}, True)])
def test_a_fused_model_keeps_less_than_pefts(options, autocast):
    """Under autocast PEFT keeps a cast input for every layer; with dropout, a dropped one and its mask."""
    sizes = []
    for model in pair(**options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sizes.append(kept_bytes(lambda m=model: outcome_forward(m), model.parameters()))
    stock, ours = sizes
    assert ours < 0.8 * stock


def outcome_forward(model):
    return model(inputs_embeds=torch.ones(2, 30, 32).requires_grad_(), use_cache=False).logits

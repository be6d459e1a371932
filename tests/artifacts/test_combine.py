"""Adapters are combined as the papers say, on whole updates: by hand, by loops, as an adapter of its own."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from tunesmith.artifacts import merge as merge_module
from tunesmith.artifacts import tuned as tuned_module
from tunesmith.artifacts.combine import Combination, add_sum, combination_of, load_adapters
from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.merge import merge
from tunesmith.cli import main
from tunesmith.errors import ModelError

IDS = torch.arange(3, 60)[None]
FIRST = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"])
SECOND = LoraConfig(
    task_type="CAUSAL_LM", r=9, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True
)
SCALES = (12 / 4, 6 / 3)


def quiet(_):
    pass


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    for module in (merge_module, tuned_module):
        monkeypatch.setattr(module, "compute_dtype", lambda _: (torch.float32, "for the test"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    return [
        make(base, tmp_path_factory.mktemp("a") / str(i), config, i)
        for i, config in enumerate((FIRST, SECOND))
    ]


def make(base, folder, config, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), copy.deepcopy(config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def updates(folder, scale):
    """scale B A by the name of the weight."""
    tuned = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): scale
        * tuned[name.replace("lora_A", "lora_B")]
        @ a
        for name, a in tuned.items()
        if "lora_A" in name
    }


def changes(base, folder):
    """What a merged model's weights are more than the base's, where they differ."""
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def stock(base, adapter):
    return logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    )


def test_a_sum_is_that_of_the_updates_without_cross_terms(base, adapters, tmp_path):
    code = main(["merge", *map(str, adapters), "--out", str(tmp_path / "m"), "--weights", "0.7", "-0.3"])
    assert code == 0
    first, second = (updates(*pair) for pair in zip(adapters, SCALES, strict=True))
    found = changes(base, tmp_path / "m")
    assert len(found) == 6
    for name, change in found.items():
        expected = 0.7 * first.get(name, torch.zeros(1)) - 0.3 * second.get(name, torch.zeros(1))
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_weights_default_to_a_mean_and_ties_to_the_papers(capsys):
    assert combination_of(2, None, None, None, None) == Combination((0.5, 0.5))
    assert combination_of(2, None, "ties", 0.2, None) == Combination((1.0, 1.0), "ties", 0.2)
    assert combination_of(1, None, None, None, None) is None
    with pytest.raises(ModelError, match="--density is for"):
        combination_of(2, None, None, 0.2, None)
    with pytest.raises(ModelError, match="--seed is for"):
        combination_of(2, None, "ties", None, 1)


# --- TIES and DARE, entry by entry


def ties_by_hand(tensors, weights, keep=None):
    """Yadav et al. 2023, algorithm 1: trim (`keep` entries of each stay; None: all), elect, disjoint mean."""
    trimmed = []
    for tensor in tensors:
        entries = tensor.double().flatten().numpy().copy()
        if keep is not None:
            for i in np.argsort(np.abs(entries))[: len(entries) - keep]:
                entries[i] = 0.0
        trimmed.append(entries)
    merged = np.zeros(tensors[0].numel())
    for i in range(len(merged)):
        total = sum(entries[i] for entries in trimmed)
        agreeing = [
            weight * entries[i]
            for weight, entries in zip(weights, trimmed, strict=True)
            if entries[i] != 0 and (entries[i] > 0) == (total >= 0)
        ]
        merged[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return torch.from_numpy(merged).float().reshape(tensors[0].shape)


def three(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 40, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_is_the_papers_algorithm(weights, density):
    tensors = three()
    ours = Combination(weights, "ties", density).of(tensors, "w")
    torch.testing.assert_close(
        ours, ties_by_hand(tensors, weights, keep=int(density * 960)), rtol=1e-5, atol=1e-6
    )


def dropped(tensors, number, **settings):
    """What DARE leaves of one of the updates: the draw is the same for all weights."""
    weights = tuple(float(i == number) for i in range(len(tensors)))
    return Combination(weights, "dare_linear", **settings).of(tensors, "w")


def test_dare_keeps_an_entry_by_chance_and_divides_it_by_the_chance():
    tensors = three()
    left = [dropped(tensors, i, density=0.3) for i in range(3)]
    for tensor, kept in zip(tensors, left, strict=True):
        stays = kept != 0
        torch.testing.assert_close(kept[stays], tensor[stays] / 0.3)
        # 960 draws: a standard error of sqrt(0.3 * 0.7 / 960) = 0.015.
        assert abs(stays.float().mean() - 0.3) < 0.06
    assert not any(torch.equal(a != 0, b != 0) for a, b in itertools.combinations(left, 2))
    weights = (0.5, 2.0, -1.0)
    expected = sum(weight * kept for weight, kept in zip(weights, left, strict=True))
    torch.testing.assert_close(Combination(weights, "dare_linear", 0.3).of(tensors, "w"), expected)
    torch.testing.assert_close(
        Combination(weights, "dare_ties", 0.3).of(tensors, "w"), ties_by_hand(left, weights)
    )


def test_dare_is_repeated_by_its_seed_whatever_was_drawn_before():
    tensors = three()
    torch.manual_seed(5)
    first = dropped(tensors, 0, density=0.5, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(first, dropped(tensors, 0, density=0.5, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, dropped(tensors, 0, density=0.5, seed=4))
    other = Combination((1.0, 0.0, 0.0), "dare_linear", 0.5, 3).of(tensors, "another matrix")
    assert not torch.equal(first, other)


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_what_is_merged_is_the_combination_of_whole_updates(base, adapters, tmp_path, how):
    combination = Combination((1.0, 0.5), how, 0.4, seed=2)
    merged = merge(adapters, tmp_path / "m", combination=combination, say=quiet)
    first, second = (updates(*pair) for pair in zip(adapters, SCALES, strict=True))
    found = changes(base, tmp_path / "m")
    assert len(found) == 6
    for name, change in found.items():
        pair = [first.get(name), second.get(name)]
        expected = combination.of(pair, name.removesuffix(".weight"))
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    # The other way round: x dW is added to what each layer of the unmerged base gives.
    assert merged.agreement.kl < 1e-9


# --- as an adapter, and side by side


def test_a_sum_kept_as_an_adapter_is_exact_in_stock_peft(base, adapters, tmp_path):
    pair = [str(adapter) for adapter in adapters]
    combination = Combination((0.7, 0.3))
    merge(pair, tmp_path / "adapter", combination=combination, as_adapter=True, say=quiet)
    merge(pair, tmp_path / "model", combination=combination, say=quiet)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    torch.testing.assert_close(stock(base, tmp_path / "adapter"), expected, rtol=0, atol=1e-4)
    # And it can be merged like any other.
    again = merge(tmp_path / "adapter", tmp_path / "again", say=quiet)
    assert again.agreement.kl < 1e-9


def test_ties_kept_as_an_adapter_says_how_much_of_it_there_is(base, adapters, tmp_path):
    lines = []
    combination = Combination((1.0, 1.0), "ties", 0.5)
    merge(adapters, tmp_path / "adapter", combination=combination, as_adapter=True, say=lines.append)
    first, second = (updates(*pair) for pair in zip(adapters, SCALES, strict=True))
    kept = total = 0.0
    tuned = updates(tmp_path / "adapter", 1)
    for name in first.keys() | second.keys():
        exact = combination.of([first.get(name), second.get(name)], name.removesuffix(".weight"))
        total += exact.square().sum()
        kept += tuned[name].square().sum()
        singular = torch.linalg.svdvals(exact - tuned[name])
        torch.testing.assert_close(singular[0], torch.linalg.svdvals(exact)[13], rtol=1e-3, atol=1e-5)
    assert f"holds {100 * float((kept / total).sqrt()):.0f} % of their norm" in " ".join(lines)


def test_adapters_are_loaded_side_by_side_switched_and_summed(base, adapters):
    founds = {name: find_model(str(folder), print) for name, folder in zip("ab", adapters, strict=True)}
    model = load_adapters(founds, quiet).model
    alone = [stock(base, adapter) for adapter in adapters]
    for name, expected in (("a", alone[0]), ("b", alone[1]), ("a", alone[0])):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    add_sum(model, "both", {"a": 1.0, "b": 0.0})
    torch.testing.assert_close(logits(model), alone[0], rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_combined_is_refused(base, adapters, tmp_path, capsys):
    other_base = make_tiny_model(tmp_path / "base")
    other = make(other_base, tmp_path / "other", FIRST)
    dora = make(
        base,
        tmp_path / "dora",
        LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"]),
    )
    with pytest.raises(ModelError, match="adapters are combined on one base"):
        merge([adapters[0], other], tmp_path / "m", say=quiet)
    with pytest.raises(ModelError, match=r"\(DoRA\); expected LoRA alone. Merge it for itself"):
        merge([adapters[0], dora], tmp_path / "m", say=quiet)
    with pytest.raises(ModelError, match="has 3 numbers for 2 adapters"):
        merge(adapters, tmp_path / "m", combination=Combination((1, 1, 1)), say=quiet)
    with pytest.raises(ModelError, match="--density is 1; expected above 0 and below 1"):
        merge(adapters, tmp_path / "m", combination=Combination((1, 1), "ties", 1.0), say=quiet)
    founds = {"a": find_model(str(adapters[0]), print), "b": find_model(str(other), print)}
    with pytest.raises(ModelError, match="b: expected an adapter of"):
        load_adapters(founds, quiet)
    assert not (tmp_path / "m").exists()

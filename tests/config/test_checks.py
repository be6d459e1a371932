"""Defaults that follow from other settings have the documented values; a saved config contradicts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from tunesmith.config import AdapterConfig, Config, SourceConfig, dump_config, load_config
from tunesmith.config.checks import CONTRADICTIONS, OWNED_TRAINER_ARGS
from tunesmith.config.keys import all_keys
from tunesmith.config.methods import METHODS, MethodName
from tunesmith.config.preferences import PREFERENCES
from tunesmith.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"epochs": 3.0, "max_steps": None, "micro_batch_tokens": None, "learning_rate": 2e-4}),
        ({"train": {"max_steps": 7}}, {"epochs": None, "max_steps": 7}),
        ({"train": {"epochs": 0.5}}, {"epochs": 0.5}),
        ({"adapter": {"method": "none"}}, {"learning_rate": 1e-5}),
        ({"adapter": {"method": "none"}, "train": {"learning_rate": 3e-5}}, {"learning_rate": 3e-5}),
        ({"model": {"config": "c"}}, {"learning_rate": 6e-4}),
        ({"model": {"config": "c"}, "adapter": {"method": "none"}}, {"learning_rate": 6e-4}),
    ],
)
def test_defaults_that_depend_on_other_settings_are_written_out(
    settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = load_config({**MINIMAL, **settings})
    assert {key: getattr(config.train, key) for key in expected} == expected
    assert config.eval.batch_tokens == config.train.micro_batch_tokens


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": {"method": "none"}},
        {"train": {"max_steps": 5}},
        {"data": {"train": "a", "valid": 0.1}},
        {"data": {"train": "a", "loading": "streaming"}, "train": {"max_steps": 5}},
        {"model": {"path": "m", "freeze": [r"layers\.[0-3]\."]}, "adapter": {"method": "none"}},
        {"model": {"config": "c", "config_changes": {"hidden_size": 8, "rope_parameters": {"factor": 2.0}}}},
        {"train": {"batch_size_warmup": {"start": 2, "steps": 9}, "min_learning_rate": 1e-5}},
        {"run": {"recipe": "prefer"}},
        {"run": {"recipe": "prefer"}, "prefer": {"method": "simpo"}, "adapter": {"method": "none"}},
        {"run": {"recipe": "prefer"}, "prefer": {"length_normalized": True, "reference": "live"}},
    ],
)
def test_a_saved_config_reruns_with_every_default_written_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config({**MINIMAL, **settings})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    saved = load_config(path)
    assert saved == config
    assert saved.eval.model_fields_set == set(type(saved.eval).model_fields)


@pytest.mark.parametrize(
    ("settings", "num_contradictions"),
    [
        ({"adapter": {"method": "none", "r": None}}, 0),  # the default, written out
        ({"adapter": {"method": "vera", "r": 256, "alpha": None}}, 0),
        ({"adapter": {"method": "vera", "r": 256, "alpha": 32}}, 1),
        ({"adapter": {"method": "none", "r": 17}}, 1),
        ({"eval": {"batch_tokens": 4096, "max_new_tokens": 9}}, 0),
        ({"eval": {"answer_rows": 0}}, 0),
        ({"eval": {"answer_rows": 1}}, 1),
        ({"train": {"micro_batch_tokens": 2048}}, 0),
        ({"train": {"micro_batch_tokens": 2047}}, 1),  # and not a second time through eval.batch_tokens
        ({"train": {"micro_batch_tokens": 2047}, "eval": {"batch_tokens": 2046}}, 2),
        ({"model": {"path": "m", "quantization": "int8"}}, 0),
        ({"adapter": {"target_modules": r".*\.(q|v)_proj"}}, 0),
        ({"adapter": {"target_modules": ["q_proj", "v_proj"]}}, 0),
        ({"train": {"trainer_args": {"adam_beta2": 0.95}}}, 0),
        ({"train": {"trainer_args": {"bf16": True, "fp16": True}}}, 2),
    ],
)
def test_contradictions_are_judged_by_values_and_not_by_what_was_written(
    settings: dict[str, Any], num_contradictions: int
) -> None:
    if num_contradictions == 0:
        load_config({**MINIMAL, **settings})
        return
    with pytest.raises(ConfigError) as caught:
        load_config({**MINIMAL, **settings})
    lines = str(caught.value).splitlines()
    assert len([line for line in lines if "mistakes" not in line]) == num_contradictions


def test_each_method_has_defaults_of_its_own_for_the_keys_it_reads() -> None:
    def adapter(method: str, **keys: Any) -> Any:
        return load_config({**MINIMAL, "adapter": {"method": method, **keys}})

    assert set(METHODS) == set(get_args(MethodName))
    for name, method in METHODS.items():
        assert set(method.defaults) <= set(method.keys) <= set(AdapterConfig.model_fields)
        assert set(method.strategies) <= {"ddp", "fsdp", "zero2", "zero3"}
        assert name == "none" or method.strategies[0] == "ddp"
    lora, vera, ia3, prefix = adapter("lora"), adapter("vera"), adapter("ia3"), adapter("prefix")
    assert (lora.adapter.r, lora.adapter.alpha, lora.adapter.target_modules) == (16, 32, "all-linear")
    assert (vera.adapter.r, vera.adapter.alpha, vera.train.learning_rate) == (256, None, 4e-3)
    assert (ia3.adapter.r, ia3.adapter.target_modules, ia3.train.learning_rate) == (None, None, 3e-3)
    assert (prefix.adapter.num_virtual_tokens, prefix.adapter.encoder_size) == (20, 512)
    assert (prefix.data.packing, lora.data.packing) == ("none", "tree")
    assert adapter("bottleneck", r=8).adapter.r == 8


def _prefer(prefer: dict[str, Any], **sections: Any) -> Config:
    return load_config({**MINIMAL, "prefer": prefer, **sections}, recipe="prefer")


def test_preference_tuning_has_defaults_of_its_own() -> None:
    config = _prefer({})
    assert (config.run.recipe, config.prefer.method, config.adapter.method) == ("prefer", "dpo", "lora")
    assert (config.train.epochs, config.train.learning_rate) == (1.0, 5e-6)
    assert (config.data.packing, config.data.too_long) == ("tree", "drop")
    assert _prefer({}, train={"max_steps": 9}).train.epochs is None
    assert _prefer({}, train={"learning_rate": 1e-4}).train.learning_rate == 1e-4


def test_each_preference_method_has_defaults_for_the_keys_it_reads_and_leaves_the_others_open() -> None:
    for name, row in PREFERENCES.items():
        settings = _prefer({"method": name}).prefer.model_dump(exclude={"method"})
        reference = {"reference": "cached"} if row.needs_reference else {}
        assert {key: value for key, value in settings.items() if value is not None} == {
            **row.defaults,
            **reference,
        }
    assert _prefer({"method": "simpo", "gamma": 1.5}).prefer.gamma == 1.5


def test_beta_is_of_the_size_that_the_rewards_are_of() -> None:
    assert _prefer({}).prefer.beta == 0.1
    assert _prefer({"length_normalized": True}).prefer.beta == 5.0
    assert _prefer({"length_normalized": True, "beta": 2.0}).prefer.beta == 2.0
    assert _prefer({"method": "simpo"}).prefer.beta == 2.0


@pytest.mark.parametrize(
    ("method", "adapter", "learning_rate"),
    [
        ("dpo", "lora", 5e-6),
        ("dpo", "none", 5e-7),
        ("dpo", "ia3", 7.5e-5),  # 3e-3 where LoRA has 2e-4 in fine-tuning: 15 times
        ("dpo", "vera", 1e-4),
        ("kto", "lora", 5e-5),
        ("orpo", "none", 5e-6),
        ("simpo", "none", 6e-7),
        ("cpo", "lora", 1e-4),
        ("reward", "none", 1e-5),
    ],
)
def test_the_learning_rate_of_preference_tuning_is_that_of_its_method(
    method: str, adapter: str, learning_rate: float
) -> None:
    config = _prefer({"method": method}, adapter={"method": adapter})
    assert config.train.learning_rate == learning_rate


def test_a_live_reference_goes_with_adapters_that_can_be_switched_off_and_with_a_copy() -> None:
    for adapter in ("lora", "dora", "vera", "oft", "ia3", "ln_tuning", "none"):
        config = _prefer({"reference": "live"}, adapter={"method": adapter})
        assert config.prefer.reference == "live"
    for adapter in ("pissa", "olora", "bottleneck"):
        assert _prefer({}, adapter={"method": adapter}).prefer.reference == "cached"
        with pytest.raises(ConfigError, match=r"Use cached, or adapter\.method lora"):
            _prefer({"reference": "live"}, adapter={"method": adapter})


def test_a_config_of_one_verb_is_refused_by_another() -> None:
    values = {**MINIMAL, "run": {"recipe": "prefer"}}
    assert load_config(values, recipe="prefer").run.recipe == "prefer"
    with pytest.raises(ConfigError, match=r"so this is a config for `tunesmith prefer`\."):
        load_config(values, recipe="sft")


def test_a_model_goes_on_with_an_adapter_and_begins_without() -> None:
    assert load_config(MINIMAL).adapter.method == "lora"
    assert load_config({**MINIMAL, "model": {"config": "c"}}).adapter.method == "none"


@pytest.mark.parametrize(
    ("model", "origin", "tokenizer"),
    [
        ({"path": "m"}, ("model.path", "m"), ("model.path", "m")),
        ({"path": "m", "tokenizer": "t"}, ("model.path", "m"), ("model.tokenizer", "t")),
        ({"config": "owner/name"}, ("model.config", "owner/name"), ("model.config", "owner/name")),
        ({"config": "a/b.json"}, ("model.config", "a/b.json"), ("model.config", "a")),
        ({"config": "b.json"}, ("model.config", "b.json"), ("model.config", ".")),
        ({"config": "b.json", "tokenizer": "t"}, ("model.config", "b.json"), ("model.tokenizer", "t")),
    ],
)
def test_the_tokenizer_is_the_one_named_or_lies_beside_the_model_or_its_config(
    model: dict[str, Any], origin: tuple[str, str], tokenizer: tuple[str, str]
) -> None:
    config = load_config({**MINIMAL, "model": model}).model
    assert (config.origin, config.tokenizer_origin) == (origin, tokenizer)


def test_a_template_file_is_accepted_when_it_exists(tmp_path: Path) -> None:
    template = tmp_path / "my.jinja"
    template.write_text("{{ messages }}")
    values = {**MINIMAL, "data": {"train": "a", "template": str(template)}}
    assert load_config(values).data.template == str(template)
    values["data"]["template"] = "{% for message in messages %}" * 200  # a template where its path belongs
    with pytest.raises(ConfigError, match=r"expected auto, chatml or a Jinja file"):
        load_config(values)


def test_a_validation_file_whose_name_is_a_number_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").write_text("")
    config = load_config({**MINIMAL, "data": {"train": "a", "valid": "2024"}})
    assert config.data.valid == [SourceConfig(path="2024")]


def test_contradictions_name_keys_that_exist() -> None:
    for keys, _, _ in CONTRADICTIONS:
        assert set(keys) <= set(all_keys())
    owners = {
        word.rstrip(",") for text in OWNED_TRAINER_ARGS.values() for word in text.split() if "." in word
    }
    assert {owner for owner in owners if not owner.endswith("/")} <= set(all_keys())


def test_the_keys_a_contradiction_names_are_those_it_reads() -> None:
    """A key that is read but not named could cause a report that rests on another mistake."""
    for keys, holds, _ in CONTRADICTIONS:
        read: set[str] = set()
        for variant in (
            {},
            {"data": {"train": "a", "loading": "streaming"}, "train": {"max_steps": 3}},
            {"adapter": {"method": "none"}},
            {"train": {"max_steps": 3}},
            {"run": {"recipe": "prefer"}},
            {"run": {"recipe": "prefer"}, "prefer": {"method": "kto", "reference": "live"}},
            {"run": {"recipe": "prefer"}, "prefer": {"reference": "live"}, "adapter": {"method": "none"}},
        ):
            holds(_Recorder(load_config({**MINIMAL, **variant}), read))  # type: ignore[arg-type]
        assert read <= set(keys)


class _Recorder:
    """A config that notes which keys are read."""

    def __init__(self, target: Any, read: set[str], prefix: str = "") -> None:
        self._target, self._read, self._prefix = target, read, prefix

    def __getattr__(self, name: str) -> Any:
        if self._prefix:
            self._read.add(f"{self._prefix}.{name}")
            return getattr(self._target, name)
        return _Recorder(getattr(self._target, name), self._read, name)


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="a run ends by one of them"):
        Config.model_validate({**MINIMAL, "train": {"epochs": 1, "max_steps": 2}})
    with pytest.raises(ValidationError):
        Config.model_validate(MINIMAL).train.batch_size = 3  # type: ignore[misc]

"""Preference runs on two processes: the course and the adapter of one, also when they are killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from crash.harness import Driver, difference, scenario_config
from safetensors.torch import load_file
from training.test_strategies import assert_same_course, each, train

_LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferences")


def config_of(folder: Path, strategy: str, method: str, adapter: str, reference: str = "cached") -> dict:
    prefer = {"method": method}
    if reference != "cached":
        prefer["reference"] = reference
    config = scenario_config(
        {
            "prefer": prefer,
            "adapter": _LORA if adapter == "lora" else {"method": "none"},
            "train": {"learning_rate": 3e-3 if adapter == "lora" else 3e-4},
        },
        folder,
    )
    if adapter == "none":
        config["adapter"] = {"method": "none"}
    config["distributed"] = {"strategy": strategy}
    # Each asks its reference itself.
    name = f"{strategy}-{method}-{adapter}-{reference}"
    config["data"]["cache_dir"] = str(folder / f"cache-{name}")
    config["run"]["name"] = name
    return config


@pytest.fixture(scope="module")
def alone(driver: Driver, folder: Path):
    """(method, adapter) -> the run of one process."""
    runs: dict[tuple[str, str], Path] = {}

    def get(method: str, adapter: str) -> Path:
        if (method, adapter) not in runs:
            runs[method, adapter] = train(driver, config_of(folder / "alone", "ddp", method, adapter), 1)
        return runs[method, adapter]

    (folder / "alone").mkdir()
    return get


def _cases():
    sampled = {("ddp", "kto", "lora"), ("fsdp", "dpo", "lora"), ("zero3", "dpo", "none")}
    for strategy in each(["ddp", "fsdp", "zero2", "zero3"]):
        for method in ("dpo", "kto"):
            for adapter in ("lora", "none"):
                (name,) = strategy.values
                marks = [*strategy.marks]
                if (name, method, adapter) not in sampled:
                    marks.append(pytest.mark.long)
                yield pytest.param(name, method, adapter, marks=marks)


@pytest.mark.parametrize(("strategy", "method", "adapter"), list(_cases()))
def test_two_processes_train_as_one_does(driver, folder, alone, strategy, method, adapter):
    run = train(driver, config_of(folder, strategy, method, adapter), 2)
    expected = alone(method, adapter)
    assert_same_course(expected, run, rel=1e-4)
    file = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    one, other = (load_file(path / "final" / file) for path in (expected, run))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("strategy", each(["ddp", "zero3"]))
def test_the_adapter_is_switched_off_in_each_step_where_the_reference_is_live(
    driver, folder, alone, strategy
):
    run = train(driver, config_of(folder, strategy, "dpo", "lora", "live"), 2)
    assert_same_course(alone("dpo", "lora"), run, rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        ("ddp", "lora"),
        *(
            pytest.param(*p.values, "none", marks=[*p.marks, pytest.mark.long])
            for p in each(["fsdp", "zero3"])
        ),
    ],
)
def test_two_processes_that_are_killed_end_with_the_same_bits(driver, folder, strategy, adapter):
    straight = train(driver, config_of(folder, strategy, "dpo", adapter), 2)
    config = config_of(folder, strategy, "dpo", adapter)
    config["run"]["name"] += "-killed"
    run = train(driver, config, 2, kill_before=["rows", "step 8"])
    assert not (run / "final").exists()
    train(driver, config, 2)
    assert difference(straight, run) is None


@pytest.mark.long
def test_a_reference_that_is_gone_for_good_is_said_so(driver, folder):
    config = config_of(folder, "fsdp", "dpo", "none")
    config["run"]["name"] = "gone"
    run = train(driver, config, 2, kill_before=["rows", "step 8"])
    shutil.rmtree(config["data"]["cache_dir"])
    ended = driver.run(config, run.with_suffix(".log"), ranks=2)
    assert all(ended.statuses)
    assert "are no longer in data.cache_dir" in run.with_suffix(".log").read_text()

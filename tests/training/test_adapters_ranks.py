"""Methods of `adapter.method` on two processes: the course and the adapter of one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from crash.harness import scenario_config
from safetensors.torch import load_file
from training.test_strategies import assert_same_course, train

from tunesmith.config.methods import METHODS

_OPTIONS = {
    "vera": {"r": 32},
    "oft": {"oft_block_size": 16},
    "bottleneck": {"r": 8},
    "prefix": {"num_virtual_tokens": 5, "encoder_size": 16},
    "prompt": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5, "encoder_size": 16},
    "trainable_tokens": {"trainable_tokens": ["a", "e", "<|im_end|>"]},
}
# These differ in what two processes could do to them: state beside the weights, a forward of their own.
_SAMPLED = {("adalora", "ddp"), ("prompt", "ddp"), ("bottleneck", "ddp"), ("pissa", "ddp")}


def _cases():
    for name, method in METHODS.items():
        for strategy in method.strategies:
            if name in ("none", "lora", "loftq"):  # test_strategies.py has the first two; loftq is LoRA
                continue
            marks = [] if (name, strategy) in _SAMPLED else [pytest.mark.long]
            if strategy.startswith("zero"):
                missing = importlib.util.find_spec("deepspeed") is None
                marks.append(pytest.mark.skipif(missing, reason="needs tunesmith[deepspeed]"))
            yield pytest.param(name, strategy, marks=marks, id=f"{name}-{strategy}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(("method", "strategy"), list(_cases()))
def test_two_processes_train_a_method_as_one_does(driver, folder, method, strategy):
    keys = {"r": 4} if method in ("dora", "rslora", "pissa", "olora", "adalora") else {}
    config = scenario_config({}, folder)
    config["adapter"] = {"method": method} | keys | _OPTIONS.get(method, {})
    config["train"] |= {"epochs": None, "max_steps": 6, "learning_rate": 3e-3}
    config["run"]["name"] = f"alone-{method}-{strategy}"
    alone = train(driver, config, 1)
    config["run"]["name"] = f"{strategy}-{method}"
    config["distributed"] = {"strategy": strategy}
    shared = train(driver, config, 2)
    assert_same_course(alone, shared, rel=1e-4)
    (one, other) = (load_file(run / "final" / "adapter_model.safetensors") for run in (alone, shared))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-3 * tensor.norm(), name

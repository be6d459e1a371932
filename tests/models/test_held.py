"""A rank that is not to hold the weights has the same model, and no memory is taken for them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from tiny import FAMILIES, make_tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tunesmith.config import load_config
from tunesmith.models.adapt import build_model
from tunesmith.models.held import Held, shape_of
from tunesmith.training.strategy import who_holds


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_model_has_its_tensors_by_name_size_and_format(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shape = shape_of(AutoConfig.from_pretrained(folder), torch.bfloat16)
    for part in ("named_parameters", "named_buffers"):  # a tied weight has one name in both
        described = [
            [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in getattr(each, part)()]
            for each in (model, shape)
        ]
        assert described[0] == described[1]


def test_no_memory_is_taken_for_weights_that_are_not_there() -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    before = psutil.Process().memory_info().rss
    shape = shape_of(config, torch.float32)
    size = sum(parameter.nbytes for parameter in shape.parameters())
    assert size > 900 * 2**20
    assert psutil.Process().memory_info().rss - before < 0.1 * size


def test_what_depends_on_weights_is_asked_of_the_rank_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same forwards are replaced as on the first rank, with weights that would agree with nothing."""
    folder = make_tiny_model(tmp_path / "model")
    config = load_config(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": "none.jsonl"},
            "adapter": {"method": "none"},
        },
        [],
    )
    answers: list[object] = []

    def broadcast(said: list[object]) -> None:
        if said[0] is None:
            said[0] = answers.pop(0)
        else:
            answers.append(said[0])

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    first = build_model(config, tiny_tokenizer(), print, held=Held(by_all=False, here=True))
    other = build_model(config, tiny_tokenizer(), print, held=Held(by_all=False, here=False))
    assert not answers
    replaced = [
        [name for name, module in model.named_modules() if "forward" in vars(module)]
        for model in (first, other)
    ]
    assert replaced[0] == replaced[1] != []
    for mine, theirs in zip(other.buffers(), first.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert other.generation_config.to_dict() == first.generation_config.to_dict()


@pytest.mark.parametrize(
    ("distributed", "by_all"),
    [
        ({}, True),
        ({"strategy": "zero2"}, True),
        ({"strategy": "zero3"}, False),
        ({"strategy": "fsdp"}, False),
        ({"strategy": "fsdp", "config": {"cpu_ram_efficient_loading": False}}, True),
    ],
)
def test_the_first_rank_alone_reads_what_is_shared_out(distributed: dict, by_all: bool) -> None:
    config = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "distributed": distributed}
    assert who_holds(load_config(config, [])).by_all is by_all

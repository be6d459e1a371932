"""A tiny model that says different things to different questions, and an adapter on it that changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.artifacts import tuned as tuned_module


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("inference") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter *= 4  # else it says the same letter whatever it is asked
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose update is not nil, as stock PEFT saves it: without a tokenizer."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    folder = tmp_path_factory.mktemp("inference") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights decide between near ties; in bfloat16 a kernel could decide otherwise."""
    monkeypatch.setattr(tuned_module, "compute_dtype", lambda _: (torch.float32, "for the test"))


@pytest.fixture(scope="session")
def greedy(model_folder: Path) -> Any:
    """function: model, messages or raw text -> the answer by argmax, token by token, without generate; its
    ids with `ids=True`."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def answer(model: Any, asked: list[dict[str, str]] | str, number: int = 8, *, ids: bool = False) -> Any:
        if isinstance(asked, str):
            tokens = tokenizer(asked)["input_ids"]
        else:
            tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + number and tokens[-1:] != [tokenizer.eos_token_id]:
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        said = tokens[start:]
        return said if ids else str(tokenizer.decode(said, skip_special_tokens=True))

    return answer


@pytest.fixture(scope="session")
def base(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tuned(model_folder: Path, adapter_folder: Path) -> Any:
    """The adapter on the base, by stock PEFT."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter_folder).eval()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}

"""The demo model, tuned on some rows of the quickstart's task, says what it learnt wherever it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.serving import Running
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith import cli
from tunesmith.artifacts import tuned as tuned_module

pytestmark = pytest.mark.demo_model
BOOKINGS = Path(__file__).parents[2] / "examples" / "bookings"
NUM_TOKENS = 48  # the longest answer has 45
ASKED = [json.loads(line)["messages"] for line in (BOOKINGS / "valid.jsonl").read_text().splitlines()[:3]]


@pytest.fixture(scope="module")
def run(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 of the 600 rows are enough for the form and the name, not for the time or the seats."""
    folder = tmp_path_factory.mktemp("bookings")
    result = tunesmith.sft(
        {
            "run": {"output_dir": str(folder), "name": "tuned", "seed": 3},
            "model": {"path": str(demo_model)},
            "data": {"train": str(BOOKINGS / "train.jsonl"), "cache_dir": str(folder / "cache")},
            "train": {"max_steps": 16, "epochs": None, "batch_size": 4, "learning_rate": 2e-3, "warmup": 3},
            "eval": {"stop_rate_rows": 0},
        }
    )
    return result.run


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned_module, "compute_dtype", lambda _: (torch.float32, "for the test"))
        started = Running(run, max_new_tokens=NUM_TOKENS)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def stock(run: Path, demo_model: Path) -> Any:
    """The run's adapter on its base, by stock PEFT."""
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "final").eval()


@pytest.fixture(scope="module")
def expected(stock: Any, demo_model: Path) -> list[str]:
    return [stock_answer(stock, demo_model, messages[:-1]) for messages in ASKED]


def stock_answer(model: Any, folder: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**given, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    return str(tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_server_answers_the_openai_client_as_it_was_tuned_and_the_base_does_not(
    server: Running, stock: Any, expected: list[str], demo_model: Path
) -> None:
    with server.client() as client:
        for messages, answer in zip(ASKED, expected, strict=True):
            done = client.chat.completions.create(model=server.name, messages=messages[:-1])
            said = done.choices[0].message.content
            assert said == answer
            assert done.choices[0].finish_reason == "stop"
            booking, right = json.loads(said), json.loads(messages[-1]["content"])
            assert list(booking) == list(right)
            assert booking["name"] == right["name"]
    with stock.disable_adapter():
        untuned = stock_answer(stock, demo_model, ASKED[0][:-1])
    with pytest.raises(json.JSONDecodeError):
        json.loads(untuned)


def test_chat_says_the_same(
    run: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system, question, _ = (message["content"] for message in ASKED[0])
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert cli.main(["chat", str(run), "--system", system, "--max-new-tokens", str(NUM_TOKENS)]) == 0
    assert capsys.readouterr().out.strip() == expected[0]


def test_merged_it_says_the_same_in_stock_transformers(
    run: Path, expected: list[str], tmp_path: Path
) -> None:
    """In float32: in the base's bfloat16 the updates are rounded, and a near tie may fall otherwise."""
    tunesmith.merge(run, tmp_path / "merged", dtype="float32", tolerance=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for messages, answer in zip(ASKED, expected, strict=True):
        assert stock_answer(merged, tmp_path / "merged", messages[:-1]) == answer

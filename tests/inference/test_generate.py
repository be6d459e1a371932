"""Answers to a file of rows: those of greedy decoding row by row, whatever the batches and wherever it
stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from inference.conftest import user
from tiny import conversations, write_rows
from transformers import AutoTokenizer

from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import load_tuned
from tunesmith.errors import ConfigError, DataError
from tunesmith.inference import generate as generate_module
from tunesmith.inference.asked import read_asked
from tunesmith.inference.generate import Manner, batches, generate

SMALL = Manner(max_new_tokens=8, batch_tokens=150)  # two to four rows a batch


@pytest.fixture
def answer(tmp_path: Path) -> Any:
    """Runs `generate` on rows; returns the lines it wrote."""

    def run(model: Path, rows: list[dict[str, Any]], manner: Manner = SMALL, **options: Any) -> list[Any]:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.jsonl"
        generate(str(model), input=str(file), output=output, manner=manner, say=print, **options)
        assert not output.with_name(f"{output.name}.part").exists()
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return run


def test_every_row_gets_its_greedy_answer_in_the_order_of_the_file(
    answer: Any, model_folder: Path, base: Any, greedy: Any
) -> None:
    rows = conversations(12, seed=3)
    lines = answer(model_folder, rows)
    for line, row in zip(lines, rows, strict=True):
        asked = row["messages"][:-1]  # the last answer is not shown
        ids = greedy(base, asked, ids=True)
        assert line["messages"] == asked
        assert line["answer"] == greedy(base, asked)
        assert (line["finish"], line["answer_tokens"]) == ("stop" if ids[-1] == 1 else "length", len(ids))
    assert [int(line["row"].rpartition(":")[2]) for line in lines] == list(range(1, 13))
    assert len({line["answer"] for line in lines}) > 6  # else the test could not tell


def test_rows_of_every_format_are_asked_with_and_without_an_answer_of_their_own(
    answer: Any, model_folder: Path, base: Any, greedy: Any
) -> None:
    asked = [user("one two?")]
    expected = greedy(base, asked)
    for row in (
        {"messages": asked},
        {"messages": [*asked, {"role": "assistant", "content": "red"}]},
        {"conversations": [{"from": "human", "value": "one two?"}]},
        {"conversations": [{"from": "human", "value": "one two?"}, {"from": "gpt", "value": "red"}]},
        {"instruction": "one two?", "output": "red"},
        {"instruction": "one two?", "input": "", "output": ""},
        {"instruction": "one two?"},
        {"prompt": asked},
        {"prompt": asked, "completion": [{"role": "assistant", "content": "red"}]},
    ):
        (line,) = answer(model_folder, [row])
        assert (line["messages"], line["answer"]) == (asked, expected), row
    (line,) = answer(model_folder, [{"q": "one two?"}], columns=["q=instruction"])
    assert (line["messages"], line["answer"]) == (asked, expected)


def test_raw_text_is_gone_on_with_and_no_template_is_used(
    answer: Any, model_folder: Path, base: Any, greedy: Any
) -> None:
    for row in ({"prompt": "one two"}, {"prompt": "one two", "completion": " three"}, {"text": "one two"}):
        (line,) = answer(model_folder, [row])
        assert (line["prompt"], line["answer"]) == ("one two", greedy(base, "one two"))


def test_a_control_token_that_a_row_spells_is_text(answer: Any, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    asked = read_asked(_written(model_folder, [{"messages": [user("a<|im_end|>b")]}]))
    tuned = load_tuned(find_model(str(model_folder), print), print)
    (ids,) = generate_module.prompts(asked, tuned.preparer)
    assert ids.tolist().count(tokenizer.eos_token_id) == 1  # the template's
    assert tokenizer.decode(ids).count("<|im_end|>") == 2


def _written(folder: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_rows(folder.parent / "some.jsonl", rows))


def test_the_system_prompt_of_the_run_is_given_to_every_row(
    answer: Any, model_folder: Path, base: Any, greedy: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "final")
    values = {"model": {"path": str(model_folder)}, "data": {"train": "t", "system": "red"}}
    values["data"]["max_length"] = 512  # beyond the model's positions they would be scaled
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    expected = greedy(base, [{"role": "system", "content": "red"}, user("one two?")])
    assert expected != greedy(base, [user("one two?")])
    rows = [{"messages": [user("one two?")]}]
    rows.append({"messages": [{"role": "system", "content": "blue"}, user("one two?")]})
    assert [line["answer"] for line in answer(run, rows)] == [expected, expected]  # as data.system does


def test_drawn_answers_are_those_of_the_seed(answer: Any, model_folder: Path) -> None:
    rows = conversations(6, seed=3)
    first, again, other = (
        [
            line["answer"]
            for line in answer(
                model_folder, rows, Manner(8, temperature=2.0, top_p=0.9, seed=seed, batch_tokens=150)
            )
        ]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_prompt_that_fills_the_models_positions_gets_an_empty_answer(
    answer: Any, model_folder: Path
) -> None:
    long, nearly = (answer(model_folder, [{"prompt": "x" * number}])[0] for number in (512, 510))
    assert (long["answer"], long["finish"], long["answer_tokens"]) == ("", "length", 0)
    assert nearly["answer_tokens"] <= 2


def test_batches_hold_rows_of_like_length_within_the_tokens_and_every_row_once() -> None:
    lengths = [5, 100, 7, 99, 6, 300]
    groups = batches(lengths, Manner(max_new_tokens=20, batch_tokens=250))
    assert groups == [[5], [1, 3], [2, 4, 0]]  # 320 alone is over the limit; 2 x 120; 3 x 27
    for group in groups[1:]:
        assert len(group) * (max(lengths[i] for i in group) + 20) <= 250


# --- going on


class _Killed(BaseException):
    pass


def _killed_after(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let so many batches through; returns a list that grows by each batch."""
    seen: list[int] = []
    original = generate_module.continue_together

    def continue_together(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        if len(seen) == number:
            raise _Killed
        seen.append(len(prompts))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generate_module, "continue_together", continue_together)
    return seen


@pytest.mark.parametrize("torn", [0, 1, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stopped_run_goes_on_and_ends_with_the_same_file(
    torn: int, temperature: float, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", conversations(12, seed=3)))
    manner = Manner(8, temperature=temperature, batch_tokens=150)

    def run(output: Path) -> None:
        generate(str(model_folder), input=rows, output=output, manner=manner, say=print)

    run(tmp_path / "whole.jsonl")
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch:
        _killed_after(3, patch)
        with pytest.raises(_Killed):
            run(output)
    assert not output.exists()
    content = journal.read_bytes()
    assert content.count(b"\n") == 4  # what it is of, and three batches
    journal.write_bytes(content[: len(content) - torn])
    with monkeypatch.context() as patch:
        seen = _killed_after(99, patch)
        run(output)
    num_batches = len(batches([len(ids) for ids in _ids(rows, model_folder)], manner))
    assert len(seen) == num_batches - (3 if torn == 0 else 2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def _ids(rows: str, model_folder: Path) -> Any:
    tuned = load_tuned(find_model(str(model_folder), print), print)
    return generate_module.prompts(read_asked(rows), tuned.preparer)


def test_a_killed_process_goes_on_and_ends_with_the_same_file(model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", conversations(60, seed=3))

    def command(output: str) -> list[str]:
        main = "import sys; from tunesmith.cli import main; sys.exit(main())"
        files = ["--input", str(rows), "--output", str(tmp_path / output)]
        settings = ["--max-new-tokens", "60", "--batch-tokens", "400"]
        return [sys.executable, "-c", main, "generate", str(model_folder), *files, *settings]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command("whole.jsonl"), env=environment, check=True, capture_output=True)
    journal = tmp_path / "out.jsonl.part"
    killed = subprocess.Popen(command("out.jsonl"), env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(command("out.jsonl"), env=environment, check=True, capture_output=True, text=True)
    assert "goes on after" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_journal_of_another_run_is_refused_and_says_what_differs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", conversations(12, seed=3)))
    output = tmp_path / "out.jsonl"
    _killed_after(1, monkeypatch)
    with pytest.raises(_Killed):
        generate(str(model_folder), input=rows, output=output, manner=SMALL, say=print)
    with pytest.raises(ConfigError, match=r"out\.jsonl\.part: was begun with another manner\."):
        generate(str(model_folder), input=rows, output=output, manner=Manner(9), say=print)
    write_rows(tmp_path / "rows.jsonl", conversations(12, seed=4))
    with pytest.raises(ConfigError, match=r"was begun with another prompts\."):
        generate(str(model_folder), input=rows, output=output, manner=SMALL, say=print)


# --- what is refused


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [user("a")]}, {"messages": []}])
    there = tmp_path / "there.jsonl"
    there.touch()

    def run(manner: Manner = SMALL, output: Path = tmp_path / "out.jsonl", **options: Any) -> None:
        generate("no-model", input=str(rows), output=output, manner=manner, say=print, **options)

    with pytest.raises(ConfigError, match="is there already"):
        run(output=there)
    with pytest.raises(ConfigError, match="--temperature -1: expected a number of 0 or more"):
        run(Manner(temperature=-1))
    with pytest.raises(ConfigError, match="--top-p is of drawn tokens"):
        run(Manner(top_p=0.5))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no_prompt: nothing precedes the answer"):
        run()
    with pytest.raises(ConfigError, match="expected NAME=OURS"):
        run(columns=["q"])

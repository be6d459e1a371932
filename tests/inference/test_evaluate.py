"""The figures of `eval` are those of plain transformers, row by row, for the base model and the tuned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inference.conftest import user
from tiny import conversations, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.errors import ConfigError, DataError, MissingExtraError
from tunesmith.inference.evaluate import evaluate
from tunesmith.inference.generate import Manner
from tunesmith.inference.metrics import rouge_l

MANNER = Manner(max_new_tokens=8, batch_tokens=300)


@pytest.fixture
def measure(tmp_path: Path) -> Any:
    """Evaluates; returns the result and the lines of rows.jsonl."""

    def run(model: Path, rows: list[dict[str, Any]], metrics: str, **options: Any) -> tuple[Any, list[Any]]:
        file = str(write_rows(tmp_path / "test.jsonl", rows))
        folder = tmp_path / "out"
        settings = {"out": folder, "resamples": 200, "manner": MANNER, "say": print} | options
        result = evaluate(str(model), data=file, metrics=metrics.split(","), **settings)
        assert json.loads((folder / "result.json").read_text()) == result
        return result, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]

    return run


def nats_by_hand(model: Any, folder: Path, row: dict[str, Any]) -> tuple[float, int]:
    """Sum of the cross entropy over the answers' tokens, their end and the newline after it, and their
    number."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages, total, number = row["messages"], 0.0, 0
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].float()
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(
                tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            )
            end = len(tokenizer.apply_chat_template(messages[: i + 1], return_dict=True)["input_ids"])
            targets = torch.tensor(whole[start:end])
            total += float(F.cross_entropy(logits[start - 1 : end - 1], targets, reduction="sum"))
            number += end - start
    return total, number


def test_losses_of_base_and_adapter_are_those_of_plain_transformers(
    measure: Any, adapter_folder: Path, model_folder: Path, base: Any, tuned: Any
) -> None:
    rows = conversations(7, seed=4)
    result, lines = measure(adapter_folder, rows, "loss")
    assert list(result["metrics"]["loss"]) == ["base", "tuned", "difference"]
    means = {}
    for name, model in (("base", base), ("tuned", tuned)):
        by_hand = [nats_by_hand(model, model_folder, row) for row in rows]
        for line, (nats, number) in zip(lines, by_hand, strict=True):
            assert line[name]["target_weight"] == number
            assert line[name]["loss"] == pytest.approx(nats / number, rel=1e-5)  # float32 sums
        means[name] = sum(nats for nats, _ in by_hand) / sum(number for _, number in by_hand)
        assert result["metrics"]["loss"][name]["value"] == pytest.approx(means[name], rel=1e-5)
    assert means["base"] != pytest.approx(means["tuned"], rel=1e-2)
    difference = result["metrics"]["loss"]["difference"]
    assert difference["value"] == pytest.approx(means["tuned"] - means["base"], rel=1e-4)
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_answers_are_scored_against_the_rows_own_and_both_models_see_the_same_prompts(
    measure: Any, adapter_folder: Path, base: Any, tuned: Any, greedy: Any
) -> None:
    asked = [[user(text)] for text in ("one two?", "three", "red green", "moon")]
    said = [greedy(base, messages) for messages in asked]
    assert said != [greedy(tuned, messages) for messages in asked]
    # The base model's own words for answers, in all rows but the last.
    answers = [*said[:3], "red"]
    rows = [
        {"messages": [*messages, {"role": "assistant", "content": answer}]}
        for messages, answer in zip(asked, answers, strict=True)
    ]
    result, lines = measure(adapter_folder, rows, "exact_match,rouge,json_valid")
    assert "loss" not in result["metrics"]
    assert result["metrics"]["exact_match"]["base"]["value"] == 3 / 4
    for line, messages, answer in zip(lines, asked, answers, strict=True):
        assert (line["messages"], line["expected"]) == (messages, answer)
        for name, model in (("base", base), ("tuned", tuned)):
            text = greedy(model, messages)
            assert line[name]["answer"] == text
            assert line[name]["exact_match"] == (text.strip() == answer.strip())
            assert line[name]["rouge"] == rouge_l(text, answer)
    mean = sum(line["tuned"]["rouge"] for line in lines) / 4
    assert result["metrics"]["rouge"]["tuned"]["value"] == pytest.approx(mean)


def test_the_loss_of_a_run_is_its_eval_loss_and_that_before_training(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", conversations(8, seed=9))
    for method in ("lora", "none"):
        config = {
            "run": {"name": method, "output_dir": str(tmp_path / "runs")},
            "model": {"path": str(model_folder), "dtype": "float32"},
            "adapter": {"r": 4} if method == "lora" else {"method": "none"},
            "data": {
                "train": str(write_rows(tmp_path / "train.jsonl", conversations(12))),
                "valid": str(valid),
                "max_length": 256,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2 if method == "lora" else 1e-3},
        }
        summary = tunesmith.sft(config).summary
        run = tmp_path / "runs" / method
        capsys.readouterr()
        result = evaluate(
            str(run), data=str(valid), metrics=["loss", "f1"], manner=MANNER, resamples=50, say=print
        )
        loss = result["metrics"]["loss"]
        assert loss["base"]["value"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)
        assert loss["tuned"]["value"] == pytest.approx(summary["best_eval_loss"], rel=1e-5)
        assert json.loads((run / "eval" / "valid" / "result.json").read_text()) == result
        shown = capsys.readouterr().out
        assert "tuned - base" in shown
        (line,) = (line for line in shown.splitlines() if line.startswith("loss"))
        assert line.count("[") == line.count("]") == 3  # nothing is broken in two
        assert f"{loss['tuned']['value']:.3f} [" in shown
        assert sorted(file.name for file in (run / "eval" / "valid").iterdir()) == [
            "result.json",
            "rows.jsonl",
        ]


def test_a_model_that_comes_from_nowhere_is_measured_alone(measure: Any, model_folder: Path) -> None:
    result, lines = measure(model_folder, conversations(3), "loss,f1")
    assert list(result["metrics"]["f1"]) == ["tuned"]
    assert "base" not in lines[0]


def test_raw_text_has_a_loss_and_a_prompt_with_a_completion_a_score(
    measure: Any, model_folder: Path, base: Any, greedy: Any
) -> None:
    result, _ = measure(model_folder, [{"text": "one two three"}], "loss")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([*tokenizer("one two three")["input_ids"], tokenizer.eos_token_id])
    with torch.no_grad():
        logits = base(ids[None]).logits[0]
    assert result["metrics"]["loss"]["tuned"]["value"] == pytest.approx(
        float(F.cross_entropy(logits[:-1], ids[1:])), rel=1e-5
    )
    row = {"prompt": "one two", "completion": greedy(base, "one two")}
    result, _ = measure(model_folder, [row], "exact_match")
    assert result["metrics"]["exact_match"]["tuned"]["value"] == 1.0
    with pytest.raises(DataError, match="only --metrics loss can be told"):
        measure(model_folder, [{"text": "one"}], "f1")


def test_what_a_tool_call_is_expected_to_read_is_the_templates_text(measure: Any, model_folder: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {"messages": [user("one"), {"role": "assistant", "content": "", "tool_calls": [call]}]}
    _, (line,) = measure(model_folder, [row], "exact_match")
    assert line["expected"].strip() == ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')


def test_an_unknown_metric_a_row_without_an_answer_and_no_place_to_write_are_said(
    measure: Any, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--metrics bleu: expected some of loss, exact_match, f1, rouge"):
        measure(model_folder, conversations(2), "f1,bleu")
    with pytest.raises(DataError, match=r"test\.jsonl:1: has no answer to measure against"):
        measure(model_folder, [{"messages": [user("a")]}], "f1")
    with pytest.raises(ConfigError, match="is no run that could hold the result"):
        measure(model_folder, conversations(2), "f1", out=None)
    with pytest.raises(DataError, match=r"test\.jsonl:1: 6\d\d tokens; the model has positions for 512"):
        measure(
            model_folder, [{"messages": [user("x" * 600), {"role": "assistant", "content": "a"}]}], "loss"
        )


# --- tasks of lm-evaluation-harness

TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def test_without_lm_eval_the_line_that_installs_it_is_said(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.inference.tasks import evaluate_tasks

    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tunesmith\[lm-eval\]'"):
        evaluate_tasks(str(model_folder), ["colours"], say=print)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_local_task_is_scored_by_lm_eval_for_base_and_adapter(
    adapter_folder: Path, base: Any, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from tunesmith.inference.tasks import evaluate_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": text, "label": i % 2} for i, text in enumerate(["one", "two", "three", "sun", "moon"])
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=file))
    with pytest.raises(ConfigError, match="lm-eval knows no such task"):
        evaluate_tasks(str(adapter_folder), ["colors"], include_path=tmp_path / "tasks", say=print)
    results = evaluate_tasks(
        str(adapter_folder), ["colours"], include_path=tmp_path / "tasks", out=tmp_path / "out", say=print
    )
    tokenizer = AutoTokenizer.from_pretrained(base.config._name_or_path)
    for name, model in (("base", base), ("tuned", tuned)):
        right = 0
        for row in rows:
            start = tokenizer(row["question"])["input_ids"]
            chances = []
            for choice in ("red", "blue"):
                ids = torch.tensor([*start, *tokenizer(" " + choice)["input_ids"]])
                with torch.no_grad():
                    logps = model(ids[None]).logits[0].log_softmax(-1)
                chances.append(float(logps[:-1].gather(1, ids[1:, None])[len(start) - 1 :].sum()))
            right += chances[row["label"]] == max(chances)
        assert results[name]["colours"]["acc,none"] == pytest.approx(right / len(rows))
    assert json.loads((tmp_path / "out" / "tasks.json").read_text())["tuned"]["colours"]["acc,none"] >= 0


def test_the_base_model_of_a_full_run_is_the_one_its_config_names(model_folder: Path, tmp_path: Path) -> None:
    import shutil

    import yaml

    from tunesmith.artifacts.found import find_model
    from tunesmith.artifacts.tuned import base_of, load_tuned

    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "final")
    changed = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        changed.lm_head.weight *= 2
    changed.save_pretrained(run / "final")
    values = {
        "model": {"path": str(model_folder)},
        "adapter": {"method": "none"},
        "data": {"train": "t", "max_length": 512},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    tuned = load_tuned(find_model(str(run), print), print)
    with base_of(tuned, print) as base:
        assert torch.equal(2 * base.lm_head.weight, tuned.model.lm_head.weight)
    values["model"] = {"config": str(model_folder)}
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"run": {"recipe": "pretrain"}}))
    with base_of(load_tuned(find_model(str(run), print), print), print) as base:
        assert base is None

"""The share of answers that end by themselves: counted after every fine-tuning, by decoding of its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import conversations, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith


def ended_by_hand(folder, rows, limit):
    """Whether <|im_end|> is the likeliest token before `limit`, by an argmax loop without generate."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ended = []
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + limit and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ended.append(ids[-1] == tokenizer.eos_token_id)
    return ended


def longest_answer(rows):
    return max(len(row["messages"][-1]["content"]) + 2 for row in rows)  # bytes, <|im_end|> and a newline


def full(run_config, rows, tmp_path, **sections):
    config = run_config(checkpoint={"every_steps": 60}, **sections)
    config["adapter"] = {"method": "none"}
    config["data"]["train"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    if "stop_rate_rows" not in sections.get("eval", {}):
        del config["eval"]["stop_rate_rows"]  # as it is in a config that does not say
    return config


def test_a_model_that_was_hardly_trained_does_not_stop_and_one_that_learnt_its_rows_does(
    run_config, tmp_path, capsys
):
    rows = conversations(2, seed=8, max_turns=1)
    config = full(run_config, rows, tmp_path, train={"max_steps": 1, "epochs": None, "learning_rate": 1e-9})
    result = tunesmith.sft(config)
    limit = max(64, 2 * longest_answer(rows))
    ended = ended_by_hand(result.final, rows, limit)
    assert result.summary["stop_rate"] == sum(ended) / 2 < 0.5
    assert result.summary["stop_rate_rows"] == 2
    assert "stop_rate_before" not in result.summary
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: only 0 % of 2 answers ended by themselves within {limit} tokens." in said

    config["run"]["name"] = "learnt"
    config["train"] = {**config["train"], "max_steps": 60, "learning_rate": 1e-2, "schedule": "constant"}
    result = tunesmith.sft(config)
    assert ended_by_hand(result.final, rows, limit) == [True, True]
    assert result.summary["stop_rate"] == 1.0
    answers = json.loads((result.run / "answers.json").read_text())
    assert answers["ended_after"] == [True, True]
    assert answers["after"] == [row["messages"][-1]["content"] for row in rows]
    assert json.loads((result.run / "summary.json").read_text())["stop_rate"] == 1.0
    assert "warning: only" not in capsys.readouterr().out


def test_answers_that_are_compared_are_counted_before_and_after(run_config, tmp_path):
    rows = conversations(3, seed=5, max_turns=1)
    config = full(
        run_config,
        rows,
        tmp_path,
        data={"valid": str(write_rows(tmp_path / "valid.jsonl", rows))},
        train={"max_steps": 60, "epochs": None, "batch_size": 3, "schedule": "constant"},
        eval={"answer_rows": 3, "max_new_tokens": 70, "every_steps": 60},
    )
    summary = tunesmith.sft(config).summary
    assert summary["stop_rate_before"] == sum(ended_by_hand(config["model"]["path"], rows, 70)) / 3
    assert (summary["stop_rate"], summary["stop_rate_rows"]) == (1.0, 3)


def test_counting_does_not_change_the_weights_and_can_be_turned_off(run_config, tmp_path):
    results = []
    for name, number in (("on", 8), ("off", 0)):
        config = run_config(adapter={"dropout": 0.2}, eval={"stop_rate_rows": number})
        config["run"]["name"] = name
        results.append(tunesmith.sft(config))
    on, off = results
    weights = [load_file(result.final / "adapter_model.safetensors") for result in results]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert on.summary["stop_rate_rows"] == 8
    assert not {"stop_rate", "stop_rate_rows"} & set(off.summary)
    assert not (off.run / "answers.json").exists()


def test_the_rows_with_the_shortest_answers_are_asked(run_config, tmp_path):
    rows = conversations(20, seed=3, max_turns=1)
    config = full(
        run_config, rows, tmp_path, train={"max_steps": 1, "epochs": None}, eval={"stop_rate_rows": 2}
    )
    result = tunesmith.sft(config)
    answers = sorted((row["messages"][-1]["content"] for row in rows[:16]), key=len)
    asked = json.loads((result.run / "answers.json").read_text())["rows"]
    assert [row["expected"] for row in asked] == answers[:2]


@pytest.mark.parametrize("loading", ["lazy", "streaming"])
def test_rows_that_are_tokenised_late_are_answered_too(run_config, loading):
    config = run_config(
        data={"loading": loading, "shuffle_buffer": 8},
        train={"max_steps": 2, "epochs": None},
        eval={"stop_rate_rows": 3},
    )
    assert tunesmith.sft(config).summary["stop_rate_rows"] == 3


def test_rows_without_a_question_and_pretraining_have_no_stop_rate(run_config, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "one two three"}] * 8)
    for recipe in (tunesmith.sft, tunesmith.pretrain):
        config = run_config(train={"max_steps": 1, "epochs": None, "learning_rate": 1e-4})
        config["run"]["name"] = recipe.__name__
        config["data"]["train"] = str(texts)
        config["adapter"] = {"method": "none"}
        assert "stop_rate" not in recipe(config).summary

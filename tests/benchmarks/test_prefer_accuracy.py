"""Accuracy on held-out pairs: what a model says of a pair, and what is counted of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed

import tunesmith
from benchmarks.prefer_accuracy import accuracies, conversations_of, judge
from tunesmith.config import load_config


def rows(number):
    return [
        {
            "conversations": [{"from": "human", "value": f"say {n}"}],
            "chosen": {"from": "gpt", "value": f"it is {n}"},
            "rejected": {"from": "gpt", "value": "it is not"},
        }
        for n in range(number)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config, and the adapter of a run of four steps by it."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(6)), encoding="utf-8")
    config = load_config(
        {
            "run": {"name": "run", "output_dir": str(folder)},
            "model": {"path": str(make_tiny_model(folder / "model")), "dtype": "float32"},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
            "data": {"train": str(file), "max_length": 64, "cache_dir": str(folder / "cache")},
            "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 1e-2},
        },
        recipe="prefer",
    )
    return config, tunesmith.prefer(config).final, file


def test_a_pair_is_judged_as_stock_transformers_and_peft_judge_it_before_and_after(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, adapter, file = run
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), adapter).eval()

    def logp(row, answer):
        """Of what the template writes for the answer."""
        question = [{"role": "user", "content": row["conversations"][0]["value"]}]
        said = {"role": "assistant", "content": row[answer]["value"]}
        prompt, ids = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, return_dict=True)[
                "input_ids"
            ]
            for messages, is_open in ((question, True), ([*question, said], False))
        )
        start = len(prompt)
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logps[range(start - 1, len(ids) - 1), ids[start:]].sum().item(), len(ids) - start

    found = {int(pair["row"].rpartition(":")[2]): pair for pair in judge(config, adapter, file)}
    assert sorted(found) == list(range(1, 7))
    for number, row in enumerate(rows(6), 1):
        after = [logp(row, answer) for answer in ("chosen", "rejected")]
        with model.disable_adapter():
            before = [logp(row, answer) for answer in ("chosen", "rejected")]
        # float32, summed in another order.
        assert found[number]["after"] == pytest.approx([nats for nats, _ in after], rel=1e-5)
        assert found[number]["before"] == pytest.approx([nats for nats, _ in before], rel=1e-5)
        assert found[number]["tokens"] == [tokens for _, tokens in after]
        assert before != after


def test_accuracies_count_pairs_whose_chosen_answer_is_ahead_and_halves_where_neither_is():
    pairs = [
        # Per token: -1 to -2, then -1 to -0.5. Whole: -4 to -2, then -4 to -0.5. Rewards 0 and 1.5.
        {"row": 0, "before": [-4.0, -2.0], "after": [-4.0, -0.5], "tokens": [4.0, 1.0]},
        # Per token and whole: equal, then ahead. Rewards 1 and 0.
        {"row": 1, "before": [-3.0, -3.0], "after": [-2.0, -3.0], "tokens": [3.0, 3.0]},
    ]
    found = accuracies(pairs, conversations=[0, 1], seed=1)
    values = {way: [each[when]["value"] for when in each] for way, each in found.items()}
    assert values == {
        "per_token": [0.75, 0.5, -0.25],
        "whole": [0.25, 0.5, 0.25],
        "reward": [0.5, 0.5, 0.0],
    }
    # Draws of two conversations: both the first, both the second, or one of each.
    assert (found["whole"]["difference"]["low"], found["whole"]["difference"]["high"]) == (0.0, 0.5)


def test_pairs_of_one_conversation_are_drawn_together():
    """One conversation of two pairs, one right and one wrong: every draw of it is half right."""
    pairs = [
        {"row": 0, "before": [-1.0, -2.0], "after": [-1.0, -2.0], "tokens": [1.0, 1.0]},
        {"row": 1, "before": [-2.0, -1.0], "after": [-2.0, -1.0], "tokens": [1.0, 1.0]},
    ]
    found = accuracies(pairs, conversations=[7, 7], seed=1)["whole"]["after"]
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.5, 0.5)


def test_rows_that_open_alike_are_of_one_conversation():
    """The other ones are numbered without gaps, in an order that is the seed's."""
    opened = rows(5) + rows(2)
    numbers = conversations_of(opened, seed=1)
    assert numbers[5:] == numbers[:2]
    assert sorted(set(numbers)) == [0, 1, 2, 3, 4]
    assert numbers != conversations_of(opened, seed=2)

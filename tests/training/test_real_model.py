"""On the real demo model and real data: every step's loss is that of a plain transformers and PEFT loop.

The loop takes ids and targets from `apply_chat_template` alone: the render with and without the answer.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

import tunesmith
from tunesmith.training.run_folder import read_metrics

STEPS, ROWS_A_STEP = 3, 4


def alpaca_messages(row):
    question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def sharegpt_messages(row):
    """What the demo model's template can show: it knows no tool calls, so their JSON is the turn's text."""
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def ids_and_targets(tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    is_target = np.zeros(len(ids), dtype=bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:i], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=True, return_dict=True)[
                "input_ids"
            ]
            assert ids[: len(before)] == before
            assert ids[: len(after)] == after
            is_target[len(before) : len(after)] = True
    return ids, is_target


def plain_losses(model_path, rows, seed):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    scheduler = get_scheduler("constant", optimizer)
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    losses = []
    for step in range(STEPS):
        batch = [
            ids_and_targets(tokenizer, rows[row])
            for row in order[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]
        ]
        num_targets = sum(int(is_target.sum()) for _, is_target in batch)
        total = 0.0
        for ids, is_target in batch:  # a row at a time: nothing is padded and nothing shares a pass
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            at = torch.from_numpy(is_target[1:])
            loss = F.cross_entropy(logits[at], torch.tensor(ids[1:])[at], reduction="sum") / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.demo_model
@pytest.mark.parametrize(
    ("name", "to_messages", "longest"),
    [("alpaca_en_demo.json", alpaca_messages, 600), ("glaive_toolcall_en_demo.json", sharegpt_messages, 900)],
)
def test_losses_on_real_rows_follow_a_plain_loop(shared, demo_model, tmp_path, name, to_messages, longest):
    rows = json.loads((shared / "data" / name).read_text(encoding="utf-8"))
    # Short rows: float32 at 135M parameters is slow on two cores, and length is not what is tested.
    rows = [row for row in rows if len(json.dumps(row)) < longest][:40]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    expected = plain_losses(demo_model, [to_messages(row) for row in rows], seed=5)
    result = tunesmith.sft(
        {
            "run": {"output_dir": str(tmp_path), "name": "r", "seed": 5},
            "model": {"path": str(demo_model), "dtype": "float32"},
            "adapter": {"r": 8, "alpha": 16},
            "data": {"train": str(tmp_path / "rows.json"), "cache_dir": str(tmp_path / "cache")},
            "train": {
                "max_steps": STEPS,
                "batch_size": ROWS_A_STEP,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "warmup": 0,
            },
        }
    )
    losses = [line["loss"] for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]

"""What a run computes, against a plain loop of transformers and PEFT that is fed the same rows.

The loop pads, masks by attention and normalises by hand; it shares nothing with tunesmith but the order of
rows. Tolerance: float32 sums in another order, over a few optimiser steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, conversations, write_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

import tunesmith
from tunesmith.training.run_folder import read_metrics


def ids_and_labels(tokenizer, messages):
    """ChatML by hand: after each `assistant` heading everything up to and with the newline behind
    <|im_end|>."""
    ids, labels = [], []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        ids += head + body
        labels += [-100] * len(head) + (body if message["role"] == "assistant" else [-100] * len(body))
    return ids, labels


def plain_loop(
    config: dict, *, steps: int, method: str = "lora", system: str | None = None
) -> tuple[list[float], torch.nn.Module]:
    """Loss of each step, and the model after them."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    rows = [json.loads(line)["messages"] for line in Path(config["data"]["train"]).read_text().splitlines()]
    if system is not None:
        rows = [[{"role": "system", "content": system}, *messages] for messages in rows]
    seed, batch_size = config["run"]["seed"], config["train"]["batch_size"]
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    if method == "lora":
        a = config["adapter"]
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=a["r"],
                lora_alpha=a["alpha"],
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
        )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["train"]["learning_rate"], weight_decay=0.0)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=round(0.03 * steps), num_training_steps=steps
    )
    losses, epoch, order = [], 0, []
    while len(losses) < steps:
        if not order:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows)).tolist()
            epoch += 1
        batch = [ids_and_labels(tokenizer, rows[row]) for row in order[:batch_size]]
        order = order[batch_size:]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([label + [-100] * (width - len(label)) for _, label in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def losses_of(result) -> list[float]:
    return [line["loss"] for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]


def same_weights(model: torch.nn.Module, folder: Path, *, rtol: float) -> None:
    from safetensors.torch import load_file

    saved = load_file(next(folder.glob("*model.safetensors")))
    state = {name.replace(".default.weight", ".weight"): value for name, value in model.state_dict().items()}
    for name, value in saved.items():
        scale = state[name].abs().max()
        assert (state[name] - value).abs().max() <= rtol * scale, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", ["tree", "flat", "none"])
def test_lora_losses_and_weights_follow_a_plain_loop(run_config, family, packing):
    config = run_config(family, data={"packing": packing})
    expected, model = plain_loop(config, steps=5)
    result = tunesmith.sft(config)
    assert losses_of(result) == pytest.approx(expected, rel=1e-4)
    # AdamW divides by the root of tiny second moments, which lets rounding grow; still far below one step's
    # change.
    same_weights(model, result.final, rtol=5e-2)


def test_full_fine_tuning_follows_a_plain_loop(run_config):
    config = run_config(adapter={}, train={"learning_rate": 1e-3})
    config["adapter"] = {"method": "none"}
    expected, model = plain_loop(config, steps=5, method="none")
    result = tunesmith.sft(config)
    assert losses_of(result) == pytest.approx(expected, rel=1e-4)
    same_weights(model, result.final, rtol=2e-2)


def test_a_system_prompt_from_the_config_reaches_the_model(run_config):
    config = run_config(data={"system": "one two three"})
    expected, _ = plain_loop(config, steps=5, system="one two three")
    assert losses_of(tunesmith.sft(config)) == pytest.approx(expected, rel=1e-4)


def test_the_size_of_passes_changes_neither_loss_nor_gradient(run_config, tmp_path):
    """1 x 8 rows = 8 x 1 row: the step is normalised by its own targets, however it is split."""
    lines = []
    for i, settings in enumerate(({"micro_batch_tokens": 4096}, {"micro_batch_tokens": 256})):
        config = run_config(
            train={"batch_size": 8, "max_steps": 3, "epochs": None, **settings}, run={"name": f"r{i}"}
        )
        lines.append(read_metrics(tunesmith.sft(config).run / "metrics.jsonl"))
    config = run_config(
        train={"batch_size": 8, "max_steps": 3, "epochs": None},
        run={"name": "alone"},
        data={"packing": "none"},
    )
    lines.append(read_metrics(tunesmith.sft(config).run / "metrics.jsonl"))
    for other in lines[1:]:
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in other] == pytest.approx(
                [line[key] for line in lines[0]], rel=1e-5
            ), key
    # The three runs really were split differently.
    assert [line["rows"] for line in lines[0]] == [8, 8, 4]


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_run_is_the_same_with_and_without_sharing(run_config, family):
    """All rows share a system prompt, which only one of the three runs computes once."""
    system = "red green blue one two three"  # a byte is a token: long enough to be shared
    lines = {}
    for packing in ("tree", "flat", "none"):
        result = tunesmith.sft(
            run_config(
                family,
                run={"name": packing},
                data={"packing": packing, "system": system},
                train={"epochs": None, "max_steps": 3, "batch_size": 8},
            )
        )
        lines[packing] = [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    for packing in ("flat", "none"):
        for tree, other in zip(lines["tree"], lines[packing], strict=True):
            for key in ("rows", "tokens", "target_tokens"):
                assert tree[key] == other[key]
            for key in ("loss", "grad_norm"):
                assert tree[key] == pytest.approx(other[key], rel=2e-5), key


def test_eval_loss_is_the_mean_over_all_validation_targets_whatever_the_pass(run_config, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(9, seed=5))
    seen = []
    for batch_tokens in (256, 300, 4096):
        config = run_config(
            data={"valid": str(valid)},
            eval={"batch_tokens": batch_tokens},
            train={"max_steps": 1, "epochs": None},
            run={"name": f"r{batch_tokens}"},
        )
        result = tunesmith.sft(config)
        seen.append(result.summary["eval_loss_before"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    total, count = 0.0, 0
    for line in valid.read_text().splitlines():
        ids, labels = ids_and_labels(tokenizer, json.loads(line)["messages"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").item()
        count += sum(label != -100 for label in labels[1:])
    assert seen == pytest.approx([total / count] * 3, rel=1e-5)


def test_a_message_weight_scales_its_share_of_the_loss(run_config, tmp_path):
    """Two answers of loss weights 1 and 0.25: the loss is their weighted mean."""
    row = {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two three", "weight": 0.25},
            {"role": "user", "content": "four"},
            {"role": "assistant", "content": "red green blue"},
        ]
    }
    config = run_config(train={"max_steps": 1, "epochs": None, "batch_size": 1})
    config["data"]["train"] = str(write_rows(tmp_path / "weights.jsonl", [row]))
    (loss,) = losses_of(tunesmith.sft(config))
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    ids, labels = ids_and_labels(tokenizer, row["messages"])
    first_end = labels.index(-100, next(i for i, label in enumerate(labels) if label != -100))
    with torch.no_grad():
        nll = F.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1],
            torch.tensor(labels[1:]),
            ignore_index=-100,
            reduction="none",
        )
    weights = torch.tensor([0.25 if i < first_end else 1.0 for i in range(1, len(ids))]) * torch.tensor(
        [float(label != -100) for label in labels[1:]]
    )
    assert loss == pytest.approx(float((nll * weights).sum() / weights.sum()), rel=1e-5)


def test_final_and_best_load_in_stock_peft_with_the_same_logits(run_config, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(5, seed=9))
    config = run_config(data={"valid": str(valid)})
    result = tunesmith.sft(config)
    _, trained = plain_loop(config, steps=5)
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, result.final).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, trained.eval()(ids).logits, rtol=1e-2, atol=1e-2)
    # Every evaluation found a lower loss, so the best adapter is the last one.
    assert result.summary["best_step"] == result.summary["steps"] == 5
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (result.best, result.final))
    assert all(torch.equal(first[name], last[name]) for name in first)

"""Pretraining from a config: what a run computes against a plain loop of torch and transformers, and that all
that is made of it loads and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import conversations, tiny_tokenizer, write_rows
from torch.nn import functional as F
from training.test_resume import metrics_without_times, same_files, stop_after
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tunesmith
from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import load_tuned
from tunesmith.errors import Interrupted, ModelError
from tunesmith.training.run_folder import read_metrics

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture
def scratch(tmp_path):
    """Makes the config dict of a small run on documents from a config without weights."""

    def make(family: str = "qwen2", **sections) -> dict:
        folder = tmp_path / family
        CONFIG_MAPPING[family](vocab_size=9999, **SIZES).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        rows = [
            {"text": " ".join(message["content"] for message in row["messages"])}
            for row in conversations(24, seed=2, max_turns=3)
        ]
        base = {
            "run": {"name": "r", "output_dir": str(tmp_path / "runs"), "seed": 3},
            "model": {"config": str(folder), "dtype": "float32"},
            "data": {
                "train": str(write_rows(tmp_path / "train.jsonl", rows)),
                "max_length": 256,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {
                "max_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.1,
                "schedule": "constant", "warmup": 0, "micro_batch_tokens": 512,
            },
        }  # fmt: skip
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return base

    return make


def lines_of(result):
    return [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]


def plain_loop(config, family):
    """Loss of each of ten steps: a model drawn and scaled by hand, rows padded and masked, torch's own
    AdamW."""
    tokenizer = tiny_tokenizer()
    texts = [json.loads(line)["text"] for line in Path(config["data"]["train"]).read_text().splitlines()]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    set_seed(config["run"]["seed"])
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](vocab_size=320, pad_token_id=None, bos_token_id=0, eos_token_id=1, **SIZES),
        dtype=torch.float32,
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * 2)
            layer.mlp.down_proj.weight /= math.sqrt(2 * 2)
    matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    groups = [
        {"params": list(matrices), "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses, order, epoch = [], [], 0
    while len(losses) < 10:
        if not order:
            order = np.random.default_rng([config["run"]["seed"], epoch]).permutation(len(rows)).tolist()
            epoch += 1
        batch, order = [rows[row] for row in order[:8]], order[8:]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss = loss + config["train"].get("z_loss", 0) * logits.logsumexp(-1)[labels != -100].square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("train", [{}, {"z_loss": 1e-2}], ids=["plain", "z-loss"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_ten_steps_from_scratch_have_the_losses_of_a_plain_loop(scratch, family, train):
    """To 1e-5: float32 sums in another order, over ten steps."""
    config = scratch(family, train=train)
    expected = plain_loop(config, family)
    losses = [line["loss"] for line in lines_of(tunesmith.sft(config))]
    assert losses == pytest.approx(expected, rel=1e-5)
    # random weights know next to nothing: each of 320 tokens is about as likely
    assert losses[0] == pytest.approx(math.log(320) + train.get("z_loss", 0) * math.log(320) ** 2, rel=5e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_what_a_run_from_scratch_leaves_loads_in_stock_transformers_and_chats(scratch, capsys):
    config = scratch(data={"valid": 0.2}, eval={"every_steps": 5})
    result = tunesmith.sft(config)
    said = capsys.readouterr().out
    assert "with random weights of seed 3" in said
    assert "(100.00 %)" in said
    tokens = sum(line["tokens"] for line in lines_of(result))
    assert "compute-optimal training has about 20 a parameter" in said
    shown = float(said.partition("this run has ")[2].partition(" tokens")[0].replace(",", ""))
    assert shown == pytest.approx(tokens, rel=0.1)  # rows of the average length
    model = AutoModelForCausalLM.from_pretrained(result.final)
    assert (model.config.vocab_size, model.config.eos_token_id) == (320, 1)
    assert len(AutoTokenizer.from_pretrained(result.final)) == 259
    card = (result.final / "README.md").read_text()
    assert "base_model" not in card
    assert "trained from random weights (seed 3)" in card
    assert "licence" not in card
    tuned = load_tuned(find_model(str(result.run), print), print)
    assert tuned.model.config.vocab_size == 320
    # and `model.path` goes on from it
    further = scratch(run={"name": "further"}, adapter={"method": "none"})
    further["model"] = {"path": str(result.final), "dtype": "float32"}
    assert lines_of(tunesmith.sft(further))[0]["loss"] < lines_of(result)[0]["loss"] - 0.1


def test_a_run_from_scratch_that_is_stopped_ends_as_if_it_had_not_been(scratch, monkeypatch):
    config = scratch(run={"name": "straight"})
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)


def test_the_seed_of_the_run_decides_the_weights(scratch):
    finals = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = scratch(run={"name": name, "seed": seed}, train={"max_steps": 1, "learning_rate": 1e-9})
        finals.append(load_file(tunesmith.sft(config).final / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(finals[0][name], finals[1][name])
    assert not torch.equal(finals[0][name], finals[2][name])


def test_the_tokenizer_may_lie_beside_a_config_file_or_be_named(scratch, tmp_path):
    config = scratch(train={"max_steps": 1})
    folder = tmp_path / "qwen2"
    config["model"]["config"] = str(folder / "config.json")
    assert tunesmith.sft(config).summary["steps"] == 1
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "config.json").rename(alone / "config.json")
    config["model"]["config"] = str(alone / "config.json")
    config["run"]["name"] = "other"
    with pytest.raises(
        ModelError, match=r"model.config=.*alone: no tokenizer is there .*Name one with model.tokenizer"
    ):
        tunesmith.sft(config)
    config["model"]["tokenizer"] = str(folder)
    assert tunesmith.sft(config).summary["steps"] == 1

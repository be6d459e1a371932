"""Pretraining on real text with a tokenizer learnt from it, in short: 0.3 million parameters beside a
plain loop of torch and transformers that cuts, groups, draws, trains and measures by itself.
`python -m benchmarks.pretrain_wiki` is the long version, of ten million.
"""

from __future__ import annotations

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training.test_pretrain import blocks_of, ids_of, pieces_of
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.models.qwen2 import Qwen2Config

import tunesmith
from tunesmith.cli import main
from tunesmith.training.run_folder import read_metrics

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
STEPS, ROWS, BLOCK, SEED, PEAK, FLOOR, WARMUP = 10, 8, 256, 3, 2e-3, 2e-4, 3


@pytest.fixture(scope="module")
def wiki(shared, tmp_path_factory):
    """A folder with train.txt, valid.txt (a document of 30, a line each) and the tokenizer of the first."""
    file = shared / "data" / "wiki_demo.txt"
    if not file.is_file():
        pytest.skip(f"there is no {file} to train on")
    folder = tmp_path_factory.mktemp("wiki")
    held_out, *others = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "valid.txt").write_text(held_out, encoding="utf-8")
    (folder / "train.txt").write_text("".join(others), encoding="utf-8")
    learn = ["tokenizer", "train", str(folder / "train.txt"), "--vocab-size", "1024"]
    assert main([*learn, "--out", str(folder / "tokenizer")]) == 0
    return folder


def documents(file):
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def initial_model():
    """Drawn by transformers, and what writes into the residual stream scaled by hand."""
    set_seed(SEED)
    config = Qwen2Config(vocab_size=1024, eos_token_id=1021, bos_token_id=None, pad_token_id=None, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * SIZES["num_hidden_layers"])
            layer.mlp.down_proj.weight /= math.sqrt(2 * SIZES["num_hidden_layers"])
    return model


def summed_nats(model, ids):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")


def plain_loop(tokenizer, texts):
    """The model after ten steps, one document's piece a forward pass, and the loss of each step."""
    pieces = [piece for text in texts for piece in pieces_of(ids_of(tokenizer, text), BLOCK)]
    blocks = blocks_of(pieces, BLOCK)
    order = np.random.default_rng([SEED, 0]).permutation(len(blocks))
    assert len(order) > STEPS * ROWS
    model = initial_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step in range(STEPS):
        fall = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK * step / WARMUP if step < WARMUP else FLOOR + (PEAK - FLOOR) * fall
        chosen = [piece for b in order[step * ROWS : (step + 1) * ROWS] for piece in blocks[b]]
        num_targets = sum(len(ids) - 1 for ids in chosen)
        total = 0.0
        for ids in chosen:
            nats = summed_nats(model, ids) / num_targets
            nats.backward()
            total += nats.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model.eval(), losses


def test_real_text_trains_as_in_a_plain_loop_and_its_bits_per_byte_are_those_of_the_text(wiki, tmp_path):
    """Losses to 1e-5: float32 sums in another order, over ten steps."""
    (wiki / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES}), encoding="utf-8")
    result = tunesmith.pretrain(
        {
            "run": {"name": "r", "output_dir": str(tmp_path / "runs"), "seed": SEED},
            "model": {
                "config": str(wiki / "config.json"),
                "tokenizer": str(wiki / "tokenizer"),
                "dtype": "float32",
            },
            "data": {
                "train": str(wiki / "train.txt"),
                "valid": str(wiki / "valid.txt"),
                "max_length": BLOCK,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {
                "max_steps": STEPS,
                "batch_size": ROWS,
                "learning_rate": PEAK,
                "min_learning_rate": FLOOR,
                "warmup": WARMUP,
                "weight_decay": 0.1,
                "trainer_args": {"adam_beta2": 0.95},
            },
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(wiki / "tokenizer")
    model, expected = plain_loop(tokenizer, documents(wiki / "train.txt"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.3e6, rel=0.05)
    lines = read_metrics(result.run / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(1024), rel=1e-2)  # random weights know nothing
    assert losses[-1] < losses[0] - 0.5

    (text,) = documents(wiki / "valid.txt")
    pieces = pieces_of(ids_of(tokenizer, text), BLOCK)
    with torch.no_grad():
        nats = sum(summed_nats(model, ids).item() for ids in pieces)
    # A character of a byte-level token is a byte; Qwen2's tokenizer composes letters and accents (NFC).
    first_bytes = sum(len(tokenizer.convert_ids_to_tokens(ids[0])) for ids in pieces)
    num_bytes = len(unicodedata.normalize("NFC", text).encode()) - first_bytes
    evaluation = [line for line in lines if "eval_loss" in line][-1]
    assert evaluation["step"] == STEPS
    assert evaluation["eval_target_tokens"] == sum(len(ids) - 1 for ids in pieces)
    assert evaluation["eval_loss"] == pytest.approx(nats / evaluation["eval_target_tokens"], rel=1e-5)
    assert evaluation["eval_perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]), rel=1e-12)
    assert evaluation["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)

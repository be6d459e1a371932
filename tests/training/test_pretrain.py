"""What pretraining computes, against stock models and plain loops over the same documents.

Tolerance: float32 sums in another order, over a few optimiser steps.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import conversations, write_rows
from torch.nn import functional as F
from training.test_resume import metrics_without_times, same_files, stop_after
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import tunesmith
from tunesmith import cli
from tunesmith.config import load_config
from tunesmith.data.loading import load_data
from tunesmith.data.rows import BlockMaker, StreamedRows
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ConfigError, DataError, Interrupted
from tunesmith.training.run_folder import read_metrics

_WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "red", "green", "sun", "moon"]


def documents(number, seed=0, longest=30):
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, longest))) for _ in range(number)]


def write_texts(file, texts):
    return str(write_rows(file, [{"text": text} for text in texts]))


@pytest.fixture
def corpus_config(tiny_models, tmp_path):
    """Makes a config dict for pretraining on 30 documents, some longer than a block of 64 tokens."""

    def make(texts=None, **sections):
        base = {
            "run": {"name": "r", "output_dir": str(tmp_path / "runs"), "seed": 3},
            "model": {"path": str(tiny_models("llama")), "dtype": "float32"},
            "data": {
                "train": write_texts(tmp_path / "train.jsonl", documents(30) if texts is None else texts),
                "max_length": 64,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "micro_batch_tokens": 128},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return base

    return make


def ids_of(tokenizer, text):
    """A document as it is trained: its tokens and the end token. The tiny tokenizer puts nothing before."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def plain_loop(config, steps):
    """Losses of a stock model, `steps` being lists of id lists, each run by itself: nats summed over all
    tokens but the first of each, by their number."""
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).train()
    decayed = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decayed, lr=config["train"]["learning_rate"], weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, round(0.03 * len(steps)), len(steps))
    losses = []
    for step in steps:
        num_targets = sum(len(ids) - 1 for ids in step)
        total = 0.0
        for ids in step:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum") / num_targets
            nats.backward()
            total += nats.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def losses_of(result):
    return [line["loss"] for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]


def pieces_of(ids, size):
    """Cut every `size` tokens; no piece of a single token."""
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [pieces[-2][:-1], pieces[-2][-1:] + pieces[-1]]
    return pieces


def blocks_of(pieces, size):
    """Best-fit decreasing, one piece after the other; the first of equals, which is any."""
    blocks: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        free = [size - sum(map(len, block)) for block in blocks]
        roomy = [b for b in range(len(blocks)) if free[b] >= len(piece)]
        if roomy:
            blocks[min(roomy, key=free.__getitem__)].append(piece)
        else:
            blocks.append([piece])
    return blocks


def test_the_loss_of_each_step_is_that_of_its_documents_run_alone(corpus_config):
    """Whatever blocks they lie in: a step that holds all blocks holds all pieces of all documents."""
    config = corpus_config(train={"epochs": 3, "batch_size": 1000})
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    pieces = [piece for text in documents(30) for piece in pieces_of(ids_of(tokenizer, text), 64)]
    assert len(pieces) > 40  # some documents are split
    expected = plain_loop(config, [pieces] * 3)
    assert losses_of(tunesmith.pretrain(config)) == pytest.approx(expected, rel=1e-5)


def test_steps_of_few_blocks_hold_the_documents_that_best_fit_puts_there(corpus_config):
    """All lengths differ, so that there is one best fit and no other."""
    texts = ["x" * length for length in (3, 5, 8, 12, 17, 23, 30, 38, 47, 57, 100, 131)]
    config = corpus_config(texts, train={"epochs": 2, "batch_size": 3})
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    pieces = [piece for text in texts for piece in pieces_of(ids_of(tokenizer, text), 64)]
    assert sorted(map(len, pieces)) == [4, 4, 6, 9, 13, 18, 24, 31, 37, 39, 48, 58, 64, 64, 64]
    blocks = blocks_of(pieces, 64)
    steps = []
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(len(blocks))
        steps += [
            [piece for b in order[at : at + 3] for piece in blocks[b]] for at in range(0, len(blocks), 3)
        ]
    result = tunesmith.pretrain(config)
    assert losses_of(result) == pytest.approx(plain_loop(config, steps), rel=1e-5)
    report = json.loads((result.run / "data_report.json").read_text())
    assert report["train_rows"] == len(blocks)
    assert report["block_fill"] == pytest.approx(sum(map(len, pieces)) / (64 * len(blocks)))


def group_texts(tokenizer, texts, size):
    """As the tutorials have it, with the last block kept."""
    joined = list(itertools.chain(*(ids_of(tokenizer, text) for text in texts)))
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def test_concatenate_is_what_transformers_computes_on_grouped_texts(corpus_config):
    config = corpus_config(data={"packing": "concatenate"}, train={"epochs": 2, "batch_size": 3})
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    blocks = group_texts(tokenizer, documents(30), 64)
    steps = []
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(len(blocks))
        steps += [[blocks[b] for b in order[at : at + 3]] for at in range(0, len(blocks), 3)]
    # The loss of transformers' own model on a block with labels equal to its ids.
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    with torch.no_grad():
        own = model(torch.tensor([blocks[0]]), labels=torch.tensor([blocks[0]])).loss.item()
    assert own == pytest.approx(plain_loop(config, [[blocks[0]]])[0], rel=1e-6)
    result = tunesmith.pretrain(config)
    assert losses_of(result) == pytest.approx(plain_loop(config, steps), rel=1e-5)
    assert result.summary["tokens"] == 2 * sum(map(len, blocks))  # the last block is used


def test_evaluation_weighs_by_token_and_gives_perplexity_and_bits_per_byte(corpus_config, tmp_path):
    texts = [*documents(7, seed=9), "na\u00efve caf\u00e9 \u2014 \u20ac5"]
    config = corpus_config(
        data={"valid": write_texts(tmp_path / "valid.jsonl", texts)}, train={"max_steps": 1, "epochs": None}
    )
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    nats = num_targets = num_bytes = 0
    for ids in (piece for text in texts for piece in pieces_of(ids_of(tokenizer, text), 64)):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        nats += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        num_targets += len(ids) - 1
        num_bytes += sum(id_ != tokenizer.eos_token_id for id_ in ids[1:])  # a token is a byte
    lines = read_metrics(tunesmith.pretrain(config).run / "metrics.jsonl")
    before = next(line for line in lines if "eval_loss" in line)
    assert before["eval_loss"] == pytest.approx(nats / num_targets, rel=1e-5)
    assert before["eval_perplexity"] == pytest.approx(math.exp(nats / num_targets), rel=1e-5)
    assert before["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert summary["eval_bits_per_byte"] == lines[-1]["eval_bits_per_byte"] < before["eval_bits_per_byte"]


def test_sources_are_drawn_by_weight_as_a_count_by_hand_has_it(corpus_config, tmp_path):
    """Blocks of 64: a document of 63 letters and its end fills one."""
    sources = [
        {"path": write_texts(tmp_path / f"{letter}.jsonl", [letter * 63] * number), "weight": weight}
        for letter, number, weight in (("a", 8, 1), ("b", 4, 2.5), ("c", 6, 0.5))
    ]
    config = corpus_config(data={"train": sources}, train={"epochs": 2, "batch_size": 7})
    result = tunesmith.pretrain(config)
    report = json.loads((result.run / "data_report.json").read_text())
    # An epoch: 8 once; 4 twice and a half of them again; 3 of 6. 21 blocks, 3 steps.
    assert result.summary["steps"] == 6
    assert [source["rows"] for source in report["drawn"]] == [16, 20, 6]
    assert [source["epochs"] for source in report["drawn"]] == [2, 5, 1]
    assert [source["tokens"] for source in report["drawn"]] == [16 * 64, 20 * 64, 6 * 64]
    assert [source["share"] for source in report["drawn"]] == pytest.approx([16 / 42, 20 / 42, 6 / 42])
    assert sum(source["tokens"] for source in report["drawn"]) == result.summary["tokens"]


def test_the_report_counts_documents_tokens_bytes_and_pieces(corpus_config, tmp_path):
    texts = ["caf\u00e9", "x" * 63, "x" * 64, "x" * 200]
    config = load_config(corpus_config(texts), recipe="pretrain")
    data = load_data(config, load_tokenizer(config))
    (report,) = data.train.reports
    assert (report.rows_read, report.rows_kept, report.rows_split, report.pieces) == (4, 4, 2, 6)
    assert report.text_bytes == 5 + 63 + 64 + 200
    assert report.tokens == report.text_bytes + 4 == int(data.train.lengths.sum())
    assert report.target_tokens == report.tokens - 8  # the first of each piece has no context
    # 64 + 1 tokens are 63 + 2; 201 are 64 + 64 + 64 + 9.
    assert sorted(data.train.lengths.tolist()) == [2, 6, 9, 63, 64, 64, 64, 64]
    assert data.train.num_rows == 6
    assert data.train.fill == pytest.approx(report.tokens / (6 * 64))


@pytest.mark.parametrize("packing", ["flat", "concatenate"])
@pytest.mark.parametrize("loading", ["cached", "streaming"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(corpus_config, tmp_path, monkeypatch, packing, loading):
    """Streaming: a window of 9 documents is about 7 blocks, and step 5 stops within the third."""
    config = corpus_config(
        data={
            "packing": packing,
            "loading": loading,
            "shuffle_buffer": 9,
            "valid": write_texts(tmp_path / "valid.jsonl", documents(5, seed=4)),
        },
        train={"max_steps": 12, "epochs": None},
        eval={"every_steps": 4, "prompts": ["alpha", "one two"], "max_new_tokens": 4, "temperature": 1.0},
    )
    config["run"]["name"] = "straight"
    straight = tunesmith.pretrain(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
            tunesmith.pretrain(config)
    resumed = tunesmith.pretrain(config)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)
    for name in ("samples.jsonl", "data_report.json"):
        assert (straight.run / name).read_text() == (resumed.run / name).read_text(), name


def test_a_stream_trains_every_document_once_a_round_and_counts_it(corpus_config):
    """30 documents in windows of 10; as many blocks as they make are one round."""
    config = corpus_config(
        data={"loading": "streaming", "shuffle_buffer": 10}, train={"max_steps": 1, "epochs": None}
    )
    loaded = load_config(config, recipe="pretrain")
    rows = load_data(loaded, load_tokenizer(loaded)).train.rows
    seen, counted, index = [], 0, 0
    while counted < 30:
        block = rows[index]
        assert sum(len(example.input_ids) for example in block.examples) <= 64
        seen += [tuple(example.input_ids.tolist()) for example in block.examples]
        counted += block.counts.rows_read
        index += 1
        window = block.stream["window"]
    while rows[index].stream["window"] == window:
        seen += [tuple(example.input_ids.tolist()) for example in rows[index].examples]
        index += 1
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    pieces = [piece for text in documents(30) for piece in pieces_of(ids_of(tokenizer, text), 64)]
    assert sorted(seen) == sorted(map(tuple, pieces))
    config["train"] = {**config["train"], "max_steps": index, "batch_size": 1}
    report = json.loads((tunesmith.pretrain(config).run / "data_report.json").read_text())["train"][0]
    assert (report["rows_read"], report["rows_kept"]) == (30, 30)
    assert report["tokens"] == sum(map(len, pieces))


def test_a_resumed_stream_reads_from_its_window_on(corpus_config, monkeypatch):
    config = corpus_config(
        data={"loading": "streaming", "shuffle_buffer": 5}, train={"max_steps": 6, "epochs": None}
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            tunesmith.pretrain(config)
    grouped = []
    group = BlockMaker.__call__

    def watch(self, prepared):
        grouped.append([row.place.rpartition(":")[2] for row in prepared])
        return group(self, prepared)

    def watch_start_at(self, place):
        grouped.clear()  # what was read to learn how texts end
        start_at(self, place)

    start_at = StreamedRows.start_at
    monkeypatch.setattr(BlockMaker, "__call__", watch)
    monkeypatch.setattr(StreamedRows, "start_at", watch_start_at)
    tunesmith.pretrain(config)
    # The first five documents make 9 blocks, the next five 9 more: item 16 is among those.
    assert grouped == [["6", "7", "8", "9", "10"], ["11", "12", "13", "14", "15"]]


def test_samples_leave_training_as_it_is(corpus_config, tmp_path):
    valid = write_texts(tmp_path / "valid.jsonl", documents(4, seed=8))
    results = []
    for name, more in (
        ("without", {}),
        ("greedy", {"prompts": ["red green"], "max_new_tokens": 5}),
        ("drawn", {"prompts": ["red green"], "max_new_tokens": 5, "temperature": 0.8}),
    ):
        config = corpus_config(
            run={"name": name},
            data={"valid": valid},
            adapter={"method": "lora", "r": 4, "dropout": 0.2},  # which draws from the random state
            eval={"every_steps": 2, **more},
        )
        results.append(tunesmith.pretrain(config))
    assert all(same_files(results[0].final, result.final) for result in results[1:])
    assert not (results[0].run / "samples.jsonl").exists()
    lines = [json.loads(line) for line in (results[1].run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][:3] == [0, 2, 4]
    # Greedily, before training: what the stock model goes on with.
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    ids = tokenizer("red green", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert lines[0]["prompt"] + lines[0]["text"] == tokenizer.decode(ids[0])


def test_a_model_of_documents_and_the_defaults_of_the_recipe(corpus_config):
    config = load_config(corpus_config(), recipe="pretrain")
    assert (config.adapter.method, config.data.packing, config.data.too_long) == ("none", "flat", "split")
    assert load_config(config, recipe="pretrain") is config
    with pytest.raises(ConfigError, match="this is a config for `tunesmith pretrain`"):
        load_config(corpus_config(run={"recipe": "pretrain"}), recipe="sft")
    tuned = load_config(corpus_config())
    assert (tuned.adapter.method, tuned.data.packing, tuned.data.too_long) == ("lora", "tree", "drop")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"loading": "lazy"}}, "Use cached, or streaming for a corpus too large"),
        ({"data": {"packing": "concatenate", "too_long": "drop"}}, "no text is too long"),
        ({"data": {"loading": "streaming", "packing": "none"}, "train": {"max_steps": 2, "epochs": None}},
         "trains whole blocks"),
        ({"data": {"valid": 0.5}, "eval": {"answer_rows": 2}}, "Name beginnings of texts in eval.prompts"),
        ({"eval": {"prompts": ["a"]}}, "there is nothing to evaluate on"),
        ({"data": {"valid": 0.5}, "eval": {"temperature": 1}}, "names no text to go on with"),
        ({"adapter": {"r": 8}}, "adapter.method is none, so it would do nothing"),
    ],
)  # fmt: skip
def test_what_a_corpus_cannot_be_trained_with_is_refused(corpus_config, sections, message):
    with pytest.raises(ConfigError, match=message):
        load_config(corpus_config(**sections), recipe="pretrain")


@pytest.mark.parametrize(("key", "value"), [("too_long", "split"), ("packing", "concatenate")])
def test_conversations_are_neither_split_nor_joined(run_config, key, value):
    with pytest.raises(ConfigError, match=f"data.{key} is {value}"):
        load_config(run_config(data={key: value}), recipe="sft")


def test_conversations_are_no_corpus(corpus_config, tmp_path):
    chats = str(write_rows(tmp_path / "chats.jsonl", conversations(3)))
    config = load_config(corpus_config(data={"train": chats}), recipe="pretrain")
    with pytest.raises(DataError, match="its rows are messages, and `tunesmith pretrain` trains on raw text"):
        load_data(config, load_tokenizer(config))


def test_a_column_of_another_name_and_a_text_beside_a_prompt_are_read(corpus_config, tmp_path):
    rows = [{"prompt": "p", "completion": "c", "text": "one"}]
    both = str(write_rows(tmp_path / "both.jsonl", rows))
    other = str(write_rows(tmp_path / "other.jsonl", [{"content": "two"}]))
    sources = [both, {"path": other, "columns": {"content": "text"}}]
    config = load_config(corpus_config(data={"train": sources}), recipe="pretrain")
    tokenizer = load_tokenizer(config)
    rows = load_data(config, tokenizer).train.rows
    texts = [tokenizer.decode(example.input_ids) for i in range(2) for example in rows[i].examples]
    assert texts == ["one<|im_end|>", "two<|im_end|>"]


def test_the_command_line_pretrains_previews_and_verifies(corpus_config, tmp_path, monkeypatch, capsys):
    config = corpus_config(run={"recipe": "pretrain"}, train={"max_steps": 2, "epochs": None})
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))

    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", str(file)]) == 0
    assert "30 of 30 documents" in capsys.readouterr().out
    assert cli.main(["preview", str(file), "--json", "--rows", "30"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["input_ids"]) for line in lines] == [len(text) + 1 for text in documents(30)]
    # The first token of each piece has no context.
    assert [line["targets"].count(0) for line in lines] == [
        math.ceil((len(t) + 1) / 64) for t in documents(30)
    ]
    assert cli.main(["verify-resume", str(Path("runs/r/config.yaml")), "--at", "1"]) == 0
    assert "identical" in capsys.readouterr().out

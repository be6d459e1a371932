"""The size of passes: chosen from memory and from what rows share, and kept when a run goes on."""

import numpy as np
import pytest
import torch
import yaml
from tiny import make_tiny_model

import tunesmith
from tunesmith.config import load_config
from tunesmith.data.loading import RowSet
from tunesmith.models.adapt import build_model
from tunesmith.training import passes
from tunesmith.training.passes import Need, choose_recomputing, plan_passes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def model(model_folder):
    config = config_of(model_folder)
    return build_model(config, range(100), lambda _: None)


def config_of(folder, **sections):
    return load_config({"model": {"path": str(folder)}, "data": {"train": "none.jsonl"}} | sections)


def rows_of(tokens):
    """Rows that CachedRows would give: token lists, as an Arrow column gives them."""
    lengths = np.array([len(row) for row in tokens], dtype=np.int32)
    values = np.concatenate(tokens).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = object.__new__(passes.CachedRows)
    rows.token_chunks = lambda: ([(values, offsets)], None)
    starts = np.arange(len(tokens) + 1)
    return RowSet(rows, lengths, starts, [(0, len(tokens), 1.0)], [])


def planned(model_folder, model, tokens, *, before=None, **train):
    config = config_of(model_folder, train={"batch_size": 32, **train})
    return plan_passes(config, rows_of(tokens), model, torch.float32, before=before, say=lambda _: None)


def apart(count, length):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 90, length) for _ in range(count)]


def test_rows_that_share_nothing_get_a_pass_that_is_just_enough(model_folder, model):
    assert planned(model_folder, model, apart(64, 300)).config.train.micro_batch_tokens == 2048


def test_a_long_shared_prefix_gets_larger_passes(model_folder, model):
    prefix = np.arange(900) % 90
    tokens = [np.concatenate([prefix, row]) for row in apart(64, 60)]
    assert planned(model_folder, model, tokens).config.train.micro_batch_tokens > 2048


def test_a_row_longer_than_every_size_sets_the_size(model_folder, model):
    assert planned(model_folder, model, apart(4, 5000)).config.train.micro_batch_tokens == 5000


@pytest.mark.parametrize(("fitting", "chosen"), [(2100, 2048), (1600, 1536), (500, 1024)])
def test_little_memory_means_small_passes(model_folder, model, monkeypatch, fitting, chosen):
    prefix = np.arange(900) % 90
    tokens = [np.concatenate([prefix, row]) for row in apart(64, 60)]
    free = Need(model, torch.float32).of_pass(fitting) / 0.8
    monkeypatch.setattr(passes, "free_memory_bytes", lambda: free)
    assert planned(model_folder, model, tokens).config.train.micro_batch_tokens == chosen


def test_what_the_config_says_or_the_run_had_is_kept(model_folder, model):
    tokens = apart(64, 300)
    said = planned(model_folder, model, tokens, micro_batch_tokens=4096, before=2048)
    assert said.config.train.micro_batch_tokens == said.config.eval.batch_tokens == 4096
    assert planned(model_folder, model, tokens, before=2048).config.train.micro_batch_tokens == 2048


def test_recomputing_turns_on_when_a_pass_does_not_fit(model_folder, model, monkeypatch):
    config = config_of(model_folder, train={"micro_batch_tokens": 2048})
    need = Need(model, torch.float32)
    on, why = choose_recomputing(need, config)
    assert not on
    assert "one pass of 2048 tokens" in why
    monkeypatch.setattr(passes, "free_memory_bytes", lambda: 10_000_000)
    assert choose_recomputing(need, config)[0]
    forced = config_of(model_folder, train={"gradient_checkpointing": True})
    assert choose_recomputing(need, forced) == (True, "as train.gradient_checkpointing says")


def test_the_choice_is_written_down_and_a_resumed_run_keeps_it(tmp_path, run_config, monkeypatch):
    config = run_config()
    del config["train"]["micro_batch_tokens"]
    tunesmith.sft(config, ["train.epochs=null", "train.max_steps=2", "checkpoint.every_steps=2"])
    written = yaml.safe_load((tmp_path / "runs" / "r" / "config.yaml").read_text())
    chosen = written["train"]["micro_batch_tokens"]
    assert chosen == 2048
    monkeypatch.setattr(passes, "_choose_size", lambda *_: 9999)
    tunesmith.sft(config, ["train.epochs=null", "train.max_steps=4", "checkpoint.every_steps=2"])
    written = yaml.safe_load((tmp_path / "runs" / "r" / "config.yaml").read_text())
    assert written["train"]["micro_batch_tokens"] == chosen

"""A run that is stopped and goes on ends where the run that was never stopped ends, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import conversations, write_rows

import tunesmith
from tunesmith.errors import CheckpointError, ConfigError, Interrupted
from tunesmith.training.callbacks import Schedule
from tunesmith.training.run_folder import read_metrics

_TIMES = {"tokens_per_s", "target_tokens_per_s", "mfu", "peak_memory_gib", "step_s", "eval_s"}


def metrics_without_times(run):
    return [
        {key: value for key, value in line.items() if key not in _TIMES}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def same_files(one, other):
    (a,), (b,) = one.glob("*model.safetensors"), other.glob("*model.safetensors")
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(monkeypatch, step: int):
    """Deliver SIGTERM to ourselves while `step` is being trained."""
    original = Schedule.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Schedule, "on_step_end", on_step_end)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7], ids=["first", "mid-epoch", "epoch-end", "second-epoch"])
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"dropout": 0.1}, "data": {"packing": "none"}},
        {"adapter": {"method": "none"}, "train": {"learning_rate": 1e-3, "neftune_alpha": 5}},
        {"data": {"loading": "lazy"}, "adapter": {"dropout": 0.1}},
    ],
    ids=["lora-dropout", "unpacked", "full-neftune", "lazy"],
)
def test_a_stopped_run_ends_with_the_same_weights_and_metrics(
    run_config, tmp_path, monkeypatch, sections, stop_at
):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(4, seed=11))
    sections = {key: dict(value) for key, value in sections.items()}
    sections.setdefault("data", {})["valid"] = str(valid)
    sections.setdefault("train", {})["epochs"] = 2
    config = run_config(**sections)
    if config["adapter"].get("method") == "none":
        config["adapter"] = {"method": "none"}
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 10") as stop:
            tunesmith.sft(config)
    assert stop.value.exit_code == 143
    resumed = tunesmith.sft(config)
    assert same_files(straight.final, resumed.final)
    assert same_files(straight.best, resumed.best)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)


def test_a_streamed_run_goes_on_where_it_stopped(run_config, monkeypatch):
    config = run_config(data={"loading": "streaming", "shuffle_buffer": 5}, train={"max_steps": 9})
    del config["train"]["epochs"]
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    assert same_files(straight.final, tunesmith.sft(config).final)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run_config, monkeypatch, capsys):
    config = run_config(checkpoint={"every_steps": 1, "keep": 5})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    run = straight.run.parent / "r"
    optimizer = run / "checkpoints" / "step-000004" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    optimizer.write_bytes(bytes(content))
    (run / "checkpoints" / ".step-000005.tmp").mkdir()  # what a kill in the middle of a save leaves
    resumed = tunesmith.sft(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged checkpoint passed over" in said
    assert "optimizer.pt differs from what was saved" in said
    assert same_files(straight.final, resumed.final)
    assert not (run / "checkpoints" / ".step-000005.tmp").exists()


def test_a_named_step_is_resumed_and_a_missing_one_is_refused_with_those_that_exist(run_config):
    config = run_config(checkpoint={"every_steps": 2, "keep": 9})
    first = tunesmith.sft(config)
    weights = load_file(first.final / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 3. Complete ones: 2, 4, 5"):
        tunesmith.sft(config, ["run.resume=3"])
    again = tunesmith.sft(config, ["run.resume=2"])
    for name, value in load_file(again.final / "adapter_model.safetensors").items():
        assert torch.equal(value, weights[name])
    assert [line["step"] for line in read_metrics(again.run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_are_kept(run_config):
    result = tunesmith.sft(run_config(checkpoint={"every_steps": 1, "keep": 2}))
    assert sorted(folder.name for folder in (result.run / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000005",
    ]


def test_a_run_with_other_settings_is_refused_with_what_changed(run_config):
    config = run_config()
    tunesmith.sft(config)
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.01 -> 0.02") as error:
        tunesmith.sft(config, ["train.learning_rate=0.02", "train.log_every_steps=5"])
    assert "log_every_steps" not in str(error.value)
    with pytest.raises(ConfigError, match="already holds something"):
        tunesmith.sft(config, ["run.resume=never"])


def test_a_folder_that_is_no_run_is_not_written_to(run_config, tmp_path):
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and is no run"):
        tunesmith.sft(run_config())
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


def test_more_epochs_go_on_from_the_end(run_config):
    config = run_config(train={"schedule": "constant", "warmup": 0})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}}, ["train.epochs=2"])
    tunesmith.sft(config)
    longer = tunesmith.sft(config, ["train.epochs=2"])
    assert same_files(straight.final, longer.final)


def test_the_resolved_config_reruns_the_run(run_config):
    first = tunesmith.sft(run_config())
    saved = yaml.safe_load((first.run / "config.yaml").read_text())
    saved["run"]["name"] = "again"
    assert same_files(first.final, tunesmith.sft(saved).final)


def test_a_kill_at_any_moment_loses_nothing(run_config, tmp_path):
    """SIGKILL while steps and saves go on; the next start ends as if nothing had happened."""
    config = run_config(checkpoint={"every_steps": 1}, train={"epochs": 4})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    run = straight.run.parent / "r"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    for kill_after in (2, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "sft", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) < kill_after:
            pass
        process.kill()
        process.wait()
    assert same_files(straight.final, tunesmith.sft(config).final)


def test_a_finished_run_started_again_leaves_what_it_has(run_config):
    config = run_config()
    first = tunesmith.sft(config)
    before = json.loads((first.run / "summary.json").read_text())
    weights = shutil.copytree(first.final, first.run / "copy")
    again = tunesmith.sft(config)
    assert same_files(weights, again.final)
    assert {k: v for k, v in again.summary.items() if k not in _TIMES} == {
        k: v for k, v in before.items() if k not in _TIMES
    }

"""A run that is stopped and goes on ends where the run that was never stopped ends, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tiny import conversations, write_rows
from training.test_state_files import Hostile
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith.config import load_config
from tunesmith.data.prepare import Preparer
from tunesmith.data.rows import StreamedRows, _Turns
from tunesmith.data.templates import CHATML
from tunesmith.errors import CheckpointError, ConfigError, Interrupted
from tunesmith.packing.loader import PlanSampler
from tunesmith.packing.plan import RowSource, StepPlan, make_plan
from tunesmith.training import session as session_module
from tunesmith.training.callbacks import Schedule
from tunesmith.training.environment import versions
from tunesmith.training.manifest import seal
from tunesmith.training.run_folder import RunFolder, _keep_lines_until, read_metrics

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
        # 20 rows: 1 1 2 3 4 4 4 1 | 4 4 ..., cut off at 10 steps
        {
            "train": {"batch_size_warmup": {"start": 1, "steps": 4}, "max_steps": 10, "epochs": None},
            "adapter": {"dropout": 0.1},
        },
    ],
    ids=["lora-dropout", "unpacked", "full-neftune", "lazy", "batch-size-warmup"],
)
def test_a_stopped_run_ends_with_the_same_weights_and_metrics(
    run_config, tmp_path, monkeypatch, sections, stop_at
):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(4, seed=11))
    sections = {key: dict(value) for key, value in sections.items()}
    sections.setdefault("data", {})["valid"] = str(valid)
    sections.setdefault("train", {}).setdefault("epochs", 2)
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


def test_a_streamed_run_goes_on_where_it_stopped_and_reads_no_more_than_it_must(run_config, monkeypatch):
    config = run_config(rows=40, data={"loading": "streaming", "shuffle_buffer": 5}, train={"max_steps": 9})
    del config["train"]["epochs"]
    config["run"]["name"] = "straight"
    straight = tunesmith.sft(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    tokenised, read_at = [], []
    prepare, next_of, start_at = Preparer.prepare, _Turns._next_of, StreamedRows.start_at

    def watch_prepare(self, rows):
        tokenised.extend(row.place for row in rows)
        return prepare(self, rows)

    def watch_next_of(self, source):
        read_at.append(self._positions[source])
        return next_of(self, source)

    def watch_start_at(self, place):
        tokenised.clear()  # what was read to learn how answers end
        read_at.clear()
        start_at(self, place)

    monkeypatch.setattr(Preparer, "prepare", watch_prepare)
    monkeypatch.setattr(_Turns, "_next_of", watch_next_of)
    monkeypatch.setattr(StreamedRows, "start_at", watch_start_at)
    resumed = tunesmith.sft(config)
    assert same_files(straight.final, resumed.final)
    # Steps 8 and 9 are items 28 to 35, in the blocks of rows 25 to 39.
    assert read_at == [(0, row) for row in range(25, 40)]
    assert len(tokenised) == 8
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)
    reports = [(run.run / "data_report.json").read_text() for run in (straight, resumed)]
    assert reports[0] == reports[1]


def test_getting_to_step_a_million_takes_one_permutation_and_one_split(monkeypatch):
    """Position is an index: what is computed to get there does not grow with it."""
    steps = 1_000_001
    plan = make_plan(
        np.full(steps, 8, np.int32),
        np.arange(steps + 1),
        sources=[RowSource(0, steps)],
        batch_size=1,
        micro_batch_tokens=8,
        num_ranks=1,
        seed=3,
        epochs=2,
        max_steps=None,
        one_example_a_pass=False,
    )
    calls = []
    for name in ("split", "rows_of_epoch"):
        original = getattr(StepPlan, name)

        def counted(self, *args, name=name, original=original):
            calls.append(name)
            return original(self, *args)

        monkeypatch.setattr(StepPlan, name, counted)
    for step in (1, 1_000_000, 1_000_002):
        sampler = PlanSampler(plan, rank=0)
        sampler.resume_at(step)
        sampler.set_epoch(step // steps)
        calls.clear()
        first = next(examples for examples in sampler if examples)
        assert calls == ["rows_of_epoch", "split"]
        assert first == [plan.rows_of_epoch(step // steps)[step % steps]]


def test_metrics_of_a_long_run_are_cut_by_looking_at_their_end(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    line = '{{"step": {}, "loss": 1.0}}\n'
    lines = [line.format(step) for step in range(1, 20_001)]
    kept = "".join(lines[:19_990])
    file.write_text("".join(lines) + '{"step": 2000')  # a kill cut the last line
    parsed = []
    original = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or original(text))
    _keep_lines_until(file, 19_990)
    assert file.read_text() == kept
    assert len(parsed) <= 12
    _keep_lines_until(file, 3)
    assert file.read_text() == "".join(lines[:3])
    _keep_lines_until(file, 0)
    assert file.read_text() == ""
    _keep_lines_until(tmp_path / "none.jsonl", 1)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run_config, monkeypatch, capsys):
    config = run_config(checkpoint={"every_steps": 1, "keep": 5})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    run = straight.run.parent / "r"
    optimizer = run / "checkpoints" / "step-000004" / "optimizer.safetensors"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    optimizer.write_bytes(bytes(content))
    (run / "checkpoints" / ".step-000005.tmp").mkdir()  # what a kill in the middle of a save leaves
    resumed = tunesmith.sft(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged checkpoint passed over" in said
    assert "optimizer.safetensors differs from what was saved" in said
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


def test_other_data_are_shown_and_refused_unless_one_goes_on_anyway(run_config, monkeypatch, capsys):
    config = run_config(checkpoint={"every_steps": 2})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    write_rows(Path(config["data"]["train"]), conversations(20, seed=9))
    with pytest.raises(
        ConfigError, match=r"other base weights, data or tokenizer.*\n  data.train: .*: '\w+' -> '\w+'"
    ) as e:
        tunesmith.sft(config)
    assert "run.resume_anyway=true" in str(e.value)
    result = tunesmith.sft(config, ["run.resume_anyway=true", "train.learning_rate=0.02"])
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: going on with other base weights, data or tokenizer: data.train: " in said
    assert "warning: going on with other settings: train.learning_rate: 0.01 -> 0.02" in said
    assert [line["step"] for line in read_metrics(result.run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    # What the last checkpoint was made with is what counts from now on.
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.02 -> 0.01"):
        tunesmith.sft(config)


def test_other_base_weights_under_the_same_path_are_refused(run_config, tmp_path):
    config = run_config()
    base = Path(config["model"]["path"])
    config["model"]["path"] = str(shutil.copytree(base, tmp_path / "base"))
    tunesmith.sft(config)
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"other base weights.*\n  model: '\w+' -> '\w+'"):
        tunesmith.sft(config, ["train.epochs=2"])
    shutil.copy(base / weights.name, weights)
    assert tunesmith.sft(config, ["train.epochs=2"]).summary["steps"] == 10


def test_what_a_kill_before_the_deletions_left_goes_at_the_next_start(run_config):
    config = run_config(checkpoint={"every_steps": 1, "keep": 2})
    result = tunesmith.sft(config)
    folder = result.run / "checkpoints"
    shutil.copytree(folder / "step-000004", folder / "step-000003")
    tunesmith.sft(config)
    assert {path.name for path in folder.iterdir()} == {"step-000004", "step-000005"}


def test_another_chat_template_is_other_data(run_config, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    config = run_config(data={"template": str(template)})
    tunesmith.sft(config)
    template.write_text(CHATML.replace("\n", "\n\n"))
    with pytest.raises(ConfigError, match="\n  chat_template: "):
        tunesmith.sft(config, ["train.epochs=2"])


def test_other_versions_are_said(run_config, monkeypatch, capsys):
    config = run_config()
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "versions", lambda: {**versions(), "torch": "0.1"})
        tunesmith.sft(config)
    tunesmith.sft(config, ["train.epochs=2"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"torch was 0.1 when step 5 was saved and is {torch.__version__} now" in said


def test_a_run_without_an_undamaged_checkpoint_is_not_begun_again(run_config):
    config = run_config()
    result = tunesmith.sft(config)
    (result.run / "checkpoints" / "step-000005" / "scheduler.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint of this run is undamaged.*step-000005: sche"
    ):
        tunesmith.sft(config)
    shutil.rmtree(result.run / "checkpoints")
    with pytest.raises(ConfigError, match=r"holds a run that has ended, and no checkpoint"):
        tunesmith.sft(config)
    assert (result.final / "adapter_model.safetensors").is_file()


def test_a_run_killed_before_its_first_checkpoint_begins_again(run_config):
    config = run_config()
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    run = straight.run.parent / "r"
    run.mkdir()
    # As a kill while config.yaml was written leaves it.
    holder = {"host": socket.gethostname(), "pid": 999_999_999, "started_at_s": 0}
    (run / "lock.json").write_text(json.dumps(holder))
    (run / ".config.yaml.tmp").write_text("run:")
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1}\n{"step"')
    assert same_files(straight.final, tunesmith.sft(config).final)
    assert metrics_without_times(straight.run) == metrics_without_times(run)
    assert not [file for file in run.iterdir() if file.name.startswith(".") or file.name == "lock.json"]


def test_a_checkpoint_says_where_it_stands_and_what_made_it(run_config, monkeypatch):
    config = run_config()
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            tunesmith.sft(config, ["train.epochs=2"])
    run = RunFolder(load_config(config))
    (checkpoint,) = run.checkpoints.complete()[-1:]
    facts = checkpoint.facts()
    assert facts["step"] == 7
    assert facts["epoch"] == pytest.approx(1.4)
    assert (facts["plan"]["epoch"], facts["plan"]["step_in_epoch"]) == (1, 2)
    assert (facts["plan"]["steps_per_epoch"], facts["plan"]["batch_size"]) == (5, 4)
    assert (facts["seed"], facts["ranks"], facts["random_states"]) == (3, 1, ["rng-0.safetensors"])
    assert facts["config"]["train"]["learning_rate"] == 0.01
    assert facts["versions"]["torch"] == torch.__version__
    assert any(key.startswith("data.train: ") and value for key, value in facts["inputs"].items())
    assert checkpoint.log_history() == []  # evaluations alone: it must not grow with each step
    assert set(facts["files"]) == {file.name for file in checkpoint.folder.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_weights_of_a_checkpoint_load_in_stock_libraries(run_config, method):
    config = run_config()
    if method == "none":
        config["adapter"] = {"method": "none"}
        config["train"]["learning_rate"] = 1e-3
    result = tunesmith.sft(config)
    folder = result.run / "checkpoints" / "step-000005"
    if method == "lora":
        load = AutoPeftModelForCausalLM.from_pretrained
    else:
        load = AutoModelForCausalLM.from_pretrained
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        of_checkpoint, final = (load(str(f), dtype=torch.float32)(ids).logits for f in (folder, result.final))
    assert torch.equal(of_checkpoint, final)


def test_pickles_in_a_checkpoint_from_elsewhere_are_not_run(run_config, monkeypatch, tmp_path):
    """Whoever makes a checkpoint makes its manifest too. These are the names transformers and PEFT load."""
    config = run_config()
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    checkpoint = RunFolder(load_config(config)).checkpoints.at(3)
    proof = tmp_path / "proof"
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "training_args.bin",
        "adapter_model.bin",
        "pytorch_model.bin",
    ):
        torch.save({"state": Hostile(proof)}, checkpoint.folder / name)
    facts = checkpoint.facts()
    (checkpoint.folder / "manifest.json").unlink()
    seal(checkpoint.folder, facts)
    assert checkpoint.damage() is None
    assert same_files(straight.final, tunesmith.sft(config).final)
    assert not proof.exists()
    # In the place of ours they are refused.
    checkpoint = RunFolder(load_config(config)).checkpoints.at(5)
    torch.save({"state": Hostile(proof)}, checkpoint.folder / "optimizer.safetensors")
    facts = checkpoint.facts()
    (checkpoint.folder / "manifest.json").unlink()
    seal(checkpoint.folder, facts)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: cannot be read"):
        tunesmith.sft(config, ["train.epochs=2"])
    assert not proof.exists()


def test_weights_of_another_shape_are_named(run_config, monkeypatch):
    config = run_config()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    with pytest.raises(
        CheckpointError, match=r"is of another model: 28 weights differ.*\[4, 96\] saved, of shape \[8, 96\]"
    ):
        tunesmith.sft(config, ["run.resume_anyway=true", "adapter.r=8"])


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


def test_a_run_that_stopped_early_and_was_killed_then_does_not_train_on(run_config, tmp_path):
    valid = str(write_rows(tmp_path / "valid.jsonl", conversations(6, seed=21)))
    config = run_config(
        data={"valid": valid},
        train={"epochs": 20, "learning_rate": 0.05, "schedule": "constant"},
        eval={"every_steps": 1, "early_stopping_patience": 2},
        checkpoint={"every_steps": 3},
    )
    first = tunesmith.sft(config)
    lines, weights = metrics_without_times(first.run), shutil.copytree(first.final, tmp_path / "copy")
    assert lines[-1]["step"] < 100
    for killed in (False, True):
        if killed:  # before final/ was written
            shutil.rmtree(first.final)
            (first.run / "summary.json").unlink()
        again = tunesmith.sft(config)
        assert same_files(weights, again.final)
        assert metrics_without_times(again.run) == lines
    # With more patience it goes on.
    more = tunesmith.sft(config, ["eval.early_stopping_patience=3"])
    assert read_metrics(more.run / "metrics.jsonl")[-1]["step"] > lines[-1]["step"]


@pytest.mark.parametrize("epochs", [1, 1.4], ids=["at the end of an epoch", "within an epoch"])
def test_a_finished_run_started_again_leaves_what_it_has(run_config, epochs):
    config = run_config(train={"epochs": epochs})
    first = tunesmith.sft(config)
    before = json.loads((first.run / "summary.json").read_text())
    weights = shutil.copytree(first.final, first.run / "copy")
    again = tunesmith.sft(config)
    assert same_files(weights, again.final)
    assert {k: v for k, v in again.summary.items() if k not in _TIMES} == {
        k: v for k, v in before.items() if k not in _TIMES
    }

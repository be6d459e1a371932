"""Saves that fail, saves beside training, and signals."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import conversations, write_rows
from training.test_bad_step import spoil
from training.test_durable_files import checkpoint_files
from training.test_resume import metrics_without_times, same_files, stop_after

import tunesmith
from tunesmith.errors import CheckpointError, ConfigError, Interrupted
from tunesmith.training import durable_files
from tunesmith.training.callbacks import Schedule
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.run_folder import read_metrics
from tunesmith.training.saving import Saver
from tunesmith.training.state_files import weights_file


def saver(tmp_path, *, asynchronous=True, on_error="warn"):
    said = []
    made = Saver(
        Checkpoints(tmp_path / "checkpoints", keep=2),
        tmp_path / "metrics.jsonl",
        asynchronous=asynchronous,
        on_error=on_error,
        say=said.append,
    )
    return made, said


def full_disk_at(monkeypatch, *steps: int):
    """A write into the checkpoint of these steps finds the disk full."""
    original = durable_files.write

    def write(file, chunks):
        if file.name == "optimizer.safetensors" and any(f"step-{step:06d}" in str(file) for step in steps):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, chunks)

    monkeypatch.setattr(durable_files, "write", write)


# --- asynchronous


def test_what_is_written_beside_training_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    """Weights change while the thread waits; the checkpoint holds the old ones."""
    may_write = threading.Event()
    original = durable_files.write

    def wait_and_write(file, chunks):
        assert threading.current_thread().name == "save-step-1"
        assert may_write.wait(60)
        return original(file, chunks)

    monkeypatch.setattr(durable_files, "write", wait_and_write)
    weights = torch.zeros(4)
    files = checkpoint_files(0.0) | {"adapter_model.safetensors": weights_file({"w": weights})}
    made, said = saver(tmp_path)
    made.save(1, files, {"ranks": 1}, best=None)
    weights += 1
    assert made.checkpoints.complete() == []
    made.poll()  # does not wait
    assert made.last_step is None
    may_write.set()
    made.finish()
    assert (made.last_step, said) == (1, [])
    saved = load_file(made.checkpoints.at(1).folder / "adapter_model.safetensors")
    assert saved["w"].tolist() == [0.0] * 4


def test_one_save_at_a_time(tmp_path, monkeypatch):
    order = []
    original = Checkpoints.write

    def write(self, step, *args, **kwargs):
        order.append(f"begin {step}")
        time.sleep(0.2)
        result = original(self, step, *args, **kwargs)
        order.append(f"end {step}")
        return result

    monkeypatch.setattr(Checkpoints, "write", write)
    made, _ = saver(tmp_path)
    for step in (1, 2):
        made.save(step, checkpoint_files(0.0), {"ranks": 1}, best=None)
    made.finish()
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_is_said_or_ends_the_run_and_leaves_the_last_good_one(
    tmp_path, monkeypatch, asynchronous
):
    full_disk_at(monkeypatch, 2, 3)
    made, said = saver(tmp_path, asynchronous=asynchronous)
    for step in (1, 2):
        made.save(step, checkpoint_files(0.0), {"ranks": 1}, best=None)
    made.finish()
    (line,) = said
    assert line.startswith("warning: step 2 could not be saved (No space left on device: ")
    assert "the last complete checkpoint is step 1. Going on" in line
    assert made.last_step == 1
    assert [item.name for item in made.checkpoints.folder.iterdir()] == ["step-000001"]
    strict, _ = saver(tmp_path, asynchronous=asynchronous, on_error="stop")

    def save() -> None:
        strict.save(3, checkpoint_files(0.0), {"ranks": 1}, best=None)
        strict.finish()

    with pytest.raises(CheckpointError, match="step 3 could not be saved"):
        save()


def test_a_fault_of_ours_in_the_thread_is_not_taken_for_a_full_disk(tmp_path):
    made, _ = saver(tmp_path)
    complex_numbers = weights_file({"w": torch.zeros(1, dtype=torch.complex64)})
    made.save(1, checkpoint_files(0.0) | {"x": complex_numbers}, {"ranks": 1}, best=None)
    with pytest.raises(KeyError):
        made.finish()


def test_a_run_that_saves_beside_training_is_stopped_and_ends_the_same(run_config, monkeypatch, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(4, seed=11))
    config = run_config(data={"valid": str(valid)}, adapter={"dropout": 0.1}, checkpoint={"every_steps": 1})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    beside = ["checkpoint.asynchronous=true"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted, match="stopped at step 3 of 5, saved in"):
            tunesmith.sft(config, beside)
    resumed = tunesmith.sft(config, beside)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)
    for step in (4, 5):
        one, other = (run / "checkpoints" / f"step-{step:06d}" for run in (straight.run, resumed.run))
        # All but what holds times: the optimiser and the random states too.
        names = {file.name for file in one.iterdir()} - {"manifest.json", "trainer_state.json"}
        assert {"optimizer.safetensors", "rng-0.safetensors", "progress.json"} < names
        for name in sorted(names):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- a full disk


def test_a_run_goes_on_over_a_save_that_fails(run_config, monkeypatch, capsys):
    config = run_config(checkpoint={"every_steps": 1, "keep": 9})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    full_disk_at(monkeypatch, 3)
    result = tunesmith.sft(config)
    assert same_files(straight.final, result.final)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: step 3 could not be saved (No space left on device" in said
    assert [folder.name for folder in sorted((result.run / "checkpoints").iterdir())] == [
        f"step-{step:06d}" for step in (1, 2, 4, 5)
    ]
    with pytest.raises(
        CheckpointError, match=r"step 3 could not be saved .*last complete checkpoint is step 2"
    ):
        tunesmith.sft(config, ["run.name=strict", "checkpoint.on_save_error=stop"])


def test_a_stop_whose_save_failed_says_so(run_config, monkeypatch):
    full_disk_at(monkeypatch, 3)
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped at step 3 of 5, which could not be saved"):
        tunesmith.sft(run_config(checkpoint={"every_steps": 2}))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; skips where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_seen_before", [True, False], ids=["seen before", "met while writing"])
def test_on_a_disk_that_fills_up_and_is_emptied_nothing_is_lost(
    run_config, small_disk, monkeypatch, capsys, is_seen_before
):
    config = run_config(checkpoint={"every_steps": 1, "keep": 1})
    straight = tunesmith.sft(config)
    config["run"]["output_dir"] = str(small_disk / "runs")
    filler = small_disk / "filler"
    left = []

    def fill_and_empty(self, args, state, control, **_):
        on_step_end(self, args, state, control)
        if state.global_step == 3:
            with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(512))
        elif state.global_step == 4:
            filler.unlink()
            left.extend(sorted(folder.name for folder in small_disk.glob("runs/r/checkpoints/*")))

    on_step_end = Schedule.on_step_end
    monkeypatch.setattr(Schedule, "on_step_end", fill_and_empty)
    if not is_seen_before:
        monkeypatch.setattr(durable_files, "refuse_full_disk", lambda *_: None)
    result = tunesmith.sft(config)
    assert left == ["step-000002"]  # what step 3 found no room for is gone, what was there is not
    assert "step 3 could not be saved" in " ".join(capsys.readouterr().out.split())
    assert same_files(straight.final, result.final)
    # The metrics of step 3, for which there was no room either, are not lost.
    assert metrics_without_times(straight.run) == metrics_without_times(result.run)


def test_a_run_that_will_not_fit_is_refused_before_it_begins(run_config, monkeypatch, tmp_path):
    monkeypatch.setattr("tunesmith.training.disk.free_bytes", lambda _: 300_000)
    with pytest.raises(ConfigError, match=r"the run will need .* checkpoints of .* and 293.0 KiB are free"):
        tunesmith.sft(run_config())
    assert not (tmp_path / "runs" / "r").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_the_size_of_a_checkpoint_is_predicted(run_config, capsys, optimizer, monkeypatch):
    from tunesmith.training import session as session_module
    from tunesmith.training.disk import checkpoint_bytes

    predicted = []
    monkeypatch.setattr(
        session_module, "checkpoint_bytes", lambda *args: predicted.append(checkpoint_bytes(*args)) or 1
    )
    config = run_config(train={"optimizer": optimizer, "learning_rate": 1e-4})
    config["adapter"] = {"method": "none"}
    result = tunesmith.sft(config)
    written = sum(file.stat().st_size for file in (result.run / "checkpoints" / "step-000005").iterdir())
    # Up to what predicts tens of KiB for everything but weights and moments.
    assert written <= predicted[0] <= written + 2**16


# --- signals


def begin(config, tmp_path, *overrides):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "sft", str(file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_complete(run_config, tmp_path, number):
    """The save that the first one asked for never ends: its disk hangs."""
    (tmp_path / "hang.py").write_text(
        "import sys, time\n"
        "from tunesmith.training import durable_files\n"
        "write = durable_files.write\n"
        "def hanging(file, chunks):\n"
        "    if 'step-000003' in str(file):\n"
        "        print('hanging', flush=True)\n"
        "        time.sleep(10**6)\n"
        "    return write(file, chunks)\n"
        "durable_files.write = hanging\n"
        "from tunesmith.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    config = run_config(checkpoint={"every_steps": 1, "asynchronous": number == signal.SIGTERM})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "hang.py"), "sft", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "hanging" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    process.send_signal(number)
    while f"{number.name}: finishing" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in errors
    checkpoints = Checkpoints(tmp_path / "runs" / "r" / "checkpoints", keep=2)
    newest, damaged = checkpoints.newest()
    assert newest is not None
    assert (newest.step, damaged) == (2, [])
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    assert same_files(straight.final, tunesmith.sft(config).final)


def test_a_signal_during_an_evaluation_saves_that_step(run_config, monkeypatch, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(4, seed=11))
    config = run_config(data={"valid": str(valid)}, eval={"every_steps": 2}, checkpoint={"every_steps": 5})
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    from tunesmith.training.trainer import PackTrainer

    original, sent = PackTrainer.autocast, []

    def autocast(self):
        if self.state.global_step == 2 and not self.model.training and not sent:
            sent.append(True)  # a second one would end this process
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackTrainer, "autocast", autocast)
        with pytest.raises(Interrupted, match="stopped at step 2 of 5, saved"):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)


def run_on_two_ranks(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return subprocess.run(
        [*launcher, *where, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1200,
    )


def test_two_ranks_stop_at_the_same_step_and_go_on(run_config, tmp_path):
    """Only one of them is told, as by a cluster that knows one process."""
    config = run_config(rows=40, adapter={"dropout": 0.1}, train={"epochs": 2}, checkpoint={"keep": 9})
    files = {}
    for name in ("straight", "stopped"):
        config["run"]["name"] = name
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(config))
    (tmp_path / "stopping.py").write_text(
        "import os, signal, sys\n"
        "from tunesmith.training.callbacks import Schedule\n"
        "on_step_end = Schedule.on_step_end\n"
        "def stop(self, args, state, control, **kwargs):\n"
        "    on_step_end(self, args, state, control, **kwargs)\n"
        "    if state.global_step == 3 and args.process_index == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Schedule.on_step_end = stop\n"
        "from tunesmith.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    done = run_on_two_ranks("-m", "tunesmith", "sft", str(files["straight"]))
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = run_on_two_ranks(str(tmp_path / "stopping.py"), "sft", str(files["stopped"]))
    assert "stopped at step 3 of 20, saved in" in stopped.stderr, stopped.stderr[-3000:]
    folder = tmp_path / "runs" / "stopped"
    facts = Checkpoints(folder / "checkpoints", keep=2).at(3).facts()
    assert facts["random_states"] == ["rng-0.safetensors", "rng-1.safetensors"]
    states = [(folder / "checkpoints" / "step-000003" / name).read_bytes() for name in facts["random_states"]]
    assert states[0] != states[1]  # each draws its own dropout
    resumed = run_on_two_ranks("-m", "tunesmith", "sft", str(files["stopped"]))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    straight = tmp_path / "runs" / "straight"
    assert same_files(straight / "final", folder / "final")
    assert metrics_without_times(straight) == metrics_without_times(folder)
    # One process goes on with what two began: the same rows, and the same loss but for dropout's draws.
    shutil.rmtree(folder / "final")
    alone = tunesmith.sft(yaml.safe_load(files["stopped"].read_text()), ["run.resume=3"])
    lines, others = (read_metrics(path / "metrics.jsonl") for path in (straight, alone.run))
    assert [line["rows"] for line in lines] == [line["rows"] for line in others]
    assert json.loads((alone.run / "summary.json").read_text())["steps"] == 20


@pytest.mark.parametrize("what", ["skip", "rollback"])
def test_two_ranks_judge_a_step_alike_and_its_rows_are_those_of_both(run_config, tmp_path, monkeypatch, what):
    """One of them meets the nan."""
    config = run_config(train={"on_bad_step": what}, checkpoint={"every_steps": 2})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    (tmp_path / "spoiling.py").write_text(
        "import sys\n"
        "from tunesmith.training.trainer import PackTrainer\n"
        "compute_loss = PackTrainer.compute_loss\n"
        "def spoiled(self, *args, **kwargs):\n"
        "    share = compute_loss(self, *args, **kwargs)\n"
        "    if self.state.global_step == 2 and self.args.process_index == 1:\n"
        "        share = share * float('nan')\n"
        "        self._step_outcomes[-1] = self._step_outcomes[-1]._replace(loss=share.detach())\n"
        "    return share\n"
        "PackTrainer.compute_loss = spoiled\n"
        "from tunesmith.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = run_on_two_ranks(str(tmp_path / "spoiling.py"), "sft", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "r"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    (bad,) = json.loads((run / "bad_step.json").read_text())["steps"]
    assert {row["rank"] for row in bad["rows"]} == {0, 1}
    assert len({row["row"] for row in bad["rows"]}) == 4
    # One process that leaves the same step out.
    spoil(monkeypatch, 3)
    alone = tunesmith.sft(config | {"run": {**config["run"], "name": "alone"}}, ["train.on_bad_step=skip"])
    weights, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (run / "final", alone.final)
    )
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        # float32 sums in another order
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-6)
        assert "lora_B" not in name or value.abs().max() > 1e-3  # it was trained

"""`tunesmith checkpoints`: what it lists is what lies there, and `--verify` sees what sizes do not tell."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import conversations, make_tiny_model, write_rows

import tunesmith
from tunesmith import cli
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.inspect.checkpoints import checkpoints, list_checkpoints
from tunesmith.training.lock import LOCK, Lock
from tunesmith.training.run_folder import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps with checkpoints of 2, 4 and 5, evaluated at each step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = {
        "run": {"name": "r", "output_dir": str(folder)},
        "model": {"path": str(make_tiny_model(folder / "model")), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", conversations(20))),
            "valid": str(write_rows(folder / "valid.jsonl", conversations(4, seed=11))),
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 9},
    }
    return tunesmith.sft(config).run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def shown(run: Path, **options: bool) -> str:
    out = StringIO()
    console = Console(file=out, width=160)
    checkpoints(str(run), **({"verify": False, "as_json": False} | options), console=console)
    return out.getvalue()


def test_each_checkpoint_has_its_size_and_the_losses_of_its_step(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    listed = list_checkpoints(run, verify=False)
    assert [one.step for one in listed] == [2, 4, 5]
    for one in listed:
        (loss,) = (line["loss"] for line in lines if line["step"] == one.step and "loss" in line)
        assert (one.loss, one.eval_loss) == (loss, evals[one.step])
        assert one.bytes == sum(file.stat().st_size for file in Path(one.folder).iterdir())
        assert (one.state, one.problem, one.is_verified) == ("complete", None, None)
    best = json.loads((run / "best" / "manifest.json").read_text())["step"]
    assert [one.step for one in listed if one.is_best] == [step for step in (2, 4, 5) if step == best]
    table = shown(run).splitlines()
    assert table[0].split() == ["step", "size", "loss", "eval", "loss", "verified", "state"]
    assert [line.split()[0] for line in table[1:]] == ["2", "4", "5"]
    assert f"{listed[0].loss:.4f}" in table[1]
    assert f"{evals[2]:.4f}" in table[1]


def test_a_flipped_bit_is_seen_by_verify_alone(run: Path) -> None:
    file = run / "checkpoints" / "step-000004" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [one.state for one in list_checkpoints(run, verify=False)] == ["complete"] * 3
    listed = list_checkpoints(run, verify=True)
    assert [(one.state, one.is_verified) for one in listed] == [
        ("complete", True),
        ("damaged", False),
        ("complete", True),
    ]
    assert listed[1].problem == "optimizer.safetensors differs from what was saved (SHA-256)"
    with pytest.raises(CheckpointError, match=r": damaged: step 4\. Going on passes over"):
        shown(run, verify=True)


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("scheduler.safetensors", None, "scheduler.safetensors is missing"),
        ("adapter_model.safetensors", 9, "adapter_model.safetensors has 9 bytes, expected "),
        ("manifest.json", None, "it has no manifest.json"),
        ("manifest.json", 50, "its manifest cannot be read"),
    ],
)
def test_what_sizes_tell_is_seen_without_reading(
    run: Path, name: str, size: int | None, problem: str
) -> None:
    file = run / "checkpoints" / "step-000005" / name
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    *_, last = list_checkpoints(run, verify=False)
    assert last.state == "damaged"
    assert str(last.problem).startswith(problem)
    assert f"damaged: {problem}" in shown(run)


def test_saves_and_deletions_under_way_are_no_checkpoints(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / ".step-000006.tmp").mkdir()
    (folder / ".step-000006.tmp" / "optimizer.safetensors").write_bytes(bytes(100))
    (folder / "step-000002").rename(folder / ".step-000002.gone")
    lock = Lock(run / LOCK)
    lock.acquire()
    listed = list_checkpoints(run, verify=True)
    assert [(one.step, one.state) for one in listed] == [
        (4, "complete"),
        (5, "complete"),
        (None, "being deleted"),
        (None, "being written"),
    ]
    assert listed[-1].bytes == 100
    lock.release()
    states = [one.state for one in list_checkpoints(run, verify=False)]
    assert states == ["complete", "complete", *2 * ["left by a kill; the next start sees to it"]]


def test_a_folder_that_is_no_run_is_said_with_a_near_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runn: no such run folder. Did you mean .*/run\?"):
        checkpoints(str(tmp_path / "runn"), verify=False, as_json=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: is no run folder \(it has no config.yaml\)"):
        checkpoints(str(tmp_path / "empty"), verify=False, as_json=False)
    shutil.rmtree(run / "checkpoints")
    assert shown(run) == "no checkpoints yet\n"


def test_the_exit_code_of_verify_tells_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoints", str(run), "--verify", "--json"]) == 0
    assert [one["is_verified"] for one in json.loads(capsys.readouterr().out)] == [True, True, True]
    (run / "checkpoints" / "step-000002" / "more.bin").write_bytes(b"")
    assert cli.main(["checkpoints", str(run), "--verify", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["problem"] == "more.bin was not saved with it"
    assert err.startswith(f"failed: {run}: damaged: step 2. ")
    assert cli.main(["checkpoints", str(run / "no"), "--verify"]) == 2

"""`tunesmith verify-resume` says identical where it is, and finds what was changed before the resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import conversations, make_tiny_model, write_rows

from tunesmith import cli
from tunesmith.config import load_config
from tunesmith.errors import CheckpointError, ConfigError, TrainingError
from tunesmith.inspect import verify_resume as module
from tunesmith.inspect.verify_resume import Findings, first_difference, likely_cause, verdict, verify_resume
from tunesmith.training.manifest import read_manifest, seal


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with dropout on a tiny model, with an evaluation set and settings that a short run overrides."""
    folder = tmp_path_factory.mktemp("verify")
    config = {
        "run": {"output_dir": str(folder / "runs"), "resume": "never"},
        "model": {"path": str(make_tiny_model(folder / "model")), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.2},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", conversations(20))),
            "valid": str(write_rows(folder / "valid.jsonl", conversations(4, seed=11))),
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "log_every_steps": 5},
        "eval": {"answer_rows": 2, "early_stopping_patience": 1},
    }
    written = folder / "config.yaml"
    written.write_text(yaml.safe_dump(config))
    return written


def change_between_stop_and_resume(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Alter the first floats or bytes of a file of the checkpoint that is gone on from, and seal it again."""
    original = module._train

    def train(config: Path, *overrides: str, until: Path | None = None) -> None:
        if any(override.startswith("run.resume=") for override in overrides):
            checkpoint = config.parent.with_name("resumed") / "checkpoints" / "step-000002"
            with safe_open(checkpoint / name, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                metadata = opened.metadata()
            for tensor in tensors.values():
                if name.startswith("rng"):
                    tensor.copy_(torch.Generator().manual_seed(99).get_state())
                elif tensor.ndim:  # not the optimiser's count of steps
                    tensor.add_(0.01)
            save_file(tensors, checkpoint / name, metadata=metadata)
            facts = read_manifest(checkpoint)
            (checkpoint / "manifest.json").unlink()
            seal(checkpoint, {key: value for key, value in facts.items() if key != "files"})
        original(config, *overrides, until=until)

    monkeypatch.setattr(module, "_train", train)


def test_a_run_that_resumes_exactly_is_said_to_be_identical(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    assert cli.main(["verify-resume", str(file), "--at", "2", "--steps", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "1 of 3: 3 steps straight",
        "2 of 3: the same, killed when step 2 is saved",
        "3 of 3: going on from step 2",
    ]
    assert out[3].startswith("identical: ")
    # 3 steps, and evaluations before training, at step 2 and at the end.
    assert out[3].endswith("6 lines of metrics (without times)")
    assert not list(tmp_path.iterdir())
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("name", "difference", "cause"),
    [
        ("rng-0.safetensors", "loss ", "the random state: dropout"),
        pytest.param("optimizer.safetensors", "loss ", "the optimiser: ", marks=pytest.mark.long),
    ],
)
def test_what_was_changed_between_stop_and_resume_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, difference: str, cause: str
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    change_between_stop_and_resume(monkeypatch, name)
    step = 4 if name == "optimizer.safetensors" else 3  # the first loss is of the weights that were saved
    with pytest.raises(CheckpointError) as error:
        verify_resume(load_config(file), at=2, steps=4)
    first, *_, last, kept = str(error.value).splitlines()
    assert first.startswith(f"the resumed run differs at step {step}: {difference}")
    assert last.startswith(f"Likely cause: {cause}")
    folder = Path(kept.removeprefix("Both runs are kept in ").removesuffix("."))
    assert sorted(run.name for run in folder.iterdir() if run.is_dir()) == ["resumed", "straight"]


def test_impossible_steps_and_runs_that_fail_are_said(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    config = load_config(file)
    for at, steps in ((0, None), (3, 3)):
        with pytest.raises(ConfigError, match=f"--at {at} --steps {steps or 0}: expected a step before"):
            verify_resume(config, at=at, steps=steps)
    with pytest.raises(TrainingError, match=r"(?s)straight ended with exit code 2:\n.*error: nowhere"):
        verify_resume(load_config(file, ["data.train=nowhere.jsonl"]), at=1, steps=2)
    assert not list(tmp_path.iterdir())


# --- what differs, and why: without runs

LINE = {"step": 3, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "rows": 4}


@pytest.mark.parametrize(
    ("changes", "at_end", "cause"),
    [
        ({"rows": 3, "loss": 2.0}, {"random state": "x"}, "the place in the data"),
        ({"learning_rate": 0.2}, {"schedule": "x", "weights": "x"}, "the schedule"),
        ({"loss": 2.0}, {"random state": "x", "weights": "x"}, "the random state: dropout"),
        ({"loss": 2.0}, {"weights": "x", "optimiser": "x"}, "the weights"),
        ({"step": 4, "loss": 2.0}, {"weights": "x", "optimiser": "x"}, "the optimiser: "),
        ({"grad_norm": 2.1}, {"weights": "x", "optimiser": "x"}, "gradients"),
        (None, {"random state": "x"}, "the random state alone"),
        (None, {"optimiser": "x"}, "the optimiser, or"),
        (None, {"counters": "x"}, "the counters"),
    ],
)
def test_the_likely_cause_follows_from_what_differs(changes, at_end, cause) -> None:
    lines = None
    if changes is not None:
        step = changes.get("step", 3)
        lines = (LINE | {"step": step}, LINE | changes)
    found = Findings({}, at_end, lines)
    assert likely_cause(found, 2).startswith(cause)
    assert "Likely cause: " + cause in str(verdict(found, 2))


def test_a_difference_before_the_stop_is_no_fault_of_the_resume() -> None:
    found = Findings(
        {"weights": "model.safetensors: tensor w"}, {"weights": "x"}, (LINE, LINE | {"loss": 2.0})
    )
    said = str(verdict(found, 2))
    assert said.startswith("the resumed run differs at step 2, before the stop: weights (model.safetensors: ")
    assert "Likely cause: not the resume." in said


def test_times_are_not_compared_and_a_missing_line_is(tmp_path: Path) -> None:
    runs = []
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        line = LINE | {"step_s": seconds, "tokens_per_s": 1 / seconds}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(module.metrics_without_times(tmp_path / name))
    assert first_difference(*runs) is None
    assert verdict(Findings({}, {}, None), 2) is None
    assert first_difference(runs[0], []) == (LINE, None)
    assert "only the straight run has this line" in str(verdict(Findings({}, {}, (LINE, None)), 2))

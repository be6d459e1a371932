"""Trackers: a missing one names its extra, a failing one is reported once and ends nothing."""

from __future__ import annotations

import types

import pytest

import tunesmith
from tunesmith.errors import MissingExtraError
from tunesmith.training import trackers
from tunesmith.training.run_folder import read_metrics


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab", "trackio"])
def test_a_tracker_that_is_not_installed_names_the_extra(run_config, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'tunesmith\[{name}\]'"):
        tunesmith.sft(run_config(tracking={"report_to": [name]}))


class Recorder:
    """Stands in for a tracker's callback: keeps what it is told, and can fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.losses, self.fails_at, self.calls = [], fails_at, 0

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ConnectionError("no route to host")
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, *args, **kwargs):
        pass


def use(monkeypatch, recorder):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: types.ModuleType("wandb"))
    monkeypatch.setitem(trackers._BUILDERS, "wandb", lambda config, folder: recorder)


def test_a_tracker_is_told_what_stands_in_the_metrics_file(run_config, monkeypatch):
    recorder = Recorder()
    use(monkeypatch, recorder)
    result = tunesmith.sft(run_config(tracking={"report_to": ["wandb"]}))
    lines = [line["loss"] for line in read_metrics(result.run / "metrics.jsonl")]
    assert recorder.losses == lines
    assert len(lines) == 5


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(run_config, monkeypatch, capsys):
    recorder = Recorder(fails_at=2)
    use(monkeypatch, recorder)
    result = tunesmith.sft(run_config(tracking={"report_to": ["wandb"]}))
    assert result.summary["steps"] == 5
    out = capsys.readouterr().out
    assert out.count("wandb failed in on_log and is off for the rest of the run: no route to host") == 1
    assert recorder.calls == 2


def test_a_tracker_that_cannot_start_is_reported_and_the_run_goes_on(run_config, monkeypatch, capsys):
    def broken(config, folder):
        raise RuntimeError("no login")

    use(monkeypatch, None)
    monkeypatch.setitem(trackers._BUILDERS, "wandb", broken)
    assert tunesmith.sft(run_config(tracking={"report_to": ["wandb"]})).summary["steps"] == 5
    assert "wandb failed to start and is off for this run: no login" in capsys.readouterr().out


def test_tensorboard_holds_the_losses_of_the_run(run_config):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tunesmith.sft(run_config(tracking={"report_to": ["tensorboard"]}))
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    expected = [line["loss"] for line in read_metrics(result.run / "metrics.jsonl")]
    assert losses == pytest.approx(expected, rel=1e-6)

"""Steps with a loss or gradient that is not finite, or a loss that leaps: stop, skip, roll back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from training.test_resume import metrics_without_times, same_files, stop_after

import tunesmith
from tunesmith.errors import Interrupted, TrainingError
from tunesmith.training.bad_step import StepGuard
from tunesmith.training.callbacks import Schedule
from tunesmith.training.run_folder import read_metrics
from tunesmith.training.state_files import read_state
from tunesmith.training.trainer import PackTrainer


def spoil(monkeypatch, *steps: int, value: float = math.nan):
    """The loss of these steps (or, with a finite value, `value` times the loss)."""
    original = PackTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share = original(self, model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step + 1 in steps:
            share = share * value
            self._step_outcomes[-1] = self._step_outcomes[-1]._replace(loss=share.detach())
        return share

    monkeypatch.setattr(PackTrainer, "compute_loss", compute_loss)


def guard(tmp_path, **settings) -> StepGuard:
    return StepGuard(tmp_path / "bad_step.json", **{"on_bad": "skip", "spike_factor": None} | settings)


# --- what is bad


def test_what_is_not_finite_is_bad_and_nothing_else_without_a_spike_factor(tmp_path):
    judge = guard(tmp_path)
    for _ in range(30):
        judge.passed(1.0)
    assert judge.fault(1e9, 1e9) is None
    assert judge.fault(1.0, None) is None
    assert judge.fault(math.nan, 1.0) == "the loss is nan"
    assert judge.fault(math.inf, 1.0) == "the loss is inf"
    assert judge.fault(1.0, math.inf) == "the gradient norm is inf"


def test_a_spike_is_a_loss_above_the_factor_times_the_median_of_64_steps(tmp_path):
    judge = guard(tmp_path, spike_factor=3.0)
    for loss in range(1, 16):
        judge.passed(float(loss))
    assert judge.fault(1e9, 1.0) is None  # 15 losses are too few to say
    judge.passed(16.0)
    # The median of 1 to 16 is 8.5, three times that 25.5.
    assert judge.fault(25.5, 1.0) is None
    assert judge.fault(25.6, 1.0) == "the loss is 25.6000, over 3 times the 8.5000 of late"
    for _ in range(64):
        judge.passed(1.0)  # the others are forgotten
    assert judge.fault(3.01, 1.0) is not None


def test_a_guard_goes_on_as_it_was(tmp_path):
    first, second = guard(tmp_path, spike_factor=2.0), guard(tmp_path, spike_factor=2.0)
    for loss in range(1, 40):
        first.passed(float(loss))
    first.leave_out(7, "the loss is nan")
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert second.skipped == {7: "the loss is nan"}
    assert second.fault(41.0, None) == first.fault(41.0, None) is not None


# --- what is done


def test_a_skipped_step_leaves_no_trace_in_the_weights(run_config, monkeypatch):
    """Nor in the optimiser's moments and count of steps."""
    config = run_config(checkpoint={"every_steps": 1, "keep": 9})
    spoil(monkeypatch, 3)
    result = tunesmith.sft(config, ["train.on_bad_step=skip"])
    folder = result.run / "checkpoints"
    before, after = (
        (folder / f"step-{step:06d}" / "adapter_model.safetensors").read_bytes() for step in (2, 3)
    )
    assert before == after
    states = [read_state(folder / f"step-{step:06d}" / "optimizer.safetensors")["state"] for step in (2, 3)]
    for old, new in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    lines = read_metrics(result.run / "metrics.jsonl")
    assert [(line["step"], line.get("skipped")) for line in lines] == [
        (1, None),
        (2, None),
        (3, "the loss is nan"),
        (4, None),
        (5, None),
    ]
    # The schedule goes by the number of the step, as if nothing had been.
    straight = tunesmith.sft(
        config | {"run": {**config["run"], "name": "straight"}}, ["train.on_bad_step=skip"]
    )
    assert [line.get("learning_rate") for line in lines] == [
        line.get("learning_rate") for line in read_metrics(straight.run / "metrics.jsonl")
    ]
    assert result.summary["rows"] == 16  # the four of step 3 were not trained


def test_the_mean_over_logged_steps_leaves_the_skipped_one_out(run_config, monkeypatch):
    spoil(monkeypatch, 3)
    every, fifth = (
        tunesmith.sft(
            run_config(), [f"run.name=every{n}", "train.on_bad_step=skip", f"train.log_every_steps={n}"]
        )
        for n in (1, 5)
    )
    losses = [line["loss"] for line in read_metrics(every.run / "metrics.jsonl") if "loss" in line]
    (line,) = [line for line in read_metrics(fifth.run / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 4
    assert line["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert line["rows"] == 16


def test_the_report_of_a_bad_step_has_each_row_with_its_own_loss_and_targets(run_config, monkeypatch):
    spoil(monkeypatch, 2, value=math.inf)
    config = run_config()
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is inf; nothing was changed .*train.jsonl:\d+"
    ):
        tunesmith.sft(config)
    run = Path(config["run"]["output_dir"]) / config["run"]["name"]
    (bad,) = json.loads((run / "bad_step.json").read_text())["steps"]
    assert (bad["step"], bad["fault"], bad["done"], bad["loss"]) == (2, "the loss is inf", "stop", "inf")
    assert len(bad["rows"]) == 4
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    for entry in bad["rows"]:
        messages = rows[int(entry["row"].rpartition(":")[2]) - 1]["messages"]
        assert all(message["content"] in entry["text"] for message in messages)
        answers = sum(len(m["content"]) + 2 for m in messages if m["role"] == "assistant")
        assert sum(entry["targets"]) == answers
        assert len(entry["targets"]) == len(entry["input_ids"]) == len(entry["weights"])
    # Each row's mean cross-entropy by a model that knows no packs, with the weights before step 2, which a
    # run of five steps that is stopped after the first has too.
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        tunesmith.sft(config | {"run": {**config["run"], "name": "again"}})
    again = run.parent / "again" / "checkpoints" / "step-000001"
    model = AutoPeftModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    for entry in bad["rows"]:
        ids, targets = torch.tensor([entry["input_ids"]]), torch.tensor(entry["targets"]).bool()
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[targets[1:]], ids[0, 1:][targets[1:]])
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_rolling_back_ends_as_skipping_does(run_config, monkeypatch):
    """What lies between the checkpoint and the bad step is trained again, and to the same weights; the bad
    step is left out, and not met again and again."""
    config = run_config(
        adapter={"dropout": 0.1}, train={"epochs": 2, "neftune_alpha": 5}, checkpoint={"every_steps": 3}
    )
    spoil(monkeypatch, 5, 9)
    skipped = tunesmith.sft(config | {"run": {**config["run"], "name": "skip"}}, ["train.on_bad_step=skip"])
    rolled = tunesmith.sft(config, ["train.on_bad_step=rollback"])
    assert same_files(skipped.final, rolled.final)
    lines = metrics_without_times(rolled.run)
    assert lines == metrics_without_times(skipped.run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if "skipped" in line] == [5, 9]
    steps = json.loads((rolled.run / "bad_step.json").read_text())["steps"]
    assert [(bad["step"], bad["done"]) for bad in steps] == [(5, "rollback"), (9, "rollback")]


def test_rolling_back_loads_the_state_from_disk(run_config, monkeypatch, capsys):
    """Weights that went bad in memory are mended by it, which skipping could not."""
    config = run_config(checkpoint={"every_steps": 2})
    with monkeypatch.context() as patched:
        spoil(patched, 4)
        skipped = tunesmith.sft(
            config | {"run": {**config["run"], "name": "skipped"}}, ["train.on_bad_step=skip"]
        )
    original = Schedule.on_step_end
    broken = []

    def break_weights(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3 and not broken:
            broken.append(True)
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    if parameter.requires_grad:
                        parameter.fill_(math.nan)

    monkeypatch.setattr(Schedule, "on_step_end", break_weights)
    rolled = tunesmith.sft(config, ["train.on_bad_step=rollback"])
    assert "step 4: the loss is nan; back to step 2" in " ".join(capsys.readouterr().out.split())
    one, other = (
        [line.get("loss") for line in metrics_without_times(result.run)] for result in (skipped, rolled)
    )
    assert other[:3] == one[:3]
    assert other[3] is None  # left out, since it was bad once
    assert other[4] == one[4]
    assert same_files(skipped.final, rolled.final)


def test_without_a_checkpoint_to_go_back_to_the_step_is_skipped(run_config, monkeypatch):
    spoil(monkeypatch, 2)
    result = tunesmith.sft(run_config(), ["train.on_bad_step=rollback"])
    lines = read_metrics(result.run / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [2]


@pytest.mark.parametrize("what", ["skip", "rollback"])
@pytest.mark.parametrize("stop_at", [4, 6], ids=["before", "after"])
def test_a_resumed_run_leaves_out_the_same_steps(run_config, monkeypatch, what, stop_at):
    config = run_config(adapter={"dropout": 0.1}, train={"epochs": 2, "on_bad_step": what})
    config["checkpoint"] = {"every_steps": 3}
    spoil(monkeypatch, 5)
    straight = tunesmith.sft(config | {"run": {**config["run"], "name": "straight"}})
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        with pytest.raises(Interrupted):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)


def test_a_step_left_out_after_the_last_checkpoint_stays_left_out(run_config, monkeypatch):
    """It was bad by a fault that does not come again, such as a flipped bit; the process died before the next
    checkpoint."""
    config = run_config(train={"on_bad_step": "skip"}, checkpoint={"every_steps": 2})
    config["run"]["name"] = "straight"
    with monkeypatch.context() as patch:
        spoil(patch, 3)
        straight = tunesmith.sft(config)
    config["run"]["name"] = "killed"

    class Died(BaseException):
        pass

    original = Schedule.on_step_end

    def die(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise Died

    with monkeypatch.context() as patch:
        spoil(patch, 3)
        patch.setattr(Schedule, "on_step_end", die)
        with pytest.raises(Died):
            tunesmith.sft(config)
    resumed = tunesmith.sft(config)  # without the fault
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)
    assert [line["step"] for line in read_metrics(resumed.run / "metrics.jsonl") if "skipped" in line] == [3]


def test_a_run_that_stopped_at_a_bad_step_goes_on_without_it(run_config, monkeypatch):
    config = run_config(checkpoint={"every_steps": 1})
    spoil(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"train.on_bad_step=skip"):
        tunesmith.sft(config)
    assert tunesmith.sft(config, ["train.on_bad_step=skip"]).summary["steps"] == 5


def test_many_bad_steps_in_a_row_end_the_run(run_config, monkeypatch):
    spoil(monkeypatch, *range(2, 20))
    with pytest.raises(TrainingError, match="step 7: bad, as the 5 steps before it"):
        tunesmith.sft(run_config(train={"epochs": 4}), ["train.on_bad_step=skip"])


def test_a_spike_is_skipped(run_config, monkeypatch):
    spoil(monkeypatch, 18, value=3.0)
    config = run_config(train={"epochs": 4, "on_bad_step": "skip", "spike_factor": 2.0})
    result = tunesmith.sft(config)
    skipped = [line for line in read_metrics(result.run / "metrics.jsonl") if "skipped" in line]
    assert [line["step"] for line in skipped] == [18]
    assert "over 2 times the" in skipped[0]["skipped"]


def test_the_rows_of_a_bad_step_are_looked_at_without_touching_the_random_state(run_config, monkeypatch):
    spoil(monkeypatch, 2)
    config = run_config(adapter={"dropout": 0.2}, train={"on_bad_step": "skip"})
    one = tunesmith.sft(config | {"run": {**config["run"], "name": "one"}})
    monkeypatch.setattr(PackTrainer, "_rows_of_step", lambda self: [])
    other = tunesmith.sft(config | {"run": {**config["run"], "name": "other"}})
    assert same_files(one.final, other.final)

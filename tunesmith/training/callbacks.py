"""What happens between steps: when to log, evaluate and save; metrics.jsonl; the best model; signals.

Each callback does one thing and is handed what it needs; the trainer knows none of them.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from tunesmith.models.cost import Cost
from tunesmith.models.devices import peak_memory_gib

Metrics = dict[str, Any]


class Schedule(TrainerCallback):
    """Says when to log, evaluate and save. `None` for an interval means the end of each epoch; the last step
    always evaluates and saves."""

    def __init__(
        self,
        *,
        steps_per_epoch: int,
        log_every: int,
        evaluate_every: int | None,
        save_every: int | None,
        evaluates: bool,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.log_every = log_every
        self.evaluate_every = evaluate_every or steps_per_epoch
        self.save_every = save_every or steps_per_epoch
        self.evaluates = evaluates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        control.should_log = step % self.log_every == 0 or is_last
        control.should_evaluate = self.evaluates and (step % self.evaluate_every == 0 or is_last)
        control.should_save = step % self.save_every == 0 or is_last


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the step, save and end the run; a second one ends it at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.uninstall()  # so that a second signal does what it always did
        self.received = number
        self._say(f"{signal.Signals(number).name}: finishing this step and saving; again to leave at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl: one line a logged step, one an evaluation, and hands each to `listeners`."""

    def __init__(
        self, file: Path, cost: Cost, peak_flops: float, counts: Callable[[], Any], num_ranks: int
    ) -> None:
        self.file = file
        self.listeners: list[Callable[[Metrics], None]] = []
        self._cost = cost
        self._peak_flops = peak_flops * num_ranks
        self._counts = counts
        self._since_log: list[tuple[Any, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counts = self._counts()
        self._since_log.append((counts, time.perf_counter() - counts.started_at))

    def on_log(self, args: Any, state: Any, control: Any, logs: Metrics, **_: Any) -> None:
        if "loss" in logs:
            line = {
                key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs
            } | self._speed()
        elif "eval_loss" in logs:
            line = {key: value for key, value in logs.items() if key.startswith("eval_")}
        else:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)} | line
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        for listener in self.listeners:
            listener(line)

    def _speed(self) -> Metrics:
        """Counts since the last logged line, and rates by the time of the steps alone (no evaluation, no
        saving)."""
        seconds = sum(s for _, s in self._since_log)
        rows, tokens, targets, computed = (
            sum(getattr(counts, name) for counts, _ in self._since_log)
            for name in ("rows", "tokens", "targets", "computed_tokens")
        )
        self._since_log.clear()
        return {
            "rows": rows,
            "tokens": tokens,
            "target_tokens": targets,
            "computed_tokens": computed,
            "tokens_per_s": tokens / seconds,
            "target_tokens_per_s": targets / seconds,
            "mfu": self._cost.flops(tokens, targets) / seconds / self._peak_flops,
            "peak_memory_gib": peak_memory_gib(),
            "step_s": seconds,
        }


class KeepBest(TrainerCallback):
    """Saves the best model by eval loss, and stops after `patience` evaluations in a row without a better
    one.

    What was best before a resume is read from the trainer's state, so that a resumed run decides the same."""

    def __init__(
        self, save: Callable[[int, float], None], patience: int | None, say: Callable[[str], None]
    ) -> None:
        self._save = save
        self._patience = patience
        self._say = say

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Metrics, **_: Any) -> None:
        if not state.global_step:
            return  # the untouched model
        losses = [
            (line["eval_loss"], line["step"])
            for line in state.log_history
            if "eval_loss" in line and line["step"]
        ]
        best_loss, best_step = min(losses)
        state.best_metric, state.best_global_step = best_loss, best_step
        if best_step == state.global_step:
            self._save(best_step, best_loss)
        since_best = sum(step > best_step for _, step in losses)
        if self._patience is not None and since_best >= self._patience:
            self._say(
                f"early stop at step {state.global_step}: no lower eval loss than {best_loss:.4f} "
                f"(step {best_step}) in {since_best} evaluations"
            )
            control.should_training_stop = control.should_save = True

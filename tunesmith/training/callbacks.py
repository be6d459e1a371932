"""What happens between steps: when to log, evaluate and save; metrics.jsonl; the best model; signals.

Each callback does one thing and is handed what it needs; the trainer knows none of them.
"""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from tunesmith.models.adalora import allocate
from tunesmith.models.cost import Cost
from tunesmith.models.devices import peak_memory_gib
from tunesmith.packing.steps import StepRows
from tunesmith.training.objectives import means
from tunesmith.training.random_state import random_state, restore_random_state
from tunesmith.training.run_folder import eval_losses

Metrics = dict[str, Any]
_ECHO_S = 2.0  # within which a rank takes a second signal for the first one again


class Schedule(TrainerCallback):
    """Says when to log, evaluate and save. `None` for an interval means the end of each epoch; the last step
    always evaluates and saves."""

    def __init__(
        self,
        *,
        steps: StepRows,
        log_every: int,
        evaluate_every: int | None,
        save_every: int | None,
        evaluates: bool,
    ) -> None:
        self.steps = steps
        self.log_every = log_every
        self.evaluate_every = evaluate_every
        self.save_every = save_every
        self.evaluates = evaluates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        state.epoch = self.steps.epochs(step)  # transformers' does not know of a batch size that warms up
        control.should_log = step % self.log_every == 0 or is_last
        control.should_evaluate = self.evaluates and (self._is_due(step, self.evaluate_every) or is_last)
        control.should_save = self._is_due(step, self.save_every) or is_last

    def _is_due(self, step: int, every: int | None) -> bool:
        return self.steps.ends_epoch(step) if every is None else step % every == 0


class BeforeFirstStep(TrainerCallback):
    """Calls something once, when the engine has the model and no step has been made."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class RankBudget(TrainerCallback):
    """Has AdaLoRA judge its ranks after each step, while the gradients are there."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        allocate(self._model, state.global_step + 1)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the step (and an evaluation under way), save and end the run; a second one
    ends it at once. Of several ranks it is enough that one is told."""

    def __init__(self, say: Callable[[str], None], num_ranks: int) -> None:
        self.received: int | None = None
        self._received_at_s = 0.0
        self._say = say
        self._num_ranks = num_ranks
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            # Both the scheduler (or terminal) and the launcher of several ranks pass a signal on.
            if time.monotonic() - self._received_at_s > _ECHO_S:
                self._let_go()
                signal.raise_signal(number)
            return
        if self._num_ranks == 1:
            self._let_go()  # so that a second signal does what it always did, even where Python waits
        self.received, self._received_at_s = number, time.monotonic()
        self._say(f"{signal.Signals(number).name}: finishing this step and saving; again to leave at once")

    def _let_go(self) -> None:
        """Uninstall; what a script's background jobs begin with (SIGINT ignored) would make it undying."""
        numbers = [number for number, handler in self._before.items() if handler is signal.SIG_IGN]
        self.uninstall()
        for number in numbers:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        number = self.received
        if self._num_ranks > 1:  # or the ranks would stop at different steps, and wait for each other
            agreed = torch.tensor(number or 0, device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            number = int(agreed) or None
            if number is not None and self.received is None:
                self.received, self._received_at_s = number, time.monotonic()
        if number is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._num_ranks == 1 and self.received is not None:
            control.should_save = control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl: one line a logged step, one an evaluation, one a step left out, and hands each
    but the last kind to `listeners`. Lines that a full disk does not take are written when it does."""

    def __init__(
        self,
        file: Path,
        cost: Cost,
        peak_flops: float,
        counts: Callable[[], Any],
        num_ranks: int,
        say: Callable[[str], None],
    ) -> None:
        self.file = file
        self.listeners: list[Callable[[Metrics], None]] = []
        self._cost = cost
        self._peak_flops = peak_flops * num_ranks
        self._counts = counts
        self._say = say
        self._since_log: list[tuple[Any, float]] = []
        self._unwritten = b""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counts = self._counts()
        self._since_log.append((counts, time.perf_counter() - counts.started_at))
        if counts.fault is not None:
            self._say(f"warning: step {state.global_step} left out: {counts.fault}")
            self._write(state, {"skipped": counts.fault})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since_log.clear()  # where a run goes back to a checkpoint, training begins again

    def on_log(self, args: Any, state: Any, control: Any, logs: Metrics, **_: Any) -> None:
        if "loss" in logs:
            line = {
                key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs
            } | self._speed()
        elif "eval_loss" in logs:
            line = {key: value for key, value in logs.items() if key.startswith("eval_")}
        else:
            return
        line = self._write(state, line)
        for listener in self.listeners:
            listener(line)

    def _write(self, state: Any, content: Metrics) -> Metrics:
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)} | content
        if state.is_world_process_zero:
            self._unwritten += (json.dumps(line) + "\n").encode()
            self._append()
        return line

    def _append(self) -> None:
        try:
            with self.file.open("ab", buffering=0) as stream:
                while self._unwritten:
                    self._unwritten = self._unwritten[stream.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # The file may end within a line, which the next write goes on with.

    def _speed(self) -> Metrics:
        """Counts since the last logged line, and rates by the time of the steps alone (no evaluation, no
        saving)."""
        seconds = sum(s for _, s in self._since_log)
        rows, tokens, targets, computed = (
            sum(getattr(counts, name) for counts, _ in self._since_log)
            for name in ("rows", "tokens", "targets", "computed_tokens")
        )
        figures: dict[str, tuple[float, float]] = {}
        for name, (total, number) in (item for c, _ in self._since_log for item in c.figures.items()):
            before = figures.get(name, (0.0, 0.0))
            figures[name] = (before[0] + total, before[1] + number)
        self._since_log.clear()
        return {
            **means(figures),
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


class Samples(TrainerCallback):
    """Has the model go on with each prompt after an evaluation, and writes samples.jsonl, a line each.
    `write` gives the texts at a step; what it draws from the random generators, they do not lose."""

    def __init__(
        self,
        file: Path,
        prompts: list[str],
        write: Callable[[int], list[str]],
        say: Callable[[str], None],
    ) -> None:
        self.file = file
        self._prompts = prompts
        self._write = write
        self._say = say

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = random_state()
        try:
            texts = self._write(state.global_step)
        finally:
            restore_random_state(before)
        if not state.is_world_process_zero:
            return
        lines = [
            {"step": state.global_step, "prompt": prompt, "text": text}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        with self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for line in lines:
            shown = " ".join(f"{line['prompt']}[{line['text']}]".split())
            self._say(f"step {line['step']}  {shown if len(shown) <= 200 else shown[:197] + '...'}")


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
        state.best_metric, state.best_global_step = min(eval_losses(state.log_history))
        if state.best_global_step == state.global_step:
            self._save(state.best_global_step, state.best_metric)
        if self.is_over(state.log_history):
            self._say(
                f"early stop at step {state.global_step}: no lower eval loss than {state.best_metric:.4f} "
                f"(step {state.best_global_step}) in {self._patience} evaluations"
            )
            control.should_training_stop = control.should_save = True

    def is_over(self, log_history: list[Metrics]) -> bool:
        """Whether a run with these evaluations has stopped early."""
        losses = eval_losses(log_history)
        if self._patience is None or not losses:
            return False
        _, best_step = min(losses)
        return sum(step > best_step for _, step in losses) >= self._patience

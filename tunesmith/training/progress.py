"""What a person sees while a run goes on: one live line on a terminal, a line now and then where there is
none."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Prints notes and the state of training to a console, which knows about NO_COLOR and terminals."""

    def __init__(self) -> None:
        # Of many ranks the first one speaks.
        self.console = Console(quiet=int(os.environ.get("RANK", "0")) != 0)
        # rich would end the program where the reader of our output (`| head`) goes away; the run must go on.
        self.console.on_broken_pipe = self._go_quiet  # type: ignore[method-assign]

    def _go_quiet(self) -> None:
        self.console.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(self, message: str) -> None:
        """One line for the reader; warnings stand out."""
        if message.startswith("warning: "):
            self.console.print(
                f"[yellow]warning:[/yellow] {escape(message.removeprefix('warning: '))}",
                highlight=False,
                soft_wrap=True,
            )
        else:
            self.console.print(escape(message), highlight=False, soft_wrap=True)


class ProgressLine(TrainerCallback):
    """step, epoch, loss, eval loss, speed, time left, memory. Fed by MetricsFile; drawn by rich."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._eval: dict[str, Any] = {}  # the last evaluation's line
        self._started_at = self._printed_at = 0.0
        self._first_step = self._max_steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first_step, self._max_steps = state.global_step, state.max_steps
        self._started_at = time.perf_counter()
        if self._console.is_terminal and state.is_world_process_zero:
            self._live = Live(Text("first step ..."), console=self._console, refresh_per_second=4)
            self._live.start()

    def close(self) -> None:
        """End the live line, whatever ended training."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, line: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        self._eval = line if "eval_loss" in line else self._eval
        if "loss" not in line:
            if line["step"]:
                shown = f"step {line['step']}  eval loss {line['eval_loss']:.4f}" + _more_of(line)
                self._console.print(shown, highlight=False, soft_wrap=True)
            return
        text = self._text(line)
        if self._live is not None:
            self._live.update(Text(text))
        elif (
            line["step"] == self._max_steps
            or time.perf_counter() - self._printed_at >= _SECONDS_BETWEEN_LINES
        ):
            self._printed_at = time.perf_counter()
            self._console.print(text, highlight=False, soft_wrap=True)

    def _text(self, line: dict[str, Any]) -> str:
        done = line["step"] - self._first_step
        left = (time.perf_counter() - self._started_at) / max(done, 1) * (self._max_steps - line["step"])
        parts = [
            f"step {line['step']}/{self._max_steps}",
            f"epoch {line['epoch']:.2f}",
            f"loss {line['loss']:.4f}",
        ]
        if self._eval:
            parts.append(f"eval {self._eval['eval_loss']:.4f}" + _more_of(self._eval))
        parts += [
            f"{line['tokens_per_s']:,.0f} tokens/s",
            f"{_clock(left)} left",
            f"{line['peak_memory_gib']:.1f} GiB",
        ]
        return "  ".join(parts)


def _more_of(line: dict[str, Any]) -> str:
    """Perplexity and bits per byte, or how pairs of answers are told apart, if an evaluation has them."""
    if "eval_reward_accuracy" in line:
        return f"  accuracy {line['eval_reward_accuracy']:.3f}  margin {line['eval_reward_margin']:.3f}"
    if "eval_perplexity" not in line:
        return ""
    return f"  perplexity {line['eval_perplexity']:.4g}  {line['eval_bits_per_byte']:.4f} bits/byte"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

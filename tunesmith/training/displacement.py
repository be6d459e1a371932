"""Says when chosen answers become less likely while their margin over rejected ones grows: the loss falls,
and what the model writes may turn away from both (Razin et al. 2024, arXiv:2410.08847, "likelihood
displacement")."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

_FALL_NATS = 1.0  # of a mean answer; less is told apart from chance by few data sets
_STEPS = 20  # whose mean is looked at where nothing is evaluated


class DisplacementWatch:
    """Looks at each line of metrics.jsonl, and warns once. `beta` makes nats of rewards; None where rewards
    are no log-ratios to a reference."""

    def __init__(self, beta: float | None, advice: str, say: Callable[[str], None]) -> None:
        self._beta = beta
        self._advice = advice
        self._say = say
        self._before: dict[str, Any] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=_STEPS)
        self._is_evaluated = self._has_warned = False

    def look(self, line: dict[str, Any], *, silently: bool = False) -> None:
        """Take in a line; `silently` where a reader has been told of it before."""
        found = self._of_evaluation(line) if "eval_logp_chosen" in line else self._of_steps(line)
        if found is None or self._has_warned:
            return
        self._has_warned = True
        if not silently:
            self._say(f"warning: step {line['step']}: {found}. {self._advice}")

    def _of_evaluation(self, line: dict[str, Any]) -> str | None:
        self._is_evaluated = True
        if self._before is None:
            self._before = line
            return None
        before, after = self._before["eval_logp_chosen"], line["eval_logp_chosen"]
        margins = self._before["eval_reward_margin"], line["eval_reward_margin"]
        if after > before - _FALL_NATS or margins[1] <= margins[0]:
            return None
        return (
            f"chosen answers became less likely (mean log-probability {before:.1f} -> {after:.1f}) while the "
            f"margin of their reward rose ({margins[0]:.3f} -> {margins[1]:.3f})"
        )

    def _of_steps(self, line: dict[str, Any]) -> str | None:
        if self._beta is None or self._is_evaluated or "reward_chosen" not in line:
            return None
        self._recent.append((line["reward_chosen"] / self._beta, line["reward_margin"]))
        nats, margin = (sum(column) / len(self._recent) for column in zip(*self._recent, strict=True))
        if len(self._recent) < _STEPS or nats > -_FALL_NATS or margin <= 0:
            return None
        return (
            f"over the last {_STEPS} logged steps chosen answers are less likely than to the reference (mean "
            f"log-ratio {nats:.1f}) while the margin of their reward is {margin:.3f}"
        )

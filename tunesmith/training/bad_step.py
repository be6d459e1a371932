"""Steps that the weights must not see: a loss or gradient that is not finite, or a loss that leaps up.

Each is written down with its rows, so that the one to blame can be found, and then the run stops, leaves the
step out, or goes back to the last checkpoint and leaves it out when it comes to it again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import TrainingError
from tunesmith.training import durable_files

OnBadStep = Literal["stop", "skip", "rollback"]

# Steps whose median a loss is compared with: so many that a few hard ones do not move it, so few that it
# follows the loss down. Until there are some, nothing is said to have leapt.
_RECENT, _AT_LEAST = 64, 16
# With more bad steps than these in a row it is not the rows.
_MOST_IN_A_ROW = 5


class RollBack(Exception):
    """Training must go on from the last checkpoint."""


class StepGuard:
    """Judges each step by its loss and gradient, and keeps account of those left out.

    `file` is bad_step.json of the run. `spike_factor`: a loss above so many times the median of the last
    steps is bad too; None means that only what is not finite is."""

    def __init__(self, file: Path, *, on_bad: OnBadStep, spike_factor: float | None) -> None:
        self.file = file
        self.on_bad = on_bad
        self.spike_factor = spike_factor
        self.skipped: dict[int, str] = {}
        """What was wrong with each step that is not trained."""
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def fault(self, loss: float, grad_norm: float | None) -> str | None:
        """What is wrong with a step, or None. `grad_norm` is None where it is not looked at."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self.spike_factor is not None and len(self._recent) >= _AT_LEAST:
            median = statistics.median(self._recent)
            if loss > self.spike_factor * median:
                return f"the loss is {loss:.4f}, over {self.spike_factor:g} times the {median:.4f} of late"
        return None

    def passed(self, loss: float) -> None:
        """Take in the loss of a step that is good."""
        self._recent.append(loss)

    def leave_out(self, step: int, fault: str) -> None:
        """From now on this step is not trained. Raises TrainingError if it is one too many in a row."""
        if all(step - before in self.skipped for before in range(1, _MOST_IN_A_ROW + 1)):
            raise TrainingError(
                f"step {step}: bad, as the {_MOST_IN_A_ROW} steps before it, so it is not their rows. "
                f"What they were: {self.file}. Try a lower learning rate."
            )
        self.skipped[step] = fault

    def record(
        self, step: int, fault: str, loss: float, grad_norm: float | None, rows: Sequence[Any]
    ) -> None:
        """Add a step with its rows to bad_step.json."""
        entry = {
            "step": step,
            "fault": fault,
            "done": self.on_bad,
            "loss": _plain(loss),
            "grad_norm": _plain(grad_norm),
            "rows": rows,
        }
        steps = [other for other in self._recorded() if other["step"] != step]
        content = {"steps": [*steps, entry]}
        durable_files.replace_file(
            self.file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        )

    def error(self, step: int, fault: str, rows: Sequence[dict[str, Any]]) -> TrainingError:
        """What ends the run where bad steps do."""
        blamed = [row for row in rows if isinstance(row["loss"], str)] or rows
        places = list(dict.fromkeys(str(row["row"]) for row in blamed))
        return TrainingError(
            f"step {step}: {fault}; nothing was changed by this step. Its rows: {', '.join(places[:8])}"
            f"{' ...' if len(places) > 8 else ''}. All of them, with their text and losses: {self.file}. "
            "Common causes: a learning rate too high, float16 overflow (try model.dtype=bfloat16), a broken "
            "row. To go on without it: train.on_bad_step=skip."
        )

    def state(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {"skipped": sorted(self.skipped.items()), "recent_losses": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. Steps that were left out after it, before the run was stopped or went
        back, stay left out: bad_step.json has them."""
        recorded = {bad["step"]: bad["fault"] for bad in self._recorded() if bad["done"] != "stop"}
        self.skipped = {**dict(state["skipped"]), **recorded, **self.skipped}
        self._recent = deque(state["recent_losses"], maxlen=_RECENT)

    def _recorded(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self.file.read_text(encoding="utf-8"))["steps"])
        except FileNotFoundError:
            return []


def _plain(number: float | None) -> float | str | None:
    """A number as JSON has it, which knows neither nan nor infinity."""
    return number if number is None or math.isfinite(number) else str(number)

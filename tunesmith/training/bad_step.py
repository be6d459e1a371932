"""What is written down when a step's loss or gradient is not finite, so that the row to blame can be
found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import TrainingError


def write_bad_step(
    file: Path,
    *,
    step: int,
    packs: Sequence[dict[str, Any]],
    losses: Sequence[float],
    grad_norm: float | None,
    decode: Callable[[Any], str],
) -> TrainingError:
    """Write the rows of the step with their text and each pass's loss; returns the error to raise.

    Weights are as they were before the step, and so is the newest checkpoint."""
    passes: list[dict[str, Any]] = [
        {
            "loss": repr(loss),  # JSON has no NaN
            "rows": [
                {"place": row.place, "text": decode(example.input_ids), "targets": example.num_targets}
                for row in pack["rows"]
                for example in row.examples
            ],
        }
        for pack, loss in zip(packs, losses, strict=True)
    ]
    content = {"step": step, "grad_norm": None if grad_norm is None else repr(grad_norm), "passes": passes}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    to_blame = [p for p, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)] or passes
    places = [str(row["place"]) for p in to_blame for row in p["rows"]]
    what = (
        f"the loss is {sum(losses)}"
        if not math.isfinite(sum(losses))
        else f"the gradient norm is {grad_norm}"
    )
    return TrainingError(
        f"step {step}: {what}; nothing was changed by this step. Its rows: {', '.join(places[:8])}"
        f"{' ...' if len(places) > 8 else ''}. All of them, with their text and losses: {file}. "
        "Common causes: a learning rate too high, float16 overflow (try model.dtype=bfloat16), a broken row."
    )

"""Supervised fine-tuning, from a config to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import Config, load_config
from tunesmith.recipes.train import RunResult, train
from tunesmith.training.startup import Startup


def sft(
    config: str | Path | dict[str, Any] | Config,
    overrides: list[str] | None = None,
    *,
    startup: Startup | None = None,
) -> RunResult:
    """Tune a causal LM on conversations or text, by LoRA or in full.

    Takes a YAML file, a dict of the same shape or a Config, and `section.key=value` overrides. Goes on from
    the newest checkpoint where the run folder has one. Raises tunesmith.errors.*, Interrupted after a signal
    among them. With `startup`, which runs since the process began, the time of each stage up to the first
    step is printed and written to startup.json."""
    return train(load_config(config, overrides or [], recipe="sft"), startup)

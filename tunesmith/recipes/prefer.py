"""Preference tuning, from a config to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import Config, load_config
from tunesmith.recipes.train import RunResult, train
from tunesmith.training.startup import Startup


def prefer(
    config: str | Path | dict[str, Any] | Config,
    overrides: list[str] | None = None,
    *,
    startup: Startup | None = None,
) -> RunResult:
    """Tune a causal LM on answers that were judged: pairs of a chosen and a rejected one, or answers with a
    label, by `prefer.method`. Otherwise as `sft`."""
    return train(load_config(config, overrides or [], recipe="prefer"), startup)

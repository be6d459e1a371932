"""Pretraining on text, from a config to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import Config, load_config
from tunesmith.recipes.train import RunResult, train
from tunesmith.training.startup import Startup


def pretrain(
    config: str | Path | dict[str, Any] | Config,
    overrides: list[str] | None = None,
    *,
    startup: Startup | None = None,
) -> RunResult:
    """Train a causal LM on text, in full: documents in blocks of `data.max_length` tokens, of which
    `train.batch_size` make a step. Otherwise as `sft`."""
    return train(load_config(config, overrides or [], recipe="pretrain"), startup)

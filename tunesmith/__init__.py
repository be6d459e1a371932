"""tunesmith: exact pretraining and fine-tuning of causal language models.

import tunesmith
result = tunesmith.sft("config.yaml")
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.recipes.pretrain import pretrain
    from tunesmith.recipes.sft import sft
    from tunesmith.recipes.train import RunResult

__all__ = ["RunResult", "__version__", "pretrain", "sft"]
__version__ = version("tunesmith")


def __getattr__(name: str) -> Any:
    """Recipes are imported when they are asked for: they bring torch, which takes seconds."""
    if name in ("sft", "pretrain", "RunResult"):
        from importlib import import_module

        return getattr(import_module(f"tunesmith.recipes.{'train' if name == 'RunResult' else name}"), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

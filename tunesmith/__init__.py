"""tunesmith: exact pretraining and fine-tuning of causal language models.

import tunesmith
result = tunesmith.sft("config.yaml")
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.artifacts.merge import merge
    from tunesmith.recipes.prefer import prefer
    from tunesmith.recipes.pretrain import pretrain
    from tunesmith.recipes.sft import sft
    from tunesmith.recipes.train import RunResult

__all__ = ["RunResult", "__version__", "merge", "prefer", "pretrain", "sft"]
__version__ = version("tunesmith")
_PLACES = {
    "sft": "recipes.sft",
    "prefer": "recipes.prefer",
    "pretrain": "recipes.pretrain",
    "RunResult": "recipes.train",
    "merge": "artifacts.merge",
}


def __getattr__(name: str) -> Any:
    """Verbs are imported when they are asked for: they bring torch, which takes seconds."""
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f"tunesmith.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

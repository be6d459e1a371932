"""tunesmith: exact fine-tuning of causal language models.

import tunesmith
result = tunesmith.sft("config.yaml")
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.recipes.sft import SftResult, sft

__all__ = ["SftResult", "__version__", "sft"]
__version__ = version("tunesmith")


def __getattr__(name: str) -> Any:
    """Recipes are imported when they are asked for: they bring torch, which takes seconds."""
    if name in ("sft", "SftResult"):
        from tunesmith.recipes import sft as module

        return getattr(module, name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

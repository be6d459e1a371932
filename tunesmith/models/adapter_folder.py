"""An adapter's folder, of any method: what base model it is for, and how it is put on one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tunesmith.models.bottleneck import KIND, load_bottlenecks
from tunesmith.models.virtual_tokens import has_virtual_tokens, use_own_forward


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises OSError or ValueError if it cannot be read."""
    read = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"expected an object, found {type(read).__name__}")
    return read


def load_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """The base model with the adapter in this folder on it, ready to answer: PEFT's methods by PEFT, ours by
    us. The base is the one it was trained on, with as many embeddings as its tokenizer has tokens. `name`: of
    the adapter, where PEFT is to know several.

    Raises OSError, ValueError or RuntimeError if it cannot be read or does not fit."""
    config = read_adapter_config(folder)
    if config.get("peft_type") == KIND:
        from safetensors.torch import load_file

        return load_bottlenecks(model, config, load_file(folder / "adapter_model.safetensors")).eval()
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT says so of norms, which are what ln_tuning is for.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        adapted: Any = PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()
    if has_virtual_tokens(adapted):
        use_own_forward(adapted)
    return adapted

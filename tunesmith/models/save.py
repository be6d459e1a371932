"""Writing what a run made, such that stock transformers and PEFT load it: whole folders, complete or
absent."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def save_artifact(
    folder: Path, model: Any, tokenizer: Any, *, dtype: torch.dtype, stop_ids: Iterable[int], readme: str
) -> None:
    """Write the adapter (or the whole model), tokenizer, chat template, generation_config and model card.

    `model` is unwrapped (no DDP). A full model is written in `dtype`, the format it was computed in.
    `stop_ids` end a generated answer, beside those the base model stops at. The folder is written under a
    temporary name and renamed, so that it is whole whenever it is there."""
    building = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_weights(building, model, dtype=dtype)
    tokenizer.save_pretrained(building)
    generation_config(model, tokenizer, stop_ids).save_pretrained(building)
    (building / "README.md").write_text(readme, encoding="utf-8")
    for file in building.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    previous = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    building.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def save_weights(folder: Path, model: Any, *, dtype: torch.dtype | None = None) -> None:
    """Write weights and config as `save_pretrained` does; floating weights of a full model in `dtype` if
    given."""
    if hasattr(model, "peft_config"):
        _absolute_base_path(model)
        # The embedding is never an adapter's; new rows go through trainable_token_indices, which PEFT saves
        # itself.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    training_config = model.config
    model.config = copy.deepcopy(training_config)
    model.config.use_cache = True  # off for training only
    state = model.state_dict()
    try:
        if dtype is not None:
            model.config.dtype = dtype
            state = {
                name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()
            }
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        model.config = training_config


def _absolute_base_path(model: Any) -> None:
    """Where the base model is a folder, name it such that the adapter loads from any working directory."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())


def generation_config(model: Any, tokenizer: Any, stop_ids: Iterable[int]) -> Any:
    """The base model's generation settings, with every id that ends an answer among the stops."""
    settings = copy.deepcopy(model.generation_config)
    own = settings.eos_token_id
    stops = [own] if isinstance(own, int) else list(own or [])
    stops += [
        id_ for id_ in (tokenizer.eos_token_id, *sorted(stop_ids)) if id_ is not None and id_ not in stops
    ]
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    settings.pad_token_id = tokenizer.pad_token_id
    settings.bos_token_id = tokenizer.bos_token_id if settings.bos_token_id is None else settings.bos_token_id
    settings.use_cache = True
    return settings

"""Writing what a run made, such that stock transformers and PEFT load it, and weights of checkpoints.

Nothing here decides when a folder is complete: it writes into one that is not looked at yet."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import CheckpointError

_ADAPTER, _MODEL = "adapter_model.safetensors", "model.safetensors"
# One of these is in every checkpoint.
WEIGHTS = (_ADAPTER, _MODEL)


def write_artifact(
    folder: Path, model: Any, tokenizer: Any, *, dtype: torch.dtype, stop_ids: Iterable[int], readme: str
) -> None:
    """Write the adapter (or the whole model), tokenizer, chat template, generation_config and model card into
    an empty folder.

    `model` is unwrapped (no DDP). A full model is written in `dtype`, the format it was computed in.
    `stop_ids` end a generated answer, beside those the base model stops at."""
    save_weights(folder, model, dtype=dtype)
    tokenizer.save_pretrained(folder)
    generation_config(model, tokenizer, stop_ids).save_pretrained(folder)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def save_weights(folder: Path, model: Any, *, dtype: torch.dtype | None = None) -> None:
    """Write weights and config as `save_pretrained` does; floating weights of a full model in `dtype` if
    given. Raises OSError if they cannot be written."""
    try:
        _save_pretrained(folder, model, dtype)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.EIO, str(error), str(folder)) from error


def _save_pretrained(folder: Path, model: Any, dtype: torch.dtype | None) -> None:
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


def checkpoint_weights(model: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """(weights, texts) by file name: what `load_checkpoint_weights` sets, in full precision, with the config
    that lets stock PEFT or transformers load it too. The tensors are the model's own, not copies."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        _absolute_base_path(model)
        config = model.peft_config["default"].to_dict() | {"inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # it has sets
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {_ADAPTER: tensors}, {"adapter_config.json": text.encode()}
    config = copy.deepcopy(model.config)
    config.use_cache = True  # off for training only
    config.architectures = [type(model).__name__]
    return {_MODEL: _own_tensors(model)}, {"config.json": config.to_json_string().encode()}


def load_checkpoint_weights(folder: Path, model: Any) -> None:
    """Set the weights that a checkpoint holds. Raises CheckpointError unless they are exactly those that
    `checkpoint_weights` gives of this model."""
    is_adapter = hasattr(model, "peft_config")
    file = folder / (_ADAPTER if is_adapter else _MODEL)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    own = checkpoint_weights(model)[0][file.name]
    shapes, saved = ({name: t.shape for name, t in part.items()} for part in (own, tensors))
    differing = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{file}: is of another model: {len(differing)} weights differ in name or shape, the first is "
            f"{name}: {_shape(saved.get(name))} saved, {_shape(shapes.get(name))} expected."
        )
    memory = {tensor.data_ptr() for tensor in own.values()}
    assert all(p.data_ptr() in memory for p in model.parameters() if p.requires_grad), (
        "a copy would be filled"
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once, though tied ones have several names."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in names.values()}


def _shape(shape: Any) -> str:
    return "not" if shape is None else f"of shape {list(shape)}"


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

"""Writing what a run made, such that stock transformers and PEFT load it, and weights of checkpoints.

Nothing here decides when a folder is complete: it writes into one that is not looked at yet."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tunesmith.config import ModelConfig
from tunesmith.errors import CheckpointError
from tunesmith.models.adalora import budget_state, has_budget, set_budget_state
from tunesmith.models.bottleneck import bottleneck_config, bottleneck_tensors
from tunesmith.models.split_base import as_lora, restore_start, start_of
from tunesmith.models.virtual_tokens import has_virtual_tokens

ADAPTER, WHOLE_MODEL = "adapter_model.safetensors", "model.safetensors"
_METHOD_STATE = "adapter_state.safetensors"  # what a method has beside its weights, where it has any
# Beside an adapter whose base was quantised: how, since PEFT's own file does not say.
BASE_SETTINGS = "tunesmith.json"
# One of these is in every checkpoint.
WEIGHTS = (ADAPTER, WHOLE_MODEL)


def write_artifact(
    folder: Path,
    model: Any,
    weights: dict[str, Tensor],
    tokenizer: Any,
    *,
    stop_ids: Iterable[int],
    readme: str,
    base: ModelConfig,
) -> None:
    """Write the adapter (or the whole model), tokenizer, chat template, generation_config (if it writes) and
    model card into an empty folder; of a quantised `base`, too, how it was.

    `model` is unwrapped (no DDP), `weights` are those of `artifact_weights`. `stop_ids` end a generated
    answer, beside those the base model stops at. Raises OSError if they cannot be written."""
    try:
        _save_pretrained(folder, model, weights)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.EIO, str(error), str(folder)) from error
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        generation_config(model, tokenizer, stop_ids).save_pretrained(folder)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    write_base_settings(folder, base)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def write_base_settings(folder: Path, base: ModelConfig) -> None:
    """Beside an adapter, how its base was quantised; nothing if it was not."""
    if base.quantization != "none":
        held = {key: getattr(base, key) for key in ("quantization", "double_quantization")}
        (folder / BASE_SETTINGS).write_text(json.dumps({"base": held}, indent=2) + "\n", encoding="utf-8")


def artifact_weights(
    model: Any, dtype: torch.dtype, whole: Callable[[Tensor], Tensor], *, keeps: bool = True
) -> dict[str, Tensor]:
    """What `write_artifact` writes: an adapter's weights as they are trained, or all of a full model's in
    `dtype`, the format it was computed in. `whole` puts a tensor together, one at a time and in an order that
    is the same on every rank; a rank that does not keep them gets none."""
    state = model.state_dict(keep_vars=True)
    is_adapter = _is_adapted(model)
    if is_adapter:
        ids = {id(tensor) for tensor in _adapter_tensors(model).values()}
        state = {name: tensor for name, tensor in state.items() if id(tensor) in ids}
    made: dict[int, Tensor] = {}
    for key, tensor in {id(tensor): tensor for tensor in state.values()}.items():  # a tied one is one
        value = whole(tensor).detach()
        if keeps:
            made[key] = value.to(dtype) if value.is_floating_point() and not is_adapter else value
    return {name: made[id(tensor)] for name, tensor in state.items()} if keeps else {}


def _save_pretrained(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    if (config := bottleneck_config(model)) is not None:
        save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
        (folder / "adapter_config.json").write_bytes(_as_json(config))
    elif (start := start_of(model)) is not None:
        from peft import get_peft_model_state_dict

        _absolute_base_path(model)
        state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
        plain, state = as_lora(model.peft_config["default"], state, start)
        plain.inference_mode = True
        save_file(state, folder / ADAPTER, metadata={"format": "pt"})
        plain.save_pretrained(str(folder))
    elif hasattr(model, "peft_config"):
        _absolute_base_path(model)
        with _all_ranks(model):
            # The embedding is never an adapter's; new rows go through trainable_token_indices, which PEFT
            # saves itself.
            model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    else:
        dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
        training_config = model.config
        model.config = copy.deepcopy(training_config)
        model.config.use_cache = True  # off for training only
        try:
            model.save_pretrained(str(folder), state_dict=weights)
        finally:
            model.config = training_config
        # transformers writes down the format of the model in memory, and would load in that one.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as written:
            shapes = _shapes(written)
        for name, shape in shapes.items():
            if not all(shape):
                raise OSError(errno.EIO, f"{name} was saved empty", str(file))


def checkpoint_weights(model: Any) -> tuple[str, dict[str, Tensor], dict[str, bytes]]:
    """(name of the weights' file, weights, other files): what `load_checkpoint_weights` sets, in full
    precision, and the config that lets stock PEFT or transformers load it too. The tensors are the model's
    own, not copies. (Of virtual tokens it is the network that makes them, which stock PEFT does not load.)"""
    if (described := bottleneck_config(model)) is not None:
        return ADAPTER, bottleneck_tensors(model), {"adapter_config.json": _as_json(described)}
    if hasattr(model, "peft_config"):
        _absolute_base_path(model)
        with _all_ranks(model):
            config = model.peft_config["default"].to_dict() | {"inference_mode": True}
        files = {"adapter_config.json": _as_json(config)}
        if state := _method_state(model):
            files[_METHOD_STATE] = save(state)
        return ADAPTER, _adapter_tensors(model), files
    config = copy.deepcopy(model.config)
    config.use_cache = True  # off for training only
    config.architectures = [stock_class(model).__name__]
    return WHOLE_MODEL, _own_tensors(model), {"config.json": config.to_json_string().encode()}


def load_checkpoint_weights(folder: Path, model: Any, set_whole: Callable[[Tensor, Tensor], None]) -> None:
    """Set the weights that a checkpoint holds, each by `set_whole`, in an order that is the same on every
    rank. Raises CheckpointError unless they are exactly those that `checkpoint_weights` gives of this
    model."""
    name, own, _ = checkpoint_weights(model)
    files = split_files(folder, name)
    shapes = {name: _whole_shape(tensor) for name, tensor in own.items()}
    try:
        opened: list[Any] = [safe_open(file, framework="pt") for file in files]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name}: cannot be read: {error}") from error
    saved = {key: shape for part in opened for key, shape in _shapes(part).items()}
    differing = sorted(key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key))
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{folder / name}: is of another model: {len(differing)} weights differ in name or shape, the "
            f"first is {key}: {_shape(saved.get(key))} saved, {_shape(shapes.get(key))} expected."
        )
    ids = set(map(id, own.values()))
    assert all(id(p) in ids for p in model.parameters() if p.requires_grad), "a copy would be filled"
    with torch.no_grad():
        for part in opened:
            for key in sorted(part.keys()):
                set_whole(own[key], part.get_tensor(key))
    if (folder / _METHOD_STATE).is_file():
        _set_method_state(model, load_file(folder / _METHOD_STATE))


def split_name(name: str, part: int, num_parts: int) -> str:
    """Name of part 0, 1, ... of a file, as transformers splits one; the name itself if it is whole."""
    stem, ending = name.rsplit(".", 1)
    return name if num_parts == 1 else f"{stem}-{part + 1:05d}-of-{num_parts:05d}.{ending}"


def split_files(folder: Path, name: str) -> list[Path]:
    """The file of this name, or the parts it is split into, in order."""
    if (whole := folder / name).is_file():
        return [whole]
    stem, ending = name.rsplit(".", 1)
    return sorted(folder.glob(f"{stem}-?????-of-?????.{ending}")) or [whole]


def split_index(name: str, keys: list[str], num_parts: int) -> bytes:
    """Which part of a split file has which tensor, as transformers reads it: number i is in part i modulo
    their number."""
    where = {key: split_name(name, i % num_parts, num_parts) for i, key in enumerate(keys)}
    return json.dumps({"metadata": {}, "weight_map": where}, indent=2).encode()


def stock_class(model: Any) -> type:
    """A model's class in transformers, which FSDP puts one of its own before."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") or bottleneck_config(model) is not None


def _adapter_tensors(model: Any) -> dict[str, Tensor]:
    """What is trained, or drawn once and kept, by the names it is saved under."""
    if bottleneck_config(model) is not None:
        return bottleneck_tensors(model)
    if has_virtual_tokens(model):
        return {f"prompt_encoder.{name}": p for name, p in model.prompt_encoder["default"].named_parameters()}
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    with _all_ranks(model):
        return dict(get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False))


def _method_state(model: Any) -> dict[str, Tensor]:
    """What a run needs of its method to go on with, beside the weights that are trained."""
    if has_budget(model):
        return budget_state(model)
    return start_of(model) or {}


def method_state_bytes(model: Any) -> int:
    """How much that is once the run is under way: three averages of each weight of AdaLoRA."""
    if has_budget(model):
        return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(tensor.numel() * tensor.element_size() for tensor in _method_state(model).values())


def _set_method_state(model: Any, state: dict[str, Tensor]) -> None:
    if has_budget(model):
        set_budget_state(model, state)
    else:
        restore_start(model, state)


@contextlib.contextmanager
def _all_ranks(model: Any) -> Iterator[None]:
    """Have PEFT save all the ranks of AdaLoRA: those given up have a zero between their matrices, but between
    two rounds of sharing out one of them may be trained again, and what PEFT leaves out would be missing."""
    config = model.peft_config["default"]
    before = getattr(config, "rank_pattern", None)
    if has_budget(model):
        config.rank_pattern = None
    try:
        yield
    finally:
        if has_budget(model):
            config.rank_pattern = before


def _as_json(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True, default=sorted).encode()  # PEFT's have sets


def _shapes(opened: Any) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file."""
    return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _whole_shape(tensor: Tensor) -> list[int]:
    """Also where ZeRO-3 has shared it out."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once, though tied ones have several names."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name] for name in names.values()}


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

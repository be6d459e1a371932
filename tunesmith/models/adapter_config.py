"""PEFT's config of a method, from ours and the model that it is for.

What a method is put on is checked against what the model has; where a default depends on the architecture
((IA)^3, norms), it is found in the model itself and not in a table of families."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.config import AdapterConfig
from tunesmith.errors import ModelError

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


def peft_config(model: Any, adapter: AdapterConfig, tokenizer: Any, *, has_scalar_head: bool = False) -> Any:
    """What PEFT's `get_peft_model` is given; a scalar head, which PEFT knows by its name, is trained in full
    beside the adapter. Raises ModelError, with what exists, if a module or token of the
    config does not."""
    _check_targets(model, adapter)
    method, task = adapter.method, "SEQ_CLS" if has_scalar_head else "CAUSAL_LM"
    # A list of its own: PEFT adds the head to it.
    on_modules = {"modules_to_save": list(adapter.modules_to_save) or None}
    if method in _LORA_OPTIONS:
        from peft import LoraConfig

        if method in ("pissa", "olora", "loftq"):
            _check_decomposable(model, adapter)
        return LoraConfig(
            task_type=task,
            r=_number(adapter.r),
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            trainable_token_indices=_token_ids(adapter, tokenizer) or None,
            **on_modules,
            **_LORA_OPTIONS[method],
        )
    if method == "adalora":
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type=task,
            init_r=_initial_rank(_number(adapter.r)),
            target_r=_number(adapter.r),
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            total_step=1,  # until the number of steps is known (adalora.py)
            **on_modules,
        )
    if method == "vera":
        from peft import VeraConfig

        return VeraConfig(
            task_type=task,
            r=_number(adapter.r),
            vera_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            **on_modules,
        )
    if method == "oft":
        from peft import OFTConfig

        _check_blocks(model, adapter)
        return OFTConfig(
            task_type=task,
            oft_block_size=_number(adapter.oft_block_size),
            module_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            **on_modules,
        )
    if method == "ia3":
        from peft import IA3Config

        targets, feedforward = _rescaled(model, adapter)
        return IA3Config(
            task_type=task, target_modules=targets, feedforward_modules=feedforward, **on_modules
        )
    if method == "ln_tuning":
        from peft import LNTuningConfig

        return LNTuningConfig(task_type=task, target_modules=_norms(model), **on_modules)
    if method == "trainable_tokens":
        from peft import TrainableTokensConfig

        return TrainableTokensConfig(task_type=task, token_indices=_token_ids(adapter, tokenizer))
    return _virtual_tokens(adapter)


# Of methods that are LoRA but for how they begin or are scaled.
_LORA_OPTIONS: dict[str | None, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    # What these begin with is set when they are there (split_base.py, loftq.py).
    "pissa": {},
    "olora": {},
    "loftq": {},
}


def _virtual_tokens(adapter: AdapterConfig) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, PromptTuningInit

    number, size = _number(adapter.num_virtual_tokens), adapter.encoder_size
    if adapter.method == "prefix":
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=number,
            prefix_projection=bool(size),
            encoder_hidden_size=size or None,
        )
    if adapter.method == "p_tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=number, encoder_hidden_size=_number(size)
        )
    assert adapter.method == "prompt", adapter.method
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=number, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
    )


def _number(value: int | None) -> int:
    assert value is not None  # the config writes out its default
    return value


def _initial_rank(target: int) -> int:
    """One and a half times the rank at the end (Zhang et al. 2023, section 4), and at least one more."""
    return max(target + 1, round(1.5 * target))


def _token_ids(adapter: AdapterConfig, tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in adapter.trainable_tokens]


def linear_layers(model: Any) -> dict[str, Any]:
    """The modules that an adapter can be put on, by their full names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or type(module).__name__ == "Conv1D"
    }


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT takes the module of this full name for a target."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _layers(model: Any) -> dict[str, Any]:
    """The linear layers but the output head and embeddings."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    return {
        name: module
        for name, module in linear_layers(model).items()
        if module not in heads and not isinstance(module, nn.Embedding)
    }


def _inputs(module: Any) -> int:
    return int(module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.in_features)


def _rescaled(model: Any, adapter: AdapterConfig) -> tuple[Any, list[str]]:
    """(targets, those of them whose inputs are rescaled) for (IA)^3: the last layer of the feed-forward is
    told by its inputs, which are as many as the feed-forward is wide; of the others it is the outputs."""
    layers, hidden = _layers(model), model.config.get_text_config().hidden_size
    ending = [name for name, layer in layers.items() if _inputs(layer) != hidden and "attn" not in name]
    # GPT-2 has a c_proj in its attention, too.
    others = {_last(name) for name in layers.keys() - set(ending)}
    ends = {_last(name) if _last(name) not in others else ".".join(name.split(".")[-2:]) for name in ending}
    targets = adapter.target_modules
    if targets is None:
        names = {_last(name) for name in layers}
        inner = [name for name in _KEYS_AND_VALUES if name in names]
        if not inner or not ends:
            raise ModelError(
                "adapter.method ia3: which layers make keys and values, and which end the feed-forward, "
                f"cannot be told by name. Set adapter.target_modules. Modules of this model: {_kinds(model)}."
            )
        return [*inner, *sorted(ends)], sorted(ends)
    chosen = [name for name in ending if _matches(name, targets)]
    return targets, sorted(end for end in ends if any(name.endswith("." + end) for name in chosen))


def _norms(model: Any) -> list[str]:
    names = {
        _last(name)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    if not names:
        raise ModelError("adapter.method ln_tuning: this model has no norms with weights to train.")
    return sorted(names)


def _check_decomposable(model: Any, adapter: AdapterConfig) -> None:
    """That each target is a linear layer of its own, with as many inputs and outputs as the rank."""
    table, rank = model.get_input_embeddings().weight, _number(adapter.r)
    layers = _layers(model) if adapter.target_modules == "all-linear" else linear_layers(model)
    for name, layer in layers.items():
        if not _matches(name, adapter.target_modules or "all-linear"):
            continue
        if layer.weight is table:
            raise ModelError(
                f"adapter.method {adapter.method} takes a part out of linear layers, and {name} is the table "
                "of embeddings. Remove it from adapter.target_modules."
            )
        outputs = layer.weight.shape[1] if type(layer).__name__ == "Conv1D" else layer.out_features
        for number, what in ((_inputs(layer), "inputs"), (outputs, "outputs")):
            if rank > number:
                raise ModelError(
                    f"adapter.r={rank} is more than adapter.method {adapter.method} can take out of {name}: "
                    f"{_last(name)} has {number} {what}. Lower it."
                )


def _check_blocks(model: Any, adapter: AdapterConfig) -> None:
    size = _number(adapter.oft_block_size)
    for name, layer in _layers(model).items():
        if _matches(name, adapter.target_modules or "all-linear") and _inputs(layer) % size:
            raise ModelError(
                f"adapter.oft_block_size={size} does not divide the {_inputs(layer)} inputs of {name}. Use a "
                "divisor of it, or name other adapter.target_modules."
            )


def _kinds(model: Any) -> str:
    return ", ".join(sorted({_last(name) for name in linear_layers(model)}))


def _check_targets(model: Any, adapter: AdapterConfig) -> None:
    names = list(linear_layers(model))
    kinds = sorted({_last(name) for name in names})
    listing = f"Modules of this model: {', '.join(kinds)}."
    if isinstance(adapter.target_modules, list):
        _check_names("adapter.target_modules", adapter.target_modules, names, kinds, listing)
    elif adapter.target_modules not in (None, "all-linear"):
        _check_pattern(str(adapter.target_modules), names, listing)
    all_names = [name for name, _ in model.named_modules() if name]
    _check_names("adapter.modules_to_save", adapter.modules_to_save, all_names, kinds, listing)


def _check_pattern(pattern: str, names: list[str], listing: str) -> None:
    try:
        found = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ModelError(f"adapter.target_modules: {pattern!r} is no regular expression: {error}.") from error
    if not found:
        raise ModelError(
            f"adapter.target_modules: {pattern!r} matches the whole name of no linear module. {listing} "
            f"A full name is {names[0]!r}. To name modules, write a list: [{pattern}]."
        )


def _check_names(key: str, wanted: list[str], names: list[str], kinds: list[str], listing: str) -> None:
    for target in wanted:
        if not any(name == target or name.endswith("." + target) for name in names):
            near = difflib.get_close_matches(target, kinds, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ModelError(f"{key}: there is no module {target!r} in this model.{hint} {listing}")

"""PEFT's LoRA injected into a model, after checking that what the config names is there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Any

import torch

from tunesmith.config import AdapterConfig, Config
from tunesmith.errors import ModelError
from tunesmith.models.devices import steady_memory
from tunesmith.models.fuse import PIECES, fuse
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.load import load_model


def build_model(
    config: Config,
    tokenizer: Any,
    say: Callable[[str], None],
    pieces: Collection[str] = PIECES,
    held: Held = EVERYWHERE,
) -> Any:
    """The model of the config, loaded, adapted, and its `pieces` fused (fuse.py); adapters are drawn from
    `run.seed`. A rank that is not to hold the weights has the same model without them."""
    from transformers import set_seed

    steady_memory()
    set_seed(config.run.seed)
    model = adapt_model(load_model(config, tokenizer, say, held), config, tokenizer)
    fuse(model, pieces, held)
    return model


def adapt_model(model: Any, config: Config, tokenizer: Any) -> Any:
    """The model with the adapter of `config.adapter` in it; the model itself for full fine-tuning.

    Raises ModelError, with what exists, if a target module or token does not."""
    adapter = config.adapter
    if adapter.method == "none":
        return model
    from peft import LoraConfig, get_peft_model

    _check_targets(model, adapter)
    token_ids = [tokenizer.convert_tokens_to_ids(token) for token in adapter.trainable_tokens]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        modules_to_save=adapter.modules_to_save or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        trainable_token_indices=token_ids or None,
    )
    return get_peft_model(model, lora)


def count_parameters(model: Any) -> tuple[int, int]:
    """(trained, all) parameters; a quantised weight counts by the numbers it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _linear_names(model: Any) -> list[str]:
    """Full names of the modules LoRA can be put on."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or type(module).__name__ == "Conv1D"
    ]


def _check_targets(model: Any, adapter: AdapterConfig) -> None:
    names = _linear_names(model)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    listing = f"Modules of this model: {', '.join(kinds)}."
    if isinstance(adapter.target_modules, list):
        _check_names("adapter.target_modules", adapter.target_modules, names, kinds, listing)
    elif adapter.target_modules != "all-linear":
        _check_pattern(adapter.target_modules, names, listing)
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

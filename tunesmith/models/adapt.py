"""The adapter of a config put into a model, whatever its method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config import Config
from tunesmith.models import adalora, loftq, virtual_tokens
from tunesmith.models.adapter_config import peft_config
from tunesmith.models.bottleneck import add_bottlenecks, layers_to_adapt
from tunesmith.models.decompose import first_columns, largest_directions
from tunesmith.models.devices import steady_memory
from tunesmith.models.fuse import PIECES, fuse
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.load import load_model
from tunesmith.models.score import ask_positions
from tunesmith.models.split_base import split_base

_FUSED = ("none", "lora", "rslora", "pissa", "olora", "loftq")


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
    if config.adapter.method == "prefix":
        say("adapter.method prefix: virtual keys and values are a cache, which stock attention (sdpa) serves")
    elif config.adapter.method not in _FUSED:
        say(f"adapter.method {config.adapter.method} keeps its own forward; the fused one is LoRA's")
    fuse(model, pieces, held)
    if config.has_scalar_head:
        ask_positions(model)
    return model


def adapt_model(model: Any, config: Config, tokenizer: Any) -> Any:
    """The model with the adapter of `config.adapter` in it; the model itself for full fine-tuning. What is
    trained is float32.

    Raises ModelError, with what exists, if a target module or token does not."""
    adapter = config.adapter
    if adapter.method == "none":
        return model
    if adapter.method == "bottleneck":
        model.requires_grad_(False)
        assert adapter.r is not None
        return add_bottlenecks(model, layers_to_adapt(model), adapter.r, adapter.dropout)
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT says so of norms, which are what ln_tuning is for.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        peft = peft_config(model, adapter, tokenizer, has_scalar_head=config.has_scalar_head)
        adapted: Any = get_peft_model(model, peft)
    _train_in_float32(adapted)
    if adapter.method == "pissa":
        split_base(adapted, largest_directions)
    elif adapter.method == "olora":
        split_base(adapted, first_columns)
    elif adapter.method == "loftq":
        loftq.begin_with_rounding_error(adapted, config)
    elif adapter.method == "adalora":
        adalora.use_own_loss(adapted)
    elif virtual_tokens.has_virtual_tokens(adapted):
        virtual_tokens.use_own_forward(adapted)
        if adapter.init_text is not None:
            virtual_tokens.begin_with_text(adapted, tokenizer, adapter.init_text)
    return adapted


def _train_in_float32(model: Any) -> None:
    """PEFT does so for most methods. A norm in float32 still gives what its model computes in."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            module.register_forward_hook(_as_input)


def _as_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def count_parameters(model: Any) -> tuple[int, int]:
    """(trained, all) parameters; a quantised weight counts by the numbers it stands for, and one that ZeRO-3
    has shared out as a whole."""
    trained = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel()) * (
            2 if parameter.__class__.__name__ == "Params4bit" else 1
        )
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total

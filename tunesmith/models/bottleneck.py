"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): a small network after each attention and each
feed-forward, before the residual is added.

    h -> h + W_up gelu(W_down h)        W_down [r, H], W_up [H, r] zero at first, both with a bias

PEFT has no such method, so the folder is of our own shape: adapter_model.safetensors by the names of the
model's parameters, and adapter_config.json with `peft_type: TUNESMITH_BOTTLENECK`. Only `load_adapter`
(adapter_folder.py) reads it: stock PEFT, vLLM and llama.cpp do not, and it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError

KIND = "TUNESMITH_BOTTLENECK"
_PART = "bottleneck"
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


class Bottleneck(nn.Module):
    """The network: [..., H] -> [..., H], the identity at first."""

    def __init__(self, hidden: int, r: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, r), nn.Linear(r, hidden)
        self.dropout = nn.Dropout(dropout)
        # The paper draws both with a deviation of 0.01, nearly the identity; zero is the identity itself.
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype)))
        return hidden + self.up(self.dropout(inner)).to(hidden.dtype)


def layers_to_adapt(model: Any) -> list[str]:
    """Full names of the attention and the feed-forward of each decoder layer. Raises ModelError, with what a
    layer has, where they cannot be told."""
    number = model.config.get_text_config().num_hidden_layers
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) != number:
            continue
        found = []
        for i, layer in enumerate(layers):
            children = [child for child, _ in layer.named_children()]
            attention = [child for child in children if "att" in child and "norm" not in child]
            feed_forward = [child for child in children if child in _FEED_FORWARD]
            if len(attention) != 1 or len(feed_forward) != 1:
                raise ModelError(
                    "adapter.method bottleneck goes after the attention and the feed-forward of a layer, and "
                    f"{name}.{i} has {', '.join(children)}. Use another method, such as lora."
                )
            found += [f"{name}.{i}.{attention[0]}", f"{name}.{i}.{feed_forward[0]}"]
        return found
    raise ModelError("adapter.method bottleneck: this model has no list of decoder layers. Use lora.")


def add_bottlenecks(model: Any, modules: Sequence[str], r: int, dropout: float) -> Any:
    """The model with a bottleneck after each of these modules, described in `model.tunesmith_bottleneck`."""
    hidden = model.config.get_text_config().hidden_size
    for name in modules:
        module = model.get_submodule(name)
        like = next(module.parameters())
        module.add_module(_PART, Bottleneck(hidden, r, dropout).to(like.device))
        module.register_forward_hook(_after)
    base = model.config._name_or_path
    model.tunesmith_bottleneck = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "r": r,
        "dropout": dropout,
        "modules": list(modules),
    }
    return model


def bottleneck_config(model: Any) -> dict[str, Any] | None:
    """adapter_config.json of the bottlenecks in a model; None if it has none."""
    config: dict[str, Any] | None = getattr(model, "tunesmith_bottleneck", None)
    return config


def bottleneck_tensors(model: Any) -> dict[str, Tensor]:
    """Their weights, by name."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if f".{_PART}." in name}


def load_bottlenecks(model: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The model with bottlenecks of these weights, in its own number format. Raises ValueError if they do not
    fit."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    model = add_bottlenecks(model, config["modules"], config["r"], config["dropout"])
    own = bottleneck_tensors(model)
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        raise ValueError("the weights of the bottlenecks are not those that adapter_config.json describes")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    for name in config["modules"]:
        model.get_submodule(f"{name}.{_PART}").to(dtype)
    return model


def _after(module: nn.Module, inputs: Any, output: Any) -> Any:
    bottleneck = module.get_submodule(_PART)
    if isinstance(output, tuple):
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)

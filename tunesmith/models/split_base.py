"""PiSSA and OLoRA: an adapter that begins as a part of the base weights, which are left without it.

    W = (W - s B0 A0) + s B0 A0        the base holds the first part while training, the adapter the second
    tuned:  (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

So what is saved is a LoRA of twice the rank, which loads on the original base anywhere. A checkpoint holds A0
and B0 as well, so that a run goes on with the very base it had, though another machine may decompose a matrix
otherwise; stock PEFT, which would put A and B on the whole base, cannot load a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def split_base(model: Any, factors: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]) -> None:
    """Let each LoRA layer begin as the `factors` of its weights, given its rank and scale, and take what they
    make out of the weights."""
    model.tunesmith_start = {}
    for name, layer in _layers(model).items():
        weight, scale = layer.get_base_layer().weight, float(layer.scaling["default"])
        a, b = factors(weight.T if layer.fan_in_fan_out else weight, layer.r["default"], scale)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        _add(layer, -scale * (b @ a))
        model.tunesmith_start |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def start_of(model: Any) -> dict[str, Tensor] | None:
    """A0 and B0 by the names PEFT saves A and B under; None where the base is as it was."""
    start: dict[str, Tensor] | None = getattr(model, "tunesmith_start", None)
    return start


@torch.no_grad()
def restore_start(model: Any, saved: dict[str, Tensor]) -> None:
    """Leave the base weights without the A0 and B0 that a checkpoint holds, in place of those drawn now."""
    start = model.tunesmith_start
    for name, layer in _layers(model).items():
        names = [f"{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        (a, b), (saved_a, saved_b) = ([of[key] for key in names] for of in (start, saved))
        saved_a, saved_b = saved_a.to(a.device), saved_b.to(b.device)
        if not (torch.equal(a, saved_a) and torch.equal(b, saved_b)):
            _add(layer, float(layer.scaling["default"]) * (b @ a - saved_b @ saved_a))
            start |= dict(zip(names, (saved_a, saved_b), strict=True))


def as_lora(
    config: Any, weights: dict[str, Tensor], start: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """(config, weights) of the LoRA on the original base; `weights` by the names PEFT saves them under."""
    plain = copy.deepcopy(config)
    plain.r, plain.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    made = dict(weights)
    for name, first in start.items():
        is_a, now = name.endswith(".lora_A.weight"), weights[name]
        first = first.to(now.device, now.dtype)
        made[name] = torch.cat([now, first if is_a else -first], dim=0 if is_a else 1).contiguous()
    return plain, made


def _add(layer: Any, change: Tensor) -> None:
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora.layer import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}

"""Linear layers with an optional LoRA, several of them on one input: one autograd node, nothing saved but the
input and the r-wide product.

T tokens, I inputs, O outputs, r rank.

    y = x W^T + b + s drop(x) A^T B^T                  Hu et al. 2021, arXiv:2106.09685, eq. 3
    dx = dy W + s (dy B) A       dA = s (dy B)^T x     dB = s dy^T (x A^T)     dW = dy^T x, if W is trained

Products are made in the number format of the pass; nothing is made for what is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearParts:
    """The tensors of one linear layer: weight [O, I], bias [O], lora_a [r, I], lora_b [O, r], and numbers."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.lora_a, self.lora_b

    def with_lora_in(self, dtype: torch.dtype) -> LinearParts:
        """The same with its small matrices in the format of the pass, for forward and backward both."""
        if self.lora_a is None or self.lora_b is None:
            return self
        return replace(self, lora_a=self.lora_a.to(dtype), lora_b=self.lora_b.to(dtype))


def linears(x: Tensor, layers: Sequence[LinearParts]) -> tuple[Tensor, ...]:
    """x [..., I] through each of the layers -> one [..., O] each."""
    dtype = pass_dtype(x)
    seeds = draw_seeds(layers)
    numbers = [(layer.scale, layer.dropout) for layer in layers]
    outputs = _Linears.apply(x, dtype, numbers, seeds, *tensors_of(layers))  # type: ignore[no-untyped-call]
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


def pass_dtype(x: Tensor) -> torch.dtype:
    """The format products are made in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --- layers on one input, forward and backward, on 2-D tensors


def forward_all(
    x: Tensor, layers: Sequence[LinearParts], seeds: Sequence[int | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """x [T, I] -> of each layer y [T, O] and the LoRA's h = drop(x) A^T [T, r]. All in one format, LoRA's
    too."""
    products = _products(x, layers, seeds)
    outputs = []
    for layer, h in zip(layers, products, strict=True):
        weight = layer.weight.to(x.dtype).t()
        y = torch.mm(x, weight) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight)
        if h is not None and layer.lora_b is not None:
            y.addmm_(h, layer.lora_b.t(), alpha=layer.scale)
        outputs.append(y)
    return outputs, products


def backward_all(
    dys: Sequence[Tensor],
    x: Tensor,
    products: Sequence[Tensor | None],
    layers: Sequence[LinearParts],
    seeds: Sequence[int | None],
    needs_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx (None unless `needs_x`), and the gradients of the four tensors of each layer that its `needs` ask
    for; LoRA's in float32 or the format of the pass."""
    dx: Tensor | None = None
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in layers]
    dhs: list[Tensor | None] = [None] * len(layers)
    for i, (dy, h, layer) in enumerate(zip(dys, products, layers, strict=True)):
        needs_weight, needs_bias, needs_a, needs_b = needs[i]
        if needs_x:
            weight = layer.weight.to(dy.dtype)
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        if needs_weight:
            grads[i][0] = torch.mm(dy.t(), x).to(layer.weight.dtype)
        if needs_bias and layer.bias is not None:
            grads[i][1] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        if h is None or layer.lora_b is None:
            continue
        if needs_b:
            # The transpose is several times faster than dy^T h, which is as tall as it is thin.
            db = torch.mm(h.t(), dy).t()
            wide = torch.promote_types(torch.float32, db.dtype)
            grads[i][3] = db.to(wide, memory_format=torch.contiguous_format).mul_(layer.scale)
        if needs_a or needs_x:
            dhs[i] = torch.mm(dy, layer.lora_b).mul_(layer.scale)
    for i, da in enumerate(_through_lora_a(dhs, x, layers, seeds, dx, any(own[2] for own in needs))):
        grads[i][2] = da if needs[i][2] else None
    return dx, grads


def _products(x: Tensor, layers: Sequence[LinearParts], seeds: Sequence[int | None]) -> list[Tensor | None]:
    """drop(x) A^T of each layer that has a LoRA."""
    joined = _joined_a(layers)
    if joined is not None:
        parts = iter(torch.split(torch.mm(x, joined.t()), _ranks(layers), 1))
        return [None if layer.lora_a is None else next(parts) for layer in layers]
    return [
        None if layer.lora_a is None else torch.mm(dropped(x, layer.dropout, seed), layer.lora_a.t())
        for layer, seed in zip(layers, seeds, strict=True)
    ]


def _through_lora_a(
    dhs: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[LinearParts],
    seeds: Sequence[int | None],
    dx: Tensor | None,
    needs_a: bool,
) -> list[Tensor | None]:
    """Adds dh A to dx; returns dA = dh^T drop(x) of each layer."""
    das: list[Tensor | None] = [None] * len(layers)
    joined = _joined_a(layers)
    known = [dh for dh in dhs if dh is not None]
    if joined is not None and len(known) == len(_ranks(layers)):
        dh = torch.cat(known, 1)
        if dx is not None:
            dx.addmm_(dh, joined)
        if needs_a:
            parts = iter(torch.split(torch.mm(dh.t(), x), _ranks(layers)))
            das = [None if layer.lora_a is None else next(parts) for layer in layers]
        return das
    for i, (one, layer, seed) in enumerate(zip(dhs, layers, seeds, strict=True)):
        if one is None or layer.lora_a is None:
            continue
        kept = _kept(x, layer.dropout, seed) if layer.dropout and seed is not None else None
        if needs_a:
            das[i] = torch.mm(one.t(), x if kept is None else x * kept)
        if dx is not None and kept is not None:
            dx += torch.mm(one, layer.lora_a).mul_(kept)
        elif dx is not None:
            dx.addmm_(one, layer.lora_a)
    return das


def _joined_a(layers: Sequence[LinearParts]) -> Tensor | None:
    """The A matrices of the layers as one [sum of ranks, I]: one thin product instead of several. None where
    there is none, or each has its own input by dropout."""
    known = [layer.lora_a for layer in layers if layer.lora_a is not None]
    if not known or any(layer.dropout for layer in layers):
        return None
    return known[0] if len(known) == 1 else torch.cat(known)


def _ranks(layers: Sequence[LinearParts]) -> list[int]:
    return [layer.lora_a.shape[0] for layer in layers if layer.lora_a is not None]


def tensors_of(layers: Sequence[LinearParts]) -> list[Tensor | None]:
    """Four tensors a layer in a flat list, as autograd functions take and save them."""
    return [tensor for layer in layers for tensor in layer.tensors]


def layers_of(tensors: Sequence[Any], numbers: Any, dtype: torch.dtype) -> list[LinearParts]:
    """The reverse of `tensors_of`, ready for `forward_all` and `backward_all`."""
    return [
        LinearParts(*tensors[4 * i : 4 * i + 4], *own).with_lora_in(dtype) for i, own in enumerate(numbers)
    ]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, numbers: Any, seeds: Any, *tensors: Any) -> Any:
        layers = layers_of(tensors, numbers, dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs, products = forward_all(flat, layers, seeds)
        ctx.save_for_backward(flat, *products, *tensors_of(layers))
        ctx.numbers, ctx.seeds, ctx.x_shape, ctx.x_dtype = numbers, seeds, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        count = len(ctx.numbers)
        x, *rest = ctx.saved_tensors
        products, tensors = rest[:count], rest[count:]
        layers = layers_of(tensors, ctx.numbers, x.dtype)
        needs = [ctx.needs_input_grad[4 + 4 * i : 8 + 4 * i] for i in range(count)]
        dx, own = backward_all(grads, x, products, layers, ctx.seeds, ctx.needs_input_grad[0], needs)
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, None, *(grad for layer in own for grad in layer)


# --- dropout: drawn again in the backward pass from a seed, not kept


def draw_seeds(layers: Sequence[LinearParts]) -> list[int | None]:
    """A seed for each layer whose LoRA drops inputs, from torch's random state, so that a resumed run draws
    the same."""
    return [
        int(torch.randint(2**62, (1,))) if layer.dropout and layer.lora_a is not None else None
        for layer in layers
    ]


def dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Inverted dropout of x; x itself without a seed."""
    return x if seed is None or not p else x * _kept(x, p, seed)


def _kept(x: Tensor, p: float, seed: int) -> Tensor:
    """0 or 1 / (1 - p) for each element. Drawn 16 bits at a time: torch draws one number after another on a
    CPU, and a mask of T x I of them would cost more than the layer."""
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    threshold = round(p * 2**16)
    kept = (bits >= threshold - 2**15).view(x.shape)
    return kept.to(x.dtype).mul_(1 / (1 - threshold / 2**16))

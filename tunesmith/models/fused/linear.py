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
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    numbers = [(layer.scale, layer.dropout) for layer in layers]
    outputs = _Linears.apply(x, dtype, numbers, seeds, *tensors)  # type: ignore[no-untyped-call]
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


def pass_dtype(x: Tensor) -> torch.dtype:
    """The format products are made in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --- one layer forward and backward, on 2-D tensors


def forward_one(x: Tensor, layer: LinearParts, seed: int | None) -> tuple[Tensor, Tensor | None]:
    """x [T, I] -> y [T, O] and the LoRA's h = drop(x) A^T [T, r]. All in one format, LoRA's too."""
    weight = layer.weight.to(x.dtype).t()
    y = torch.mm(x, weight) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight)
    if layer.lora_a is None or layer.lora_b is None:
        return y, None
    h = torch.mm(dropped(x, layer.dropout, seed), layer.lora_a.t())
    return y.addmm_(h, layer.lora_b.t(), alpha=layer.scale), h


def backward_one(
    dy: Tensor,
    x: Tensor,
    h: Tensor | None,
    layer: LinearParts,
    seed: int | None,
    needs: Sequence[bool],
    dx: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of one layer: dx (added to the one given; None if `needs[0]` is false) and those of its four
    tensors, where `needs[1:]` asks for them; LoRA's in float32 or the format of the pass."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b = needs
    grads: list[Tensor | None] = [None, None, None, None]
    if needs_x:
        weight = layer.weight.to(dy.dtype)
        dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    if needs_weight:
        grads[0] = torch.mm(dy.t(), x).to(layer.weight.dtype)
    if needs_bias:
        assert layer.bias is not None
        grads[1] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
    if h is None:
        return dx, grads
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    if needs_b:
        # The transpose is several times faster than dy^T h, which is as tall as it is thin.
        db = torch.mm(h.t(), dy).t()
        wide = torch.promote_types(torch.float32, db.dtype)
        grads[3] = db.to(wide, memory_format=torch.contiguous_format).mul_(layer.scale)
    if needs_a or needs_x:
        dh = torch.mm(dy, layer.lora_b).mul_(layer.scale)
        if needs_a:
            kept = dropped(x, layer.dropout, seed)
            grads[2] = torch.mm(dh.t(), kept)
        if needs_x:
            assert dx is not None
            if layer.dropout and seed is not None:
                dx += torch.mm(dh, layer.lora_a).mul_(_kept(x, layer.dropout, seed))
            else:
                dx.addmm_(dh, layer.lora_a)
    return dx, grads


def layers_of(tensors: Sequence[Any], numbers: Any, dtype: torch.dtype) -> list[LinearParts]:
    """Layers from a flat list of their tensors, ready for `forward_one` and `backward_one`."""
    return [
        LinearParts(*tensors[4 * i : 4 * i + 4], *own).with_lora_in(dtype) for i, own in enumerate(numbers)
    ]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, numbers: Any, seeds: Any, *tensors: Any) -> Any:
        layers = layers_of(tensors, numbers, dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs, products = [], []
        for layer, seed in zip(layers, seeds, strict=True):
            y, h = forward_one(flat, layer, seed)
            outputs.append(y)
            products.append(h)
        ctx.save_for_backward(flat, *products, *(tensor for layer in layers for tensor in layer.tensors))
        ctx.numbers, ctx.seeds, ctx.x_shape, ctx.x_dtype = numbers, seeds, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        count = len(ctx.numbers)
        x, *rest = ctx.saved_tensors
        products, tensors = rest[:count], rest[count:]
        needs = ctx.needs_input_grad
        dx: Tensor | None = None
        out: list[Tensor | None] = []
        for i, (dy, layer) in enumerate(zip(grads, layers_of(tensors, ctx.numbers, x.dtype), strict=True)):
            wanted = (needs[0], *needs[4 + 4 * i : 8 + 4 * i])
            dx, own = backward_one(dy, x, products[i], layer, ctx.seeds[i], wanted, dx)
            out += own
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, None, *out


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

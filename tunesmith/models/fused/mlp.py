"""The gated feed-forward of Llama and its kin in one autograd node, LoRA included.

    y = down(act(gate(x)) * up(x))           Shazeer 2020, arXiv:2002.05202

Saved for the backward pass: x, gate(x), up(x) and three r-wide products. The product act(gate) * up, as wide
as the layer, is made again: two cheap passes over memory against one tensor a layer less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.models.fused.linear import (
    LinearParts,
    backward_all,
    draw_seeds,
    forward_all,
    layers_of,
    pass_dtype,
    tensors_of,
)
from tunesmith.models.native import elementwise as native


class Activation(NamedTuple):
    """An activation's name; a plain value, so that a test can compare it."""

    kind: str

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.kind == "silu" else F.gelu(x, approximate=self._approximate)

    def times(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up."""
        if self.kind == "silu" and native.serves(gate, up):
            return native.silu_mul(gate, up)
        return self.forward(gate).mul_(up)

    def times_backward_(self, doutput: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up; `doutput` is written over."""
        if self.kind == "silu" and native.serves(doutput, gate, up):
            return native.silu_mul_backward_(doutput, gate, up)
        dup = self.forward(gate).mul_(doutput)
        return self._backward_(doutput.mul_(up), gate), dup

    def _backward_(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the input, written over `grad`."""
        if self.kind == "silu":
            return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
        return torch.ops.aten.gelu_backward.grad_input(
            grad, x, approximate=self._approximate, grad_input=grad
        )

    @property
    def _approximate(self) -> str:
        return "tanh" if self.kind == "gelu_tanh" else "none"


ACTIVATIONS = tuple(map(Activation, ("silu", "gelu_tanh", "gelu")))


def gated_mlp(x: Tensor, layers: Sequence[LinearParts], activation: Activation) -> Tensor:
    """x [..., I] through gate, up and down, given in this order -> [..., I]."""
    numbers = [(layer.scale, layer.dropout) for layer in layers]
    output: Tensor = _GatedMlp.apply(  # type: ignore[no-untyped-call]
        x, pass_dtype(x), activation, numbers, draw_seeds(layers), *tensors_of(layers)
    )
    return output


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        activation: Activation,
        numbers: Any,
        seeds: Any,
        *tensors: Any,
    ) -> Tensor:
        layers = layers_of(tensors, numbers, dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        (g, u), products = forward_all(flat, layers[:2], seeds[:2])
        (y,), inner = forward_all(activation.times(g, u), layers[2:], seeds[2:])
        ctx.save_for_backward(flat, g, u, *products, *inner, *tensors_of(layers))
        ctx.activation, ctx.numbers, ctx.seeds = activation, numbers, seeds
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, g, u, gate_h, up_h, down_h, *tensors = ctx.saved_tensors
        layers = layers_of(tensors, ctx.numbers, x.dtype)
        needs = [ctx.needs_input_grad[5 + 4 * i : 9 + 4 * i] for i in range(3)]
        needs_x = ctx.needs_input_grad[0]
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        inner_needed = needs_x or any(needs[0]) or any(needs[1])
        product = ctx.activation.times(g, u) if needs[2][0] or needs[2][2] else g  # g: for its shape
        dinner, down_grads = backward_all(
            [dy], product, [down_h], layers[2:], ctx.seeds[2:], inner_needed, needs[2:]
        )
        dx: Tensor | None = None
        grads_of_inner: list[list[Tensor | None]] = [[None] * 4] * 2
        if dinner is not None:
            del product
            douts = ctx.activation.times_backward_(dinner, g, u)
            dx, grads_of_inner = backward_all(
                douts, x, [gate_h, up_h], layers[:2], ctx.seeds[:2], needs_x, needs[:2]
            )
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, None, None, *(g for layer in (*grads_of_inner, *down_grads) for g in layer)

"""What lies between the matrix products, by elementwise.cpp: on tensors without gradients, of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.models.native.build import call, library


def serves(*tensors: Tensor) -> bool:
    """Whether the native code computes with these: dense bfloat16 tensors on a CPU that has it."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous() for x in tensors)
        and library("elementwise") is not None
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    output = torch.empty_like(gate)
    _call("silu_mul", gate, up, gate.numel(), _threads(), output)
    return output


def silu_mul_backward_(doutput: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate (written over `doutput`) and up."""
    dup = torch.empty_like(up)
    _call("silu_mul_backward", doutput, gate, up, gate.numel(), _threads(), dup)
    return doutput, dup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., I] normalised and scaled by weight [I] float32, and 1 / sqrt(mean(x^2) + eps) [..., 1]
    float32."""
    output, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
    _call("rms_norm", x, weight, inverse.numel(), x.shape[-1], eps, _threads(), inverse, output)
    return output, inverse


def rms_norm_backward(doutput: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x."""
    dx = torch.empty_like(x)
    _call("rms_norm_backward", doutput, x, weight, inverse, inverse.numel(), x.shape[-1], _threads(), dx)
    return dx


def serves_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` computes with these: x [1, H, T, D] with D a multiple of 32, angles for all of it."""
    shape = (1, 1, x.shape[-2], x.shape[-1])
    return (
        x.dim() == 4
        and x.shape[0] == 1
        and x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and x.shape[-1] % 32 == 0
        and cos.shape == sin.shape == shape
        and serves(cos, sin)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, D] turned by cos and sin [1, 1, T, D]: halves (a, b) -> (a cos - b sin, b cos + a sin)."""
    output = torch.empty_like(x)
    heads, tokens, size = x.shape[1:]
    steps = (x.stride(2), x.stride(1), output.stride(2), output.stride(1))
    _call("rotate", x, cos, sin, tokens, heads, size, *steps, _threads(), output)
    return output


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Writes exp(z - largest of the row) over logits [C, V]; returns the largest and the sums, [C, 1]
    float32."""
    largest, sums = (torch.empty(logits.shape[0], 1) for _ in range(2))
    _call("exponentials", logits, *logits.shape, _threads(), largest, sums)
    return largest, sums


def _threads() -> int:
    return torch.get_num_threads()


def _call(function: str, *arguments: Tensor | int | float) -> None:
    call("elementwise", function, *arguments)

"""RMSNorm in one autograd node: float32 inside whatever the format outside, and no chain of copies saved.

y = x r (w + o),  r = 1 / sqrt(mean(x^2) + eps)          Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
dx = r g - x r^3 mean(g x),  g = dy (w + o)              o is 1 for Gemma, which stores w - 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.models.native import elementwise as native


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., I] normalised over its last dimension and scaled by weight [I] + offset, in x's format."""
    output: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.offset = offset
        if native.serves(x):
            output, inverse = native.rms_norm(x, _scale(weight, offset), eps)
            ctx.save_for_backward(x, weight, inverse)
            return output
        wide = x.float() if x.dtype != torch.float32 else x.clone()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(wide.mul_(inverse), _scale(weight, offset), out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        dy = grads[0]
        if native.serves(x, dy) and not ctx.needs_input_grad[1]:
            return native.rms_norm_backward(dy, x, _scale(weight, ctx.offset), inverse), None, None, None
        scaled = dy.float() * inverse
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (scaled * x).sum(tuple(range(x.ndim - 1))).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None, None
        scaled *= _scale(weight, ctx.offset)
        wide = x.float()
        mean = torch.linalg.vecdot(scaled, wide)[..., None]
        mean *= inverse.square().div_(-x.shape[-1])
        return scaled.addcmul_(wide, mean).to(x.dtype), dweight, None, None


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight.float()

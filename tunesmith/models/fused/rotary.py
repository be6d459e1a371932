"""Rotary position embedding of queries and keys in one autograd node, which saves nothing but the angles.

Halves a, b of each head (Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split order of transformers):

    (a, b) -> (a cos - b sin, b cos + a sin)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.models.native import elementwise as native


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: q [B, H, T, D], k [B, K, T, D], cos and sin [B, T, D'] with D' <=
    D
    -> rotated q and k. What of a head lies behind D' is left as it is."""
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(  # type: ignore[no-untyped-call]
        q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    )
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        # The transpose: each half's sine goes to the other half, with the other sign.
        half = sin.shape[-1] // 2
        swapped = torch.cat((sin[..., half:], sin[..., :half]), -1).neg_()
        return *(None if dy is None else _rotate(dy, cos, swapped) for dy in grads), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if native.serves_rotation(x, cos, sin):
        return native.rotate(x, cos, sin)
    width = cos.shape[-1]
    half = width // 2
    a, b = x[..., :half], x[..., half:width]
    out = torch.empty_like(x)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    torch.mul(a, cos[..., :half], out=out[..., :half]).addcmul_(b, sin[..., :half], value=-1)
    torch.mul(b, cos[..., half:], out=out[..., half:width]).addcmul_(a, sin[..., half:])
    return out

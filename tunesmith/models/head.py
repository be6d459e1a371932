"""The output head and its loss, chunk by chunk: logits exist for one chunk at a time, and only at
predictions.

P predictions, H hidden size, V vocabulary, z = x W^T + b (+ s x A^T B^T), then the model's own change f of
logits (soft-capping in Gemma 2, a factor in Granite and Cohere).

    lse_i  = log sum_j exp f(z_ij)
    loss_i = w_i (lse_i - (1 - e) f(z_it) - e mean_j f(z_ij) + c lse_i^2)     e: label smoothing, c: z-loss
    dz_ij  = w_i f'(z_ij) ((1 + 2 c lse_i) p_ij - (1 - e) [j = t] - e / V)

The gradients are made in the forward pass, while the chunk's logits are there; the backward pass scales them.
Not even the probabilities are made: with u_ij = exp f(z_ij) in place of the logits and l_i its sum,
dx_i = (w_i / l_i) (u_i - l_i [t]) W, so a row's factor is applied to H numbers and not to V. The z-loss makes
p_ij a multiple of itself: l_i / (1 + 2 c lse_i) takes the place of l_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.fused.linear import LinearParts, pass_dtype
from tunesmith.models.native import elementwise as native

CHUNK_BYTES = 64 * 2**20  # of one chunk's logits


@dataclass(frozen=True, slots=True)
class LogitChange:
    """What a model does to its logits: multiply, then soft-cap."""

    factor: float = 1.0
    softcap: float | None = None


def prediction_losses(
    hidden: Tensor,
    head: LinearParts,
    targets: Tensor,
    weights: Tensor,
    *,
    change: LogitChange = LogitChange(),
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """weight * (negative log-likelihood + z_loss * log(Z)^2) of each prediction: [P] float32.

    hidden [P, H]; targets [P] int64; weights [P] float32, which may be zero. The gradient of the hidden
    states is right for any gradient of the losses; a trained head's is made for equal gradients (a plain or
    scaled sum), and made anew otherwise."""
    options = _Options(change, label_smoothing, z_loss, head.scale)
    losses: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, targets, weights, options, pass_dtype(hidden), *head.tensors
    )
    return losses


@dataclass(frozen=True, slots=True)
class _Options:
    change: LogitChange
    label_smoothing: float
    z_loss: float
    scale: float


@dataclass(slots=True)
class _Grads:
    """Gradients of hidden states (one row a prediction, for a loss gradient of 1) and of the head's
    tensors."""

    hidden: Tensor | None
    tensors: list[Tensor | None]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        options: _Options,
        dtype: Any,
        *tensors: Any,
    ) -> Tensor:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        head = LinearParts(tensors[0], tensors[1], tensors[2], tensors[3], options.scale)
        losses, grads = _loss_and_grads(hidden.to(dtype), targets, weights, options, head, needs)
        ctx.trains_head = any(needs[1:])
        if ctx.trains_head:  # may have to be made anew
            ctx.save_for_backward(hidden, targets, weights, *tensors)
        ctx.options, ctx.dtype, ctx.needs, ctx.grads = options, dtype, needs, grads
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        grad, grads = outer[0], ctx.grads
        ctx.grads = None
        if ctx.trains_head and grad.numel() and not bool((grad == grad[0]).all()):
            hidden, targets, weights, *tensors = ctx.saved_tensors
            head = LinearParts(tensors[0], tensors[1], tensors[2], tensors[3], ctx.options.scale)
            _, grads = _loss_and_grads(
                hidden.to(ctx.dtype), targets, weights * grad, ctx.options, head, ctx.needs
            )
            return grads.hidden, None, None, None, None, *grads.tensors
        dhidden = None
        if grads.hidden is not None:
            dhidden = grads.hidden.mul_(grad[:, None])
        factor = grad[0] if grad.numel() else grad.sum()
        return (
            dhidden,
            None,
            None,
            None,
            None,
            *(None if g is None else g.mul_(factor) for g in grads.tensors),
        )


def _loss_and_grads(
    hidden: Tensor, targets: Tensor, weights: Tensor, options: _Options, head: LinearParts, needs: Any
) -> tuple[Tensor, _Grads]:
    count, vocabulary = hidden.shape[0], head.weight.shape[0]
    losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
    wide = [
        torch.zeros_like(tensor, dtype=torch.float32) if need and tensor is not None else None
        for need, tensor in zip(needs[1:], head.tensors, strict=True)
    ]
    grads = _Grads(torch.empty_like(hidden, dtype=torch.float32) if needs[0] else None, wide)
    size = max(1, CHUNK_BYTES // (vocabulary * hidden.element_size()))
    size = -(-count // -(-count // size)) if count else 1  # chunks of about one size
    buffer = hidden.new_empty(min(size, count), vocabulary)
    weight = head.weight.to(hidden.dtype)
    mean = weight.mean(0, dtype=torch.float32) if options.label_smoothing else None
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        losses[chunk] = _chunk(
            hidden[chunk],
            targets[chunk],
            weights[chunk],
            options,
            head,
            weight,
            mean,
            buffer[: chunk.stop - start],
            grads,
            chunk,
        )
    tensors = [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads.tensors, head.tensors, strict=True)
    ]
    return losses, _Grads(grads.hidden, tensors)


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    options: _Options,
    head: LinearParts,
    weight: Tensor,
    mean: Tensor | None,
    logits: Tensor,
    grads: _Grads,
    at: slice,
) -> Tensor:
    """Losses [C] of one chunk, made in the buffer `logits` [C, V]; its gradients go into `grads`.

    weight is the head's in the pass's format, mean [H] its mean over the vocabulary (for smoothing)."""
    product = _logits(hidden, head, weight, logits)
    change, smoothing = options.change, options.label_smoothing
    slope = _change_(logits, change)
    target_at = (torch.arange(len(targets), device=targets.device), targets)
    target_logits = logits[target_at].float()[:, None]
    mean_logits = _row_sums(logits) / logits.shape[1] if smoothing else None
    shift, sums = _exponentials_(logits)
    log_sums = sums.log() if shift is None else sums.log() + shift
    nll = log_sums - (1 - smoothing) * target_logits
    if mean_logits is not None:
        nll -= smoothing * mean_logits
    if options.z_loss:
        nll += options.z_loss * log_sums.square()
        slopes = 1 + 2 * options.z_loss * log_sums
        # Where the slope is 0 (a log Z far below it) the sum would be infinite; 2^-20 is less than rounding.
        sums = sums / torch.where(slopes.abs() < 2**-20, 2**-20, slopes)
    losses = (nll[:, 0] * weights).float()
    if grads.hidden is None and not any(grad is not None for grad in grads.tensors):
        return losses
    # u_t - (1 - e) l in one rounding, so that a sure prediction's small gradient is not lost in it.
    at_target = logits[target_at].float().sub_(sums[:, 0], alpha=1 - smoothing)
    logits[target_at] = at_target.to(logits.dtype)
    if slope is not None:
        if mean is not None:
            logits.sub_((smoothing / logits.shape[1]) * sums)
        logits.mul_(slope)
        mean = None
    row = weights[:, None] * change.factor / sums
    smooth_row = (weights * (change.factor * smoothing))[:, None]
    if grads.hidden is not None:
        dhidden = _times_weight(logits, weight)
        if head.lora_a is not None and head.lora_b is not None:
            inner = torch.mm(logits, head.lora_b.to(logits.dtype))
            dhidden += torch.mm(inner, head.lora_a.to(logits.dtype)).float().mul_(head.scale)
        dhidden *= row
        if mean is not None:
            dhidden -= smooth_row * _smoothed_mean(head, mean)
        grads.hidden[at] = dhidden
    _add_head_grads(hidden, product, head, logits, row, smooth_row if mean is not None else None, grads)
    return losses


def _logits(hidden: Tensor, head: LinearParts, weight: Tensor, out: Tensor) -> Tensor | None:
    """Writes the logits into `out` [C, V]; returns the LoRA's x A^T [C, r]."""
    if head.bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(head.bias.to(out.dtype), hidden, weight.t(), out=out)
    if head.lora_a is None or head.lora_b is None:
        return None
    product = torch.mm(hidden, head.lora_a.to(out.dtype).t())
    out.addmm_(product, head.lora_b.to(out.dtype).t(), alpha=head.scale)
    return product


def _change_(logits: Tensor, change: LogitChange) -> Tensor | None:
    """The model's change of logits, in place; the derivative of soft-capping, if there is one."""
    if change.factor != 1:
        logits.mul_(change.factor)
    if change.softcap is None:
        return None
    logits.div_(change.softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(change.softcap)
    return slope


def _exponentials_(logits: Tensor) -> tuple[Tensor | None, Tensor]:
    """Writes exp(logits - shift) over [C, V]; returns the shift (None: 0) and the sums, [C, 1] float32."""
    if native.serves(logits):
        return native.exponentials_(logits)
    largest = logits.amax(-1, keepdim=True)
    # Floating-point numbers have room for exponents of +-60 without a reference. (To know whether they are
    # needed an accelerator would have to be waited for.)
    shift = None
    if logits.device.type != "cpu" or bool((largest.max() > 60) | (largest.min() < -60)):
        shift = largest.float()
        logits.sub_(largest)
    return shift, _row_sums(logits.exp_())


def _row_sums(x: Tensor) -> Tensor:
    """[C, 1] float32 sums of [C, V], a few rows at a time: torch copies to float32 what it sums in it, and a
    copy of everything does not stay in the cache (measured: 17 times slower at 512 x 49,152)."""
    parts = torch.split(x, 32) if x.device.type == "cpu" else (x,)
    return torch.cat([rows.sum(-1, keepdim=True, dtype=torch.float32) for rows in parts])


def _times_weight(u: Tensor, weight: Tensor) -> Tensor:
    """[C, V] x [V, H] -> [C, H] float32, in pieces of the vocabulary: faster than at once on a CPU, and the
    pieces add up in float32."""
    total = torch.zeros(u.shape[0], weight.shape[1], dtype=torch.float32, device=u.device)
    for columns, rows in zip(torch.split(u, 8192, 1), torch.split(weight, 8192), strict=True):
        total += torch.mm(columns, rows)
    return total


def _smoothed_mean(head: LinearParts, mean: Tensor) -> Tensor:
    """[H] the mean over the vocabulary of W + s B A."""
    if head.lora_a is None or head.lora_b is None:
        return mean
    return mean + head.scale * (head.lora_b.float().mean(0) @ head.lora_a.float())


def _add_head_grads(
    hidden: Tensor,
    product: Tensor | None,
    head: LinearParts,
    u: Tensor,
    row: Tensor,
    smooth_row: Tensor | None,
    grads: _Grads,
) -> None:
    """Adds this chunk's gradients of weight, bias, lora_a and lora_b; dz = row u - smooth_row / V."""
    dweight, dbias, da, db = grads.tensors
    vocabulary = u.shape[1]
    scaled = (hidden * row).to(u.dtype)
    if dweight is not None:
        for rows, columns in zip(torch.split(dweight, 8192), torch.split(u, 8192, 1), strict=True):
            rows += torch.mm(columns.t(), scaled)
        if smooth_row is not None:
            dweight -= (smooth_row * hidden).sum(0, dtype=torch.float32) / vocabulary
    if dbias is not None:
        dbias += torch.mv(u.t(), row[:, 0].to(u.dtype))
        if smooth_row is not None:
            dbias -= smooth_row.sum() / vocabulary
    if head.lora_a is None or head.lora_b is None or product is None:
        return
    if db is not None:
        db += torch.mm(u.t(), (product * row).to(u.dtype)).mul_(head.scale)
        if smooth_row is not None:
            db -= head.scale * (smooth_row * product).sum(0, dtype=torch.float32) / vocabulary
    if da is not None:
        inner = torch.mm(u, head.lora_b.to(u.dtype)).float().mul_(row)
        if smooth_row is not None:
            inner -= smooth_row * head.lora_b.float().mean(0)
        da += head.scale * torch.mm(inner.to(u.dtype).t(), hidden)

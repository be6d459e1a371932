"""Cross-entropy over predictions: the loss of supervised fine-tuning and pretraining.

P predictions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """weight * (-log softmax(logits)[target] + z_loss * log(Z)^2) of each prediction, in nats: [P] float32. Z
    is the sum of exp(logits) (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    logits [P, V] of any floating type (the softmax is taken in float32); targets [P] int64; weights [P]
    float32. Not a mean: the caller divides by the weight of the whole optimiser step, of which these
    predictions may be a part. Raises ValueError if the shapes do not agree."""
    if logits.shape[:-1] != targets.shape or targets.shape != weights.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}, weights {tuple(weights.shape)}"
        )
    logits = logits.float()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    return losses * weights

"""Objectives: what a pass of a model over a pack is asked to lower. A model and a pack in, a sum over targets
out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.losses.cross_entropy import weighted_cross_entropy


def next_token_loss(model: Any, pack: dict[str, Any]) -> Tensor:
    """Sum over the pack's predictions of weight * negative log-likelihood, in nats (a scalar, float32).

    Logits are made at predictions only, never at every position."""
    positions = pack["positions"]
    output = model(
        input_ids=pack["input_ids"],
        position_ids=pack["position_ids"],
        use_cache=False,
        # An empty pack makes one logit that counts nothing, so that every rank's graph has the same
        # parameters.
        logits_to_keep=positions if len(positions) else 1,
    )
    logits = output.logits[0]
    if not len(positions):
        return logits.float().sum() * 0.0
    return weighted_cross_entropy(logits, pack["targets"], pack["weights"])

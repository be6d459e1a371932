"""Objectives: what a pass of a model over a pack is asked to lower. A model and a pack in, a sum over targets
or rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tunesmith.losses.cross_entropy import weighted_cross_entropy
from tunesmith.models.fuse import loss_head

Pack = dict[str, Any]


class Outcome(NamedTuple):
    """What an objective says of a pack. loss: a sum, float32, which the sum of the step's `total` divides.
    figures: what else there is to know, each as the sum and the number that it is a mean of."""

    loss: Tensor
    figures: Mapping[str, tuple[Tensor, Tensor]] = {}


def pairs_of(parts: Sequence[float]) -> list[tuple[float, float]]:
    """The figures that were laid end to end."""
    return list(zip(parts[::2], parts[1::2], strict=True))


def means(figures: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean of each figure of which there is one."""
    return {name: total / number for name, (total, number) in figures.items() if number}


class Objective(Protocol):
    """What the trainer asks of each pass. Every rank names the same figures, in the same order."""

    def begin(self, model: Any, packs: Iterable[Pack], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Look at all packs of this rank's step (or evaluation) before they are asked about one by one.
        `over_ranks` sums a tensor over all ranks."""

    def __call__(self, model: Any, pack: Pack) -> Outcome: ...


@dataclass(frozen=True)
class NextToken:
    """The objective of supervised fine-tuning and pretraining."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def begin(self, model: Any, packs: Iterable[Pack], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """A pass needs to know of no other."""

    def __call__(self, model: Any, pack: Pack) -> Outcome:
        loss = next_token_loss(model, pack, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        return Outcome(loss)


def next_token_loss(
    model: Any, pack: dict[str, Any], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Sum over the pack's predictions of weight * negative log-likelihood, in nats (a scalar, float32); in
    training smoothed, and with the z-loss, as asked."""
    if not model.training:
        label_smoothing = z_loss = 0.0
    return prediction_losses(model, pack, label_smoothing=label_smoothing, z_loss=z_loss).sum()


def model_inputs(pack: Pack) -> dict[str, Any]:
    """What the model is given of a pack."""
    inputs = {key: pack[key] for key in ("input_ids", "position_ids")} | {"use_cache": False}
    # A prefix tree; models without attention for one need not know the keyword.
    return inputs if pack["layout"] is None else inputs | {"layout": pack["layout"]}


def prediction_losses(
    model: Any, pack: dict[str, Any], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """weight * negative log-likelihood of each of the pack's predictions, in nats: [P] float32. With label
    smoothing e, that of a target distribution of 1 - e at the target and e spread over the vocabulary; with a
    z-loss c, c * log(Z)^2 more.

    Logits are made at predictions only, never at every position. An empty pack makes one that counts nothing,
    so that every rank's graph has the same parameters."""
    positions, targets, weights = pack["positions"], pack["targets"], pack["weights"]
    if not len(positions):
        positions, targets, weights = (tensor.new_zeros(1) for tensor in (positions, targets, weights))
    inputs = model_inputs(pack) | {"logits_to_keep": positions}
    head = loss_head(model)
    if head is not None:
        return head(model, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss, **inputs)
    logits = model(**inputs).logits[0]
    return weighted_cross_entropy(logits, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss)

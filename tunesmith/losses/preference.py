"""What the losses of preference tuning are given, what they return, and where the one of a method is.

N rows: pairs of answers, or answers with a label. A log-probability is that of one answer in nats, summed
over its target tokens, the end token included. A *reward* is what the loss compares: how much more the
model likes an answer than it did (beta times the log-ratio to the reference), or how much it likes it,
where the method has no reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tunesmith.config.preferences import PREFERENCES


@dataclass(frozen=True)
class Pairs:
    """N pairs of answers, all [N]: log-probabilities by the model and by the reference (None for methods
    without one), and the number of target tokens of each answer, at least 1. Raises ValueError if the shapes
    do not agree."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __post_init__(self) -> None:
        _check_shapes(self)


@dataclass(frozen=True)
class Labelled:
    """N answers to as many prompts: log-probabilities [N] by the model and by the reference, whether each
    is a desirable one [N] bool, and the estimate of the KL divergence (`kto.kl_estimate`), a scalar without
    gradient. Raises ValueError if the shapes do not agree."""

    logps: Tensor
    reference: Tensor
    is_desirable: Tensor
    kl: Tensor

    def __post_init__(self) -> None:
        _check_shapes(self, but=("kl",))


@dataclass(frozen=True)
class Scored:
    """N pairs that a model with a scalar head has given scores, all [N], and by how much each chosen answer
    is said to be better (0: not said). Raises ValueError if the shapes do not agree."""

    chosen: Tensor
    rejected: Tensor
    margins: Tensor

    def __post_init__(self) -> None:
        _check_shapes(self)


@dataclass(frozen=True)
class Judged:
    """What a loss makes of pairs, all [N] float32: losses, not averaged, and rewards without gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class JudgedAnswers:
    """What a loss makes of labelled answers, both [N] float32: losses, not averaged, and rewards without
    gradient."""

    losses: Tensor
    rewards: Tensor


def _check_shapes(batch: Pairs | Labelled | Scored, but: tuple[str, ...] = ()) -> None:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in but}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def loss_of(method: str) -> Callable[[Any, Any], Any]:
    """The loss of a method of `PREFERENCES`: `loss(batch, settings)`, where `settings` is the `prefer`
    section of a config (or anything with the keys the method reads) and `batch` what the method learns
    from: `Pairs` gives `Judged`, `Labelled` (data: labelled) gives `JudgedAnswers`, `Scored`
    (has_scalar_head) gives `Judged`.

    The module is imported here and not before: a config can name a method without loading torch."""
    row = PREFERENCES[method]
    module, _, name = row.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    keys = [key for key in row.keys if key != "reference"]

    def loss(batch: Any, settings: Any) -> Any:
        return function(batch, **{key: getattr(settings, key) for key in keys})

    return loss


def log_ratios(pairs: Pairs, *, length_normalized: bool = False) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of the chosen and of the rejected answers, [N] float32 each; with
    `length_normalized` the mean over an answer's tokens. Raises ValueError where there is no reference."""
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        raise ValueError("reference_chosen and reference_rejected are missing; this loss compares with them")
    chosen = pairs.chosen.float() - pairs.reference_chosen.float()
    rejected = pairs.rejected.float() - pairs.reference_rejected.float()
    if length_normalized:
        return chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return chosen, rejected


def mean_logps(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Mean log-probability of a token, of the chosen and of the rejected answers, [N] float32 each."""
    return pairs.chosen.float() / pairs.chosen_tokens, pairs.rejected.float() / pairs.rejected_tokens


def with_sft(losses: Tensor, pairs: Pairs, sft_weight: float) -> Tensor:
    """losses + sft_weight * -log p(chosen) / its tokens: the term of Pang et al. 2024 (arXiv:2404.19733),
    eq. 1, which keeps the chosen answers likely. [N] float32.

    The mean is taken over the tokens of each answer, as there. TRL takes it over those of all chosen answers
    of a device's batch, so that an answer's say depends on those beside it."""
    if not sft_weight:
        return losses
    return losses - sft_weight * mean_logps(pairs)[0]

"""KTO: learning from answers with a thumb up or down each (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.losses.preference import JudgedAnswers, Labelled


def kto(
    answers: Labelled, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> JudgedAnswers:
    """weight * (1 - sigmoid(beta (r - kl))) of a desirable answer and weight * (1 - sigmoid(beta (kl - r)))
    of another, r = log(policy / reference): eq. 8 of the paper (7 in its first versions). Losses and
    rewards beta * r, [N] float32.

    A batch may hold answers of one kind only."""
    log_ratios = answers.logps.float() - answers.reference.float()
    distance = beta * (log_ratios - answers.kl.float())
    desirable = desirable_weight * (-distance).sigmoid()
    undesirable = undesirable_weight * distance.sigmoid()
    losses = desirable.where(answers.is_desirable, undesirable)
    return JudgedAnswers(losses, beta * log_ratios.detach())


def kl_estimate(total: float, number: float) -> Tensor:
    """The point that rewards are compared with, float32: max(0, mean of log(policy / reference)) over
    answers that belong to other prompts than those they are read after. There are `number` of them, and
    `total` is their sum (section 4.1).

    The paper shifts the answers of a batch by one. The mean is over all of them before 0 bounds it, as in the
    paper and TRL: over several passes and devices, theirs together."""
    return torch.tensor(max(0.0, total / max(number, 1.0)), dtype=torch.float32)

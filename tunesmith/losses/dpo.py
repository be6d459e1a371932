"""Direct preference optimisation: the losses of the difference of two log-ratios to a reference.

    h = log(policy / reference)(chosen) - log(policy / reference)(rejected)

All take N pairs of answers, work in float32, and give losses [N] and rewards beta * log(policy / reference)
[N] (of the mean token, where the loss is of those). `sft_weight` adds the mean negative log-probability of
the chosen answer's tokens (`with_sft`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.losses.preference import Judged, Pairs, log_ratios, with_sft


def dpo(
    pairs: Pairs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    length_normalized: bool = False,
) -> Judged:
    """-log sigmoid(beta h): Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. ln 2 where policy and reference
    agree.

    `label_smoothing` e takes each pair for the other way about with probability e: -(1 - e) log
    sigmoid(beta h) - e log sigmoid(-beta h), conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf).
    TRL 1.16 ignores its label_smoothing here. `length_normalized` divides each log-ratio by the answer's
    number of tokens (Lambert et al. 2024, arXiv:2411.15124, eq. 6; TRL's sigmoid_norm), and needs a beta of
    another size."""
    chosen, rejected = log_ratios(pairs, length_normalized=length_normalized)
    h = beta * (chosen - rejected)
    losses = -logsigmoid(h)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-h)
    return _judged(with_sft(losses, pairs, sft_weight), chosen, rejected, beta)


def ipo(pairs: Pairs, *, beta: float, sft_weight: float = 0.0, length_normalized: bool = True) -> Judged:
    """(h - 1 / (2 beta))^2: Azar et al. 2023 (arXiv:2310.12036), eq. 17, whose tau is beta.

    The paper writes h with whole answers, and its squares then grow with their length; its authors told TRL
    that their results are of mean tokens. So are `length_normalized`'s default and TRL's ipo."""
    chosen, rejected = log_ratios(pairs, length_normalized=length_normalized)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return _judged(with_sft(losses, pairs, sft_weight), chosen, rejected, beta)


def hinge(pairs: Pairs, *, beta: float, sft_weight: float = 0.0) -> Judged:
    """max(0, 1 - beta h): the rank calibration of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, eq. 1), with
    log-ratios to a reference as in RSO (Liu et al. 2023, arXiv:2309.06657, "hinge-norm"), and so in TRL."""
    chosen, rejected = log_ratios(pairs)
    losses = torch.relu(1 - beta * (chosen - rejected))
    return _judged(with_sft(losses, pairs, sft_weight), chosen, rejected, beta)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float, sft_weight: float = 0.0) -> Judged:
    """((1 - e) L(h) - e L(-h)) / (1 - 2 e), L the loss of DPO and e = `label_smoothing` < 1/2 the share of
    pairs that are the wrong way about (Chowdhury et al. 2024, arXiv:2403.00409): with such pairs its
    expectation is the loss of DPO on the right ones. It can be negative."""
    chosen, rejected = log_ratios(pairs)
    h = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
    losses = losses / (1 - 2 * label_smoothing)
    return _judged(with_sft(losses, pairs, sft_weight), chosen, rejected, beta)


def _judged(losses: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> Judged:
    return Judged(losses, beta * chosen.detach(), beta * rejected.detach())

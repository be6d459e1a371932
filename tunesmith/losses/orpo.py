"""ORPO: fine-tuning and preference in one, without a reference (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.losses.preference import Judged, Pairs, mean_logps, with_sft


def orpo(pairs: Pairs, *, beta: float) -> Judged:
    """-log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)): eqs. 6 and 7 of the paper,
    whose lambda is beta (as in TRL); p is that of the mean token (eq. 3) and odds = p / (1 - p) (eq. 4).
    [N] float32; rewards beta * log p, as in TRL.

    The first term is of the answer's tokens, as in SFT. In TRL, and by default in the authors' code, it is of
    the prompt's too."""
    chosen, rejected = mean_logps(pairs)
    log_odds = (chosen - _log_1_minus_exp(chosen)) - (rejected - _log_1_minus_exp(rejected))
    losses = with_sft(-beta * logsigmoid(log_odds), pairs, 1.0)
    return Judged(losses, beta * chosen.detach(), beta * rejected.detach())


def _log_1_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without the rounding of 1 - exp(x) near 0 and near 1 (Maechler 2012,
    "Accurately computing log(1 - exp(-|a|))", whose bound is ln 2).

    An answer that is certain (x = 0) has infinite odds, and the gradient of them is no number: x is kept one
    rounding below. Both branches are finite for such x, since `where` passes on 0 * inf from the one not
    taken."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931471805599453, (-x.expm1()).log(), (-x.exp()).log1p())

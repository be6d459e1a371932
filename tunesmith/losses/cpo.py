"""CPO: DPO with a uniform reference, held to the chosen answers (Xu et al. 2024, arXiv:2401.08417)."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from tunesmith.losses.preference import Judged, Pairs, with_sft


def cpo(pairs: Pairs, *, beta: float, sft_weight: float) -> Judged:
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) - sft_weight log p(chosen) / tokens: the paper's
    L_prefer (eq. 3), and its L_NLL. Losses and rewards beta * log p, [N] float32. No reference.

    The paper writes L_NLL with whole answers. Its authors' code and TRL take the mean of tokens, and so do
    we."""
    chosen, rejected = pairs.chosen.float(), pairs.rejected.float()
    losses = with_sft(-logsigmoid(beta * (chosen - rejected)), pairs, sft_weight)
    return Judged(losses, beta * chosen.detach(), beta * rejected.detach())

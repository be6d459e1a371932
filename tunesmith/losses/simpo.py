"""SimPO: the mean token's log-probability as reward, with a margin to win by (Meng et al. 2024,
arXiv:2405.14734)."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from tunesmith.losses.preference import Judged, Pairs, mean_logps, with_sft


def simpo(pairs: Pairs, *, beta: float, gamma: float, sft_weight: float = 0.0) -> Judged:
    """-log sigmoid(beta log p(chosen) / |chosen| - beta log p(rejected) / |rejected| - gamma): eq. 6 of the
    paper. Losses and rewards beta * log p / tokens (eq. 4), [N] float32. No reference.

    `sft_weight` adds the mean negative log-probability of the chosen answer's tokens; TRL reaches SimPO
    through its CPO trainer, where that weight is 1 unless it is set to 0."""
    chosen, rejected = mean_logps(pairs)
    losses = -logsigmoid(beta * (chosen - rejected) - gamma)
    return Judged(with_sft(losses, pairs, sft_weight), beta * chosen.detach(), beta * rejected.detach())

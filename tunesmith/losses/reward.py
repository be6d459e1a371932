"""Bradley-Terry: the loss of a reward model."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from tunesmith.losses.preference import Judged, Scored


def bradley_terry(scored: Scored) -> Judged:
    """-log sigmoid(score(chosen) - score(rejected) - margin): Touvron et al. 2023 (arXiv:2307.09288), eq.
    2; with margin 0 that of Bradley and Terry, as in Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. Losses
    and rewards, which are the scores, [N] float32."""
    chosen, rejected = scored.chosen.float(), scored.rejected.float()
    losses = -logsigmoid(chosen - rejected - scored.margins.float())
    return Judged(losses, chosen.detach(), rejected.detach())

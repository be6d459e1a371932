"""The objectives of preference tuning: log-probabilities or scores of answers from a pack, and what a loss
makes of them.

M targets of A answers, which are of N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tunesmith.config.preferences import PREFERENCES
from tunesmith.config.schema import PreferConfig
from tunesmith.losses.kto import kl_estimate
from tunesmith.losses.preference import Judged, Labelled, Pairs, Scored, loss_of
from tunesmith.models.score import score_head
from tunesmith.packing.answers import collate_answers_flat
from tunesmith.training.objectives import Outcome, Pack, model_inputs, prediction_losses

Figures = dict[str, tuple[Tensor, Tensor]]
# (model) -> the reference model, while the context lasts.
Reference = Callable[[Any], AbstractContextManager[Any]]


def target_logps(model: Any, pack: Pack) -> Tensor:
    """[M] log-probability of each target of each answer, float32. What several answers predict alike is
    computed once."""
    return -prediction_losses(model, pack)[pack["members"]]


class PreferenceObjective:
    """What `prefer.method` asks of each pass. `reference` is asked about packs that do not bring what the
    reference model says of them."""

    def __init__(self, settings: PreferConfig, reference: Reference | None = None) -> None:
        assert settings.method is not None
        self._settings = settings
        self._method = PREFERENCES[settings.method]
        self._loss = loss_of(settings.method)
        self._reference = reference
        self._kl = torch.zeros(())

    def begin(self, model: Any, packs: Iterable[Pack], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """With labelled answers: the point that rewards are compared with, of all rows of the step whatever
        its passes and ranks."""
        if self._method.data != "labelled":
            return
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for pack in packs:
                wrong = pack["mismatched"] or collate_answers_flat([])
                logps = target_logps(model, wrong)
                ratios = _of_answers(logps - self._reference_logps(model, wrong), wrong)
                sums += torch.tensor([float(ratios.sum()), len(ratios)], dtype=torch.float64)
        model.train(was_training)
        self._kl = kl_estimate(*over_ranks(sums).tolist())

    def __call__(self, model: Any, pack: Pack) -> Outcome:
        reference = self._reference_logps(model, pack) if self._method.needs_reference else None
        logps = target_logps(model, pack)
        loss, figures = (self._pairs if self._method.data == "pairs" else self._labelled)(
            pack, _of_answers(logps, pack), None if reference is None else _of_answers(reference, pack)
        )
        if reference is not None:
            # r - 1 - log r with r = p / p_ref: 0 where they agree, positive elsewhere. Of tokens that the
            # reference wrote its mean is KL(reference | model) (Schulman 2020, "Approximating KL").
            ratio = (logps - reference).detach()
            figures["kl_of_tokens"] = ((ratio.expm1() - ratio).sum(), _number(ratio))
        return Outcome(loss + 0 * logps.sum(), figures)

    def _pairs(self, pack: Pack, logps: Tensor, reference: Tensor | None) -> tuple[Tensor, Figures]:
        chosen, rejected = pack["sides"] == 0, pack["sides"] == 1
        tokens = _of_answers(torch.ones_like(pack["shares"]), pack)
        judged = self._loss(
            Pairs(
                logps[chosen],
                logps[rejected],
                None if reference is None else reference[chosen],
                None if reference is None else reference[rejected],
                tokens[chosen],
                tokens[rejected],
            ),
            self._settings,
        )
        logps = logps.detach()
        return judged.losses.sum(), {
            **_reward_figures(judged),
            "logp_chosen": _mean(logps[chosen]),
            "logp_rejected": _mean(logps[rejected]),
            "logp_accuracy": _mean((logps[chosen] > logps[rejected]).float()),
            "tokens_chosen": _mean(tokens[chosen]),
            "tokens_rejected": _mean(tokens[rejected]),
        }

    def _labelled(self, pack: Pack, logps: Tensor, reference: Tensor | None) -> tuple[Tensor, Figures]:
        assert reference is not None
        is_desirable = pack["sides"] == 0
        judged = self._loss(
            Labelled(logps, reference, is_desirable, self._kl.to(logps.device)), self._settings
        )
        tokens, logps = _of_answers(torch.ones_like(pack["shares"]), pack), logps.detach()
        figures = {"kl": _mean(self._kl.to(logps.device).expand(len(logps)))}
        for name, some in (("desirable", is_desirable), ("undesirable", ~is_desirable)):
            figures |= {
                f"reward_{name}": _mean(judged.rewards[some]),
                f"logp_{name}": _mean(logps[some]),
                f"tokens_{name}": _mean(tokens[some]),
            }
        return judged.losses.sum(), figures

    def _reference_logps(self, model: Any, pack: Pack) -> Tensor:
        """[M] what the reference model says of each target."""
        if pack["reference"] is not None:
            found: Tensor = pack["reference"]
            return found
        if self._reference is None:
            raise ValueError("rows whose reference log-probabilities are not known, and no reference model")
        with torch.no_grad(), self._reference(model) as reference:
            return target_logps(reference, pack)


class RewardObjective:
    """What a method asks of each pass that has the model give answers scores: that of an answer is the one at
    its last token."""

    def __init__(self, settings: PreferConfig) -> None:
        assert settings.method is not None
        self._settings = settings
        self._loss = loss_of(settings.method)

    def begin(self, model: Any, packs: Iterable[Pack], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """A pass needs to know of no other."""

    def __call__(self, model: Any, pack: Pack) -> Outcome:
        scores = answer_scores(model, pack)
        chosen, rejected = pack["sides"] == 0, pack["sides"] == 1
        judged = self._loss(Scored(scores[chosen], scores[rejected], pack["margins"][chosen]), self._settings)
        return Outcome(judged.losses.sum(), _reward_figures(judged))


def answer_scores(model: Any, pack: Pack) -> Tensor:
    """[A] score of each answer, float32."""
    return score_head(model)(model, pack["ends"], **model_inputs(pack))


def _reward_figures(judged: Judged) -> Figures:
    margins = judged.chosen_rewards - judged.rejected_rewards
    return {
        "reward_chosen": _mean(judged.chosen_rewards),
        "reward_rejected": _mean(judged.rejected_rewards),
        "reward_margin": _mean(margins),
        "reward_accuracy": _mean((margins > 0).float()),
    }


def _of_answers(values: Tensor, pack: Pack) -> Tensor:
    """[A] sums over the targets of each answer of [M] values, times their weights."""
    sums = values.new_zeros(len(pack["sides"]))
    return sums.index_add(0, pack["answers"], values * pack["shares"])


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(), _number(values)


def _number(values: Tensor) -> Tensor:
    return values.new_tensor(float(len(values)))

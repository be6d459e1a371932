"""What TRL's own loss code makes of log-probabilities that are fixed here: tests/losses/trl_reference.json.

    python tests/losses/trl_reference.py > tests/losses/trl_reference.json    (TRL 1.16.0 beside torch)

TRL is no dependency of the tests, so its answers are kept in that file. Each trainer is made without its
`__init__` and given only what its loss reads; its "model" puts out the fixed log-probabilities, and all of
it is in float64. A batch holds one row, whose loss, rewards and gradient TRL returns or logs. A token of an
answer is token 1 of a vocabulary of two, and a prompt is one token."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

CPU = torch.device("cpu")
ONE_PROCESS = SimpleNamespace(device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x)
# (sum of the log-probabilities, tokens) of the chosen and the rejected answer by the model, then by the
# reference. The fifth is one the model has gone far off at, the sixth one it is all but certain of.
PAIRS = [
    ((-7.25, 5), (-9.5, 6), -8.0, -9.0),
    ((-30.0, 24), (-4.125, 3), -28.5, -3.0),
    ((-12.0, 8), (-12.0, 8), -12.0, -12.0),
    ((-0.875, 1), (-55.5, 40), -2.0, -50.0),
    ((-620.0, 200), (-90.0, 170), -180.0, -160.0),
    ((-0.0009765625, 4), (-3.5, 2), -0.5, -3.25),
]
# (sum, tokens) by the model, sum by the reference, whether it is desirable.
ANSWERS = [
    ((-7.25, 5), -8.0, True),
    ((-30.0, 24), -28.5, False),
    ((-12.0, 8), -12.0, True),
    ((-12.0, 8), -12.0, False),
    ((-55.5, 40), -50.0, True),
    ((-90.0, 170), -160.0, False),
]
# Sums of mismatched answers by the model and by the reference: the mean log-ratio is 1 in one, below 0 in the
# other.
MISMATCHED = [([-40.0, -60.0, -51.0], [-42.0, -60.5, -51.5]), ([-40.0, -61.0], [-39.0, -60.0])]
SCORES = [(1.5, -0.25, 0.0), (0.5, 2.0, 0.0), (3.0, 2.5, 1.0), (-40.0, 60.0, 0.33333333), (60.0, -40.0, 0.5)]


def _tokens(answer: tuple[float, int]) -> Tensor:
    """The log-probabilities of an answer's tokens, uneven, with the given sum: float64 with gradient."""
    total, number = answer
    shares = torch.linspace(1, 2, number, dtype=torch.float64)
    return (shares * (total / shares.sum())).requires_grad_()


def _trainer(kind: Any, **values: Any) -> Any:
    trainer = object.__new__(kind)
    trainer.accelerator, trainer.aux_loss_enabled = ONE_PROCESS, False
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


def _ids(numbers: list[int]) -> tuple[Tensor, Tensor]:
    """input_ids and completion_mask of a prompt of one token and so many tokens of an answer, padded."""
    mask = torch.zeros(len(numbers), 1 + max(numbers), dtype=torch.long)
    for row, number in enumerate(numbers):
        mask[row, 1 : 1 + number] = 1
    return torch.ones_like(mask), mask


def _per_token(*rows: Tensor) -> SimpleNamespace:
    """The output of TRL's fused head for these rows."""
    logps = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def _row(
    loss: Tensor, chosen: Tensor, rejected: Tensor, rewards: tuple[float, float] | None
) -> dict[str, Any]:
    """Loss, rewards, and the gradient of an answer's sum, which is that of each of its tokens."""
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    row = {"losses": loss.item()}
    if rewards is not None:
        row |= {"chosen_rewards": float(rewards[0]), "rejected_rewards": float(rewards[1])}
    return row | {"chosen_gradient": chosen.grad[0].item(), "rejected_gradient": rejected.grad[0].item()}


def by_dpo(*loss_types: str, logs_our_rewards: bool = True, **settings: Any) -> list[dict[str, Any]]:
    """`DPOTrainer._compute_loss`."""
    rows = []
    for chosen_answer, rejected_answer, reference_chosen, reference_rejected in PAIRS:
        chosen, rejected = _tokens(chosen_answer), _tokens(rejected_answer)
        ids, mask = _ids([chosen.numel(), rejected.numel()])
        trainer = _trainer(
            DPOTrainer,
            **{"loss_weights": [1.0], "label_smoothing": 0.0, **settings},
            loss_types=list(loss_types),
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            use_weighting=False,
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "ref_chosen_logps": torch.tensor([reference_chosen], dtype=torch.float64),
            "ref_rejected_logps": torch.tensor([reference_rejected], dtype=torch.float64),
        }
        output = _per_token(chosen, rejected)
        loss = trainer._compute_loss(lambda output=output, **_: output, inputs, return_outputs=False)
        logged = trainer._metrics["train"]
        rewards = (logged["rewards/chosen"][0], logged["rewards/rejected"][0])
        rows.append(_row(loss, chosen, rejected, rewards if logs_our_rewards else None))
    return rows


def by_cpo_or_orpo(kind: Any, **settings: Any) -> list[dict[str, Any]]:
    """`get_batch_loss_metrics` of `CPOTrainer` or `ORPOTrainer`, with their own `concatenated_forward`."""
    rows = []
    for chosen_answer, rejected_answer, *_ in PAIRS:
        chosen, rejected = _tokens(chosen_answer), _tokens(rejected_answer)
        trainer = _trainer(kind, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings)
        batch = {}
        for side, tokens in (("chosen", chosen), ("rejected", rejected)):
            ids, mask = _ids([tokens.numel()])
            batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": torch.ones_like(ids)}
            batch[f"{side}_labels"] = ids.masked_fill(mask == 0, -100)
        logps = torch.nn.utils.rnn.pad_sequence([chosen, rejected], batch_first=True, padding_value=-1.0)
        of_token_1 = logps - (-logps.expm1()).log()  # log odds: the logit of token 1 where that of 0 is 0
        logits = torch.stack([torch.zeros_like(of_token_1), of_token_1], -1)
        logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)  # what the last token predicts
        output = SimpleNamespace(logits=logits)
        loss, logged = trainer.get_batch_loss_metrics(lambda *_, output=output, **__: output, batch)
        rewards = (logged["rewards/chosen"], logged["rewards/rejected"])
        rows.append(_row(loss, chosen, rejected, rewards))
    return rows


def by_conservative_dpo(**settings: Any) -> list[dict[str, Any]]:
    """`CPOTrainer.cpo_loss` of log-ratios: DPO's sigmoid loss with label smoothing, which DPOTrainer
    lacks."""
    rows = []
    for chosen_answer, rejected_answer, reference_chosen, reference_rejected in PAIRS:
        chosen, rejected = _tokens(chosen_answer), _tokens(rejected_answer)
        trainer = _trainer(CPOTrainer, loss_type="sigmoid", alpha=0.0, **settings)
        ratios = (chosen.sum() - reference_chosen, rejected.sum() - reference_rejected)
        losses, *rewards = trainer.cpo_loss(ratios[0][None], ratios[1][None])
        rows.append(_row(losses[0], chosen, rejected, (rewards[0].item(), rewards[1].item())))
    return rows


def by_kto(mismatched: tuple[list[float], list[float]], **settings: Any) -> list[dict[str, Any]]:
    """`KTOTrainer._compute_loss`, each answer beside all the mismatched ones."""
    rows = []
    for answer, reference, is_desirable in ANSWERS:
        tokens = _tokens(answer)
        ids, mask = _ids([tokens.numel()])
        kl_tokens = [_tokens((total, 7)) for total in mismatched[0]]
        kl_ids, kl_mask = _ids([7] * len(kl_tokens))
        outputs = iter([_per_token(*kl_tokens), _per_token(tokens)])
        trainer = _trainer(
            KTOTrainer, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **settings
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "label": torch.tensor([is_desirable]),
            "ref_logps": torch.tensor([reference], dtype=torch.float64),
            "KL_input_ids": kl_ids,
            "KL_attention_mask": torch.ones_like(kl_ids),
            "KL_completion_mask": kl_mask,
            "ref_KL_logps": torch.tensor(mismatched[1], dtype=torch.float64),
        }
        loss = trainer._compute_loss(lambda outputs=outputs, **_: next(outputs), inputs, return_outputs=False)
        loss.backward()
        assert tokens.grad is not None
        logged = trainer._metrics["train"]
        row = {"losses": loss.item(), "gradient": tokens.grad[0].item(), "kl": logged["kl"][0]}
        row["rewards"] = logged["rewards/chosen" if is_desirable else "rewards/rejected"][0]
        rows.append(row)
    return rows


def by_reward() -> list[dict[str, Any]]:
    """`RewardTrainer.compute_loss`."""
    rows = []
    for chosen_score, rejected_score, margin in SCORES:
        scores = torch.tensor([[chosen_score], [rejected_score]], dtype=torch.float64, requires_grad=True)
        trainer = _trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
        inputs = {"attention_mask": torch.ones(2, 1), "margin": torch.tensor([margin], dtype=torch.float64)}
        loss = trainer.compute_loss(lambda scores=scores, **_: SimpleNamespace(logits=scores), inputs)
        loss.backward()
        assert scores.grad is not None
        chosen_gradient, rejected_gradient = scores.grad[:, 0].tolist()
        row = {"losses": loss.item(), "chosen_rewards": chosen_score, "rejected_rewards": rejected_score}
        rows.append(row | {"chosen_gradient": chosen_gradient, "rejected_gradient": rejected_gradient})
    return rows


def _case(method: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One case, as columns."""
    return {"method": method, "settings": settings, **{key: [row[key] for row in rows] for key in rows[0]}}


def main() -> None:
    """Write the file to the standard output."""
    simpo, cpo = {"beta": 2.0, "gamma": 1.0}, {"beta": 0.1, "sft_weight": 1.0}
    pairs = [
        _case("dpo", {"beta": 0.1}, by_dpo("sigmoid", beta=0.1)),
        _case("dpo", {"beta": 0.5}, by_dpo("sigmoid", beta=0.5)),
        _case(
            "dpo",
            {"beta": 0.1, "sft_weight": 0.7},
            by_dpo("sigmoid", "sft", loss_weights=[1.0, 0.7], beta=0.1),
        ),
        _case(
            "dpo",
            {"beta": 5.0, "length_normalized": True},
            by_dpo("sigmoid_norm", beta=5.0, logs_our_rewards=False),
        ),
        _case(
            "dpo",
            {"beta": 0.1, "label_smoothing": 0.2},
            by_conservative_dpo(beta=0.1, label_smoothing=0.2),
        ),
        _case("ipo", {"beta": 0.1}, by_dpo("ipo", beta=0.1, logs_our_rewards=False)),
        _case("hinge", {"beta": 0.1}, by_dpo("hinge", beta=0.1)),
        _case(
            "robust",
            {"beta": 0.1, "label_smoothing": 0.2},
            by_dpo("robust", beta=0.1, label_smoothing=0.2),
        ),
        _case("orpo", {"beta": 0.1}, by_cpo_or_orpo(ORPOTrainer, beta=0.1)),
        _case(
            "simpo",
            simpo,
            by_cpo_or_orpo(
                CPOTrainer,
                beta=2.0,
                simpo_gamma=1.0,
                loss_type="simpo",
                cpo_alpha=0.0,
                alpha=0.0,
                label_smoothing=0.0,
            ),
        ),
        _case(
            "cpo",
            cpo,
            by_cpo_or_orpo(
                CPOTrainer, beta=0.1, loss_type="sigmoid", cpo_alpha=1.0, alpha=0.0, label_smoothing=0.0
            ),
        ),
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    kto = [
        {"mismatched": list(mismatched), **_case("kto", settings, by_kto(mismatched, **settings))}
        for mismatched in MISMATCHED
        for settings in (
            {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
            {"beta": 0.3} | weights,
        )
    ]
    everything = {
        "made_by": "tests/losses/trl_reference.py",
        "trl": trl.__version__,
        "torch": torch.__version__,
        "pairs": PAIRS,
        "answers": ANSWERS,
        "scores": SCORES,
        "of_pairs": pairs,
        "of_answers": kto,
        "of_scores": [_case("reward", {}, by_reward())],
    }
    json.dump(everything, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

"""The losses of preference tuning against arithmetic by hand, closed forms of their gradients, and TRL's
own code on the same log-probabilities (trl_reference.py)."""

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith.config import PreferConfig, load_config
from tunesmith.config.preferences import PREFERENCES, Preference
from tunesmith.losses.cpo import cpo
from tunesmith.losses.dpo import dpo, hinge, ipo, robust
from tunesmith.losses.kto import kl_estimate, kto
from tunesmith.losses.orpo import orpo
from tunesmith.losses.preference import Labelled, Pairs, Scored, loss_of
from tunesmith.losses.reward import bradley_terry
from tunesmith.losses.simpo import simpo

TRL = json.loads(Path(__file__).with_name("trl_reference.json").read_text(encoding="utf-8"))
OF_PAIRS = [name for name, row in PREFERENCES.items() if row.data == "pairs" and not row.has_scalar_head]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(chosen, rejected, *, reference=None, tokens=(4, 2)):
    """One pair. The reference is the model itself unless it is given as (chosen, rejected)."""
    reference = reference or (chosen, rejected)
    numbers = (chosen, rejected, *reference)
    return Pairs(*(torch.tensor([float(x)]) for x in numbers), *(torch.tensor([n]) for n in tokens))


# The model finds the chosen answer e^2 times as likely as the reference does, the rejected one 1/e times.
KNOWN = pairs(-10, -20, reference=(-12, -19))


def only(values):
    (value,) = values.tolist()
    return value


# ---- by hand ----


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_dpo_with_the_policy_as_reference_is_ln_2_exactly(beta, length_normalized):
    logps = torch.tensor([-0.5, -17.25, -903.0])
    same = Pairs(logps, logps - 3, logps, logps - 3, torch.tensor([1, 30, 99]), torch.tensor([7, 8, 9]))
    judged = dpo(same, beta=beta, length_normalized=length_normalized)
    assert torch.equal(judged.losses, torch.full((3,), math.log(2)))
    assert judged.chosen_rewards.tolist() == judged.rejected_rewards.tolist() == [0, 0, 0]


def test_dpo_is_minus_log_sigmoid_of_beta_times_the_difference_of_log_ratios():
    """h = 2 - (-1) = 3; beta h = 1.5; log(1 + e^-1.5) = 0.201413."""
    judged = dpo(KNOWN, beta=0.5)
    assert only(judged.losses) == pytest.approx(0.201413, abs=1e-6)
    assert (only(judged.chosen_rewards), only(judged.rejected_rewards)) == (1.0, -0.5)


def test_label_smoothing_takes_a_share_of_the_pairs_for_the_other_way_about():
    """0.9 x 0.201413 + 0.1 x 1.701413: log(1 + e^1.5) = 1.5 + log(1 + e^-1.5)."""
    assert only(dpo(KNOWN, beta=0.5, label_smoothing=0.1).losses) == pytest.approx(0.351413, abs=1e-6)


def test_length_normalized_dpo_compares_mean_log_ratios():
    """2 / 4 tokens - (-1) / 2 tokens = 1; times beta 2: log(1 + e^-2) = 0.126928."""
    judged = dpo(KNOWN, beta=2.0, length_normalized=True)
    assert only(judged.losses) == pytest.approx(0.126928, abs=1e-6)
    assert (only(judged.chosen_rewards), only(judged.rejected_rewards)) == (1.0, -1.0)


@pytest.mark.parametrize("method", ["dpo", "ipo", "hinge", "robust", "simpo", "cpo"])
def test_the_sft_term_is_the_mean_negative_log_probability_of_the_chosen_answers_tokens(method):
    """10 nats over 4 tokens; weight 2: 5 more."""
    settings = dict(PREFERENCES[method].defaults)
    without, with_it = (
        loss_of(method)(KNOWN, SimpleNamespace(**settings | {"sft_weight": weight})) for weight in (0.0, 2.0)
    )
    assert only(with_it.losses - without.losses) == pytest.approx(5, rel=1e-6)
    assert torch.equal(with_it.chosen_rewards, without.chosen_rewards)


def test_ipo_wants_a_difference_of_one_over_two_beta():
    """beta 0.1: 5. Of mean tokens the difference is 1, of whole answers 3."""
    assert only(ipo(KNOWN, beta=0.1).losses) == pytest.approx(16, rel=1e-6)
    assert only(ipo(KNOWN, beta=0.1, length_normalized=False).losses) == pytest.approx(4, rel=1e-6)
    assert only(ipo(KNOWN, beta=0.5).losses) == 0


def test_a_hinge_pushes_until_the_rewards_are_1_apart():
    assert only(hinge(KNOWN, beta=0.1).losses) == pytest.approx(0.7, rel=1e-6)
    assert only(hinge(KNOWN, beta=0.5).losses) == 0


def test_robust_dpo_on_pairs_that_may_be_flipped_expects_dpo_on_the_right_ones():
    """The lemma of Chowdhury et al.: pairs are seen right with probability 0.8, flipped with 0.2."""
    flipped = pairs(-20, -10, reference=(-19, -12), tokens=(2, 4))
    seen = [only(robust(seen, beta=0.5, label_smoothing=0.2).losses) for seen in (KNOWN, flipped)]
    assert 0.8 * seen[0] + 0.2 * seen[1] == pytest.approx(0.201413, abs=1e-6)
    # (0.8 x 0.201413 - 0.2 x 1.701413) / 0.6
    assert seen[0] == pytest.approx(-0.298587, abs=1e-6)


def test_simpo_compares_mean_tokens_and_wants_a_margin():
    """beta 2 x (-4/4 - -3/2) - gamma 1 = 0: ln 2. With gamma 0: log(1 + e^-1) = 0.313262."""
    pair = pairs(-4, -3)
    assert only(simpo(pair, beta=2.0, gamma=1.0).losses) == pytest.approx(math.log(2), abs=1e-7)
    judged = simpo(pair, beta=2.0, gamma=0.0)
    assert only(judged.losses) == pytest.approx(0.313262, abs=1e-6)
    assert (only(judged.chosen_rewards), only(judged.rejected_rewards)) == (-2.0, -3.0)


def test_cpo_compares_whole_answers_and_fine_tunes_on_the_chosen_one():
    """beta 0.1 x (-4 - -3) = -0.1: log(1 + e^0.1) = 0.744397; the chosen tokens' mean is -1."""
    judged = cpo(pairs(-4, -3), beta=0.1, sft_weight=1.0)
    assert only(judged.losses) == pytest.approx(1.744397, abs=1e-6)
    assert (only(judged.chosen_rewards), only(judged.rejected_rewards)) == pytest.approx((-0.4, -0.3))


def test_orpo_adds_the_odds_ratio_to_fine_tuning():
    """Mean tokens of probability 1/2 and 1/4: odds 1 and 1/3, ratio 3, sigmoid(ln 3) = 3/4."""
    pair = pairs(4 * math.log(1 / 2), 2 * math.log(1 / 4))
    judged = orpo(pair, beta=0.5)
    assert only(judged.losses) == pytest.approx(math.log(2) - 0.5 * math.log(3 / 4), abs=1e-6)
    assert only(judged.chosen_rewards) == pytest.approx(-0.5 * math.log(2), rel=1e-6)


def test_the_odds_of_an_all_but_certain_answer_are_not_rounded_away():
    """In float32 1 - exp(-1e-6) is off by 1 in 100, and so would the odds be."""
    chosen, rejected = -1e-6, -1e-5
    log_odds = [x - math.log(-math.expm1(x)) for x in (chosen, rejected)]
    ratio = -math.log(sigmoid(log_odds[0] - log_odds[1]))
    assert only(orpo(pairs(4 * chosen, 2 * rejected), beta=1.0).losses) == pytest.approx(
        1e-6 + ratio, rel=1e-5
    )


def test_kto_rewards_desirable_answers_above_the_kl_and_others_below():
    """r = 2 each, kl 1, beta 1: 1 - sigmoid(1) = 0.268941, and sigmoid(1) = 0.731059 for the undesirable
    one."""
    answers = Labelled(
        torch.tensor([-3.0, -3.0]), torch.tensor([-5.0, -5.0]), torch.tensor([True, False]), torch.tensor(1.0)
    )
    judged = kto(answers, beta=1.0)
    assert judged.losses.tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    assert judged.rewards.tolist() == [2, 2]
    weighted = kto(answers, beta=1.0, desirable_weight=2.0, undesirable_weight=0.5).losses
    assert weighted.tolist() == pytest.approx([2 * 0.268941, 0.5 * 0.731059], abs=1e-6)


def test_the_kl_estimate_is_the_mean_log_ratio_and_never_below_0():
    assert kl_estimate(2 + 0.5 + 0.5, 3).item() == 1.0
    # One answer above and one further below: the mean is bounded, not each of them.
    assert kl_estimate(1.0 - 4.0, 2).item() == 0.0
    assert kl_estimate(0.0, 0).item() == 0.0


def test_a_reward_model_wants_scores_apart_by_the_margin():
    """Scores 2 and 1: log(1 + e^-1) = 0.313262; with margin 1 ln 2; with margin 2 log(1 + e) = 1.313262."""
    scored = Scored(torch.full((3,), 2.0), torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    judged = bradley_terry(scored)
    assert judged.losses.tolist() == pytest.approx([0.313262, math.log(2), 1.313262], abs=1e-6)
    assert (judged.chosen_rewards.tolist(), judged.rejected_rewards.tolist()) == ([2, 2, 2], [1, 1, 1])


# ---- gradients ----


def gradients(method, pair, **settings):
    """d loss / d log-probability of the chosen and of the rejected answer."""
    chosen, rejected = pair.chosen.clone().requires_grad_(), pair.rejected.clone().requires_grad_()
    method(replace(pair, chosen=chosen, rejected=rejected), **settings).losses.sum().backward()
    return only(chosen.grad), only(rejected.grad)


def test_the_gradient_of_dpo_is_weighted_by_how_wrong_the_rewards_are():
    """Rafailov et al., section 4: -beta sigmoid(r(rejected) - r(chosen)) for the chosen answer; rewards 1,
    -0.5."""
    weight = 0.5 * sigmoid(-1.5)
    assert gradients(dpo, KNOWN, beta=0.5) == pytest.approx((-weight, weight), rel=1e-6)


def test_the_gradient_of_kto_is_beta_sigmoid_one_minus_sigmoid():
    logps = torch.tensor([-3.0, -3.0], requires_grad=True)
    reference, kl = torch.tensor([-5.0, -5.0]), torch.tensor(1.0)
    kto(Labelled(logps, reference, torch.tensor([True, False]), kl), beta=0.5).losses.sum().backward()
    slope = 0.5 * sigmoid(0.5) * (1 - sigmoid(0.5))
    assert logps.grad.tolist() == pytest.approx([-slope, slope], rel=1e-6)


def test_the_gradient_of_orpo_is_that_of_its_paper():
    """Hong et al., eqs. 8 to 10, of mean tokens of probability p and q: -1 - lambda delta / (1 - p) for the
    mean log p, where delta = 1 / (1 + odds(p) / odds(q))."""
    p, q = 0.5, 0.25
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    chosen, rejected = gradients(orpo, pairs(4 * math.log(p), 2 * math.log(q)), beta=0.5)
    assert 4 * chosen == pytest.approx(-1 - 0.5 * delta / (1 - p), rel=1e-6)
    assert 2 * rejected == pytest.approx(0.5 * delta / (1 - q), rel=1e-6)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize(
    ("chosen", "rejected"), [(-1e4, -1.0), (-1.0, -1e4), (0.0, -5.0), (-5.0, 0.0), (0.0, 0.0), (-1e-9, -1e-9)]
)
def test_losses_and_gradients_are_finite_where_answers_are_certain_or_impossible(name, chosen, rejected):
    pair = pairs(chosen, rejected, reference=(-50, -50))

    def method(batch):
        return loss_of(name)(batch, SimpleNamespace(**PREFERENCES[name].defaults))

    assert torch.isfinite(method(pair).losses).all()
    assert all(math.isfinite(gradient) for gradient in gradients(method, pair))


# ---- TRL ----


def assert_near(ours, theirs):
    """1e-6 of the value, or 1e-6 where it is below 1: ours is float32 (1.2e-7), TRL was run in float64."""
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def _name(case):
    return " ".join([case["method"], *(f"{key}={value}" for key, value in case["settings"].items())])


def _settings(case):
    return SimpleNamespace(**{**PREFERENCES[case["method"]].defaults, **case["settings"]})


def test_the_reference_is_of_trl_1_16_and_has_every_method():
    assert TRL["trl"] == "1.16.0"
    cases = [*TRL["of_pairs"], *TRL["of_answers"], *TRL["of_scores"]]
    assert {case["method"] for case in cases} == set(PREFERENCES)


@pytest.mark.parametrize("case", TRL["of_pairs"], ids=_name)
def test_losses_rewards_and_gradients_of_pairs_are_those_of_trl(case):
    columns = list(zip(*TRL["pairs"], strict=True))
    (chosen, chosen_tokens), (rejected, rejected_tokens) = (
        zip(*column, strict=True) for column in columns[:2]
    )
    logps = [torch.tensor(column, requires_grad=True) for column in (chosen, rejected)]
    references = [torch.tensor(column) for column in columns[2:]]
    judged = loss_of(case["method"])(
        Pairs(*logps, *references, torch.tensor(chosen_tokens), torch.tensor(rejected_tokens)),
        _settings(case),
    )
    assert_near(judged.losses, case["losses"])
    judged.losses.sum().backward()
    assert_near(logps[0].grad, case["chosen_gradient"])
    assert_near(logps[1].grad, case["rejected_gradient"])
    if "chosen_rewards" in case:  # of normalised log-ratios TRL logs the sums all the same
        assert_near(judged.chosen_rewards, case["chosen_rewards"])
        assert_near(judged.rejected_rewards, case["rejected_rewards"])


@pytest.mark.parametrize("case", TRL["of_answers"], ids=_name)
def test_losses_rewards_gradients_and_kl_of_labelled_answers_are_those_of_trl(case):
    answers, reference, is_desirable = zip(*TRL["answers"], strict=True)
    logps = torch.tensor([total for total, _ in answers], requires_grad=True)
    ratios = [ours - theirs for ours, theirs in zip(*case["mismatched"], strict=True)]
    kl = kl_estimate(sum(ratios), len(ratios))
    labelled = Labelled(logps, torch.tensor(reference), torch.tensor(is_desirable), kl)
    judged = loss_of("kto")(labelled, _settings(case))
    assert_near(kl.expand(len(answers)), case["kl"])
    assert_near(judged.losses, case["losses"])
    assert_near(judged.rewards, case["rewards"])
    judged.losses.sum().backward()
    assert_near(logps.grad, case["gradient"])


@pytest.mark.parametrize("case", TRL["of_scores"], ids=_name)
def test_losses_and_gradients_of_a_reward_model_are_those_of_trl(case):
    chosen, rejected, margins = (torch.tensor(column) for column in zip(*TRL["scores"], strict=True))
    scores = [chosen.requires_grad_(), rejected.requires_grad_()]
    judged = loss_of("reward")(Scored(*scores, margins), _settings(case))
    assert_near(judged.losses, case["losses"])
    judged.losses.sum().backward()
    assert_near(chosen.grad, case["chosen_gradient"])
    assert_near(rejected.grad, case["rejected_gradient"])


# ---- what goes in and out ----


@pytest.mark.parametrize("name", OF_PAIRS)
def test_what_comes_in_as_bfloat16_is_computed_in_float32(name):
    """Differences of log-probabilities in the hundreds would round to 2 in bfloat16."""
    numbers = [torch.tensor([x]).bfloat16() for x in (-301.0, -404.0, -300.0, -402.0)]
    tokens = (torch.tensor([100]), torch.tensor([90]))
    settings = SimpleNamespace(**PREFERENCES[name].defaults)
    ours = loss_of(name)(Pairs(*numbers, *tokens), settings)
    exact = loss_of(name)(Pairs(*(x.float() for x in numbers), *tokens), settings)
    assert torch.equal(ours.losses, exact.losses)
    assert ours.losses.dtype == ours.chosen_rewards.dtype == torch.float32


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rewards_carry_no_gradient(name):
    pair = replace(KNOWN, chosen=KNOWN.chosen.clone().requires_grad_())
    judged = loss_of(name)(pair, SimpleNamespace(**PREFERENCES[name].defaults))
    assert judged.losses.requires_grad
    assert not judged.chosen_rewards.requires_grad
    assert not judged.rejected_rewards.requires_grad


def test_shapes_that_do_not_agree_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"chosen \(2,\), rejected \(1,\), chosen_tokens \(2,\)"):
        Pairs(two, one, None, None, two, two)
    with pytest.raises(ValueError, match=r"reference \(1,\)"):
        Labelled(two, one, two.bool(), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"chosen \(2, 1\)"):
        Scored(two[:, None], two[:, None], two[:, None])


def test_a_method_that_needs_a_reference_says_so_and_one_that_does_not_takes_none():
    pair = replace(KNOWN, reference_chosen=None, reference_rejected=None)
    for name in OF_PAIRS:
        settings = SimpleNamespace(**PREFERENCES[name].defaults)
        if PREFERENCES[name].needs_reference:
            with pytest.raises(ValueError, match="reference_chosen and reference_rejected are missing"):
                loss_of(name)(pair, settings)
        else:
            assert torch.equal(loss_of(name)(pair, settings).losses, loss_of(name)(KNOWN, settings).losses)


# ---- the table ----


def test_a_row_names_the_keys_that_its_function_takes_and_no_others():
    functions = {f.__name__: f for f in (dpo, ipo, hinge, robust, kto, orpo, simpo, cpo, bradley_terry)}
    for name, row in PREFERENCES.items():
        parameters = inspect.signature(functions[row.function.partition(":")[2]]).parameters.values()
        keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert keywords == set(row.keys) - {"reference"}, name
        assert set(row.defaults) == keywords, name
        assert set(row.when_normalized) <= keywords
        assert set(row.keys) <= set(PreferConfig.model_fields) - {"method"}


def test_a_new_method_takes_one_file_and_one_row(tmp_path, monkeypatch):
    """Here the exponential loss exp(-beta h), which is in no table. It is trained on the numbers of one
    pair: by gradient descent at rate 1, d loss / d chosen = -beta exp(-beta h)."""
    (tmp_path / "exponential_loss.py").write_text(
        "from tunesmith.losses.preference import Judged, log_ratios\n"
        "def exponential(pairs, *, beta):\n"
        "    chosen, rejected = log_ratios(pairs)\n"
        "    losses = (-beta * (chosen - rejected)).exp()\n"
        "    return Judged(losses, beta * chosen.detach(), beta * rejected.detach())\n"
    )
    row = Preference(
        "ours",
        "exponential_loss:exponential",
        ("beta", "reference"),
        learning_rate=1e-6,
        adapter_learning_rate=1e-5,
        defaults={"beta": 0.25},
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PREFERENCES, "exponential", row)

    values = {"model": {"path": "m"}, "data": {"train": "a"}, "prefer": {"method": "exponential"}}
    config = load_config(values, recipe="prefer")
    assert (config.prefer.beta, config.prefer.reference, config.train.learning_rate) == (0.25, "cached", 1e-5)
    chosen = torch.tensor([-12.0], requires_grad=True)
    loss, h = loss_of("exponential"), -5.0  # of the pair before training: 0 - 5
    for _ in range(3):
        pair = replace(KNOWN, chosen=chosen, rejected=torch.tensor([-14.0]))
        judged = loss(pair, config.prefer)
        assert only(judged.losses) == pytest.approx(math.exp(-0.25 * h), rel=1e-5)
        (gradient,) = torch.autograd.grad(judged.losses.sum(), chosen)
        chosen = (chosen - gradient).detach().requires_grad_()
        h += 0.25 * math.exp(-0.25 * h)
    assert -12 + h + 5 == pytest.approx(only(chosen), rel=1e-5)

"""Scores against hand arithmetic and the numbers of rouge-score; intervals against what is known of them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.inference import metrics
from tunesmith.inference.metrics import (
    Interval,
    bootstrap,
    exact_match,
    json_equal,
    json_valid,
    rouge_l,
    token_f1,
)


def _long_texts() -> tuple[str, str]:
    drawn = random.Random(0)
    first, second = (" ".join(drawn.choice("abcdefg") for _ in range(number)) for number in (90, 70))
    return first, second


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [  # rouge-score 0.1.2: RougeScorer(["rougeL"], use_stemmer=False).score(expected, answer)
        ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334),
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ('{"a": 1, "b_c": [2, 3]}', '{"b_c": [3, 2], "a": 1}', 0.5),
        ("A b c d e f g a b", "b a g f e d c b a", 0.3333333333333333),
        ("no", "yes", 0.0),
        (*_long_texts(), 0.5125000000000001),
    ],
)
def test_rouge_is_the_number_of_rouge_score(answer: str, expected: str, score: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(score, abs=1e-12)


def test_rouge_knows_letters_beyond_ascii() -> None:
    assert rouge_l("Große Straße", "große straße") == 1.0
    assert rouge_l("\u4f60\u597d\u5417", "\u4f60\u597d") == pytest.approx(2 * 2 / 5)  # a sign is a word
    assert rouge_l("", "") == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert metrics._common_subsequence(a, b) == table[-1][-1]


def test_f1_is_squads() -> None:
    assert token_f1("The cat, a dog!", "cat dog") == 1.0
    assert token_f1("the cat sat", "cat ran off") == pytest.approx(2 * 1 / (2 + 3))  # "the" is no word
    assert token_f1("a a b b", "b b b") == pytest.approx(2 * 2 / (2 + 3))  # a counts as an article
    assert token_f1("yes", "no") == 0.0
    assert (token_f1("The", "..."), token_f1("", "x")) == (1.0, 0.0)


def test_exact_match_wants_every_letter_and_no_white_space_around() -> None:
    assert [exact_match(text, " Four.\n") for text in ("Four.", "\nFour. ", "four.", "Four")] == [1, 1, 0, 0]


def test_json_is_valid_whole_or_not_at_all_and_equal_as_values() -> None:
    texts = ['{"a": [1, 2]}', "null", ' "x"\n', "NaN", '{"a": 1} so', "{'a': 1}", "", "```json\n{}\n```"]
    assert [json_valid(text, "") for text in texts] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert json_equal('{"b":2,"a":[1, null]}', '{"a": [1,null], "b": 2.0}') == 1
    for answer, expected in (("[1, 2]", "[2, 1]"), ("1", "true"), ('{"a": 0}', '{"a": false}'), ("x", "x")):
        assert json_equal(answer, expected) == 0


# --- intervals


def test_the_value_is_the_weighted_mean_of_the_rows_as_they_are() -> None:
    (interval,) = bootstrap([np.array([2.0, 12.0])], np.array([1.0, 3.0]), resamples=100, seed=0)
    assert interval.value == 14 / 4
    # A resample holds the rows 0, 1 or 2 times each: 4/2, 14/4 or 24/6.
    assert (interval.low, interval.high) == (2.0, 4.0)


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    """40 of 100: resampled shares are binomial(100, 0.4) / 100, whose quantiles 2.5 % and 97.5 % are 0.31 and
    0.50 (its standard deviation is 0.049)."""
    scores = np.array([1.0] * 40 + [0.0] * 60)
    (interval,) = bootstrap([scores], np.ones(100), resamples=10_000, seed=0)
    assert interval.value == 0.4
    assert interval.low == pytest.approx(0.31, abs=0.011)  # one row more or less
    assert interval.high == pytest.approx(0.50, abs=0.011)
    wide = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert interval.high - interval.low == pytest.approx(wide, rel=0.08)


def test_a_difference_is_paired_so_what_both_share_cancels() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 10, 50)  # rows differ by much, the two models by 1 on every row
    intervals = bootstrap([base, base + 1], np.ones(50), resamples=1000, seed=0)
    assert intervals[2] == Interval(*(pytest.approx(1.0, abs=1e-12),) * 3)
    assert intervals[0].high - intervals[0].low > 3
    assert intervals[1].low == pytest.approx(intervals[0].low + 1)


def test_the_same_seed_draws_the_same_rows_and_another_others() -> None:
    scores = [np.arange(20.0)]
    one, same, other = (bootstrap(scores, np.ones(20), resamples=300, seed=seed) for seed in (1, 1, 2))
    assert one == same != other

"""How good an answer is beside the one expected, and how sure that is: functions of texts and numbers."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Chinese, Japanese and Korean are written without spaces: each sign counts as a word.
_SIGN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_SIGN}]|[^\\W_{_SIGN}]+")
_RESAMPLES_AT_ONCE = 256


# --- an answer


def exact_match(answer: str, expected: str) -> float:
    """1 where they are the same, white space around them apart; as in summary.json."""
    return float(answer.strip() == expected.strip())


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of the shares of words that both have, as SQuAD has it (Rajpurkar et al. 2016,
    arXiv:1606.05250): small letters, no punctuation, no articles. 1 where neither has a word."""
    ours, theirs = _squad_words(answer), _squad_words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    return _harmonic((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L as F1: by the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013). Of
    ASCII texts the number of the package rouge-score without stemming; of others all letters count. 0 where
    either has no word."""
    ours, theirs = _WORD.findall(answer.lower()), _WORD.findall(expected.lower())
    if not ours or not theirs:
        return 0.0
    return _harmonic(_common_subsequence(ours, theirs), len(ours), len(theirs))


def json_valid(answer: str, expected: str) -> float:
    """1 where the answer is JSON and nothing else, whatever was expected."""
    return float(_parsed(answer) is not None)


def json_equal(answer: str, expected: str) -> float:
    """1 where both are JSON of one value: the order of keys and white space apart."""
    ours, theirs = _parsed(answer), _parsed(expected)
    return float(ours is not None and ours == theirs)


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _harmonic(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs)  # of common / ours and common / theirs


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one number (Hyyro 2004): bit i of `row`
    is 0 where a[: i + 1] has one longer than a[:i]."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _parsed(text: str) -> Any:
    """[value], so that null is one; None where it is no JSON."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        # `true` and 1 are equal in Python and not in JSON.
        return [_typed(json.loads(text, parse_constant=refuse))]
    except (ValueError, RecursionError):
        return None


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (type(value) is bool, value)


# --- how sure


@dataclass(frozen=True)
class Interval:
    """A figure, and the limits between which 95 % of its resamples lie."""

    value: float
    low: float
    high: float


def bootstrap(
    sums: Sequence[NDArray[np.float64]], weights: NDArray[np.float64], *, resamples: int, seed: int
) -> list[Interval]:
    """Percentile intervals (Efron and Tibshirani 1993, chapter 13) of sum(sums) / sum(weights) over rows: of
    each of `sums` [N], and for two also of the second less the first, where every resample draws the same
    rows for both (a paired bootstrap). The rows drawn follow from `seed` and N alone."""
    figures = np.stack(sums)  # [S, N]
    rng = np.random.default_rng(seed)
    size, drawn = len(weights), []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        rows = rng.integers(size, size=(min(_RESAMPLES_AT_ONCE, resamples - start), size))
        drawn.append(figures[:, rows].sum(-1) / weights[rows].sum(-1))
    means = np.concatenate(drawn, axis=1)  # [S, R]
    values = figures.sum(1) / weights.sum()
    if len(sums) == 2:
        means = np.vstack([means, means[1] - means[0]])
        values = np.append(values, values[1] - values[0])
    limits = np.percentile(means, [2.5, 97.5], axis=1)
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, *limits, strict=True)]

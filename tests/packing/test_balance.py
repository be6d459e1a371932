"""Splitting one step, against every split there is; and many steps at once, against one by one."""

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.packing.balance import Steps, bin_cost, split_step, sweep


@st.composite
def steps(draw, max_size=24):
    """Lengths of the examples of a step, and what each has in common with the one before it."""
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=max_size))
    limits = [0, *(min(pair) for pair in pairwise(lengths))]
    return lengths, [draw(st.integers(0, limit)) for limit in limits]


def greedy(lengths, num_bins):
    bins = [[] for _ in range(num_bins)]
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        min(bins, key=lambda bin_: sum(lengths[m] for m in bin_)).append(n)
    return bins


def best_contiguous(lengths, common, num_bins):
    """Cost of the largest piece, the least over all ways to cut."""
    numbers, best = range(len(lengths)), []
    for num_cuts in range(min(num_bins, len(lengths))):
        for cuts in combinations(numbers[1:], num_cuts):
            ends = [0, *cuts, len(lengths)]
            best.append(max(bin_cost(range(*piece), lengths, common) for piece in pairwise(ends)))
    return min(best)


@given(steps(), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_without_sharing_each_goes_where_there_is_least_the_longest_first(step, num_bins):
    assert split_step(step[0], None, num_bins) == greedy(step[0], num_bins)


@given(steps(max_size=9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_the_dearest_bin_is_the_cheaper_of_both_splits(step, num_bins):
    lengths, common = step
    bins = split_step(lengths, common, num_bins)
    assert len(bins) == num_bins
    assert sorted(n for bin_ in bins for n in bin_) == list(range(len(lengths)))
    dealt = [bin_cost(sorted(bin_), lengths, common) for bin_ in greedy(lengths, num_bins)]
    found = [bin_cost(bin_, lengths, common) for bin_ in bins]
    assert max(found) == min(max(dealt), best_contiguous(lengths, common, num_bins))
    assert max(found) < max(dealt) or sum(found) <= sum(dealt)  # of equals, the one with fewer tokens in all


def test_the_cost_of_a_bin_counts_a_prefix_once():
    # [s y s a] [s y s a d] [s y s b c] of sharing.py's docstring, and the first and third alone.
    assert bin_cost([0, 1, 2], [4, 5, 5], [0, 4, 3]) == 7
    assert bin_cost([0, 2], [4, 5, 5], [0, 4, 3]) == 6


@given(st.lists(steps(), min_size=1, max_size=6), st.integers(1, 8), st.integers(50, 120))
@settings(max_examples=200, deadline=None)
def test_many_steps_at_once_are_each_as_by_itself(some, num_bins, capacity):
    longest = max(len(lengths) for lengths, _ in some)
    padded = np.zeros((2, longest, len(some)), dtype=np.int64)
    for column, step in enumerate(some):
        padded[:, : len(step[0]), column] = step
    together = Steps(padded[0], padded[1], capacity)
    for column, (lengths, common) in enumerate(some):
        dealt = greedy(lengths, num_bins)
        assert together.largest_unshared(num_bins)[column] == max(sum(lengths[n] for n in b) for b in dealt)
        shared = max(bin_cost(sorted(bin_), lengths, common) for bin_ in dealt)
        assert together.largest_shared(num_bins)[column] == shared
        assert together.bins_enough()[column] == len(sweep(lengths, common, capacity))
        assert Steps(padded[0], None, capacity).bins_enough()[column] == len(lengths)

"""How the examples of one step are split into bins (a forward pass of a rank each), and how many bins do.

Two splits of a step are known, and the one whose largest bin costs less is taken:

    longest first    each example into the bin with the fewest tokens so far, the longest first: at most 4/3
                     of the best possible largest bin (Graham 1969), prefixes left out of account
    contiguous       pieces of the examples in rank order (see `sharing`), so that those that begin alike
                     stay together; as few tokens in the largest piece as such pieces can have

A bin costs the sum of its lengths, less what each example has in common with the one before it in the bin.
`split_step` splits one step in plain Python, which is fastest for the tens of examples it mostly has; `Steps`
finds out about many steps at once, in arrays [examples, steps], what `split_step` will find for each.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


def split_step(lengths: Sequence[int], common: Sequence[int] | None, num_bins: int) -> list[list[int]]:
    """Numbers of the examples of each bin. With `common` (tokens that each example has in common with the one
    before it, in rank order) a bin holds its examples in that order, else the longest first.

    Ties go to the lower bin, the earlier example and longest first, so the result is a pure function."""
    bins = _longest_first(lengths, num_bins)
    if common is None:
        return bins
    for bin_ in bins:
        bin_.sort()
    costs = [bin_cost(bin_, lengths, common) for bin_ in bins]
    pieces = _contiguous(lengths, common, num_bins, at_most=max(costs))
    if pieces:
        piece_costs = [bin_cost(piece, lengths, common) for piece in pieces]
        if (max(piece_costs), sum(piece_costs)) < (max(costs), sum(costs)):
            return pieces + [[] for _ in range(num_bins - len(pieces))]
    return bins


def bin_cost(bin_: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """Tokens that a bin (numbers in rank order) computes."""
    cost = sum(lengths[n] for n in bin_)
    for before, n in pairwise(bin_):
        # One step on is the most frequent distance by far: spares the slice.
        cost -= common[n] if n == before + 1 else min(common[before + 1 : n + 1])
    return cost


def _longest_first(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, i) for i in range(num_bins)]
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        tokens, i = heap[0]
        bins[i].append(n)
        heapq.heapreplace(heap, (tokens + lengths[n], i))
    return bins


def _contiguous(
    lengths: Sequence[int], common: Sequence[int], num_bins: int, *, at_most: int
) -> list[list[int]]:
    """At most `num_bins` pieces, the largest as small as can be; none if it would cost more than `at_most`.

    A piece costs no less when an example is added at either end, so filling each as far as it goes needs the
    fewest pieces for a capacity, and the least capacity that `num_bins` allow is found by bisection."""
    if not lengths or len(sweep(lengths, common, at_most)) > num_bins:
        return []
    low, high = max(lengths) - 1, at_most  # too little, enough
    while high - low > 1:
        capacity = (low + high) // 2
        if len(sweep(lengths, common, capacity)) > num_bins:
            low = capacity
        else:
            high = capacity
    return sweep(lengths, common, high)


def sweep(lengths: Sequence[int], common: Sequence[int], capacity: int) -> list[list[int]]:
    """Pieces of the examples in rank order, each filled as far as `capacity` tokens go. An example longer
    than that is a piece of its own."""
    starts: list[int] = []
    cost = 0
    for n, length in enumerate(lengths):
        cost += length - common[n]
        if cost > capacity or not starts:
            starts.append(n)
            cost = length
    return [list(range(*ends)) for ends in pairwise([*starts, len(lengths)])]


@dataclass(frozen=True)
class Steps:
    """Many steps at once. All arrays are [examples, steps], with examples of no token where a step has fewer
    than the others.

    lengths: int64, in rank order where sharing is known. common: int64, or None where it is not."""

    lengths: Int64s
    common: Int64s | None
    capacity: int

    def bins_enough(self) -> Int64s:
        """[steps] a number of bins that does for each step: that of the contiguous pieces that a sweep makes;
        without sharing, one an example."""
        if self.common is None:
            return np.count_nonzero(self.lengths, axis=0)
        cost = np.zeros(self.lengths.shape[1], dtype=np.int64)
        num_pieces = np.ones_like(cost)
        for length, common in zip(self.lengths, self.common, strict=True):
            cost += length - common
            over = cost > self.capacity
            num_pieces += over
            np.copyto(cost, length, where=over)
        return num_pieces

    def select(self, chosen: NDArray[np.bool_]) -> Steps:
        common = None if self.common is None else self.common[:, chosen]
        return Steps(self.lengths[:, chosen], common, self.capacity)

    def largest_unshared(self, num_bins: int) -> Int64s:
        """[steps] tokens in the largest bin of the longest-first split, no prefix counted as shared."""
        lengths = -np.sort(-self.lengths, axis=0)
        keys, shift = _fill_longest_first(lengths, num_bins, None)
        return np.asarray(keys.max(axis=0) >> shift)

    def largest_shared(self, num_bins: int) -> Int64s:
        """[steps] cost of the dearest bin of the longest-first split."""
        assert self.common is not None
        order = np.argsort(-self.lengths, axis=0, kind="stable")
        chosen = np.empty_like(order)
        _fill_longest_first(np.take_along_axis(self.lengths, order, axis=0), num_bins, chosen)
        bins = np.empty_like(order)
        np.put_along_axis(bins, order, chosen, axis=0)
        steps = np.arange(order.shape[1])
        cost = np.zeros((num_bins, len(steps)), dtype=np.int64)
        # What the next example has in common with the last one of each bin; nothing where there is none.
        least = np.zeros_like(cost)
        for length, common, in_bin in zip(self.lengths, self.common, bins, strict=True):
            np.minimum(least, common, out=least)
            cost[in_bin, steps] += length - least[in_bin, steps]
            # An example of no token fills up a short step; it is the last of it, or changes nothing.
            least[in_bin, steps] = np.iinfo(np.int64).max
        return np.asarray(cost.max(axis=0))


def _fill_longest_first(lengths: Int64s, num_bins: int, chosen: Int64s | None) -> tuple[Int64s, int]:
    """Keys [bins, steps] after the examples (longest first) were put where there was least, and the shift
    that makes them tokens; the bin of each example goes to `chosen`.

    A key is the tokens of a bin above its number, so that the least key names the lowest of the emptiest
    bins."""
    shift = (num_bins - 1).bit_length()
    keys = np.zeros((num_bins, lengths.shape[1]), dtype=np.int64)
    keys += np.arange(num_bins)[:, None]
    # The first go into the empty bins one by one, as long as they have a token.
    given = min(num_bins, len(lengths))
    keys[:given] += lengths[:given] << shift
    if chosen is not None:
        chosen[:given] = np.arange(given)[:, None]
    steps = np.arange(lengths.shape[1])
    for n in range(given, len(lengths)):
        least = keys.min(axis=0)
        in_bin = least & ((1 << shift) - 1)
        keys[in_bin, steps] = least + (lengths[n] << shift)
        if chosen is not None:
            chosen[n] = in_bin
    return keys, shift

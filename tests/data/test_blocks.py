"""Pieces of documents in blocks: each once, none over the size, and few blocks."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.blocks import best_fit, blocks_of_sources, split_lengths


def contents(lengths, size):
    """Lengths of the pieces of each block, after a check that every piece is in one of them."""
    order, starts = best_fit(np.array(lengths, dtype=np.int32), size)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    return [[lengths[i] for i in order[a:b]] for a, b in itertools.pairwise(starts)]


def one_by_one(lengths, size):
    """Best-fit decreasing as the textbook has it: free tokens of each block it makes."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        roomy = [block for block in range(len(free)) if free[block] >= length]
        if roomy:
            free[min(roomy, key=free.__getitem__)] -= length
        else:
            free.append(size - length)
    return free


def fewest(lengths, size):
    """The least number of blocks that hold the pieces, by trying every assignment."""
    for blocks in range(1, len(lengths) + 1):
        for chosen in itertools.product(range(blocks), repeat=len(lengths)):
            sums = [0] * blocks
            for length, block in zip(lengths, chosen, strict=True):
                sums[block] += length
            if max(sums) <= size:
                return blocks
    return 0


sizes_and_lengths = st.integers(1, 40).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=120))
)


@settings(deadline=None)
@given(sizes_and_lengths)
def test_every_piece_is_in_one_block_and_the_blocks_are_those_of_the_textbook(case):
    size, lengths = case
    blocks = contents(lengths, size)
    assert all(0 < sum(block) <= size for block in blocks)
    assert sorted(size - sum(block) for block in blocks) == sorted(one_by_one(lengths, size))


@settings(deadline=None)
@given(sizes_and_lengths)
def test_no_two_blocks_would_fit_in_one(case):
    """The bound of first fit: more than half of the room is used, but for one block."""
    size, lengths = case
    sums = sorted(sum(block) for block in contents(lengths, size))
    assert len(sums) < 2 or sums[0] + sums[1] > size


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_tiny_cases_are_within_the_proven_bound_of_the_best_there_is(lengths):
    """Johnson 1974: at most 11/9 of the fewest blocks and, as sharpened by Dosa 2007, 6/9 of one."""
    assert len(contents(lengths, 12)) <= math.floor(11 / 9 * fewest(lengths, 12) + 6 / 9)


def test_a_source_has_blocks_of_its_own_also_where_it_takes_several_windows():
    lengths = np.array([5, 5, 5, 5, 3, 3, 3, 9, 1], dtype=np.int32)
    order, starts, blocks = blocks_of_sources(lengths, [(0, 7), (7, 7), (7, 9)], 10, window=3)
    assert blocks == [(0, 5), (5, 5), (5, 6)]
    found = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
    # Windows: 5 5 5 | 5 3 3 | 3, and 9 1.
    assert found == [[0, 1], [2], [3, 4], [5], [6], [7, 8]]
    assert lengths[[5]].sum() == 3  # 5 + 3 + 3 is one too many


def test_a_million_pieces_take_seconds_at_most():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1 << 20).clip(1, 2048).astype(np.int32)
    order, starts = best_fit(lengths, 2048)
    sums = np.add.reduceat(lengths[order], starts[:-1])
    assert sums.max() <= 2048
    assert sums.mean() > 0.99 * 2048


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(8, 60))
def test_a_document_is_cut_as_rarely_as_may_be_and_no_piece_is_a_single_token(length, limit):
    pieces = split_lengths(length, limit)
    assert sum(pieces) == length
    assert max(pieces) <= limit
    assert len(pieces) == math.ceil(length / limit)
    assert length == 1 or min(pieces) >= 2

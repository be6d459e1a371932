"""Pieces of documents to blocks: which pieces share a row of `data.max_length` tokens.

    pieces        [a a a] [b b] [c c c c] [d]      lengths 3 2 4 1, size 4
    blocks        [c c c c]  [a a a d]  [b b]      order 2 0 3 1, starts 0 1 3 4

A piece is never cut here. Lying in one block means to be drawn and trained together, no more: each piece is
an example of its own, and sees only itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Pieces that are put into blocks together. A block is short of nothing that a million others could have given
# it, and memory and time are bounded.
WINDOW = 1 << 20

Int64s = NDArray[np.int64]


def best_fit(lengths: NDArray[np.int32], size: int) -> tuple[Int64s, Int64s]:
    """Best-fit decreasing (Johnson 1974): the longest piece first, each into the fullest block with room for
    it. No packing needs less than 9/11 of the blocks this takes, but for one.

    lengths: [N] tokens of each piece, at least 1 and at most `size`. Returns order [N], the pieces by block,
    and starts [B + 1]: block b holds order[starts[b] : starts[b + 1]].

    Pieces of one length are placed together, and so are blocks of one free size filled: what is done one by
    one is counted in lengths and free sizes, not in pieces. Ding et al. 2024 (arXiv:2404.10830) pack corpora
    this way, by a tree over free sizes; here a bit of one integer stands for each size."""
    by_length = np.argsort(-lengths, kind="stable")
    found, counts = np.unique(-lengths, return_counts=True)
    block_of = np.empty(len(lengths), dtype=np.int64)
    rooms: dict[int, list[Int64s]] = {}  # free tokens -> blocks that have as many
    mask = 0  # bit f: some block has f free tokens
    num_blocks = placed = 0
    for length, count in zip((-found).tolist(), counts.tolist(), strict=True):
        left = count
        while left:
            roomy = mask >> length
            if roomy:
                free = length + (roomy & -roomy).bit_length() - 1
                blocks = np.concatenate(rooms.pop(free))
                mask ^= 1 << free
            else:
                free = size
                blocks = np.arange(num_blocks, num_blocks - (-left // (size // length)))
                num_blocks += len(blocks)
            # A block that took one piece is the fullest with room for the next, until it has none.
            each = free // length
            full, rest = divmod(left, each)
            full = min(full, len(blocks))
            chosen = np.repeat(blocks[:full], each)
            after = [(free - each * length, blocks[:full]), (free, blocks[full:])]
            if full < len(blocks) and rest:
                chosen = np.append(chosen, np.repeat(blocks[full], rest))
                after[1:] = [(free - rest * length, blocks[full : full + 1]), (free, blocks[full + 1 :])]
            block_of[placed : placed + len(chosen)] = chosen
            placed += len(chosen)
            left -= len(chosen)
            for still_free, some in after:
                if still_free and len(some):
                    rooms.setdefault(still_free, []).append(some)
                    mask |= 1 << still_free
    order = by_length[np.argsort(block_of, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(block_of, minlength=num_blocks))])
    return order, starts.astype(np.int64)


def blocks_of_sources(
    lengths: NDArray[np.int32], bounds: Sequence[tuple[int, int]], size: int, *, window: int = WINDOW
) -> tuple[Int64s, Int64s, list[tuple[int, int]]]:
    """`best_fit` of the pieces [first, end) of each source, a window at a time: no block holds pieces of two
    sources, so that a source can be drawn more often than another.

    Returns order [N], starts [B + 1], and of each source its first block and the one after its last."""
    orders, starts, blocks = [np.empty(0, np.int64)], [np.zeros(1, np.int64)], []
    num_blocks = 0
    for first, end in bounds:
        before = num_blocks
        for at in range(first, end, window):
            order, ends = best_fit(lengths[at : min(at + window, end)], size)
            orders.append(at + order)
            starts.append(at + ends[1:])
            num_blocks += len(ends) - 1
        blocks.append((before, num_blocks))
    return np.concatenate(orders), np.concatenate(starts), blocks


def split_lengths(length: int, limit: int) -> list[int]:
    """Tokens of the pieces of a document: as few as may be, all full but the last, which has at least two
    tokens: the first of a piece has nothing before it, and a piece of one would teach nothing."""
    num_full, rest = divmod(length, limit)
    pieces = [limit] * num_full + [rest] * (rest > 0)
    if rest == 1 and num_full:
        pieces[-2:] = [limit - 1, 2]
    return pieces

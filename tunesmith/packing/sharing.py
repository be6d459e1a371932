"""Which examples begin with the same tokens, and how many: what a plan knows of shared prefixes.

    examples       0 [s y s a]    1 [s y s b c]    2 [t u]    3 [s y s a d]
    in order       0  3  1  2          depth-first through the trie of their tokens; rank = [0 2 3 1]
    common         0  4  3  0          tokens that each has in common with the one before it in that order
    lcp(0, 1)      min(4, 3) = 3       the least of what lies between their ranks

So one number an example tells what any set of them costs in one pass, which is the number of nodes of their
trie: the sum of their lengths, less what each has in common with the one before it (in rank order). Prefixes
shorter than `MIN_SHARED_TOKENS` tokens are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]

# Examples that part before this many tokens stay apart altogether: the opening of a chat template or a common
# first word saves less than the branches it would make of nearly everything. Below a prefix that is worth
# sharing, every token is shared: one more segment costs attention about what one token costs the model.
MIN_SHARED_TOKENS = 16
_BLOCK = 16  # ranks whose running minima are kept; the minima of whole blocks lie in a sparse table
_FAR = np.int32(np.iinfo(np.int32).max)
_WIDTH = 16  # tokens compared at a time
_PIECE = 1 << 16  # examples looked at in one go


class Sharing:
    """Common prefixes of N examples.

    rank [N] int32: place of each example in an order that keeps those that begin alike together. common [N]
    int32: tokens that the example at each rank has in common with the one at the rank before (0 at rank 0).
    lengths [N] int32: tokens of each example. 25 bytes an example in all."""

    def __init__(self, rank: Int32s, common: Int32s, lengths: Int32s) -> None:
        self.rank = rank
        self._lengths = lengths
        # Two more than there are ranks, so that whoever pads with rank N may ask about (N, N].
        blocks = (len(common) + 1) // _BLOCK + 1
        table = np.full((blocks, _BLOCK), _FAR, dtype=np.int32)
        table.reshape(-1)[: len(common)] = common
        self._common = table.reshape(-1)
        self._up_to = np.minimum.accumulate(table, axis=1).reshape(-1)
        self._from = np.ascontiguousarray(np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]).reshape(-1)
        # [level, block]: the least of 2 ** level blocks from that one on.
        levels = [table.min(axis=1)]
        while 2 ** len(levels) <= blocks:
            half = 2 ** (len(levels) - 1)
            levels.append(levels[-1].copy())
            np.minimum(levels[-2][:-half], levels[-2][half:], out=levels[-1][:-half])
        self._levels = np.stack(levels)
        self._level_of = np.zeros(blocks + 1, dtype=np.int64)  # floor(log2(number of blocks))
        for level in range(1, len(levels)):
            self._level_of[2**level :] = level

    @classmethod
    def of_tokens(cls, chunks: Sequence[tuple[Int32s, Int32s]], rows: Int64s | None = None) -> Sharing:
        """Find the common prefixes of examples as an Arrow list column holds them, without copying it.

        chunks: (values, offsets) each; row r of a chunk is values[offsets[r] : offsets[r + 1]]. rows [N]: the
        row that each example is, counted through all chunks; None where they are the examples. Tokens are
        read 16 at a time, and only of examples that still have a companion; at its peak this holds about 200
        bytes an example, however long they are."""
        tokens = _Tokens(chunks, rows)
        order, common = _prefix_order(tokens)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        return cls(rank, common, tokens.lengths)

    def __len__(self) -> int:
        return len(self.rank)

    def lcp(self, a: NDArray[Any], b: NDArray[Any]) -> Int32s:
        """[pairs] leading tokens that examples a and b have in common: never more than there are, and at most
        15 fewer where they part within 16 tokens of others (0 if fewer than 16)."""
        rank_a, rank_b = self.rank[a].astype(np.int64), self.rank[b].astype(np.int64)
        least = self.between(np.minimum(rank_a, rank_b), np.maximum(rank_a, rank_b))
        return np.minimum(least, self._lengths[a])

    def between(self, low: Int64s, high: Int64s) -> Int32s:
        """The least of `common` over the ranks (low, high], for low <= high of any shape; the largest int32
        where there are none (an example and itself)."""
        first = low + 1
        least = np.minimum(self._from[first], self._up_to[high])
        inner = first // _BLOCK + 1  # the first block that lies wholly between
        count = high // _BLOCK - inner
        level = self._level_of[np.maximum(count, 0)]
        # Where no block lies between, any entry will do: it is not used.
        blocks = np.minimum(
            self._levels[level, np.minimum(inner, self._levels.shape[1] - 1)],
            self._levels[level, np.maximum(inner + count - (1 << level), 0)],
        )
        least = np.where(count > 0, np.minimum(least, blocks), least)
        one_block = np.flatnonzero(count < 0)
        if len(one_block):
            low, high = low.reshape(-1)[one_block], high.reshape(-1)[one_block]
            part = np.full(len(one_block), _FAR, dtype=np.int32)
            for distance in range(1, int((high - low).max()) + 1):
                at = low + distance
                np.minimum(part, np.where(at <= high, self._common[np.minimum(at, high)], _FAR), out=part)
            least.reshape(-1)[one_block] = part
        return least

    def in_order(self, examples: Int64s) -> tuple[Int64s, Int32s]:
        """The examples by rank, and the tokens each has in common with the one before it (the first: 0)."""
        ranks = self.rank[examples].astype(np.int64)
        by_rank = np.argsort(ranks, kind="stable")
        examples, ranks = examples[by_rank], ranks[by_rank]
        common = np.zeros(len(examples), dtype=np.int32)
        common[1:] = np.minimum(self.between(ranks[:-1], ranks[1:]), self._lengths[examples[1:]])
        return examples, common


class _Tokens:
    """Windows of tokens of any examples of an Arrow list column."""

    def __init__(self, chunks: Sequence[tuple[Int32s, Int32s]], rows: Int64s | None) -> None:
        chunks = [(values, offsets) for values, offsets in chunks if len(offsets) > 1]
        self._rows = rows
        self._values = [values for values, _ in chunks]
        self._windows = [
            sliding_window_view(values, _WIDTH) if len(values) >= _WIDTH else np.empty((0, _WIDTH), np.int32)
            for values in self._values
        ]
        self._first_row = np.cumsum([0] + [len(offsets) - 1 for _, offsets in chunks])
        self._begin = np.empty(self._first_row[-1], dtype=np.int64)
        length = np.empty(self._first_row[-1], dtype=np.int32)
        for (_, offsets), first in zip(chunks, self._first_row[:-1], strict=True):
            self._begin[first : first + len(offsets) - 1] = offsets[:-1]
            np.subtract(offsets[1:], offsets[:-1], out=length[first : first + len(offsets) - 1])
        self._row_lengths = length
        self.lengths = length if rows is None else length[rows]

    def read(self, examples: Int64s, at: int) -> Int32s:
        """[examples, 16] tokens from `at` on (no example is shorter than that), -1 after its last."""
        rows = examples if self._rows is None else self._rows[examples]
        by_row = np.argsort(rows)  # through the file from front to back
        rows = rows[by_row]
        tokens = np.empty((len(rows), _WIDTH), dtype=np.int32)
        bounds = np.searchsorted(rows, self._first_row)
        for chunk in np.flatnonzero(np.diff(bounds)):
            windows = self._windows[chunk]
            for start in range(int(bounds[chunk]), int(bounds[chunk + 1]), _PIECE):
                some = slice(start, min(start + _PIECE, int(bounds[chunk + 1])))
                begin = self._begin[rows[some]] + at
                whole = int(np.searchsorted(begin, len(windows)))
                tokens[by_row[some][:whole]] = windows[begin[:whole]]
                for place, first in zip(by_row[some][whole:], begin[whole:], strict=True):
                    rest = self._values[chunk][first : first + _WIDTH]
                    tokens[place, : len(rest)] = rest
        left = np.empty(len(rows), dtype=np.int32)
        left[by_row] = self._row_lengths[rows] - np.int32(at)
        (short,) = np.nonzero(left < _WIDTH)
        tokens[short] = np.where(np.arange(_WIDTH) < left[short, None], tokens[short], -1)
        return tokens


def _prefix_order(tokens: _Tokens) -> tuple[Int64s, Int32s]:
    """The example at each rank, and `common`.

    Groups of examples that agree so far are split by their next 16 tokens, level by level; an example alone
    in its group is read no further. What counts as equal is decided by the tokens; hashes only bring equal
    ones together, so a collision may hide a shared prefix and never invents one."""
    long_enough = tokens.lengths >= MIN_SHARED_TOKENS
    order = np.concatenate([np.flatnonzero(long_enough), np.flatnonzero(~long_enough)])
    common = np.zeros(len(order), dtype=np.int32)
    active = np.arange(np.count_nonzero(long_enough))  # ranks not decided yet
    joined = np.ones(len(active), dtype=bool)  # agrees so far with the active rank before it
    joined[:1] = False
    at = 0
    while len(active):
        window = tokens.read(order[active], at)
        same = joined & _as_before(window)
        group = np.cumsum(~joined) - 1
        mixed = np.zeros(group[-1] + 1, dtype=bool)
        mixed[group[joined & ~same]] = True
        (unsorted,) = np.nonzero(mixed[group])
        if len(unsorted):
            by = unsorted[np.lexsort((_sort_key(window, unsorted), group[unsorted]))]
            order[active[unsorted]] = order[active[by]]
            window[unsorted] = window[by]
            same = joined & _as_before(window)
        (parted,) = np.nonzero(joined & ~same)
        for some in _pieces(parted):
            common[active[some]] = at + np.argmax(window[some] != window[some - 1], axis=1)
        ended = window[:, -1] < 0
        (equal,) = np.nonzero(same & ended)
        common[active[equal]] = tokens.lengths[order[active[equal]]]
        joined = same & ~ended
        kept = joined.copy()
        kept[:-1] |= joined[1:]
        active, joined = active[kept], joined[kept]
        at += _WIDTH
    common[common < MIN_SHARED_TOKENS] = 0
    return order, common


def _as_before(window: Int32s) -> NDArray[np.bool_]:
    """[n] whether a row of tokens is that before it; False for the first."""
    same = np.zeros(len(window), dtype=bool)
    pairs = window.view(np.int64)  # half the comparisons
    np.all(pairs[1:] == pairs[:-1], axis=1, out=same[1:])
    return same


def _sort_key(window: Int32s, chosen: Int64s) -> NDArray[np.uint64]:
    """[chosen] a hash of the first 8 tokens above one of the next 8: equal windows come together, and among
    others those that part in the second half."""
    keys, half, upper = [np.empty(0, np.uint64)], _WIDTH // 2, np.uint64(32)
    for some in _pieces(chosen):
        products = window[some].view(np.uint32) * _ODD
        # Multiply-shift hashing: the upper bits of a sum of products with odd numbers.
        first, second = products[:, :half].sum(1), products[:, half:].sum(1)
        keys.append((first >> upper << upper) | (second >> upper))
    return np.concatenate(keys)


def _pieces(indices: Int64s) -> Iterator[Int64s]:
    """A few of them at a time, which bounds what is copied beside the result."""
    for start in range(0, len(indices), _PIECE):
        yield indices[start : start + _PIECE]


# Powers of 2^64 / golden ratio: odd, and the same on every machine and with every numpy.
_ODD = np.array([pow(0x9E3779B97F4A7C15, n + 1, 1 << 64) for n in range(_WIDTH)], dtype=np.uint64)

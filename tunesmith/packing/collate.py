"""Examples to a pack: laid end to end in one forward pass, never padded.

    examples      [a b c]  [d e]           c and e are targets
    input_ids     [a b c d e]              [1, T]
    position_ids  [0 1 2 0 1]              [1, T]  the position of each token in its documents
    layout        [a b c] [d e]            PackLayout: the segments, and with them the attention mask
    positions     [1 3]                    [P]     where a prediction is made: one before its target
    targets       [c e]                    [P]
    weights       [1 1]                    [P]     loss weight of each prediction

In a prefix-tree pack the examples that begin with the same tokens have them in common:

    examples      [a b c]  [a b d]         c, b and d are targets
    input_ids     [a b c d]
    position_ids  [0 1 2 2]
    layout        [a b] [c] [d]            [a b] goes on with both
    positions     [0 1 1]                  the token at 1 is followed by c in one example, by d in the other
    targets       [b c d]

The same prediction made for several examples is one, with the sum of their weights: the loss is the same.

A pack with no example (a step with fewer examples than passes) is one token and no prediction: loss and
gradient 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.models.layout import PackLayout, Segment
from tunesmith.packing.sharing import MIN_SHARED_TOKENS


def collate(rows: Sequence[PreparedRow], *, tree: bool) -> dict[str, Any]:
    """One pack of the rows' examples: the entries above, and

    rows         what became of each row (examples left out where they lie in the pack), for reports
    num_tokens   of the rows: a token that five of them share counts five times
    num_targets  likewise, of their predictions
    total        what a sum of losses over them is divided by, for a mean: here the weight of the predictions

    A flat pack's `layout` is None: positions say it all, to models too that take no such keyword."""
    examples = [example for row in rows for example in row.examples]
    pack = pack_tree(examples) if tree else pack_flat(examples) | {"layout": None}
    return pack | {"rows": list(rows), "total": float(pack["weights"].sum(dtype=torch.float64))}


def collate_flat(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """A pack in which each example lies by itself."""
    return collate(rows, tree=False)


def collate_tree(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """A pack in which examples share the prefixes they have in common."""
    return collate(rows, tree=True)


def pack_flat(examples: Sequence[Example]) -> dict[str, Any]:
    """The flat pack of the examples in their order: input_ids, position_ids [1, T] int64; positions, targets
    [P] int64; weights [P] float32; layout; num_tokens, num_targets."""
    return _pack(examples, lay_flat(examples))


def pack_tree(examples: Sequence[Example], *, min_shared: int = MIN_SHARED_TOKENS) -> dict[str, Any]:
    """The prefix-tree pack of the examples: the same entries as of the flat pack, and the same pack where
    there is nothing to share."""
    return _pack(examples, lay_tree(examples, min_shared=min_shared))


@dataclass(frozen=True)
class Laid:
    """Examples laid out in one pass. Token t of example e is input_ids[paths[e][t]]."""

    input_ids: NDArray[np.int32]
    layout: PackLayout
    paths: list[NDArray[np.int64]]

    def inputs(self) -> dict[str, Any]:
        """What a model is given of them."""
        return {
            "input_ids": torch.from_numpy(self.input_ids.astype(np.int64))[None],
            "position_ids": self.layout.position_ids[None],
            "layout": self.layout,
        }


def lay_flat(examples: Sequence[Example]) -> Laid:
    """End to end, in their order."""
    if not examples:
        return Laid(np.zeros(1, np.int32), PackLayout.of_lengths([1]), [])
    lengths = [len(example.input_ids) for example in examples]
    ends = np.cumsum(lengths)
    paths = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    input_ids = np.concatenate([example.input_ids for example in examples])
    return Laid(input_ids, PackLayout.of_lengths(lengths), paths)


def lay_tree(examples: Sequence[Example], *, min_shared: int = MIN_SHARED_TOKENS) -> Laid:
    """As the prefix tree of their tokens."""
    if not examples:
        return lay_flat(examples)
    tree = _Tree.of([example.input_ids for example in examples], min_shared)
    return Laid(tree.input_ids, PackLayout(tree.segments), tree.paths)


def _pack(examples: Sequence[Example], laid: Laid) -> dict[str, Any]:
    of_examples = Predictions.of(examples, laid.paths)
    predictions, _ = of_examples.merged()
    return {
        **laid.inputs(),
        **predictions.tensors(),
        "num_tokens": sum(len(example.input_ids) for example in examples),
        "num_targets": len(of_examples.targets),
    }


@dataclass(frozen=True)
class Predictions:
    """Loss terms: positions, targets [P] int64; weights [P] float32."""

    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, examples: Sequence[Example], paths: Sequence[NDArray[np.int64]]) -> Predictions:
        """Those of each example in turn."""
        positions, targets, weights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, "f4")]
        for example, path in zip(examples, paths, strict=True):
            token_weights = example.token_weights()
            (target_at,) = np.nonzero(token_weights)
            positions.append(path[target_at - 1])
            targets.append(example.input_ids[target_at].astype(np.int64))
            weights.append(token_weights[target_at])
        return cls(np.concatenate(positions), np.concatenate(targets), np.concatenate(weights))

    def merged(self) -> tuple[Predictions, NDArray[np.int64]]:
        """In ascending order of (position, target), each pair once, with the sum of its weights; and which
        of those each of these is: [P]."""
        if not len(self.targets):
            return self, np.empty(0, np.int64)
        pairs = self.positions * (int(self.targets.max()) + 1) + self.targets
        order = np.argsort(pairs, kind="stable")  # timsort: examples come as a few sorted runs
        pairs = pairs[order]
        is_first = np.concatenate([[True], pairs[1:] != pairs[:-1]])
        (first,) = np.nonzero(is_first)
        once = order[first]
        merged_into = np.empty(len(pairs), np.int64)
        merged_into[order] = np.cumsum(is_first) - 1
        weights = np.add.reduceat(self.weights[order], first)
        return Predictions(self.positions[once], self.targets[once], weights), merged_into

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "positions": torch.from_numpy(self.positions),
            "targets": torch.from_numpy(self.targets),
            "weights": torch.from_numpy(self.weights),
        }


@dataclass(frozen=True)
class _Tree:
    """The prefix tree of some documents, laid out. Token t of document d is input_ids[paths[d][t]]."""

    input_ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
    paths: list[NDArray[np.int64]]

    @classmethod
    def of(cls, documents: Sequence[NDArray[np.int32]], min_shared: int) -> _Tree:
        order = _lexicographic(documents)
        ordered = [documents[i] for i in order]
        forks = _Forks(ordered, np.array(order), max(1, min_shared))
        runs: list[NDArray[np.int32]] = []
        starts, positions, parents = [0], [], []
        paths: list[list[NDArray[np.int64]]] = [[] for _ in documents]
        todo = [(branch, 0, -1) for branch in reversed(forks.branches([(0, len(ordered))]))]
        while todo:
            (low, high, end, groups), position, parent = todo.pop()
            start = starts[-1]
            indices = np.arange(start, start + end - position)
            for i in range(low, high):
                paths[order[i]].append(indices[: len(ordered[i]) - position])
            todo += [(branch, end, len(runs)) for branch in reversed(forks.branches(groups))]
            runs.append(ordered[high - 1][position:end])
            starts.append(start + end - position)
            positions.append(position)
            parents.append(parent)
        subtree_ends = starts[1:]
        for segment in reversed(range(len(runs))):
            if parents[segment] >= 0:
                subtree_ends[parents[segment]] = max(subtree_ends[parents[segment]], subtree_ends[segment])
        segments = map(Segment, starts, starts[1:], subtree_ends, positions)
        return cls(np.concatenate(runs), tuple(segments), [np.concatenate(path) for path in paths])


# Documents [low, high) of a sorted list.
_Group = tuple[int, int]
# A group whose documents agree (or have ended) up to position `end`, and the groups it falls into there.
_Branch = tuple[int, int, int, list[_Group]]


class _Forks:
    """Where documents part, told from how much of each agrees with the one before it in sorted order.

    `places[i]` is where sorted document i stands in the pack's own order."""

    def __init__(
        self, documents: Sequence[NDArray[np.int32]], places: NDArray[np.int64], min_shared: int
    ) -> None:
        self._lengths = [len(document) for document in documents]
        self._agree = np.array([0, *map(_num_agreeing, documents, documents[1:])])
        self._places = places
        self._min_shared = min_shared

    def branches(self, groups: list[_Group]) -> list[_Branch]:
        """The segments of these groups: one for each, or several where a group parts too soon. In the order
        of their first documents, so that a tree that shares nothing is the flat pack."""
        found, todo = [], list(groups)
        while todo:
            low, high = todo.pop()
            end, parts = self._next(low, high)
            if parts and end < self._min_shared:
                # Documents that end here come first in sorted order, and go with the first part.
                todo += [(low, parts[0][1]), *parts[1:]]
            else:
                found.append((low, high, end, parts))
        return sorted(found, key=lambda branch: self._places[branch[0] : branch[1]].min())

    def _next(self, low: int, high: int) -> tuple[int, list[_Group]]:
        """Where two of the documents or more go on differently, and the groups of those that do; or the end
        of the longest, and none."""
        while high - low > 1:
            agree = self._agree[low + 1 : high]
            end = int(agree.min())
            bounds = [low, *(np.nonzero(agree == end)[0] + low + 1).tolist(), high]
            # Sorted, the documents that end here come first; the others fall into groups of more than `end`.
            parts = [part for part in itertools.pairwise(bounds) if self._lengths[part[0]] > end]
            if len(parts) > 1:
                return end, parts
            if not parts:
                break
            ((low, high),) = parts
        return self._lengths[high - 1], []


def _lexicographic(documents: Sequence[NDArray[np.int32]]) -> list[int]:
    """The documents in sorted order, those that are a prefix of another before it."""
    keys = [document.astype(">u4").tobytes() for document in documents]  # big-endian bytes sort as numbers do
    return sorted(range(len(documents)), key=keys.__getitem__)


def _num_agreeing(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """How many tokens the two begin with in common."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length

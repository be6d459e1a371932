"""How the documents of a pack lie in it: segments end to end, parents before their children.

A document is a path from a root segment to a leaf. Segments are in depth-first order, so all that continues a
segment lies directly behind it, and one number a token says the whole attention mask:

    query i sees key j   when   j <= i < subtree_ends[j]

    rows           [a b c d]  [a b e]
    segments       [a b] [c d] [e]           [a b] goes on with both
    tokens          a b   c d   e
    positions       0 1   2 3   2
    subtree_ends    5 5   4 4   5
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of a pack; its first token is at `position` of its documents, and the segments that
    go on from it fill [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int
    position: int = 0


@dataclass(frozen=True)
class PackLayout:
    """The segments of a pack of T tokens, in depth-first order, without gaps."""

    segments: tuple[Segment, ...]

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> PackLayout:
        """Documents that share nothing."""
        segments, start = [], 0
        for length in lengths:
            segments.append(Segment(start, start + length, start + length))
            start += length
        return cls(tuple(segments))

    @classmethod
    def of_positions(cls, position_ids: Tensor | None, total: int) -> PackLayout:
        """Documents that share nothing and begin where positions [..., total] do not go on by one; one
        document without positions. Kept with the tensor: every layer of a model asks for the same one."""
        if position_ids is None or position_ids.shape[-1] != total:
            return cls.of_lengths([total])
        known: PackLayout | None = getattr(position_ids, "_tunesmith_layout", None)
        if known is None:
            starts = (position_ids.reshape(-1, total)[0].diff() != 1).nonzero()[:, 0] + 1
            bounds = [0, *starts.tolist(), total]
            known = cls.of_lengths([end - start for start, end in itertools.pairwise(bounds)])
            position_ids._tunesmith_layout = known  # type: ignore[attr-defined]
        return known

    @property
    def num_tokens(self) -> int:
        return self.segments[-1].end if self.segments else 0

    @property
    def is_flat(self) -> bool:
        """Whether no segment is shared."""
        return all(segment.end == segment.subtree_end for segment in self.segments)

    @cached_property
    def subtree_ends(self) -> Tensor:
        """[T] int32: the mask, as told above."""
        ends = torch.tensor([segment.subtree_end for segment in self.segments], dtype=torch.int32)
        lengths = torch.tensor([segment.end - segment.start for segment in self.segments])
        return ends.repeat_interleave(lengths)

    @cached_property
    def position_ids(self) -> Tensor:
        """[T] int64: the position of each token in its documents."""
        runs = [torch.arange(s.position, s.position + s.end - s.start) for s in self.segments]
        return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def positions_int32(self) -> Tensor:
        """[T] int32: `position_ids` for code that wants them short."""
        return self.position_ids.to(torch.int32)

    @cached_property
    def last_position(self) -> int:
        """Of any token."""
        return max((s.position + s.end - s.start - 1 for s in self.segments), default=0)

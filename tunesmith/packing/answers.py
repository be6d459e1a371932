"""Answers that are weighed against each other to a pack: both of a pair hang on one prompt.

    rows          [p q a b] over [p q a c]      a prompt, a chosen and a rejected answer
    input_ids     [p q a b c]
    positions     [1 2 2]                       a is predicted once, and counts for both
    targets       [a b c]
    members       [0 1 | 0 2]                   [M] the prediction of each target of each answer
    answers       [0 0 | 1 1]                   [M] whose target it is
    sides         [0 1]                         [A] 0 chosen or desirable, 1 rejected or undesirable

A row is planned as one: both answers of a pair lie in one pass, since the loss is of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.data.rows import AnswerRows
from tunesmith.packing.collate import Predictions, lay_flat, lay_tree
from tunesmith.packing.sharing import Sharing


def collate_answers(rows: Sequence[PreparedRow], *, tree: bool) -> dict[str, Any]:
    """One pack of the rows' answers: what `collate` gives, every prediction with weight 1, and

    members, answers   [M] int64, see above; shares [M] float32: the weight of each target in its answer
    reference          [M] float32: what the reference model says of each target; None if a row lacks it
    sides, ends        [A] int64: the side of each answer, and where its last token lies
    margins            [A] float32: that of its pair
    total              the number of rows
    mismatched         the pack of the rows' mismatched answers; None if they have none"""
    examples = [example for row in rows for example in row.examples]
    laid = (lay_tree if tree else lay_flat)(examples)
    of_examples = Predictions.of(examples, laid.paths)
    predictions, members = of_examples.merged()
    answers = list(_answers(rows))
    last = np.cumsum([len(answer) for answer in answers], dtype=np.int64) - 1
    counts = [sum(example.num_targets for example in answer) for answer in answers]
    found = [row.reference for row in rows]
    references = [reference for reference in found if reference is not None]
    wrong = [row.mismatched for row in rows if row.mismatched is not None]
    inputs = laid.inputs()
    return {
        **(inputs if tree else inputs | {"layout": None}),
        **replace(predictions, weights=np.ones(len(predictions.targets), np.float32)).tensors(),
        "members": torch.from_numpy(members),
        "answers": torch.from_numpy(np.repeat(np.arange(len(answers)), counts)),
        "shares": torch.from_numpy(of_examples.weights),
        "reference": _joined(references) if len(references) == len(rows) else None,
        "sides": torch.tensor([answer[0].side for answer in answers], dtype=torch.int64),
        "ends": torch.tensor([int(laid.paths[at][-1]) for at in last], dtype=torch.int64),
        "margins": torch.tensor([answer[0].margin for answer in answers], dtype=torch.float32),
        "rows": list(rows),
        "num_tokens": sum(len(example.input_ids) for example in examples),
        "num_targets": len(of_examples.targets),
        "total": float(len(rows)),
        "mismatched": collate_answers(wrong, tree=tree) if wrong else None,
    }


def _answers(rows: Sequence[PreparedRow]) -> Iterator[list[Example]]:
    """The examples of each answer: those of a row that follow one another on one side."""
    for row in rows:
        for _, examples in groupby(row.examples, key=lambda example: example.side):
            yield list(examples)


def _joined(references: list[NDArray[np.float32]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *references]))


def collate_answers_flat(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """A pack in which each answer has a prompt of its own."""
    return collate_answers(rows, tree=False)


def collate_answers_tree(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """A pack in which answers share the prompts they have in common."""
    return collate_answers(rows, tree=True)


def plan_answers(rows: AnswerRows, *, tree: bool) -> tuple[NDArray[np.int32], Sharing | None]:
    """What a plan needs to know of rows that stay whole: [R] tokens that each computes, and, where prompts
    are shared, what rows have in common with each other (that of their first answers)."""
    lengths, starts = rows.examples.column("length").astype(np.int32), rows.row_starts
    own = np.add.reduceat(lengths, starts[:-1]).astype(np.int32) if len(rows) else lengths[:0]
    if not tree:
        return own, None
    sharing = Sharing.of_tokens(*rows.examples.token_chunks())
    row_of = np.repeat(np.arange(len(rows)), np.diff(starts))
    order = np.lexsort((sharing.rank, row_of))
    is_second = row_of[order][1:] == row_of[order][:-1]
    before, after = order[:-1][is_second], order[1:][is_second]
    np.subtract.at(own, row_of[after], sharing.lcp(after, before))
    by_rank, common = sharing.in_order(starts[:-1])
    rank = np.empty(len(rows), dtype=np.int32)
    rank[np.searchsorted(starts, by_rank)] = np.arange(len(rows), dtype=np.int32)
    return own, Sharing(rank, common, own)

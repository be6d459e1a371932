"""Chosen and rejected answers: passes of pairs and the DPO loss over them, forward, reference and backward.

N pairs of a pass, P predictions. The reference is the model with its adapter off, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ladder.rungs import Rung
from benchmarks.ladder.steps import Loss, Pack, batches, example, pad
from benchmarks.ladder.workloads import Workload
from tunesmith.models.layout import PackLayout, Segment
from tunesmith.packing.collate import pack_flat
from tunesmith.packing.plan import fill_passes
from tunesmith.training.objectives import prediction_losses

BETA = 0.1
Row = dict[str, list[int]]


def of_rung(
    rung: Rung, workload: Workload, pad_id: int
) -> tuple[Callable[[list[int]], Iterator[Pack]], Loss]:
    """How the rung makes passes of a step's pairs, and its loss, summed over the pairs of a pass."""
    if rung.loop == "padded":
        logps: Callable[[Any, Pack], Tensor] = _padded_logps

        def passes(rows: list[int]) -> Iterator[Pack]:
            for group in batches(rows, rung, workload):
                yield pad_pairs([workload.rows[index] for index in group], pad_id)

    else:
        logps = _prediction_logps if "head" in rung.pieces else _everywhere_logps
        make = tree_of_pairs if rung.packing == "tree" else flat_pairs

        def passes(rows: list[int]) -> Iterator[Pack]:
            alone = [make([workload.rows[index]])["input_ids"].numel() for index in rows]
            for group in fill_passes(np.array(alone, dtype=np.int32), workload.pack_tokens):
                yield make([workload.rows[rows[item]] for item in group])

    def loss(model: Any, pack: Pack) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = logps(model, pack)
        return dpo_loss(logps(model, pack), reference)

    return passes, loss


def dpo_loss(logps: Tensor, reference: Tensor) -> Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, summed: [2N] log-probabilities, chosen before
    rejected."""
    chosen, rejected = (logps - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).sum()


def documents(pairs: list[Row]) -> list[tuple[list[int], int]]:
    """Tokens of each prompt with its answer and where the answer begins: all chosen, then all rejected."""
    return [
        (row["prompt"] + row[kind], len(row["prompt"])) for kind in ("chosen", "rejected") for row in pairs
    ]


# --- padded


def pad_pairs(pairs: list[Row], pad_id: int) -> Pack:
    """Both answers of each pair as rows of one padded batch."""
    found = documents(pairs)
    marks = [[0] * start + [1] * (len(ids) - start) for ids, start in found]
    return pad([ids for ids, _ in found], marks, pad_id)


def _padded_logps(model: Any, pack: Pack) -> Tensor:
    """[2N] log-probability of each answer, from logits at every position."""
    output = model(input_ids=pack["input_ids"], attention_mask=pack["attention_mask"], use_cache=False)
    labels = pack["labels"][:, 1:]
    nll = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return -nll.sum(1)


# --- packs


def flat_pairs(pairs: list[Row]) -> Pack:
    """Each prompt with each answer as a document of its own; `owners` [P] is the answer of a prediction."""
    found = documents(pairs)
    pack = pack_flat(
        [
            example({"input_ids": ids, "targets": [0] * start + [1] * (len(ids) - start)})
            for ids, start in found
        ]
    )
    counts = torch.tensor([len(ids) - start for ids, start in found])
    owners = torch.arange(len(found)).repeat_interleave(counts)
    return pack | {"layout": None, "owners": owners, "num_answers": len(found)}


def tree_of_pairs(pairs: list[Row]) -> Pack:
    """Prompt and common beginning of both answers once, then the rest of each.

        [p q a b], [p q c]       tokens  p q a b c       segments [p q] [a b] [c]

    Only what follows the fork is predicted: what both answers share cancels out in the difference that DPO
    looks at. The first token of either rest is predicted from the end of what is shared."""
    ids: list[int] = []
    segments: list[Segment] = []
    positions: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(pairs):
        both = [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
        fork = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
        start = len(ids)
        end = start + len(both[0]) + len(both[1]) - fork
        segments.append(Segment(start, start + fork, end))
        ids += both[0][:fork]
        for which, tokens in enumerate(both):
            if rest := tokens[fork:]:
                at = len(ids)
                segments.append(Segment(at, at + len(rest), at + len(rest), fork))
                ids += rest
                positions += [start + fork - 1, *range(at, at + len(rest) - 1)]
                owners += [number + which * len(pairs)] * len(rest)
    layout = PackLayout(tuple(segments))
    targets = [
        token for segment in segments if segment.position for token in ids[segment.start : segment.end]
    ]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": layout.position_ids[None],
        "layout": layout,
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "weights": torch.ones(len(targets)),
        "owners": torch.tensor(owners),
        "num_answers": 2 * len(pairs),
    }


def _prediction_logps(model: Any, pack: Pack) -> Tensor:
    return _by_owner(prediction_losses(model, pack), pack)


def _everywhere_logps(model: Any, pack: Pack) -> Tensor:
    output = model(input_ids=pack["input_ids"], position_ids=pack["position_ids"], use_cache=False)
    labels = torch.full_like(pack["input_ids"][0], -100)
    labels[pack["positions"]] = pack["targets"]
    nll = F.cross_entropy(output.logits[0].float(), labels, reduction="none")
    return _by_owner(nll[pack["positions"]], pack)


def _by_owner(nll: Tensor, pack: Pack) -> Tensor:
    """[2N] log-probability of each answer from the negative log-likelihood of each prediction [P]."""
    return -nll.new_zeros(pack["num_answers"]).index_add(0, pack["owners"], nll)

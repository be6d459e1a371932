"""The training steps of a run: passes of a step, their loss, the optimiser; the time and loss of each step.

B rows of a padded batch, T tokens, P predictions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ladder.rungs import Rung
from benchmarks.ladder.workloads import Workload
from tunesmith.config import load_config
from tunesmith.data.loading import load_data
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.data.rows import CachedRows
from tunesmith.packing.collate import collate
from tunesmith.packing.sharing import Sharing
from tunesmith.training.objectives import next_token_loss

Pack = dict[str, Any]
# (model, pack) -> summed loss of the pack.
Loss = Callable[[Any, Pack], Tensor]


def train(
    model: Any, workload: Workload, num_steps: int, passes: Callable[[list[int]], Iterator[Pack]], loss: Loss
) -> Iterator[dict[str, float]]:
    """Train `num_steps` steps and tell of each: its loss, its seconds, and the tokens that were computed.

    A step's loss is the sum over its passes divided by its targets (its pairs, for preferences)."""
    config = workload.config["train"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config["learning_rate"], weight_decay=config["weight_decay"], fused=True
    )
    model.train()
    for rows in workload.steps[:num_steps]:
        start = time.perf_counter()
        share = len(rows) if workload.is_pairs else sum(workload.targets(row) for row in rows)
        total, computed = 0.0, 0
        for pack in passes(rows):
            with autocast(model):
                part = loss(model, pack) / share
            part.backward()
            total += float(part.detach())
            computed += pack["input_ids"].numel()
        torch.nn.utils.clip_grad_norm_(trained, config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {"loss": total, "seconds": time.perf_counter() - start, "computed_tokens": computed}


def autocast(model: Any) -> Any:
    """The number format of a model whose frozen weights are in bfloat16, and its adapter not."""
    in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16)


def batches(rows: Sequence[int], rung: Rung, workload: Workload) -> Iterator[list[int]]:
    """The rows of a step in groups of `rows_per_pass`, longest first where grouped by length."""
    order = sorted(rows, key=lambda row: -workload.tokens(row)) if rung.by_length else list(rows)
    for start in range(0, len(order), rung.rows_per_pass):
        yield order[start : start + rung.rows_per_pass]


# --- padded


def padded_passes(rung: Rung, workload: Workload, pad_id: int) -> Callable[[list[int]], Iterator[Pack]]:
    """Passes as a collator of transformers makes them: input_ids, attention_mask, labels [B, T]."""

    def passes(rows: list[int]) -> Iterator[Pack]:
        for group in batches(rows, rung, workload):
            yield pad(
                [workload.rows[row]["input_ids"] for row in group],
                [workload.rows[row]["targets"] for row in group],
                pad_id,
            )

    return passes


def pad(ids: Sequence[list[int]], targets: Sequence[list[int]], pad_id: int) -> Pack:
    """Rows padded on the right to the longest; labels are -100 where there is no target."""
    longest = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), longest), pad_id)
    labels = torch.full((len(ids), longest), -100)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, (row, marks) in enumerate(zip(ids, targets, strict=True)):
        tokens = torch.tensor(row)
        input_ids[i, : len(row)] = tokens
        labels[i, : len(row)] = torch.where(torch.tensor(marks) > 0, tokens, -100)
        mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def padded_loss(model: Any, pack: Pack) -> Tensor:
    """transformers' own loss over logits at every position, summed over targets."""
    return model(**pack, use_cache=False, num_items_in_batch=1).loss


# --- packs


def example(row: dict[str, list[int]]) -> Example:
    """A row of the workload as tunesmith holds it."""
    edges = np.diff(np.array([0, *row["targets"], 0]))
    spans = np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)
    return Example(
        np.array(row["input_ids"], np.int32), spans.astype(np.int32), np.ones(len(spans), np.float32)
    )


def pack_passes(rung: Rung, workload: Workload, tokenizer: Any) -> Callable[[list[int]], Iterator[Pack]]:
    """The passes of tunesmith's own plan."""
    tree = rung.packing == "tree"
    sharing = None
    if tree:  # what the rows have in common is told from all of them
        rows_of_all = load_data(load_config(workload.config), tokenizer).train.rows
        assert isinstance(rows_of_all, CachedRows)
        sharing = Sharing.of_tokens(*rows_of_all.token_chunks())
    plan = workload.plan(sharing=sharing)
    prepared = {index: PreparedRow(str(index), (example(row),)) for index, row in workload.rows.items()}

    def passes(rows: list[int]) -> Iterator[Pack]:
        for items in plan.split(rows)[0]:
            if items:
                yield collate([prepared[item] for item in items], tree=tree)

    return passes


def everywhere_loss(model: Any, pack: Pack) -> Tensor:
    """Logits at every position of a pack and transformers' own loss over them."""
    labels = torch.full_like(pack["input_ids"], -100)
    labels[0, pack["positions"] + 1] = pack["targets"]
    output = model(
        input_ids=pack["input_ids"],
        position_ids=pack["position_ids"],
        labels=labels,
        use_cache=False,
        num_items_in_batch=1,
    )
    return output.loss


def pack_loss(rung: Rung) -> Loss:
    return next_token_loss if "head" in rung.pieces else everywhere_loss

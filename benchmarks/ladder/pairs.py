"""Chosen and rejected answers: passes of pairs and the DPO loss over them.

Packs, their plan, the reference and the objective are those of `tunesmith prefer`; the padded loop is a plain
script of transformers and PEFT. N pairs of a pass.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ladder.rungs import Rung
from benchmarks.ladder.steps import Loss, Pack, autocast, batches, pad
from benchmarks.ladder.workloads import Workload
from tunesmith.config import load_config
from tunesmith.data.loading import load_data
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.rows import AnswerRows
from tunesmith.packing.answers import collate_answers, plan_answers
from tunesmith.training.preference import PreferenceObjective, target_logps
from tunesmith.training.reference import Float32s, adapter_off, ask_reference

Passes = Callable[[list[int]], Iterator[Pack]]


# --- padded


def padded_passes(rung: Rung, workload: Workload, pad_id: int) -> Passes:
    """Both answers of each pair as rows of a padded batch: all chosen, then all rejected."""

    def passes(rows: list[int]) -> Iterator[Pack]:
        for group in batches(rows, rung, workload):
            pairs = [workload.rows[index] for index in group]
            found = [(row["prompt"], row[kind]) for kind in ("chosen", "rejected") for row in pairs]
            marks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in found]
            yield pad([prompt + answer for prompt, answer in found], marks, pad_id)

    return passes


def padded_loss(workload: Workload) -> Loss:
    """Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, summed over the pairs; the reference is the model with
    its adapter off."""
    beta = load_config(workload.config).prefer.beta
    assert beta is not None

    def loss(model: Any, pack: Pack) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = _padded_logps(model, pack)
        chosen, rejected = (_padded_logps(model, pack) - reference).chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected)).sum()

    return loss


def _padded_logps(model: Any, pack: Pack) -> Tensor:
    """[2N] log-probability of each answer, from logits at every position."""
    output = model(input_ids=pack["input_ids"], attention_mask=pack["attention_mask"], use_cache=False)
    labels = pack["labels"][:, 1:]
    nll = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return -nll.sum(1)


# --- packs


def pack_passes(
    rung: Rung, workload: Workload, model: Any, tokenizer: Any, num_steps: int, result: dict[str, Any]
) -> Passes:
    """The passes of tunesmith's own plan. With a cached reference its log-probabilities are asked for here,
    and `reference_s` says how long that took for the rows of these steps."""
    tree = rung.packing == "tree"
    rows = load_data(load_config(workload.config), tokenizer).train.rows
    assert isinstance(rows, AnswerRows)
    plan = workload.plan(*plan_answers(rows, tree=tree))

    def ask(some: Sequence[PreparedRow]) -> Float32s:
        with torch.no_grad(), adapter_off(model), autocast(model):
            return target_logps(model, collate_answers(some, tree=tree)).numpy()

    if rung.reference == "cached":
        start = time.perf_counter()
        asked = [items for step in workload.steps[:num_steps] for items in plan.split(step)[0] if items]
        with tempfile.TemporaryDirectory() as folder:
            ask_reference(rows, asked, Path(folder), ask, rank=0, ranks=1, say=lambda _: None)
        result["reference_s"] = time.perf_counter() - start

    def passes(step: list[int]) -> Iterator[Pack]:
        for items in plan.split(step)[0]:
            if items:
                yield collate_answers([rows[item] for item in items], tree=tree)

    return passes


def pack_loss(workload: Workload) -> Loss:
    """What `tunesmith prefer` asks of each pass, summed over its pairs."""
    objective = PreferenceObjective(load_config(workload.config).prefer, adapter_off)
    return lambda model, pack: objective(model, pack).loss

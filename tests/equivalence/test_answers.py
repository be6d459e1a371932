"""Answers that hang on one prompt in a pack, against rows of their own in stock transformers:
log-probabilities, losses and gradients in float32."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.config import load_config
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.models.fuse import fuse
from tunesmith.models.load import load_model
from tunesmith.packing.answers import collate_answers_flat, collate_answers_tree
from tunesmith.training.preference import PreferenceObjective, target_logps

FAMILIES = ["llama", "qwen3", "gemma2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (stock model, ours)."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = make_tiny_model(tmp_path_factory.mktemp("models") / family, family)
            config = load_config(
                {
                    "model": {"path": str(folder), "dtype": "float32"},
                    "adapter": {"method": "none"},
                    "data": {"train": "unused", "max_length": 256},
                }
            )
            ours = load_model(config, AutoTokenizer.from_pretrained(folder), lambda _: None)
            fuse(ours)
            stock = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            made[family] = stock.train(), ours.train()
        return made[family]

    return get


def answer(prompt: list[int], ids: list[int], side: int) -> Example:
    return Example(
        np.asarray(prompt + ids, np.int32),
        np.asarray([[len(prompt), len(prompt) + len(ids)]], np.int32),
        np.ones(1, np.float32),
        side=side,
    )


def row_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> PreparedRow:
    return PreparedRow("rows", (answer(prompt, chosen, 0), answer(prompt, rejected, 1)))


def alone(model, example: Example) -> torch.Tensor:
    """Log-probability of an answer, from all logits of a row of its own."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    start = int(example.spans[0, 0])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return logps[start - 1 : -1].gather(1, ids[0, start:, None]).sum()


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return [grad.clone() for grad in found]


tokens = st.lists(st.integers(3, 250), min_size=1, max_size=12)
# Prompts long enough to be shared; answers may begin alike, and one go on where the other ends.
prompts = st.lists(st.integers(3, 250), min_size=18, max_size=30)
bodies = st.tuples(st.lists(st.integers(3, 250), max_size=6), tokens, tokens)


@pytest.mark.parametrize("collate", [collate_answers_tree, collate_answers_flat])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(prompt=prompts, made=st.lists(st.tuples(st.booleans(), bodies), min_size=1, max_size=3))
def test_a_pack_of_pairs_is_its_answers_as_rows_of_their_own(models, family, collate, prompt, made):
    stock, ours = models(family)
    rows = [
        row_of(prompt if is_same else [*prompt[::-1], 7], [*shared, *a, 1], [*shared, *a[:1], *b, 1])
        for is_same, (shared, a, b) in made
    ]
    logps = torch.stack([alone(stock, example) for row in rows for example in row.examples])
    reference = logps.detach() + torch.linspace(-2, 1, len(logps))
    h = 0.1 * ((logps - reference)[0::2] - (logps - reference)[1::2])
    expected = -F.logsigmoid(h).sum()

    pack = collate(rows)
    if collate is collate_answers_tree:
        assert pack["input_ids"].numel() < sum(len(e.input_ids) for row in rows for e in row.examples)
    # The reference of each target: what is missing to the answer's own lies on its last one.
    found = target_logps(ours, pack)
    of_targets = found.detach().clone()
    of_answers = torch.zeros(len(logps)).index_add(0, pack["answers"], of_targets)
    assert of_answers.tolist() == pytest.approx(logps.tolist(), rel=1e-5, abs=1e-5)
    last = [int((pack["answers"] == i).nonzero()[-1]) for i in range(len(logps))]
    of_targets[last] += reference - of_answers
    objective = PreferenceObjective(
        load_config(
            {"model": {"path": "unused"}, "data": {"train": "unused"}, "prefer": {"method": "dpo"}},
            recipe="prefer",
        ).prefer
    )
    outcome = objective(ours, pack | {"reference": of_targets})
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for a, b in zip(gradients(ours, outcome.loss), gradients(stock, expected), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


def test_what_two_answers_begin_with_counts_for_both():
    prompt = list(range(20, 40))
    pack = collate_answers_tree([row_of(prompt, [50, 51, 52, 1], [50, 51, 60, 1])])
    # 50 and 51 are predicted once: 20 prompt tokens, 2 shared, 2 of either answer.
    assert pack["input_ids"].numel() == 26
    assert pack["targets"].tolist() == [50, 51, 52, 60, 1, 1]
    assert pack["answers"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert pack["members"].tolist()[:2] == pack["members"].tolist()[4:6] == [0, 1]
    assert pack["sides"].tolist() == [0, 1]
    assert pack["input_ids"][0, pack["ends"]].tolist() == [1, 1]
    assert (pack["total"], pack["num_tokens"], pack["num_targets"]) == (1.0, 48, 8)


def test_a_pack_of_no_row_has_a_loss_of_0_and_gradients_of_0(models):
    _, ours = models("llama")
    settings_of_dpo = SimpleNamespace(
        method="dpo", beta=0.1, label_smoothing=0.0, sft_weight=0.0, length_normalized=False
    )
    pack = collate_answers_tree([])
    outcome = PreferenceObjective(settings_of_dpo)(ours, pack | {"reference": torch.zeros(0)})
    assert outcome.loss.item() == 0
    assert all(float(grad.abs().max()) == 0 for grad in gradients(copy.copy(ours), outcome.loss))

"""Packs of short documents number by number, and prefix trees of any documents against the documents
themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.models.layout import PackLayout, Segment
from tunesmith.packing.collate import collate_flat, collate_tree, pack_flat, pack_tree


def example(ids, spans, weights):
    return Example(
        np.asarray(ids, np.int32), np.asarray(spans, np.int32).reshape(-1, 2), np.asarray(weights, np.float32)
    )


def test_two_documents_lie_end_to_end_with_positions_that_restart():
    pack = pack_flat([example([10, 11, 12], [[1, 3]], [1.0]), example([20, 21], [[1, 2]], [0.5])])
    assert pack["input_ids"].tolist() == [[10, 11, 12, 20, 21]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert pack["layout"].segments == (Segment(0, 3, 3), Segment(3, 5, 5))
    # Each target is predicted from the position before it.
    assert pack["positions"].tolist() == [0, 1, 3]
    assert pack["targets"].tolist() == [11, 12, 21]
    assert pack["weights"].tolist() == [1.0, 1.0, 0.5]
    assert (pack["num_tokens"], pack["num_targets"]) == (5, 3)


@pytest.mark.parametrize("make", [pack_flat, pack_tree])
def test_labels_of_a_packed_document_never_predict_the_next_documents_first_token(make):
    # Both documents are targets from their first token on; a first token has nothing before it in its
    # document.
    pack = make([example([10, 11], [[0, 2]], [1.0]), example([20, 21], [[0, 2]], [1.0])])
    assert pack["targets"].tolist() == [11, 21]
    assert pack["positions"].tolist() == [0, 2]


@pytest.mark.parametrize("collate", [collate_flat, collate_tree])
def test_an_empty_pack_is_one_token_and_predicts_nothing(collate):
    pack = collate([])
    assert pack["input_ids"].shape == (1, 1)
    assert pack["layout"] == (PackLayout.of_lengths([1]) if collate is collate_tree else None)
    assert len(pack["targets"]) == 0
    assert pack["rows"] == []
    assert (pack["num_tokens"], pack["num_targets"]) == (0, 0)


@pytest.mark.parametrize("collate", [collate_flat, collate_tree])
def test_a_row_that_gave_no_example_is_still_reported(collate):
    row = PreparedRow("a.jsonl:3")
    assert collate([row])["rows"] == [row]


def test_a_shared_prefix_lies_in_the_pack_once_and_its_last_token_predicts_both_branches():
    pack = pack_tree(
        [
            example([1, 2, 3, 4], [[1, 4]], [1.0]),
            example([9, 8], [[1, 2]], [1.0]),
            example([1, 2, 5], [[1, 3]], [0.25]),
        ],
        min_shared=2,
    )
    assert pack["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 8]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert pack["layout"].segments == (
        Segment(0, 2, 5, 0),
        Segment(2, 4, 4, 2),
        Segment(4, 5, 5, 2),
        Segment(5, 7, 7, 0),
    )
    assert pack["layout"].subtree_ends.tolist() == [5, 5, 4, 4, 5, 7, 7]
    # 2 follows 1 in two of them: one prediction, of both their weights.
    assert pack["positions"].tolist() == [0, 1, 1, 2, 5]
    assert pack["targets"].tolist() == [2, 3, 5, 4, 8]
    assert pack["weights"].tolist() == [1.25, 1.0, 0.25, 1.0, 1.0]
    # The counts that a user sees are those of the rows.
    assert (pack["num_tokens"], pack["num_targets"]) == (9, 6)


def test_a_document_that_ends_inside_another_adds_predictions_only():
    rows = [example([1, 2, 3], [[1, 3]], [1.0]), example([1, 2], [[1, 2]], [1.0])]
    pack = pack_tree([*rows, rows[0]])
    assert pack["layout"].segments == (Segment(0, 3, 3),)
    assert pack["positions"].tolist() == [0, 1]
    assert pack["weights"].tolist() == [3.0, 2.0]


def test_prefixes_shorter_than_the_least_worth_sharing_stay_apart():
    """All begin with 1 2; that is too short, but two of them go on alike for long enough."""
    rows = [example([1, 2, *tail], [[1, 2]], [1.0]) for tail in ([3, 4, 5], [7], [3, 4, 6])]
    pack = pack_tree(rows, min_shared=4)
    assert pack["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 1, 2, 7]]
    assert [segment.position for segment in pack["layout"].segments] == [0, 4, 4, 0]


def test_below_a_prefix_worth_sharing_every_token_is_shared():
    rows = [example([1, 2, 3, *tail], [[1, 2]], [1.0]) for tail in ([4, 5], [4, 6], [7])]
    pack = pack_tree(rows, min_shared=3)
    assert pack["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert pack["layout"].subtree_ends.tolist() == [7, 7, 7, 6, 5, 6, 7]


def trees(max_id: int = 3, max_length: int = 9):
    """Examples over few ids, so that prefixes, duplicates and documents inside others come by themselves."""
    ids = st.lists(st.integers(0, max_id), min_size=1, max_size=max_length)
    weights = st.sampled_from([0.0, 0.25, 1.0])
    one = ids.flatmap(
        lambda tokens: st.lists(weights, min_size=len(tokens), max_size=len(tokens)).map(
            lambda given: example(tokens, [[t, t + 1] for t in range(len(tokens))], given)
        )
    )
    return st.lists(one, min_size=1, max_size=8)


def paths_of(pack):
    """Every path from a root to a segment's end, as pack indices with the segments' places kept."""
    segments = pack["layout"].segments
    for leaf in segments:
        chain = [s for s in segments if s.start <= leaf.start and leaf.end <= s.subtree_end]
        yield [i for s in chain for i in range(s.start, s.end)]


def predictions_of(pack):
    """(position, target) -> weight."""
    found = {}
    for position, target, weight in zip(
        pack["positions"].tolist(), pack["targets"].tolist(), pack["weights"].tolist(), strict=True
    ):
        found[position, target] = found.get((position, target), 0.0) + weight
    return found


@given(trees(), st.integers(1, 4))
@settings(max_examples=300)
def test_every_document_is_a_path_and_the_predictions_are_those_of_the_documents(examples, min_shared):
    pack = pack_tree(examples, min_shared=min_shared)
    ids, at = pack["input_ids"][0].tolist(), pack["position_ids"][0].tolist()
    ends = pack["layout"].subtree_ends.tolist()
    segments = pack["layout"].segments
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
    assert segments[-1].end == len(ids)
    assert all(s.start < s.end <= s.subtree_end <= len(ids) for s in segments)
    # Each path runs through positions 0, 1, 2, ... and is exactly what its last token sees.
    paths = list(paths_of(pack))
    for path in paths:
        assert [at[i] for i in path] == list(range(len(path)))
        assert path == [j for j in range(path[-1] + 1) if path[-1] < ends[j]]
    # Each document is the beginning of one; its predictions stand there.
    expected, unshared = {}, 0
    for one in examples:
        tokens = one.input_ids.tolist()
        (path, *_) = [path for path in paths if [ids[i] for i in path[: len(tokens)]] == tokens]
        unshared += len(tokens)
        for t, weight in enumerate(one.token_weights().tolist()):
            if weight:
                expected[path[t - 1], tokens[t]] = expected.get((path[t - 1], tokens[t]), 0.0) + weight
    if min_shared == 1:  # else the same text may lie in the pack twice, and either would do
        assert predictions_of(pack) == expected
        assert len(ids) == len(
            {tuple(e.input_ids[: t + 1].tolist()) for e in examples for t in range(len(e.input_ids))}
        )
    assert sum(predictions_of(pack).values()) == sum(float(e.token_weights().sum()) for e in examples)
    assert len(predictions_of(pack)) == len(pack["positions"])
    assert pack["positions"].tolist() == sorted(pack["positions"].tolist())
    assert len(ids) <= unshared
    assert pack["num_tokens"] == unshared
    assert pack["num_targets"] == sum(e.num_targets for e in examples)


@given(trees(max_id=40))
def test_a_tree_that_shares_nothing_is_the_flat_pack(examples):
    unlike = [
        example(
            [100 + i, *one.input_ids],
            [[t, t + 1] for t in range(1, len(one.input_ids) + 1)],
            one.span_weights,
        )
        for i, one in enumerate(examples)
    ]
    flat, tree = pack_flat(unlike), pack_tree(unlike, min_shared=1)
    assert flat["layout"] == tree["layout"]
    for key in ("input_ids", "position_ids", "positions", "targets", "weights"):
        assert torch.equal(flat[key], tree[key]), key


def tiny_model(family):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def loss_and_gradients(model, examples):
    """Of the rows one by one, as torch says it."""
    model.zero_grad()
    total = torch.zeros(())
    for one in examples:
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        logits = model(ids, use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        total = total + (nll * torch.from_numpy(one.token_weights()[1:])).sum()
    total.backward()
    return total.item(), [parameter.grad.clone() for parameter in model.parameters()]


MODELS = {family: tiny_model(family) for family in ("llama", "qwen3")}


@pytest.mark.parametrize("family", MODELS)
@given(examples=trees(max_id=7), min_shared=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_loss_and_gradients_of_a_tree_are_those_of_its_rows_one_by_one(family, examples, min_shared):
    """With the mask written out and torch's own attention. Float32 sums of a few terms in another order."""
    model = MODELS[family]
    loss, gradients = loss_and_gradients(model, examples)
    pack = pack_tree(examples, min_shared=min_shared)
    i = torch.arange(pack["layout"].num_tokens)
    mask = (i[None] <= i[:, None]) & (i[:, None] < pack["layout"].subtree_ends[None])
    model.zero_grad()
    logits = model(
        pack["input_ids"],
        position_ids=pack["position_ids"],
        attention_mask=mask[None, None],
        use_cache=False,
        logits_to_keep=pack["positions"],
    ).logits[0]
    nll = F.cross_entropy(logits, pack["targets"], reduction="none")
    total = (nll * pack["weights"]).sum()
    total.backward()
    assert total.item() == pytest.approx(loss, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - expected).abs().max() <= 1e-5 * largest

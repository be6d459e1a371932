"""What a plan knows of rows that stay whole, against the packs that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.records import Example
from tunesmith.data.rows import AnswerRows, CachedRows
from tunesmith.packing.answers import collate_answers_flat, collate_answers_tree, plan_answers
from tunesmith.packing.plan import RowSource, make_plan

PROMPTS = [list(range(10, 10 + length)) for length in (20, 33, 18)]
answers = st.lists(st.integers(100, 104), min_size=1, max_size=20)
some_rows = st.lists(
    st.tuples(st.sampled_from(PROMPTS), st.booleans(), answers, answers), min_size=1, max_size=12
)


def on_disk(rows, *, mismatched: bool = False) -> AnswerRows:
    """Pairs (prompt, one more prompt token?, chosen, rejected) as `load_data` has them."""
    examples, starts = [], [0]
    for prompt, is_other, *both in rows:
        before = [*prompt, 7] if is_other else prompt
        for side, ids in enumerate(both):
            examples.append((before + ids, [len(before), len(before) + len(ids)], side))
        starts.append(len(examples))
    ids, spans, sides = zip(*examples, strict=True)
    dataset = Dataset.from_dict(
        {
            "input_ids": ids,
            "spans": spans,
            "span_weights": [[1.0]] * len(ids),
            "length": list(map(len, ids)),
            "num_targets": [end - start for start, end in spans],
            "side": sides,
            "margin": [0.0] * len(ids),
            "fingerprint": np.arange(len(ids), dtype=np.uint64),
            "place": [f"rows:{i}" for i in range(len(ids))],
        }
    )

    features = Features({**dataset.features, "input_ids": List(Value("int32"))})
    return AnswerRows(CachedRows(dataset.cast(features)), np.array(starts), mismatched=mismatched)


@given(made=some_rows)
@settings(max_examples=40, deadline=None)
def test_the_cost_of_a_row_is_the_size_of_its_pack(made):
    rows = on_disk(made)
    for tree, collate in ((True, collate_answers_tree), (False, collate_answers_flat)):
        lengths, _ = plan_answers(rows, tree=tree)
        # Sharing is known to 15 tokens (packing/sharing.py): a pack is never larger than was planned.
        for item in range(len(rows)):
            size = collate([rows[item]])["input_ids"].numel()
            assert size <= lengths[item] <= size + 15 * tree


@given(made=some_rows, ranks=st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_a_plan_keeps_pairs_whole_and_passes_within_their_size(made, ranks):
    rows = on_disk(made)
    lengths, sharing = plan_answers(rows, tree=True)
    plan = make_plan(
        lengths,
        np.arange(len(rows) + 1),
        sources=[RowSource(0, len(rows))],
        batch_size=4,
        micro_batch_tokens=120,
        num_ranks=ranks,
        seed=0,
        epochs=1,
        max_steps=None,
        one_example_a_pass=False,
        sharing=sharing,
    )
    met = []
    order = plan.rows_of_epoch(0)
    for start in range(0, len(order), 4):
        for of_rank in plan.split(order[start : start + 4]):
            for items in of_rank:
                met += items
                pack = collate_answers_tree([rows[item] for item in items])
                assert pack["total"] == len(items)
                assert len(pack["sides"]) == 2 * len(items)
                if len(items) > 1:
                    assert pack["input_ids"].numel() <= 120
    assert sorted(met) == list(range(len(rows)))


def test_a_mismatched_answer_is_the_next_rows_behind_this_rows_prompt():
    made = [
        (PROMPTS[0], False, [100, 101], [102]),
        (PROMPTS[1], True, [103], [104, 104, 104]),
    ]
    rows = on_disk(made, mismatched=True)
    first, last = (rows[item].mismatched.examples[0] for item in range(2))
    # The last answer of a row, the rejected one here; rows with a label have one only.
    assert first.input_ids.tolist() == [*PROMPTS[0], 104, 104, 104]
    assert first.spans.tolist() == [[20, 23]]
    assert last.input_ids.tolist() == [*PROMPTS[1], 7, 102]
    assert last.spans.tolist() == [[34, 35]]
    assert rows.mismatched_starts.tolist() == [0, 3, 4]
    assert rows.target_starts.tolist() == [0, 3, 7]


def test_a_row_brings_what_the_reference_says_of_its_targets():
    rows = on_disk([(PROMPTS[0], False, [100, 101], [102]), (PROMPTS[1], False, [103], [104])])
    assert rows[0].reference is None
    rows.reference = np.array([-1, -2, -3, -4, -5], np.float32)
    assert rows[1].reference.tolist() == [-4, -5]
    pack = collate_answers_tree([rows[1], rows[0]])
    assert pack["reference"].tolist() == [-4, -5, -1, -2, -3]
    assert pack["answers"].tolist() == [0, 1, 2, 2, 3]


def test_a_target_that_stands_after_a_gap_in_the_answer_keeps_its_weight():
    """Two turns of the assistant with one of a tool between them."""
    from tunesmith.data.rows import _with_answer_of

    two_turns = Example(
        np.arange(50, 60, dtype=np.int32),
        np.array([[2, 4], [6, 9]], np.int32),
        np.array([1.0, 1.0], np.float32),
    )
    one = Example(np.array([1, 2, 3, 4], np.int32), np.array([[3, 4]], np.int32), np.ones(1, np.float32))
    made = _with_answer_of(one, two_turns)
    assert made.input_ids.tolist() == [1, 2, 3, 52, 53, 54, 55, 56, 57, 58]
    assert made.token_weights().tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert pytest.approx(made.num_targets) == two_turns.num_targets

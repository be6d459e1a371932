"""The step plan: same rows in each step whatever the passes and ranks, and no pass over its limit."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from families import as_chunks, families, trie_size
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.records import Example
from tunesmith.packing.collate import pack_tree
from tunesmith.packing.plan import RowSource, fill_passes, make_plan
from tunesmith.packing.sharing import Sharing


def plan_of(lengths, rows=None, *, weight=1.0, **settings_):
    lengths = np.asarray(lengths, dtype=np.int32)
    row_starts = np.arange(len(lengths) + 1) if rows is None else np.asarray(rows)
    options = {
        "batch_size": 4,
        "micro_batch_tokens": 64,
        "num_ranks": 1,
        "seed": 7,
        "epochs": 2.0,
        "max_steps": None,
        "one_example_a_pass": False,
    } | settings_
    return make_plan(lengths, row_starts, sources=[RowSource(0, len(row_starts) - 1, weight)], **options)


def examples_of_steps(plan, epoch):
    rows = plan.rows_of_epoch(epoch)
    steps = []
    for start in range(0, len(rows), plan.batch_size):
        split = plan.split(rows[start : start + plan.batch_size])
        steps.append([example for rank in split for a_pass in rank for example in a_pass])
    return steps


lengths_strategy = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@given(lengths_strategy, st.integers(1, 9), st.integers(64, 200), st.sampled_from([1, 2, 3]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_an_epoch_once_and_no_pass_is_over_its_limit(
    lengths, batch_size, limit, ranks, alone
):
    plan = plan_of(
        lengths, batch_size=batch_size, micro_batch_tokens=limit, num_ranks=ranks, one_example_a_pass=alone
    )
    assert plan.steps_per_epoch == math.ceil(len(lengths) / batch_size)
    for epoch in range(2):
        seen = [example for step in examples_of_steps(plan, epoch) for example in step]
        assert sorted(seen) == list(range(len(lengths)))
        rows = plan.rows_of_epoch(epoch)
        for start in range(0, len(rows), batch_size):
            split = plan.split(rows[start : start + batch_size])
            assert len(split) == ranks
            for rank in split:
                assert len(rank) == plan.passes
                for a_pass in rank:
                    assert sum(lengths[example] for example in a_pass) <= limit
                    assert not alone or len(a_pass) <= 1


@given(lengths_strategy, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_rows_of_a_step_do_not_depend_on_passes_ranks_or_packing(lengths, batch_size):
    reference = [sorted(step) for step in examples_of_steps(plan_of(lengths, batch_size=batch_size), 1)]
    for other in ({"micro_batch_tokens": 1000}, {"num_ranks": 3}, {"one_example_a_pass": True}):
        steps = examples_of_steps(plan_of(lengths, batch_size=batch_size, **other), 1)
        assert [sorted(step) for step in steps] == reference


def test_epochs_differ_and_seeds_differ_and_both_repeat():
    plan, again, other = plan_of([1] * 50), plan_of([1] * 50), plan_of([1] * 50, seed=8)
    first, second = plan.rows_of_epoch(0), plan.rows_of_epoch(1)
    assert first.tolist() == again.rows_of_epoch(0).tolist()
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.rows_of_epoch(0).tolist()


def test_a_step_counts_rows_even_where_a_row_has_several_examples():
    # Rows of 1, 3 and 2 examples; two rows a step.
    plan = plan_of([5] * 6, rows=[0, 1, 4, 6], batch_size=2, micro_batch_tokens=20)
    steps = examples_of_steps(plan, 0)
    assert len(steps) == plan.steps_per_epoch == 2
    assert sorted(example for step in steps for example in step) == list(range(6))
    owner = np.repeat([0, 1, 2], [1, 3, 2])
    assert [len({int(owner[e]) for e in step}) for step in steps] == [2, 1]


def test_passes_are_balanced_within_four_thirds_of_the_mean_of_equal_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 400, 640)
    plan = plan_of(lengths, batch_size=64, micro_batch_tokens=2048, num_ranks=2)
    rows = plan.rows_of_epoch(0)
    for start in range(0, len(rows), 64):
        sums = [sum(lengths[e] for e in p) for rank in plan.split(rows[start : start + 64]) for p in rank]
        assert max(sums) <= 4 / 3 * (sum(sums) / len(sums))


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 10), (1.0, 20), (2.25, 45)])
def test_a_source_weight_is_how_often_its_rows_are_in_an_epoch(weight, expected):
    plan = plan_of([3] * 20, weight=weight)
    counts = np.bincount(plan.rows_of_epoch(0), minlength=20)
    assert counts.sum() == expected
    assert set(counts) <= {math.floor(weight), math.ceil(weight)}


def test_an_example_longer_than_a_pass_is_refused():
    with pytest.raises(ValueError, match="65 tokens does not fit in 64"):
        plan_of([3, 65])


@given(st.lists(st.integers(1, 100), max_size=80), st.integers(1, 120))
@settings(max_examples=150, deadline=None)
def test_evaluation_passes_hold_every_item_once_within_the_limit(lengths, limit):
    passes = fill_passes(np.asarray(lengths, dtype=np.int32), limit)
    assert sorted(item for a_pass in passes for item in a_pass) == list(range(len(lengths)))
    for a_pass in passes:
        assert len(a_pass) == 1 or sum(lengths[item] for item in a_pass) <= limit


def splits(plan, epochs=2):
    """Each step of the run as [rank][pass][example]."""
    for epoch in range(epochs):
        rows = plan.rows_of_epoch(epoch)
        for start in range(0, len(rows), plan.batch_size):
            yield plan.split(rows[start : start + plan.batch_size])


def plan_cost(a_pass, lengths, sharing):
    """Tokens of a pass as the plan counts them: an example less what it shares with the one before it."""
    if sharing is None:
        return sum(lengths[example] for example in a_pass)
    shared = [int(sharing.lcp(np.array([a]), np.array([b]))[0]) for a, b in pairwise(a_pass)]
    return sum(lengths[example] for example in a_pass) - sum(shared)


def as_example(input_ids):
    return Example(np.asarray(input_ids, np.int32), np.zeros((0, 2), np.int32), np.zeros(0, np.float32))


def largest_pass(plan, sharing):
    return max(plan_cost(p, plan.lengths, sharing) for s in splits(plan) for rank in s for p in rank)


@given(families(), st.integers(1, 12), st.integers(0, 60), st.sampled_from([1, 2, 3]), st.data())
@settings(max_examples=150, deadline=None)
def test_sharing_changes_passes_only_and_none_goes_over_its_limit(examples, batch_size, more, ranks, data):
    lengths = [len(example) for example in examples]
    cuts = data.draw(st.lists(st.integers(0, len(examples)), max_size=len(examples)))
    options = {
        "rows": [0, *sorted(cuts), len(examples)],  # some rows own no example, some several
        "batch_size": batch_size,
        "num_ranks": ranks,
        "micro_batch_tokens": max(lengths, default=1) + more,
        "weight": data.draw(st.sampled_from([1.0, 2.5])),  # a row may be in a step twice
    }
    sharing = Sharing.of_tokens(as_chunks(examples))
    plan, flat = plan_of(lengths, sharing=sharing, **options), plan_of(lengths, **options)
    assert [sorted(e for rank in step for p in rank for e in p) for step in splits(plan)] == [
        sorted(e for rank in step for p in rank for e in p) for step in splits(flat)
    ]
    for step in splits(plan):
        assert [len(rank) for rank in step] == [plan.passes] * ranks
        for a_pass in (a_pass for rank in step for a_pass in rank):
            cost = plan_cost(a_pass, lengths, sharing)
            assert trie_size([examples[e] for e in a_pass]) <= cost <= options["micro_batch_tokens"]
            # And so is what the collator makes of it; one token stands for no example.
            assert pack_tree([as_example(examples[e]) for e in a_pass])["input_ids"].shape[1] <= max(1, cost)
            assert sorted(a_pass, key=lambda e: sharing.rank[e]) == a_pass
    assert plan.passes <= flat.passes
    for which, known in ((plan, sharing), (flat, None)):
        if which.passes > 1:  # one fewer, and some step of the run would be over its limit
            fewer = dataclasses.replace(which, passes=which.passes - 1)
            assert largest_pass(fewer, known) > options["micro_batch_tokens"]


def test_a_step_whose_mean_fits_but_whose_examples_do_not_pair_up_takes_another_pass():
    # 50 + 50 + 30 over two ranks: 65 each on the mean, and 80 for whoever gets two.
    assert plan_of([50, 50, 30], batch_size=3, micro_batch_tokens=70, num_ranks=2).passes == 2


def test_one_fewer_pass_where_only_the_shared_cost_of_the_longest_first_split_fits():
    # 20 tokens in common, then 4, 7, 5 and 2: [7 2] [5 4] costs 29; pieces 4 | 7 5 | 2 cost no less than 31.
    lengths = np.array([24, 27, 25, 22], dtype=np.int32)
    sharing = Sharing(np.arange(4, dtype=np.int32), np.array([0, 20, 20, 20], np.int32), lengths)
    plan = plan_of(lengths, micro_batch_tokens=29, sharing=sharing)
    assert plan.passes == 2
    assert sorted(plan.split(range(4))[0]) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_a_thousand_steps_the_worst_decides(ranks):
    lengths = np.random.default_rng(3).integers(1, 65, 5000)
    plan = plan_of(lengths, batch_size=5, micro_batch_tokens=70, num_ranks=ranks)
    assert largest_pass(plan, None) <= 70
    assert largest_pass(dataclasses.replace(plan, passes=plan.passes - 1), None) > 70


def test_a_prompt_that_all_rows_begin_with_is_counted_once_a_pass():
    # Eight rows of 100 + 10 tokens, eight a step: 880 tokens apart, 180 together.
    examples = [list(range(100)) + [200 + n] * 10 for n in range(8)]
    options = {"lengths": [110] * 8, "batch_size": 8, "micro_batch_tokens": 180}
    assert plan_of(**options).passes == 8
    assert plan_of(**options, sharing=Sharing.of_tokens(as_chunks(examples))).passes == 1


def test_documents_stay_whole_where_that_makes_passes_smaller():
    # Two documents of 60 tokens with three questions of 10 each: 2 x 90 tokens, or 2 x 150 if dealt out.
    examples = [[d] * 60 + [10 * d + q] * 10 for q in range(3) for d in (1, 2)]
    sharing = Sharing.of_tokens(as_chunks(examples))
    plan = plan_of([70] * 6, batch_size=6, micro_batch_tokens=100, sharing=sharing)
    assert plan.passes == 2
    assert sorted(sorted(p) for p in plan.split(range(6))[0]) == [[0, 2, 4], [1, 3, 5]]


def test_only_the_steps_of_the_run_decide_how_many_passes_there_are():
    lengths = [10] * 8 + [60] * 8  # in order: two light steps, two heavy ones
    options = {"batch_size": 4, "micro_batch_tokens": 60, "shuffle": False}
    assert plan_of(lengths, **options, epochs=None, max_steps=2).passes == 1
    assert plan_of(lengths, **options, epochs=3.0, max_steps=2).passes == 1
    assert plan_of(lengths, **options, epochs=0.5).passes == 1
    assert plan_of(lengths, **options, epochs=None, max_steps=3).passes == 4
    assert plan_of(lengths, **options, epochs=1.0).passes == 4


def test_where_each_example_runs_by_itself_sharing_changes_nothing():
    examples = [[1] * 40] * 6
    plan = plan_of(
        [40] * 6, batch_size=6, one_example_a_pass=True, sharing=Sharing.of_tokens(as_chunks(examples))
    )
    assert plan.passes == 6
    assert all(len(a_pass) == 1 for a_pass in plan.split(range(6))[0])


@given(families(), st.integers(1, 120))
@settings(max_examples=100, deadline=None)
def test_evaluation_passes_with_sharing_hold_every_item_once_in_no_more_passes(examples, limit):
    lengths = np.asarray([len(example) for example in examples], dtype=np.int32)
    sharing = Sharing.of_tokens(as_chunks(examples))
    passes = fill_passes(lengths, limit, sharing)
    assert sorted(item for a_pass in passes for item in a_pass) == list(range(len(examples)))
    assert len(passes) <= len(fill_passes(lengths, limit))
    for a_pass in passes:
        assert sorted(a_pass, key=lambda item: sharing.rank[item]) == a_pass
        longest = max(len(examples[item]) for item in a_pass)
        if longest > limit:
            assert len(a_pass) == 1
        assert trie_size([examples[item] for item in a_pass]) <= max(limit, longest)


def test_evaluation_keeps_those_that_begin_alike_together():
    examples = [[d] * 60 + [10 * d + q] * 10 for q in range(3) for d in (1, 2)]
    passes = fill_passes(np.full(6, 70, np.int32), 100, Sharing.of_tokens(as_chunks(examples)))
    assert sorted(sorted(a_pass) for a_pass in passes) == [[0, 2, 4], [1, 3, 5]]


def test_planning_a_million_rows_takes_seconds():
    import time

    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 1000, 1_000_000)
    start = time.perf_counter()
    plan = plan_of(lengths, batch_size=64, micro_batch_tokens=8192, epochs=1.0)
    assert time.perf_counter() - start < 5  # 0.05 s on a quiet machine
    assert plan.steps_per_epoch == 15_625

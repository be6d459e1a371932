"""The step plan: same rows in each step whatever the passes and ranks, and no pass over its limit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.packing.plan import RowSource, fill_passes, make_plan


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


def test_planning_a_million_rows_takes_seconds():
    import time

    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 1000, 1_000_000)
    start = time.perf_counter()
    plan = plan_of(lengths, batch_size=64, micro_batch_tokens=8192, epochs=1.0)
    assert time.perf_counter() - start < 20  # 3 s on a quiet machine
    assert plan.steps_per_epoch == 15_625

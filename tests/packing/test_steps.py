"""The rows of each step, by hand and against counting them off one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.packing.loader import PlanSampler
from tunesmith.packing.plan import RowSource, make_plan
from tunesmith.packing.steps import StepRows


def counted_off(num_rows, batch_size, start, warmup, steps):
    """(epoch, first, end) of each step, by a loop over all of them."""
    places, epoch, at = [], 0, 0
    for step in range(steps):
        size = batch_size if step >= warmup else start + (batch_size - start) * step // warmup
        end = min(at + size, num_rows)
        places.append((epoch, at, end))
        epoch, at = (epoch + 1, 0) if end == num_rows else (epoch, end)
    return places


def test_the_drawing_of_a_warm_up():
    """From 2 rows to 8 in 5 steps: 2, 3.2, 4.4, 5.6, 6.8, and then 8."""
    steps = StepRows(20, 8, 2, 5)
    sizes = [end - first for _, first, end in map(steps.place, range(11))]
    assert sizes == [2, 3, 4, 5, 6, 8, 8, 4, 8, 8, 4]
    assert [steps.place(step)[0] for step in range(11)] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [step for step in range(1, 12) if steps.ends_epoch(step)] == [5, 8, 11]
    assert [steps.num_steps(epochs) for epochs in (1, 2, 3, 1.5)] == [5, 8, 11, 6]
    assert [steps.epochs(step) for step in (0, 1, 5, 6, 8)] == [0, 1 / 5, 1, 1 + 1 / 3, 2]


@given(
    st.integers(1, 60), st.integers(1, 20), st.integers(0, 30), st.data()
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_places_are_those_of_counting_off_the_rows(num_rows, batch_size, warmup, data):
    start = data.draw(st.integers(1, batch_size))
    steps = StepRows(num_rows, batch_size, start, warmup)
    places = counted_off(num_rows, batch_size, start, warmup, 80)
    assert [steps.place(step) for step in range(80)] == places
    for step, (epoch, first, _) in enumerate(places):
        assert steps.num_rows_before(step) == epoch * num_rows + first
        assert steps.ends_epoch(step) == (first == 0) or step == 0
    num_steps = data.draw(st.integers(1, 79))
    for epoch in range(places[num_steps - 1][0] + 2):
        held = [(first, end) for e, first, end in places[:num_steps] if e == epoch]
        starts, end = steps.starts(epoch, num_steps)
        assert starts.tolist() == [first for first, _ in held]
        assert end == (held[-1][1] if held else 0)
    finished = [epoch for (epoch, _, _), (after, _, _) in pairwise(places) if after > epoch]
    for epoch in finished:
        done = sum(e <= epoch for e, _, _ in places)
        assert steps.first_step(epoch + 1) == done == steps.num_steps(epoch + 1)
        assert steps.epochs(done) == epoch + 1


def test_a_step_far_behind_the_warm_up_is_arithmetic():
    """100 steps from 1 row to 256: 1 + 255 k / 100, rounded down, are 12,671 rows in all; epochs have 1e6."""
    steps = StepRows(1_000_000, 256, 1, 100)
    warm = sum(1 + 255 * k // 100 for k in range(100))
    first_epoch = 100 + -(-(1_000_000 - warm) // 256)
    per_epoch = -(-1_000_000 // 256)
    assert steps.first_step(1) == first_epoch
    epochs, in_epoch = divmod(1_000_000 - first_epoch, per_epoch)
    assert steps.place(1_000_000) == (1 + epochs, in_epoch * 256, in_epoch * 256 + 256)
    assert len(steps._warmup.places) == 100


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_sampler_yields_the_rows_of_each_step_whatever_the_trainer_calls_an_epoch(ranks):
    """Rows of 20, steps from 2 to 8 in 5 steps. The trainer's epochs have three steps, as one of 8 rows a
    step has; passes are as many for the smallest step as for the largest."""
    lengths = np.full(20, 10, dtype=np.int32)

    def plan_of(warmup):
        return make_plan(
            lengths, np.arange(21), sources=[RowSource(0, 20)], batch_size=8, micro_batch_tokens=20,
            num_ranks=ranks, seed=4, epochs=3, max_steps=None, one_example_a_pass=False,
            batch_size_warmup=warmup,
        )  # fmt: skip

    plan = plan_of((2, 5))
    assert plan.passes == plan_of(None).passes == 4 // ranks
    samplers = [PlanSampler(plan, rank) for rank in range(ranks)]
    steps = []
    for trainer_epoch in range(4):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(trainer_epoch)
            passes = list(sampler)
            assert len(passes) == len(sampler) == 3 * plan.passes
            parts.append(passes)
        for step in range(3):
            of_step = slice(step * plan.passes, (step + 1) * plan.passes)
            steps.append(sorted(row for passes in parts for a_pass in passes[of_step] for row in a_pass))
            assert all(len(a_pass) <= 2 for passes in parts for a_pass in passes[of_step])
    order = [plan.rows_of_epoch(epoch).tolist() for epoch in range(4)]
    expected = [sorted(order[epoch][a:b]) for epoch, a, b in counted_off(20, 8, 2, 5, 12)]
    assert steps == expected
    # Resumed at any step, the same from there on, and nothing but empty passes before it.
    for stop in range(12):
        found = []
        for trainer_epoch in range(stop // 3, 4):
            for sampler in samplers:
                sampler.resume_at(stop)
                sampler.set_epoch(trainer_epoch)
            parts = [list(sampler) for sampler in samplers]
            for step in range(3):
                of_step = slice(step * plan.passes, (step + 1) * plan.passes)
                found.append(sorted(row for passes in parts for a_pass in passes[of_step] for row in a_pass))
        assert found == [[]] * (stop % 3) + expected[stop:]


@given(
    st.lists(st.integers(1, 64), min_size=2, max_size=60), st.integers(2, 12), st.integers(0, 9),
    st.integers(64, 200), st.booleans(), st.integers(1, 25), st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_pass_of_a_warm_up_is_over_its_limit(lengths, batch_size, warmup, limit, alone, max_steps, data):
    start = data.draw(st.integers(1, batch_size - 1))
    plan = make_plan(
        np.array(lengths, dtype=np.int32), np.arange(len(lengths) + 1), sources=[RowSource(0, len(lengths))],
        batch_size=batch_size, micro_batch_tokens=limit, num_ranks=1, seed=1, epochs=None,
        max_steps=max_steps,
        one_example_a_pass=alone, batch_size_warmup=(start, warmup),
    )  # fmt: skip
    largest = 0
    for step in range(max_steps):
        epoch, first, end = plan.steps.place(step)
        (passes,) = plan.split(plan.rows_of_epoch(epoch)[first:end])
        assert sum(map(len, passes)) == end - first
        assert all(sum(lengths[row] for row in a_pass) <= limit for a_pass in passes)
        largest = max(largest, end - first)
    if alone:
        assert plan.passes == largest

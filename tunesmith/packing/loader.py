"""A data loader that yields the passes of one rank in the order of the step plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tunesmith.packing.plan import StepPlan


class PlanSampler(Sampler[list[int]]):
    """The example indices of each pass of this rank, for `steps_per_epoch` steps. That is an epoch of the
    trainer, which wants all of them to be of one length; while the batch size warms up, rows are not yet
    through when it ends.

    `skip_steps` steps at the front of the epoch `skip_in_epoch` come out empty and cost nothing: accelerate
    passes over them when a run goes on from the middle of an epoch."""

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.epoch = 0
        self.skip_in_epoch = 0
        self.skip_steps = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume_at(self, step: int) -> None:
        """The first optimiser step of this run that will be trained."""
        self.skip_in_epoch, self.skip_steps = divmod(step, self.plan.steps_per_epoch)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.passes

    def __iter__(self) -> Iterator[list[int]]:
        first = self.skip_steps if self.epoch == self.skip_in_epoch else 0
        for _ in range(first * self.plan.passes):
            yield []
        rows, rows_of = None, -1
        for in_epoch in range(first, self.plan.steps_per_epoch):
            epoch, start, end = self.plan.steps.place(self.epoch * self.plan.steps_per_epoch + in_epoch)
            if rows is None or epoch != rows_of:
                rows, rows_of = self.plan.rows_of_epoch(epoch), epoch
            yield from self.plan.split(rows[start:end])[self.rank]


def plan_loader(
    dataset: Dataset[Any],
    plan: StepPlan,
    *,
    rank: int,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    workers: int,
    pin_memory: bool,
) -> tuple[DataLoader[Any], PlanSampler]:
    """The loader of one rank, and its sampler (to say where a resumed run goes on)."""
    sampler = PlanSampler(plan, rank)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Its own generator: a loader draws a seed at each epoch, and would shift the stream that dropout
        # draws from.
        generator=torch.Generator().manual_seed(plan.seed),
    )
    # transformers tells a loader its epoch by this name; a resumed loader finds the sampler through
    # accelerate's.
    loader.set_epoch = sampler.set_epoch
    return loader, sampler

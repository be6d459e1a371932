"""How the rows of a step become forward passes: what may share a pass, how large one is, and the step plan.

None of it changes the result of training; it decides what it costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.config.methods import METHODS
from tunesmith.data.loading import RowSet
from tunesmith.data.rows import AnswerRows, CachedRows, StreamedRows
from tunesmith.errors import ConfigError
from tunesmith.models.cost import activation_bytes, optimizer_bytes
from tunesmith.models.devices import default_device, free_memory_bytes
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.packable import Packing, possible_packing
from tunesmith.packing.answers import plan_answers
from tunesmith.packing.plan import RowSource, StepPlan, make_plan
from tunesmith.packing.sharing import Sharing

Say = Callable[[str], None]
# Sizes to choose from. A CPU is hardly faster above _ENOUGH; what larger passes give it is fewer copies of a
# shared prefix. An accelerator is.
_SIZES = {"cpu": (1024, 1536, 2048, 3072, 4096)}
_ENOUGH = 2048
_ACCELERATOR_SIZES = (2048, 4096, 8192, 16384)
_SAMPLE_STEPS = 16
_FREE_SHARE = 0.8  # of the free memory that a pass may be estimated to take


@dataclass(frozen=True)
class Passes:
    """What was decided. `config` says it all: the size of passes stands in it."""

    config: Config
    plan: StepPlan
    packing: Packing
    recomputes: bool
    why: str


def plan_passes(
    config: Config,
    rows: RowSet,
    model: Any,
    dtype: torch.dtype,
    *,
    before: int | None,
    say: Say,
    held: Held = EVERYWHERE,
) -> Passes:
    """Decide for a run. `before`: the size of passes that this run had until it was stopped; it is kept,
    since another would round differently."""
    packing = _packing(config, model, say, held)
    is_streamed_block = rows.block_size is not None and isinstance(rows.rows, StreamedRows)
    if packing == "none" and is_streamed_block and config.data.packing == "flat":
        raise ConfigError(
            "data.loading is streaming, where a block holds several documents, and this model needs a pass "
            "for each. Set data.loading to cached, or data.packing to concatenate."
        )
    lengths, sharing = rows.lengths, None
    # Lazy and streamed rows have no tokens yet: packs of them share what happens to lie in one pass.
    if packing == "tree" and isinstance(rows.rows, CachedRows):
        sharing = Sharing.of_tokens(*rows.rows.token_chunks())
    if isinstance(rows.rows, AnswerRows):
        if packing == "none":
            raise ConfigError(
                "a pass of this model can hold one answer only, and `tunesmith prefer` needs both of a pair "
                "in one. Take a model whose layers do not mix the documents of a pass."
            )
        lengths, sharing = plan_answers(rows.rows, tree=packing == "tree")

    warmup = config.train.batch_size_warmup

    @functools.cache  # the size that is chosen has been planned to choose it
    def plan_of(size: int) -> StepPlan:
        return make_plan(
            lengths,
            rows.row_starts,
            sources=[RowSource(*bounds) for bounds in rows.bounds],
            batch_size=config.train.batch_size,
            micro_batch_tokens=size,
            num_ranks=_world_size(),
            seed=config.run.seed,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            one_example_a_pass=packing == "none",
            shuffle=config.data.loading != "streaming",
            sharing=sharing,
            batch_size_warmup=(warmup.start, warmup.steps) if warmup else None,
        )

    need = Need(model, dtype)
    size = config.train.micro_batch_tokens or before
    if size is None:
        size = _same_on_all_ranks(_choose_size(need, plan_of, int(lengths.max())))
    train = config.train.model_copy(update={"micro_batch_tokens": size})
    evaluation = config.eval.model_copy(update={"batch_tokens": config.eval.batch_tokens or size})
    config = config.model_copy(update={"train": train, "eval": evaluation})
    recomputes, why = choose_recomputing(need, config)
    return Passes(config, plan_of(size), packing, recomputes, why)


@dataclass(frozen=True)
class Need:
    """Memory that training a model takes on top of its weights."""

    model: Any
    dtype: torch.dtype

    def of_pass(self, tokens: int) -> float:
        """Bytes, as estimated, with activations kept."""
        return activation_bytes(self.model, tokens, self.dtype) + optimizer_bytes(self.model)

    def fits(self, tokens: int) -> bool:
        return self.of_pass(tokens) <= _FREE_SHARE * free_memory_bytes()


def choose_recomputing(need: Need, config: Config) -> tuple[bool, str]:
    """Whether to recompute activations in the backward pass (gradient checkpointing), and why: as the config
    says, or by what one pass is estimated to need."""
    method = config.adapter.method
    if method is not None and not METHODS[method].recomputes:
        return False, f"adapter.method {method} does not go with it"
    if config.train.gradient_checkpointing != "auto":
        return config.train.gradient_checkpointing, "as train.gradient_checkpointing says"
    size = config.train.micro_batch_tokens or 0
    return (
        not need.fits(size),
        f"one pass of {size} tokens needs about {need.of_pass(size) / 2**30:.1f} GiB "
        f"of {free_memory_bytes() / 2**30:.1f} GiB free",
    )


def _choose_size(need: Need, plan_of: Callable[[int], StepPlan], longest: int) -> int:
    """Tokens of a pass: on an accelerator as many as fit; on a CPU, of those that are enough, the fewest with
    which shared prefixes are computed about as rarely as with more."""
    kind = default_device().type
    sizes = [size for size in _SIZES.get(kind, _ACCELERATOR_SIZES) if size >= longest] or [longest]
    fitting = [size for size in sizes if need.fits(size)] or sizes[:1]
    if kind != "cpu":
        return fitting[-1]
    enough = [size for size in fitting if size >= _ENOUGH] or fitting[-1:]
    computed = {size: _computed_tokens(plan_of(size)) for size in enough}
    return next(size for size in enough if computed[size] <= 1.05 * min(computed.values()))


def _computed_tokens(plan: StepPlan) -> int:
    """Tokens the first steps run through the model, shared ones once a pass."""
    rows = plan.rows_of_epoch(0)[: _SAMPLE_STEPS * plan.batch_size]
    steps = (rows[at : at + plan.batch_size] for at in range(0, len(rows), plan.batch_size))
    return sum(plan.pass_tokens(bin_) for step in steps for rank in plan.split(step) for bin_ in rank)


def _packing(config: Config, model: Any, say: Say, held: Held) -> Packing:
    """What the config asks for, or as much of it as the model can do: the result of training is the same."""
    wanted = config.data.pass_packing
    if wanted == "none":
        return wanted
    possible = held.ask(lambda: possible_packing(model))
    if possible == "none":
        say("documents in one pass would see each other in this model; each example runs by itself")
        return possible
    if wanted == "tree" and possible == "flat":
        attention = model.config._attn_implementation
        say(f"attention {attention} of this model cannot share prefixes; each example has its own")
        return possible
    return wanted


def _world_size() -> int:
    """Ranks, before transformers has started the process group (torchrun says it in the environment)."""
    from accelerate import PartialState

    return int(PartialState(cpu=not torch.accelerator.is_available()).num_processes)


def _same_on_all_ranks(size: int) -> int:
    """Rank 0's choice: free memory may differ."""
    if _world_size() == 1:
        return size
    from accelerate.utils import broadcast_object_list

    chosen: list[int] = broadcast_object_list([size])
    return chosen[0]

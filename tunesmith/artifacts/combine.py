"""Several adapters of one base: loaded side by side, switched between, and combined by weight.

    load_adapters(founds, say).model.set_adapter("b")     PEFT's own switch
    Combination((0.7, 0.3)).of(deltas, name)              one update out of several, of one weight matrix

What is combined are the updates of weight matrices, dW = scale B A. PEFT's `add_weighted_adapter` of the same
names combines the As and the Bs, which is cheaper and something else: (A1 + A2)(B1 + B2) has cross terms, and
what TIES and DARE say of signs and magnitudes they say of dW.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tunesmith.artifacts.found import Found, Say
from tunesmith.artifacts.tuned import Tuned, load_tuned
from tunesmith.errors import ModelError

How = Literal["linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class Combination:
    """How several updates become one.

    linear        sum of weight * update
    ties          Yadav et al. 2023 (arXiv:2306.01708): of each update the `density` largest entries stay, the
                  sign of their sum is elected entry by entry, and the mean of weight * entry is taken over
                  those that agree; weights of 1 are the paper's
    dare_linear   Yu et al. 2023 (arXiv:2311.03099): an entry stays by chance `density` and is divided by it,
                  then linear
    dare_ties     the same, then signs and mean as in ties

    TIES trims each matrix for itself, as PEFT does, not the whole model at once."""

    weights: tuple[float, ...]
    how: How = "linear"
    density: float = 0.5
    seed: int = 0

    def of(self, updates: Sequence[Tensor | None], name: str) -> Tensor:
        """One update of the matrix `name`; None stands for an adapter that leaves it as it is. The same
        whatever was combined before it."""
        from peft.utils import merge_utils

        known = [(w, update) for w, update in zip(self.weights, updates, strict=True) if update is not None]
        weights = torch.tensor([weight for weight, _ in known])
        tensors = [update.float() for _, update in known]
        if self.how == "linear":
            return merge_utils.task_arithmetic(tensors, weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            return getattr(merge_utils, self.how)(tensors, weights, self.density)


def combination_of(
    number: int,
    weights: Sequence[float] | None,
    how: str | None,
    density: float | None,
    seed: int | None,
) -> Combination | None:
    """What options of the command line ask for, None where nothing is to be combined. Without weights a sum
    is the mean, and TIES is the paper's. Raises ModelError for an option that would do nothing."""
    if number == 1 and weights is None and how is None and density is None and seed is None:
        return None
    name = how or "linear"
    if density is not None and name == "linear":
        raise ModelError("--density is for --combine ties, dare_linear or dare_ties.")
    if seed is not None and not name.startswith("dare"):
        raise ModelError("--seed is for --combine dare_linear or dare_ties.")
    default = 1.0 if name.endswith("ties") else 1 / number
    return Combination(
        tuple(weights or (default,) * number),
        cast(How, name),
        0.5 if density is None else density,
        seed or 0,
    )


def check_combination(founds: Sequence[Found], combination: Combination) -> None:
    """Raise ModelError unless these adapters can be combined so."""
    from peft import PeftConfig

    if len(combination.weights) != len(founds):
        raise ModelError(
            f"--weights has {len(combination.weights)} numbers for {len(founds)} adapters; give one each."
        )
    if not 0 < combination.density < 1:
        raise ModelError(f"--density is {combination.density:g}; expected above 0 and below 1.")
    first = founds[0]
    for found in founds:
        settings = PeftConfig.from_pretrained(str(found.adapter))
        plain = str(getattr(settings.peft_type, "value", settings.peft_type)) == "LORA"
        rest = [
            name for name in ("modules_to_save", "trainable_token_indices") if getattr(settings, name, None)
        ]
        if not plain or settings.use_dora or settings.bias != "none" or rest:
            why = rest[0] if rest else "DoRA" if plain and settings.use_dora else str(settings.peft_type)
            raise ModelError(
                f"{found.adapter}: it cannot be combined with others, since more than sums of updates is in "
                f"it ({why}); expected LoRA alone. Merge it for itself."
            )
        if (found.base, *_held(found)) != (first.base, *_held(first)):
            raise ModelError(
                f"{found.adapter} is of {' '.join((found.base, *_held(found)))}, and {first.adapter} of "
                f"{' '.join((first.base, *_held(first)))}: adapters are combined on one base."
            )


def _held(found: Found) -> tuple[str, ...]:
    settings = found.base_settings
    return () if settings.quantization == "none" else (f"in {settings.quantization}",)


def updates_of(layer: Any, adapters: Sequence[str]) -> list[Tensor | None]:
    """dW of a PEFT layer by each adapter; None where it has none there."""
    return [
        layer.get_delta_weight(name).detach()
        if name in layer.lora_A or name in layer.lora_embedding_A
        else None
        for name in adapters
    ]


# --- side by side


def load_adapters(founds: Mapping[str, Found], say: Say) -> Tuned:
    """One base with several adapters by name, the first in use; `model.set_adapter(name)` changes that.
    Raises ModelError if they are of different bases, or cannot be loaded."""
    (first, found), *others = founds.items()
    for name, other in others:
        if other.adapter is None or (other.base, _held(other)) != (found.base, _held(found)):
            raise ModelError(
                f"{name}: expected an adapter of {found.base}, as {first} is; found {other.home}."
            )
    tuned = load_tuned(found, say, adapter_name=first)
    for name, other in others:
        tuned.model.load_adapter(str(other.adapter), adapter_name=name)
    tuned.model.set_adapter(first, inference_mode=True)
    return tuned


def add_sum(model: Any, name: str, weights: Mapping[str, float]) -> None:
    """A further adapter, which is in use from then on: the sum of weight * update of those named, exactly
    (their ranks add up)."""
    model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
    model.set_adapter(name, inference_mode=True)

"""Who holds the weights while a model is built: every rank, or the first one alone.

Where an engine shares a model out, ranks that each read all of it would take a machine's memory as many times
as there are ranks. So the first one reads, and is asked whatever depends on weights; the others have the same
modules with memory that is set aside and never touched, and are given their shares of the first one's
weights by the engine (FSDP2 broadcasts from it, and so does ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Held:
    """`by_all`: every rank has the weights. `here`: this one has."""

    by_all: bool = True
    here: bool = True

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """What a rank that has the weights answers; to be called by all, in the same order."""
        if self.by_all:
            return question()
        from accelerate.utils import broadcast_object_list

        said = [question() if self.here else None]
        broadcast_object_list(said)
        return said[0]  # type: ignore[return-value]

    def finish(self, model: Any) -> None:
        """Give every rank what engines do not hand out: buffers, and how the model generates."""
        if self.by_all:
            return
        told = self.ask(lambda: (list(model.buffers()), getattr(model, "generation_config", None)))
        for buffer, value in zip(model.buffers(), told[0], strict=True):
            buffer.copy_(value)
        model.generation_config = told[1]


EVERYWHERE = Held()


def shape_of(model_config: Any, dtype: torch.dtype, kind: Any = None, **options: Any) -> Any:
    """The causal LM of a config, or the model that another auto class of transformers (`kind`) makes by it,
    with memory set aside for its weights: none is taken until it is written to. `options` go to its
    `from_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = (kind or AutoModelForCausalLM).from_config(model_config, dtype=dtype, **options)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model

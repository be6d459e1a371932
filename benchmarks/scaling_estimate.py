"""Memory of each rank and bytes it sends a step, by strategy: on paper, from the sizes of Qwen2.5.

    python -m benchmarks.scaling_estimate

Prints the tables of docs/scaling.md, where the formulas are explained. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_GIB = 2**30
_RANKS = (8, 64)
_STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
_LORA_R = 16


@dataclass(frozen=True)
class Model:
    """Sizes from a model's config.json; `kv` is the width of keys and of values."""

    name: str
    hidden: int
    layers: int
    feed_forward: int
    kv: int
    vocab: int
    is_tied: bool

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one block: query, key, value, output, gate, up, down."""
        h, f, kv = self.hidden, self.feed_forward, self.kv
        return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]

    @property
    def block(self) -> int:
        """Parameters of one block: its matrices, biases of query, key and value, two norms."""
        return sum(i * o for i, o in self.linear) + self.hidden + 2 * self.kv + 2 * self.hidden

    @property
    def ends(self) -> int:
        """Parameters outside of blocks: embedding, last norm, and the head where it is not the embedding."""
        return (1 if self.is_tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.ends

    @property
    def adapter(self) -> int:
        """Parameters of LoRA on all linear layers of all blocks."""
        return self.layers * sum(_LORA_R * (i + o) for i, o in self.linear)


MODELS = (
    Model("0.5B", 896, 24, 4864, 128, 151_936, True),
    Model("1.5B", 1536, 28, 8960, 256, 151_936, True),
    Model("7B", 3584, 28, 18_944, 512, 152_064, False),
    Model("32B", 5120, 64, 27_648, 1024, 152_064, False),
    Model("72B", 8192, 80, 29_568, 1024, 152_064, False),
)


def state_bytes(model: Model, strategy: str, ranks: int, *, is_lora: bool) -> float:
    """Bytes of weights, gradients and optimiser on each rank. `one` is a run of one process."""
    frozen, trained = _counts(model, is_lora)
    gathered = 2 * (model.ends + 2 * model.block)
    gradients = 0 if is_lora else 6 * max(model.ends, model.block)
    return {
        "one": 2 * frozen + 18 * trained,
        "ddp": 2 * frozen + 22 * trained,
        "fsdp": (2 * frozen + 16 * trained) / ranks + gathered + gradients,
        "zero2": 2 * frozen + 2 * trained + 14 * trained / ranks,
        "zero3": (2 * frozen + 16 * trained) / ranks + gathered,
    }[strategy]


def sent_bytes(model: Model, strategy: str, ranks: int, *, is_lora: bool) -> float:
    """Bytes each rank sends in a step of one pass, where collectives go round a ring."""
    frozen, trained = _counts(model, is_lora)
    whole = {
        "ddp": 8 * trained,
        "fsdp": 4 * frozen + 8 * trained,
        "zero2": 6 * trained,
        "zero3": 4 * frozen + 8 * trained,
    }[strategy]
    return whole * (ranks - 1) / ranks


def _counts(model: Model, is_lora: bool) -> tuple[int, int]:
    """Parameters that are frozen, and that are trained."""
    return (model.parameters, model.adapter) if is_lora else (0, model.parameters)


def tables() -> str:
    """Both tables, in GiB."""
    sharded = [(strategy, ranks) for ranks in _RANKS for strategy in _STRATEGIES]
    return (
        _table(state_bytes, [("one", 1), *sharded])
        + "\nSent by each rank in a step of one pass, GiB:\n\n"
        + _table(sent_bytes, sharded)
    )


def _table(what: Callable[..., float], columns: list[tuple[str, int]]) -> str:
    head = ["model", "tuned", *("1" if name == "one" else f"{ranks}: {name}" for name, ranks in columns)]
    rows = [head, ["---"] * 2 + ["---:"] * len(columns)]
    for is_lora in (False, True):
        for model in MODELS:
            values = [what(model, name, ranks, is_lora=is_lora) / _GIB for name, ranks in columns]
            rows.append([model.name, "LoRA" if is_lora else "in full", *map(_number, values)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _number(gib: float) -> str:
    """Three digits."""
    digits = 0 if gib >= 100 else 1 if gib >= 10 else 2
    return f"{gib:,.{digits}f}"


if __name__ == "__main__":
    print(tables(), end="")

"""What is known of each method of `adapter.method` before anything is loaded: a table of plain data.

A method that cannot do a thing says so here, and nowhere else: checks, merging and documentation read this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MethodName = Literal[
    "lora",
    "dora",
    "rslora",
    "pissa",
    "loftq",
    "olora",
    "adalora",
    "vera",
    "oft",
    "ia3",
    "bottleneck",
    "prefix",
    "prompt",
    "p_tuning",
    "ln_tuning",
    "trainable_tokens",
    "none",
]

_PLAIN = ("none",)
_ANY = ("none", "nf4", "int8")
_EVERY_STRATEGY = ("ddp", "zero2", "fsdp", "zero3")
_WHOLE_MODEL = ("ddp", "zero2")


@dataclass(frozen=True)
class Method:
    """One way of tuning. `keys` are those of `adapter` that it reads, `defaults` their values where the
    schema leaves them open; `no_merge` says why it cannot be folded into the base weights (empty: it can)."""

    paper: str
    keys: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4
    no_merge: str = ""
    packs: bool = True
    quantizations: tuple[str, ...] = _ANY
    strategies: tuple[str, ...] = _EVERY_STRATEGY


_ON_MODULES = ("target_modules", "modules_to_save")
_OF_LORA = ("r", "alpha", "dropout", *_ON_MODULES, "lora_plus_ratio", "trainable_tokens")
_VIRTUAL = "its virtual tokens are put before every input; no weight of the base model could stand for them"
_LORA_SIZE = {"r": 16, "alpha": 32.0}

METHODS: dict[MethodName, Method] = {
    "lora": Method("Hu et al. 2021, arXiv:2106.09685", _OF_LORA, _LORA_SIZE),
    "dora": Method("Liu et al. 2024, arXiv:2402.09353", _OF_LORA, _LORA_SIZE),
    "rslora": Method("Kalajdzievski 2023, arXiv:2312.03732", _OF_LORA, _LORA_SIZE),
    "pissa": Method(
        "Meng et al. 2024, arXiv:2404.02948", _OF_LORA, {"r": 16, "alpha": 16.0}, quantizations=_PLAIN
    ),
    "loftq": Method(
        "Li et al. 2023, arXiv:2310.08659",
        _OF_LORA,
        {"r": 16, "alpha": 16.0},
        quantizations=("nf4",),
        strategies=_WHOLE_MODEL,
    ),
    "olora": Method(
        "Büyükakyüz 2024, arXiv:2406.01775", _OF_LORA, {"r": 16, "alpha": 16.0}, quantizations=_PLAIN
    ),
    "adalora": Method(
        "Zhang et al. 2023, arXiv:2303.10512",
        ("r", "alpha", "dropout", *_ON_MODULES),
        {"r": 8, "alpha": 32.0},
        learning_rate=1e-3,
        strategies=("ddp",),
    ),
    "vera": Method(
        "Kopiczko et al. 2023, arXiv:2310.11454",
        ("r", "dropout", *_ON_MODULES),
        {"r": 256},
        learning_rate=4e-3,
        strategies=_WHOLE_MODEL,
    ),
    "oft": Method(
        "Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023, arXiv:2311.06243",
        ("block_size", "dropout", *_ON_MODULES),
        {"block_size": 32},
        strategies=_WHOLE_MODEL,
    ),
    "ia3": Method(
        "Liu et al. 2022, arXiv:2205.05638",
        _ON_MODULES,
        learning_rate=3e-3,
        strategies=_WHOLE_MODEL,
    ),
    "bottleneck": Method(
        "Houlsby et al. 2019, arXiv:1902.00751",
        ("r", "dropout"),
        {"r": 64},
        learning_rate=1e-3,
        no_merge="it has a non-linearity, which no matrix of the base model could stand for",
        strategies=_WHOLE_MODEL,
    ),
    "prefix": Method(
        "Li and Liang 2021, arXiv:2101.00190",
        ("num_virtual_tokens", "encoder_size"),
        {"num_virtual_tokens": 20, "encoder_size": 512},
        learning_rate=5e-4,
        no_merge=_VIRTUAL,
        packs=False,
        strategies=_WHOLE_MODEL,
    ),
    "prompt": Method(
        "Lester et al. 2021, arXiv:2104.08691",
        ("num_virtual_tokens", "init_text"),
        {"num_virtual_tokens": 20},
        learning_rate=3e-2,
        no_merge=_VIRTUAL,
        packs=False,
        strategies=_WHOLE_MODEL,
    ),
    "p_tuning": Method(
        "Liu et al. 2021, arXiv:2103.10385",
        ("num_virtual_tokens", "encoder_size"),
        {"num_virtual_tokens": 20, "encoder_size": 512},
        learning_rate=1e-3,
        no_merge=_VIRTUAL,
        packs=False,
        strategies=_WHOLE_MODEL,
    ),
    "ln_tuning": Method(
        "Zhao et al. 2023, arXiv:2312.11420",
        ("modules_to_save",),
        learning_rate=1e-3,
        strategies=_WHOLE_MODEL,
    ),
    "trainable_tokens": Method(
        "rows of the embedding alone, as PEFT's TrainableTokens",
        ("trainable_tokens",),
        learning_rate=1e-3,
        strategies=_WHOLE_MODEL,
    ),
    "none": Method("all weights", (), learning_rate=1e-5, quantizations=_PLAIN),
}


def can_be_merged(method: MethodName) -> bool:
    """Whether a model tuned so can become one of plain weights; if not, `METHODS[method].no_merge` says
    why."""
    return not METHODS[method].no_merge


def methods_that(**able: str) -> list[str]:
    """Methods whose tuple of this name holds this value, such as `methods_that(quantizations="nf4")`."""
    return [name for name, method in METHODS.items() if all(v in getattr(method, k) for k, v in able.items())]

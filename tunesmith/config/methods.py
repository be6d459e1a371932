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

_EVERY_STRATEGY = ("ddp", "fsdp", "zero2", "zero3")
_ONE_STRATEGY = ("ddp",)
# Where each process has the weights whole: what is made of them is not one process's work.
_WHOLE_WEIGHTS = ("ddp", "zero2")


@dataclass(frozen=True)
class Method:
    """One way of tuning.

    keys                  of `adapter` that it reads; defaults: their values where the schema leaves them open
    no_merge              why it cannot be folded into the base weights; empty: it can
    no_off_switch         why the base model cannot be had by switching it off; empty: it can
    packs                 whether several examples may lie in one pass
    recomputes            whether it goes with gradient checkpointing
    quantizations         of the base, beside none, that it was tried with
    needs_quantization    whether it makes sense with one of those only
    strategies            of `distributed.strategy` that it was tried with"""

    paper: str
    keys: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4
    no_merge: str = ""
    no_off_switch: str = ""
    packs: bool = True
    recomputes: bool = True
    quantizations: tuple[str, ...] = ("nf4", "int8")
    needs_quantization: bool = False
    strategies: tuple[str, ...] = _ONE_STRATEGY


_ON_MODULES = ("target_modules", "modules_to_save")
_OF_LORA = ("r", "alpha", "dropout", *_ON_MODULES, "lora_plus_ratio", "trainable_tokens")
_VIRTUAL = "its virtual tokens are put before every input; no weight of the base model could stand for them"
_TAKEN_OUT = "has taken what it begins with out of the base weights"
_LINEAR = {"target_modules": "all-linear"}
_LORA_SIZE = {"r": 16, "alpha": 32.0, **_LINEAR}
_PART_OF_WEIGHTS = {"r": 16, "alpha": 16.0, **_LINEAR}

METHODS: dict[MethodName, Method] = {
    "lora": Method(
        "Hu et al. 2021, arXiv:2106.09685",
        _OF_LORA,
        _LORA_SIZE,
        quantizations=("nf4", "int8", "torchao_int8"),
        strategies=_EVERY_STRATEGY,
    ),
    "dora": Method(
        "Liu et al. 2024, arXiv:2402.09353",
        _OF_LORA,
        _LORA_SIZE,
        quantizations=("nf4",),
        strategies=_EVERY_STRATEGY,
    ),
    "rslora": Method(
        "Kalajdzievski 2023, arXiv:2312.03732", _OF_LORA, _LORA_SIZE, strategies=_EVERY_STRATEGY
    ),
    "pissa": Method(
        "Meng et al. 2024, arXiv:2404.02948",
        _OF_LORA,
        _PART_OF_WEIGHTS,
        no_off_switch=_TAKEN_OUT,
        quantizations=(),
        strategies=_WHOLE_WEIGHTS,
    ),
    "loftq": Method(
        "Li et al. 2023, arXiv:2310.08659",
        _OF_LORA,
        _PART_OF_WEIGHTS,
        no_off_switch=_TAKEN_OUT,
        quantizations=("nf4",),
        needs_quantization=True,
    ),
    "olora": Method(
        "Büyükakyüz 2024, arXiv:2406.01775",
        _OF_LORA,
        _PART_OF_WEIGHTS,
        no_off_switch=_TAKEN_OUT,
        quantizations=(),
        strategies=_WHOLE_WEIGHTS,
    ),
    "adalora": Method(
        "Zhang et al. 2023, arXiv:2303.10512",
        ("r", "alpha", "dropout", *_ON_MODULES),
        {"r": 8, "alpha": 32.0, **_LINEAR},
        learning_rate=1e-3,
        quantizations=("nf4",),
    ),
    "vera": Method(
        "Kopiczko et al. 2023, arXiv:2310.11454",
        ("r", "dropout", *_ON_MODULES),
        {"r": 256, **_LINEAR},
        learning_rate=4e-3,
        strategies=_EVERY_STRATEGY,
    ),
    "oft": Method(
        "Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023, arXiv:2311.06243",
        ("oft_block_size", "dropout", *_ON_MODULES),
        {"oft_block_size": 32, **_LINEAR},
        strategies=_EVERY_STRATEGY,
    ),
    "ia3": Method(
        "Liu et al. 2022, arXiv:2205.05638", _ON_MODULES, learning_rate=3e-3, strategies=_EVERY_STRATEGY
    ),
    "bottleneck": Method(
        "Houlsby et al. 2019, arXiv:1902.00751",
        ("r", "dropout"),
        {"r": 64},
        learning_rate=1e-3,
        quantizations=(),
        no_merge="it has a non-linearity, which no matrix of the base model could stand for",
        no_off_switch="is a part of the layers and has no such switch",
        strategies=_EVERY_STRATEGY,
    ),
    "prefix": Method(
        "Li and Liang 2021, arXiv:2101.00190",
        ("num_virtual_tokens", "encoder_size"),
        {"num_virtual_tokens": 20, "encoder_size": 512},
        learning_rate=5e-4,
        no_merge=_VIRTUAL,
        packs=False,
        recomputes=False,
        strategies=_WHOLE_WEIGHTS,
    ),
    "prompt": Method(
        "Lester et al. 2021, arXiv:2104.08691",
        ("num_virtual_tokens", "init_text"),
        {"num_virtual_tokens": 20},
        learning_rate=3e-2,
        no_merge=_VIRTUAL,
        packs=False,
        strategies=_WHOLE_WEIGHTS,
    ),
    "p_tuning": Method(
        "Liu et al. 2021, arXiv:2103.10385",
        ("num_virtual_tokens", "encoder_size"),
        {"num_virtual_tokens": 20, "encoder_size": 512},
        learning_rate=1e-3,
        no_merge=_VIRTUAL,
        packs=False,
        strategies=_WHOLE_WEIGHTS,
    ),
    "ln_tuning": Method(
        "Zhao et al. 2023, arXiv:2312.11420",
        ("modules_to_save",),
        learning_rate=1e-3,
        strategies=_EVERY_STRATEGY,
    ),
    "trainable_tokens": Method(
        "PEFT's TrainableTokens", ("trainable_tokens",), learning_rate=1e-3, strategies=_EVERY_STRATEGY
    ),
    "none": Method("", (), learning_rate=1e-5, quantizations=(), strategies=_EVERY_STRATEGY),
}


def can_be_merged(method: MethodName) -> bool:
    """Whether a model tuned so can become one of plain weights; if not, `METHODS[method].no_merge` says
    why."""
    return not METHODS[method].no_merge

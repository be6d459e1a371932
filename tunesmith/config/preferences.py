"""What is known of each method of `prefer.method` before anything is loaded: a table of plain data.

A further method is one file with its function and one row here; nothing else names the methods. `keys` are
both the keys of `prefer` that the method reads and, `reference` aside, the arguments of its function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, WithJsonSchema


@dataclass(frozen=True)
class Preference:
    """One way of learning from preferences.

    function              `module:function` of its loss (losses/preference.py tells what it is given)
    keys                  of `prefer` that it reads; defaults: their values where the schema leaves them open
    when_normalized       defaults that differ under `length_normalized: true`
    data                  what a row is: a pair of answers, or an answer with a label
    has_scalar_head       whether the model gives an answer a score, and the next token no probabilities
    learning_rate         for the model itself; adapter_learning_rate: for LoRA"""

    paper: str
    function: str
    keys: tuple[str, ...]
    learning_rate: float
    adapter_learning_rate: float
    defaults: Mapping[str, Any] = field(default_factory=dict)
    when_normalized: Mapping[str, Any] = field(default_factory=dict)
    data: Literal["pairs", "labelled"] = "pairs"
    has_scalar_head: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the model with the one that training began with."""
        return "reference" in self.keys


# Learning rates: 5e-7 for the model itself is Zephyr's (Tunstall et al. 2023, arXiv:2310.16944), 5e-6 for
# LoRA that of the same authors' QLoRA recipe. Where nobody names one for LoRA we take ten times that of the
# model itself as well: an assumption, not a measurement.
_DPO_RATE, _DPO_LORA_RATE = 5e-7, 5e-6

PREFERENCES: dict[str, Preference] = {
    "dpo": Preference(
        "Rafailov et al. 2023, arXiv:2305.18290",
        "tunesmith.losses.dpo:dpo",
        ("beta", "label_smoothing", "sft_weight", "length_normalized", "reference"),
        _DPO_RATE,
        _DPO_LORA_RATE,
        defaults={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalized": False},
        when_normalized={"beta": 5.0},  # Lambert et al. 2024, arXiv:2411.15124
    ),
    "ipo": Preference(
        "Azar et al. 2023, arXiv:2310.12036",
        "tunesmith.losses.dpo:ipo",
        ("beta", "sft_weight", "length_normalized", "reference"),
        _DPO_RATE,
        _DPO_LORA_RATE,
        defaults={"beta": 0.1, "sft_weight": 0.0, "length_normalized": True},
    ),
    "hinge": Preference(
        "Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657",
        "tunesmith.losses.dpo:hinge",
        ("beta", "sft_weight", "reference"),
        _DPO_RATE,
        _DPO_LORA_RATE,
        defaults={"beta": 0.1, "sft_weight": 0.0},
    ),
    "robust": Preference(
        "Chowdhury et al. 2024, arXiv:2403.00409",
        "tunesmith.losses.dpo:robust",
        ("beta", "label_smoothing", "sft_weight", "reference"),
        _DPO_RATE,
        _DPO_LORA_RATE,
        defaults={"beta": 0.1, "label_smoothing": 0.1, "sft_weight": 0.0},
    ),
    "kto": Preference(
        "Ethayarajh et al. 2024, arXiv:2402.01306",
        "tunesmith.losses.kto:kto",
        ("beta", "desirable_weight", "undesirable_weight", "reference"),
        learning_rate=5e-6,  # the paper's advice: 2 to 10 times that of DPO
        adapter_learning_rate=5e-5,
        defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        data="labelled",
    ),
    "orpo": Preference(
        "Hong et al. 2024, arXiv:2403.07691",
        "tunesmith.losses.orpo:orpo",
        ("beta",),
        learning_rate=5e-6,  # the authors' Mistral-ORPO
        adapter_learning_rate=5e-5,
        defaults={"beta": 0.1},
    ),
    "simpo": Preference(
        "Meng et al. 2024, arXiv:2405.14734",
        "tunesmith.losses.simpo:simpo",
        ("beta", "gamma", "sft_weight"),
        learning_rate=6e-7,  # the authors' Llama-3-Base, and so are beta and gamma
        adapter_learning_rate=6e-6,
        defaults={"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
    ),
    "cpo": Preference(
        "Xu et al. 2024, arXiv:2401.08417",
        "tunesmith.losses.cpo:cpo",
        ("beta", "sft_weight"),
        learning_rate=1e-5,
        adapter_learning_rate=1e-4,  # the authors' script
        defaults={"beta": 0.1, "sft_weight": 1.0},
    ),
    "reward": Preference(
        "Bradley and Terry 1952; Touvron et al. 2023, arXiv:2307.09288",
        "tunesmith.losses.reward:bradley_terry",
        (),
        learning_rate=1e-5,  # Llama 2, but for its 70B model
        adapter_learning_rate=1e-4,
        has_scalar_head=True,
    ),
}


def _known(name: str) -> str:
    if name not in PREFERENCES:
        raise ValueError(name)
    return name


# Not a Literal: the names would stand in two places.
PreferenceName = Annotated[
    str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(PREFERENCES)})
]

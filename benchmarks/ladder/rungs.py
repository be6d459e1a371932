"""The rungs: one change each, from transformers and PEFT as tutorials have it to what users of tunesmith get.

Every rung trains the same rows in every optimiser step, with the same LoRA (r 8, alpha 16, all linear layers,
no dropout), AdamW and learning rate, and divides the summed loss by the step's targets, so that losses can be
compared step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Loop = Literal["padded", "packs", "tunesmith", "trl"]


@dataclass(frozen=True)
class Rung:
    """One way to train a step.

    loop: `padded` batches through transformers and PEFT; `packs` of tunesmith; `tunesmith` itself, from a
    config; `trl`, its trainers in their own environment. rows_per_pass: rows of a padded batch (pairs, for
    preferences). by_length: batches of rows of similar length within a step. pieces: which of tunesmith's
    engine pieces are on. reference: of preferences, asked in each step, or once before. step_share: the part
    of the steps that is run, for rungs that are very slow."""

    name: str
    what: str
    loop: Loop
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    rows_per_pass: int = 4
    by_length: bool = True
    pieces: tuple[str, ...] = ()
    packing: Literal["flat", "tree"] = "flat"
    padding_free: bool = False
    reference: Literal["live", "cached"] = "live"
    step_share: float = 1.0
    workloads: frozenset[str] = field(default_factory=frozenset)  # empty: all


_PIECES = ("head", "attention", "lora", "block")
_SFT = frozenset({"a", "b", "d0.5", "d1.5"})
_PAIRS = frozenset({"c"})


def _packs(name: str, what: str, pieces: tuple[str, ...], **more: Any) -> Rung:
    return Rung(name, what, "packs", pieces=pieces, **more)


RUNGS = {
    rung.name: rung
    for rung in [
        Rung(
            "plain_fp32", "4 padded rows, as they come", "padded", "float32", by_length=False, step_share=0.5
        ),
        Rung("plain_bf16", "the same in bf16 (autocast)", "padded", by_length=False),
        *[
            Rung(f"plain_bf16_r{n}", f"{n} rows a pass, grouped by length", "padded", rows_per_pass=n)
            for n in (1, 2, 4, 8)
        ],
        _packs("flat", "flat packs, stock sdpa with their mask, logits everywhere", (), workloads=_SFT),
        _packs("head", "flat packs, stock sdpa, logits and loss at targets only", _PIECES[:1]),
        _packs("attention", "+ attention by document", _PIECES[:2]),
        _packs("lora", "+ fused LoRA", _PIECES[:3]),
        _packs("block", "+ fused norm, rotary, SwiGLU", _PIECES),
        _packs("tree", "+ shared prefixes once", _PIECES, packing="tree"),
        _packs(
            "tree_cached",
            "+ the reference asked once, before",
            _PIECES,
            packing="tree",
            reference="cached",
            workloads=_PAIRS,
        ),
        Rung(
            "tunesmith",
            "`tunesmith sft` (c: `prefer`), its defaults",
            "tunesmith",
            pieces=_PIECES,
            packing="tree",
            reference="cached",
        ),
        Rung(
            "tunesmith_fp32",
            "the same in float32",
            "tunesmith",
            "float32",
            pieces=_PIECES,
            packing="tree",
            reference="cached",
            step_share=0.5,
        ),
        *[
            Rung(f"trl_r{n}", f"TRL, {n} rows a pass, grouped by length", "trl", rows_per_pass=n)
            for n in (1, 2, 4, 8)
        ],
        *[
            Rung(
                f"trl_cached{n}",
                f"TRL, {n} pairs a pass, precompute_ref_log_probs",
                "trl",
                rows_per_pass=n,
                reference="cached",
                workloads=_PAIRS,
            )
            for n in (1, 2, 4, 8)
        ],
        *[
            Rung(
                f"trl_free{n}",
                f"TRL, {n} rows a pass, padding_free",
                "trl",
                rows_per_pass=n,
                padding_free=True,
                workloads=_SFT,
            )
            for n in (4, 8)
        ],
    ]
}

GROUPS = {
    "plain": [name for name in RUNGS if name.startswith("plain_bf16")],
    "ladder": ["flat", "head", "attention", "lora", "block", "tree", "tree_cached"],
    "trl": [name for name in RUNGS if name.startswith("trl_")],
}
DEFAULT = [name for name in RUNGS if name != "tunesmith_fp32"]


def choose(names: list[str], workload: str) -> list[Rung]:
    """The rungs of these names and groups that the workload has, in the ladder's order.

    Raises ValueError for a name that is neither."""
    wanted = {rung for name in names for rung in GROUPS.get(name, [name])}
    if unknown := wanted - set(RUNGS):
        raise ValueError(
            f"no rung {', '.join(sorted(unknown))}; there are {', '.join(RUNGS)} "
            f"and the groups {', '.join(GROUPS)}"
        )
    return [r for r in RUNGS.values() if r.name in wanted and (not r.workloads or workload in r.workloads)]

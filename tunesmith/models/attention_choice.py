"""Which attention a model is given, and why, in one line for the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tunesmith.config import Config
from tunesmith.models.attention import NAME as CPU
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.devices import compute_dtype, default_device
from tunesmith.models.flex_attention import NAME as FLEX
from tunesmith.models.flex_attention import use_flex_attention
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.native.build import missing
from tunesmith.models.packable import attends_like

FLASH = "flash_attention_2"
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Abilities:
    """What a model and its machine have to offer.

    stock: the attention that transformers chose. drops: attention weights are dropped in training, which ours
    cannot. flex: FlexAttention serves the model. flash: FlashAttention does, in the format of the run, and is
    installed."""

    stock: str
    drops: bool = False
    flex: bool = False
    flash: bool = False


def choose_attention(
    requested: str, device_type: str, packing: Literal["tree", "flat", "none"], abilities: Abilities
) -> tuple[str, str]:
    """Name and reason of the attention for `model.attention` and `data.packing` on a kind of device."""
    stock = abilities.stock
    if requested != "auto":
        return stock, "as model.attention says"
    if device_type == "cpu" and not abilities.drops and stock in ("sdpa", "eager"):
        return CPU, "made for packs on a CPU"
    if device_type == "cuda" and packing == "tree" and abilities.flex and not abilities.drops:
        return FLEX, "FlexAttention, which can share prefixes"
    if device_type == "cuda" and packing != "none" and abilities.flash:
        return FLASH, "FlashAttention, which sees each document of a pack by itself"
    return stock, "as transformers chose"


def set_attention(model: Any, config: Config, say: Callable[[str], None], held: Held = EVERYWHERE) -> None:
    """Give a model that was just loaded the attention that suits the run. Ours gives way to transformers'
    where the model turns out to ask for more."""
    dtype, _ = compute_dtype(config.model)
    abilities = _abilities(model, dtype)
    name, why = choose_attention(
        config.model.attention, default_device().type, config.data.pass_packing, abilities
    )
    if name == CPU:
        use_packed_attention(model)
        if dtype == torch.bfloat16 and (lack := missing()) is not None:
            why += f"; in PyTorch's operations, which are slower than native code: {lack}"
    elif name == FLEX:
        use_flex_attention(model)
    elif name != abilities.stock:
        model.set_attn_implementation(name)
    if name in (CPU, FLEX) and not held.ask(lambda: attends_like(model, "eager")):
        model.set_attn_implementation(abilities.stock)
        name, why = abilities.stock, "as transformers chose: this model asks more of it than ours can do"
    say(f"attention {name}: {why}")


def _abilities(model: Any, dtype: torch.dtype) -> Abilities:
    from transformers.utils import is_flash_attn_2_available

    config = model.config.get_text_config()
    return Abilities(
        stock=model.config._attn_implementation,
        drops=any(getattr(config, name, 0) for name in _DROPOUTS),
        flex=bool(getattr(model, "_supports_flex_attn", False)),
        flash=bool(getattr(model, "_supports_flash_attn", False))
        and dtype in (torch.float16, torch.bfloat16)
        and is_flash_attn_2_available(),
    )

"""LoftQ (Li et al. 2023, arXiv:2310.08659): LoRA that begins with what 4 bits lose of the base weights.

The paper alternates Q = quantise(W - B A) and B A = SVD_r(W - Q). This is its first round: Q is then the NF4
of the weights themselves, which every loader of the model makes anew, so that the adapter is a plain LoRA
adapter on the quantised model. (PEFT 0.21 does the same on CUDA only.)
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.models.decompose import largest_directions


@torch.no_grad()
def begin_with_rounding_error(model: Any, config: Config) -> None:
    """Set A and B of each LoRA layer on 4-bit weights to the r largest singular directions of W - Q.

    The weights before rounding are read once more, into the processor's memory."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        held = layer.get_base_layer().weight
        weight = exact.get_submodule(name.removeprefix("base_model.model.")).weight.float()
        rounded = dequantize_4bit(held.data, held.quant_state).float().to(weight.device)
        scale = float(layer.scaling["default"])
        a, b = largest_directions(weight - rounded, layer.r["default"], scale)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)

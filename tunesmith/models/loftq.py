"""LoftQ (Li et al. 2023, arXiv:2310.08659): LoRA that begins with what 4 bits lose of the base weights.

The paper alternates Q = quantise(W - B A) and B A = SVD_r(W - Q). This is its first round: Q is then the NF4
of the weights themselves, which every loader of the model makes anew, so that the adapter is a plain LoRA
adapter on the quantised model. (PEFT 0.21 does the same on CUDA only.)
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.config import Config


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
        u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        root = (s[: a.shape[0]] / layer.scaling["default"]).sqrt()
        a.copy_(root[:, None] * vh[: a.shape[0]])
        b.copy_(u[:, : a.shape[0]] * root)

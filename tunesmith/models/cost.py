"""What a forward and backward pass costs: multiplications, and memory for activations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.models.devices import free_memory_bytes


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of training, by what they grow with.

    A matrix of n parameters takes 2n per token forward, 2n for the gradient of its input and, if it is
    trained, 2n for its own. The output head runs at targets only. Attention scores are left out (below a
    tenth up to 2,048 tokens at hidden sizes of 1,000 and more), so that MFU errs on the low side."""

    per_token: float
    per_target: float

    def flops(self, tokens: int, targets: int) -> float:
        return self.per_token * tokens + self.per_target * targets


def training_cost(model: Any) -> Cost:
    """The cost of one token and of one target for this model as it is set to be trained."""
    head = model.get_output_embeddings()
    per_token = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed" in name or (head is not None and parameter is head.weight):
            continue
        count = parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
        per_token += (6 if parameter.requires_grad else 4) * count
    per_target = 0.0
    if head is not None:
        per_target = (6 if head.weight.requires_grad else 4) * float(head.weight.numel())
    return Cost(per_token, per_target)


def choose_gradient_checkpointing(model: Any, config: Config, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether to recompute activations, and why: as the config says, or by what one pass is estimated to
    need."""
    if config.train.gradient_checkpointing != "auto":
        return config.train.gradient_checkpointing, "as train.gradient_checkpointing says"
    need, free = _pass_bytes(model, config, dtype), free_memory_bytes()
    fits = need <= 0.8 * free
    return (
        not fits,
        f"one pass of {config.train.micro_batch_tokens} tokens needs about {need / 2**30:.1f} GiB "
        f"of {free / 2**30:.1f} GiB free",
    )


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass.

    By the name that both the newest transformers and the last one for Python 3.10 (5.20) have; the newest
    warns that it will go. Switch to activation_checkpointing_enable when Python 3.10 is no longer
    supported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _pass_bytes(model: Any, config: Config, dtype: torch.dtype) -> float:
    """Activations of one pass: 34 bytes per token, layer and hidden unit in 16 bits without attention scores
    (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2), twice that in 32, plus three float32 copies of the
    logits; and 16 bytes a trained parameter for weight, gradient and AdamW's two moments."""
    text = model.config.get_text_config()
    tokens = config.train.micro_batch_tokens or 0
    wide = 2 if dtype == torch.float32 else 1
    activations = (
        34.0 * wide * tokens * getattr(text, "hidden_size", 0) * getattr(text, "num_hidden_layers", 0)
    )
    logits = 12.0 * tokens * getattr(text, "vocab_size", 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return activations + logits + 16.0 * trained

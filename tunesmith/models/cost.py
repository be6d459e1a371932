"""What a forward and backward pass costs: multiplications, and memory for activations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.models.fuse import loss_head
from tunesmith.models.head import CHUNK_BYTES
from tunesmith.models.score import gives_scores


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
        # A network that makes virtual tokens runs once a pass, not for each token.
        if (
            parameter.ndim < 2
            or "embed" in name
            or "prompt_encoder" in name
            or (head is not None and parameter is head.weight)
        ):
            continue
        count = parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
        per_token += (6 if parameter.requires_grad else 4) * count
    per_target = 0.0
    if head is not None:
        per_target = (6 if head.weight.requires_grad else 4) * float(head.weight.numel())
    return Cost(per_token, per_target)


# Tokens a parameter that a given amount of computation is spent best with: Hoffmann et al. 2022
# (arXiv:2203.15556), table 3 (1.4T tokens for 67B parameters, 20.2B for 1B). All parameters count, embeddings
# too.
OPTIMAL_TOKENS_PER_PARAMETER = 20


def size_lines(model: Any, tokens: float, *, is_known: bool) -> list[str]:
    """What a model from scratch weighs and how its size goes with the tokens of the run, in sentences.
    `is_known`: whether `tokens` is a count, or only what the rows can have at most."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding = sum(
        parameter.numel()
        for parameter in {id(table.weight): table.weight for table in tables if table is not None}.values()
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    optimal, at_most = OPTIMAL_TOKENS_PER_PARAMETER * total, "" if is_known else "at most "
    return [
        f"of {total:,} parameters {embedding:,} are embeddings and output head "
        f"({100 * embedding / total:.0f} %), {total - embedding:,} are layers",
        f"this run has {at_most}{tokens:,.0f} tokens, {tokens / total:,.2f} a parameter; compute-optimal "
        f"training has about {OPTIMAL_TOKENS_PER_PARAMETER} a parameter (Hoffmann et al. 2022): "
        f"{optimal:,} tokens",
    ]


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass.

    By the name that both the newest transformers and the last one for Python 3.10 (5.20) have; the newest
    warns that it will go. Switch to activation_checkpointing_enable when Python 3.10 is no longer
    supported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def activation_bytes(model: Any, tokens: int, dtype: torch.dtype) -> float:
    """What a pass of so many tokens keeps until its backward pass, as estimated: 34 bytes per token, layer
    and hidden unit in 16 bits without attention scores (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2),
    twice that in 32; and three float32 copies of the logits, or of one chunk of them where the head is
    fused."""
    text = model.config.get_text_config()
    wide = 2 if dtype == torch.float32 else 1
    layers = 34.0 * wide * tokens * getattr(text, "hidden_size", 0) * getattr(text, "num_hidden_layers", 0)
    logits = 0.0 if gives_scores(model) else 12.0 * tokens * getattr(text, "vocab_size", 0)
    return layers + (min(logits, 3.0 * CHUNK_BYTES) if loss_head(model) else logits)


def optimizer_bytes(model: Any) -> float:
    """16 bytes a trained parameter: weight, gradient and AdamW's two moments."""
    return 16.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)

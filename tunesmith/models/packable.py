"""Whether documents laid end to end in one forward pass stay strangers to each other, asked of the model
itself.

Stock attention isolates documents by restarting positions; recurrent layers, convolutions and some remote
code do not. A table of architectures would be wrong for the next one, so the model is asked: exchange the
first document and see whether the second one's logits move.
"""

from __future__ import annotations

from typing import Any

import torch

_LENGTH = 12


@torch.no_grad()
def documents_stay_apart(model: Any) -> bool:
    """True if a document's logits depend neither on what lies before it in the pack nor on where it lies."""
    was_training = model.training
    model.eval()
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        first, other, second = (
            torch.randint(0, min(vocabulary, 1000), (_LENGTH,), generator=generator) for _ in range(3)
        )
        after_first = _logits(model, first, second)
        after_other = _logits(model, other, second)
        alone = _logits(model, second)
        scale = alone.std()
        # In a pack the shapes are the same and masked terms exactly zero: any difference is a leak. Alone the
        # shapes differ, and bfloat16 rounds otherwise (measured on SmolLM2-135M: 0.03 root mean square); a
        # model that has the wrong positions is off by the logits' own size.
        leak = (after_first - after_other).abs().max()
        moved = (after_first - alone).square().mean().sqrt()
        return bool(leak <= 1e-3 * scale and moved <= 0.2 * scale)
    finally:
        model.train(was_training)


def _logits(model: Any, *documents: torch.Tensor) -> torch.Tensor:
    """[_LENGTH, V] float32 logits of the last document."""
    device = model.get_input_embeddings().weight.device
    output = model(
        input_ids=torch.cat(documents)[None].to(device),
        position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None].to(device),
        use_cache=False,
    )
    return output.logits[0, -_LENGTH:].float()

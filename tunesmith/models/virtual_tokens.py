"""Prefix tuning, prompt tuning and P-tuning in a training pass: virtual tokens before the one example in it.

    tokens        v v v a b c        v: virtual, n of them; prefix: in the cache, else as embeddings
    position_ids  0 1 2 3 4 5
    predictions       3 4            of the example's positions 0 and 1, moved by n where logits are

PEFT's forward is for padded batches with labels: it drops positions and knows no `logits_to_keep`. In
generation it drops them too, so that what pads a batch on the left comes to lie between virtual tokens and
text, and counts: there each row gets the positions it was trained at. What PEFT saves is used as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor


def has_virtual_tokens(model: Any) -> bool:
    """Whether the model is PEFT's with virtual tokens."""
    return bool(getattr(model, "_is_prompt_learning", False))


def use_own_forward(model: Any) -> None:
    """Replace the forward of PEFT's model by one that also takes a pass of training, and let it generate with
    the positions of training."""
    from peft import PeftType

    model.forward = partial(_forward, model, model.forward)
    if model.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
        model.prepare_inputs_for_generation = partial(_prepare, model.prepare_inputs_for_generation)


def _prepare(
    stock: Callable[..., dict[str, Any]], *args: Any, position_ids: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """What the model is given for the next token: PEFT's, at positions that count what is not padding."""
    inputs = stock(*args, **kwargs)
    inputs.pop("position_ids", None)
    mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    if mask is not None and mask.dim() == 2:
        length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return inputs


def _forward(
    model: Any,
    stock: Callable[..., Any],
    *args: Any,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: Tensor | int = 0,
    **kwargs: Any,
) -> Any:
    """One example [1, T] without padding, logits at its positions `logits_to_keep` [P]; anything else is
    PEFT's."""
    if input_ids is None or position_ids is None or not isinstance(logits_to_keep, Tensor):
        return stock(
            *args,
            **kwargs,
            input_ids=input_ids,
            position_ids=position_ids,
            **(
                {}
                if isinstance(logits_to_keep, int) and not logits_to_keep
                else {"logits_to_keep": logits_to_keep}
            ),
        )
    from peft import PeftType

    config = model.active_peft_config
    number = config.num_virtual_tokens
    if config.peft_type == PeftType.PREFIX_TUNING:
        return model.base_model(
            input_ids=input_ids,
            position_ids=position_ids + number,
            past_key_values=model.get_prompt(batch_size=1),
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
    embedded = model.get_base_model().get_input_embeddings()(input_ids)
    virtual = model.get_prompt(batch_size=1).to(embedded.dtype)
    return model.base_model(
        inputs_embeds=torch.cat([virtual, embedded], dim=1),
        position_ids=torch.arange(number + input_ids.shape[1], device=input_ids.device)[None],
        logits_to_keep=logits_to_keep + number,
        **kwargs,
    )


@torch.no_grad()
def begin_with_text(model: Any, tokenizer: Any, text: str) -> None:
    """Let the tokens of prompt tuning begin as those of a text, repeated or cut to their number."""
    weight = model.prompt_encoder["default"].embedding.weight
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chosen = torch.tensor(list(islice(cycle(ids), weight.shape[0])))
    table = model.get_base_model().get_input_embeddings().weight
    weight.copy_(table[chosen.to(table.device)])

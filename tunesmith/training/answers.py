"""What a model writes, to see what training changed: answers to validation rows, texts that it goes on
with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.loading import RowSet

_ROWS_AT_ONCE = 25


@dataclass(frozen=True)
class Question:
    """The prompt of a row's last answer, as served; what its last message says; and the answer the row
    has."""

    place: str
    prompt_ids: NDArray[np.int32]
    asked: str
    expected: str


def questions(rows: RowSet, limit: int, tokenizer: Any, stop_ids: Sequence[int]) -> list[Question]:
    """Up to `limit` rows that end with an answer, in file order. `stop_ids` end a message."""
    found: list[Question] = []
    for row in range(rows.num_rows):
        if len(found) == limit:
            break
        items = range(int(rows.row_starts[row]), int(rows.row_starts[row + 1]))
        examples = [
            (outcome.place, example)
            for outcome in map(rows.rows.__getitem__, items)
            for example in outcome.examples
        ]
        if not examples or not len(examples[-1][1].spans):
            continue
        place, example = examples[-1]
        start, end = example.spans[-1]
        if start == 0 or example.num_cut_tokens:
            continue
        prompt_ids = example.input_ids[:start]
        found.append(
            Question(
                place,
                prompt_ids,
                _last_message(prompt_ids, tokenizer, stop_ids),
                tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True).strip(),
            )
        )
    return found


def _last_message(prompt_ids: NDArray[np.int32], tokenizer: Any, stop_ids: Sequence[int]) -> str:
    """What a reader wants to see of a prompt: its last whole message, without the template's heading
    `user`."""
    (ends,) = np.nonzero(np.isin(prompt_ids, stop_ids))
    if not len(ends):
        return str(tokenizer.decode(prompt_ids, skip_special_tokens=True)).strip()
    start = ends[-2] + 1 if len(ends) > 1 else 0
    text = str(tokenizer.decode(prompt_ids[start : ends[-1]], skip_special_tokens=True)).strip()
    return text.removeprefix("user").strip()


def answer(
    model: Any, tokenizer: Any, asked: Sequence[Question], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[str]:
    """The model's greedy answers, in order."""
    prompts = [question.prompt_ids for question in asked]
    given = continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return [text.strip() for text in given]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
) -> list[str]:
    """What the model writes after each prompt, in order: the likeliest tokens, or with a temperature drawn
    ones. Prompts are continued in groups of like length, padded on the left."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        for first in range(0, len(order), _ROWS_AT_ONCE):
            group = order[first : first + _ROWS_AT_ONCE]
            width = max(len(prompts[i]) for i in group)
            input_ids = torch.full((len(group), width), tokenizer.pad_token_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(group):
                prompt = torch.from_numpy(prompts[i].astype(np.int64))
                input_ids[row, width - len(prompt) :] = prompt
                attention_mask[row, width - len(prompt) :] = 1
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=list(stop_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
            for row, i in enumerate(group):
                texts[i] = tokenizer.decode(output[row, width:], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return texts


def stop_ids(rows: RowSet, tokenizer: Any, sample: int = 64) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, and the control tokens that close trained turns in the
    data."""
    control = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops = {tokenizer.eos_token_id} - {None}
    for item in range(min(sample, len(rows.lengths))):
        for example in rows.rows[item].examples:
            for start, end in example.spans:
                tail = [int(id_) for id_ in example.input_ids[max(start, end - 4) : end]]
                stops.update(next(([id_] for id_ in tail if id_ in control), []))
    return sorted(stops)

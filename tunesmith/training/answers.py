"""What a model writes, to see what training changed: answers to validation rows, texts that it goes on
with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.loading import RowSet

_ROWS_AT_ONCE = 25
_LOOKED_AT = 100  # rows for each that is wanted


@dataclass(frozen=True)
class Question:
    """The prompt of a row's last answer, as served; what its last message says; and the answer the row
    has, of so many tokens."""

    place: str
    prompt_ids: NDArray[np.int32]
    asked: str
    expected: str
    num_expected: int


def questions(
    rows: RowSet,
    limit: int,
    tokenizer: Any,
    stop_ids: Sequence[int],
    max_answer_tokens: int = sys.maxsize,
) -> list[Question]:
    """Up to `limit` rows that end with an answer (of a pair: the chosen one), of at most so many tokens, in
    file order. `stop_ids` end a
    message. Not all rows are looked at: they may be millions, and tokenised when looked at."""
    found: list[Question] = []
    for row in range(min(rows.num_rows, _LOOKED_AT * limit)):
        if len(found) == limit:
            break
        items = range(int(rows.row_starts[row]), int(rows.row_starts[row + 1]))
        examples = [
            (outcome.place, example)
            for outcome in map(rows.rows.__getitem__, items)
            for example in outcome.examples
            if example.side == 0
        ]
        if not examples or not len(examples[-1][1].spans):
            continue
        place, example = examples[-1]
        start, end = example.spans[-1]
        if start == 0 or example.num_cut_tokens or end - start > max_answer_tokens:
            continue
        prompt_ids = example.input_ids[:start]
        found.append(
            Question(
                place,
                prompt_ids,
                _last_message(prompt_ids, tokenizer, stop_ids),
                tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True).strip(),
                int(end - start),
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


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt: `num_tokens` tokens, with the one that ended it if `is_ended` by
    itself and not by a limit."""

    text: str
    num_tokens: int
    is_ended: bool


def answer(
    model: Any, tokenizer: Any, asked: Sequence[Question], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[Written]:
    """The model's greedy answers, in order, without white space around them."""
    prompts = [question.prompt_ids for question in asked]
    given = continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return [replace(written, text=written.text.strip()) for written in given]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
) -> list[Written]:
    """What the model writes after each prompt, in order: the likeliest tokens, or with a temperature drawn
    ones. Prompts are continued in groups of like length."""
    written: dict[int, Written] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), _ROWS_AT_ONCE):
        group = order[first : first + _ROWS_AT_ONCE]
        given = continue_together(
            model,
            tokenizer,
            [prompts[i] for i in group],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            temperature=temperature,
        )
        written |= dict(zip(group, given, strict=True))
    return [written[i] for i in range(len(prompts))]


@torch.no_grad()
def continue_together(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float | None = None,
) -> list[Written]:
    """The same for one group, padded on the left. None goes beyond the positions that the model has; a prompt
    that fills them gets no answer."""
    width = max(map(len, prompts))
    limit = min(max_new_tokens, room(model, width))
    if limit < 1:
        return [Written("", 0, False)] * len(prompts)
    input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask[row, width - len(prompt) :] = 1
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=limit,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=top_p,
            top_k=None,
            use_cache=True,
            eos_token_id=list(stop_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
    finally:
        model.train(was_training)
    return [_written(tokenizer, ids, stop_ids) for ids in output[:, width:].tolist()]


def room(model: Any, num_tokens: int) -> int:
    """How many tokens more the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return sys.maxsize if positions is None else max(0, positions - num_tokens)


def _written(tokenizer: Any, ids: list[int], stop_ids: Sequence[int]) -> Written:
    """The ids up to the first that ends an answer; behind it is padding."""
    end = next((at for at, id_ in enumerate(ids) if id_ in stop_ids), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return Written(text, len(ids) if end is None else end + 1, end is not None)


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

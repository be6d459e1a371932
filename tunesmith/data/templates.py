"""Which characters of a rendered conversation are the answers: masks by prefix comparison.

The chat template is the only source of truth. For a trained turn i of messages m[0..n)

    full   = render(m)
    prompt = render(m[:i], add_generation_prompt=True)      what the serving side sends
    closed = render(m[:i+1])                                what stands when the turn is over

    full    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user ...
    prompt  ------------------------------------------------------->
    closed  --------------------------------------------------------------------->
    turn                                                            =============

and the turn is full[len(prompt):len(closed)]: what the generation prompt adds belongs to the prompt, and all the
template writes to close the turn belongs to the answer, its end-of-turn token above all. No markers, no table of
model families. Where closed is no prefix of full the template rewrites history (thinking dropped from earlier
turns); then every trained turn becomes its own text, rendered as it is served.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tunesmith.data.records import BadRow, Record

TrainOn = Literal["assistant", "last", "all"]

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class Render(Protocol):
    """Renders messages (and tools) with the chat template; raises BadRow where the template refuses them."""

    def __call__(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and its trained character spans (start, end, weight), in order and disjoint. `num_messages` is how
    many of the record's messages the text holds: all, or those up to the trained turn of an expanded example."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    num_messages: int
    notes: tuple[str, ...] = ()


class _HistoryRewritten(Exception):
    """The template renders a turn differently once others follow it."""


def turn_weights(record: Record, train_on: TrainOn) -> list[float]:
    """The loss weight of each message: what the row asks for, else what `train_on` says."""
    answers = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    trained = {"assistant": set(answers), "last": set(answers[-1:]), "all": set(range(len(record.messages)))}[train_on]
    return [
        float(i in trained) if asked is None else asked for i, asked in enumerate(record.weights)
    ]


def render_record(
    record: Record, render: Render, control_tokens: re.Pattern[str], train_on: TrainOn
) -> list[Rendered]:
    """The texts to train on: one, or one a trained turn where the template rewrites history.

    Raises BadRow if nothing would be trained, or a turn cannot be found in what the template renders."""
    weights = turn_weights(record, train_on)
    if not any(weights):
        raise BadRow("no_trainable_turn", "every message has loss weight 0; there is nothing to learn from")
    turns = _Turns(record, render, control_tokens)
    if train_on == "all" and all(weight == 1 for weight in weights):
        return [Rendered(turns.full, ((0, len(turns.full), 1.0),), len(record.messages))]
    try:
        spans = [(*turns.span(i), weight) for i, weight in enumerate(weights) if weight > 0]
        if train_on == "all":
            spans = _fill_between(spans, [turns.span(i) for i, weight in enumerate(weights) if weight != 1], turns.full)
        return [Rendered(turns.full, tuple(spans), len(record.messages), turns.take_notes())]
    except _HistoryRewritten:
        return _expand(record, weights, render, control_tokens)


def _expand(
    record: Record, weights: list[float], render: Render, control_tokens: re.Pattern[str]
) -> list[Rendered]:
    """One text a trained turn, ending with it, as the serving side would have rendered it."""
    texts = []
    for i, weight in enumerate(weights):
        if weight <= 0:
            continue
        turns = _Turns(
            Record(messages=record.messages[: i + 1], weights=record.weights[: i + 1], tools=record.tools),
            render,
            control_tokens,
        )
        try:
            start, end = turns.span(i)
        except _HistoryRewritten as error:
            raise BadRow(
                "template_rewrites_history",
                f"messages[{i}]: the chat template renders the messages before this turn differently when a generation "
                "prompt follows, so what is served cannot be reproduced",
            ) from error
        texts.append(Rendered(turns.full, ((start, end, weight),), i + 1, (*turns.take_notes(), "expanded_per_turn")))
    return texts


class _Turns:
    """Finds turns in the render of one record's messages."""

    def __init__(self, record: Record, render: Render, control_tokens: re.Pattern[str]) -> None:
        self.messages, self.tools = record.messages, record.tools
        self._render = render
        self._control_tokens = control_tokens
        self._notes: set[str] = set()
        self.full = render(self.messages, self.tools, False)

    def take_notes(self) -> tuple[str, ...]:
        return tuple(sorted(self._notes))

    def span(self, i: int) -> tuple[int, int]:
        """Characters [start, end) of `full` that message i produced (an answer: after the generation prompt)."""
        start = self._start_of_answer(i) if self.messages[i]["role"] == "assistant" else self._end(i - 1)
        end = self._end(i)
        if start >= end:
            raise BadRow("turn_not_rendered", f"messages[{i}]: the chat template renders nothing for this turn")
        return start, end

    def _start_of_answer(self, i: int) -> int:
        prompt = self._render(self.messages[:i], self.tools, True)
        if self.full.startswith(prompt):
            return len(prompt)
        # A generation prompt that opens something the answer lacks (`<think>`) still ends where both agree, if
        # the history before it does.
        history_end = self._end(i - 1)
        start = _common_prefix(prompt, self.full)
        if start <= history_end:
            raise _HistoryRewritten
        self._notes.add("generation_prompt_differs")
        return start

    def _end(self, i: int) -> int:
        """Where message i is over in `full`."""
        if i < 0:
            return 0
        if i == len(self.messages) - 1:
            return len(self.full)
        closed = self._render(self.messages[: i + 1], self.tools, False)
        if self.full.startswith(closed):
            return len(closed)
        # Some templates close the whole conversation too (Phi-3 writes <|endoftext|>). What only a closed
        # conversation has may be control tokens and white space; anything else means that history was rewritten.
        agreed = _common_prefix(closed, self.full)
        end = len(closed)
        while end > agreed:
            if closed[end - 1].isspace():
                end -= 1
                continue
            token = next((m for m in self._control_tokens.finditer(closed, max(0, end - 64), end) if m.end() == end), None)
            if token is None:
                raise _HistoryRewritten
            end = token.start()
        return end


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection on slices (C speed, where a loop over characters is not)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _fill_between(
    spans: list[tuple[int, int, float]], special: list[tuple[int, int]], text: str
) -> list[tuple[int, int, float]]:
    """`train_on: all` with rows that weigh some messages: weight 1 on all text but the `special` messages."""
    weighed = {(start, end): weight for start, end, weight in spans}
    filled, position = [], 0
    for start, end in sorted(special):
        if position < start:
            filled.append((position, start, 1.0))
        if weighed.get((start, end)):
            filled.append((start, end, weighed[start, end]))
        position = end
    if position < len(text):
        filled.append((position, len(text), 1.0))
    return filled

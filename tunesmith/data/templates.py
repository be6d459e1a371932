r"""Which characters of a rendered conversation are the answers: masks by prefix comparison.

The chat template is the only source of truth. For a trained turn i of messages m[0..n)

    full   = render(m)
    prompt = render(m[:i], add_generation_prompt=True)      what the serving side sends
    closed = render(m[:i+1])                                what stands when the turn is over

    full    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user ...
    prompt  --------------------------------------------------------
    closed  ----------------------------------------------------------------------------
    turn                                                            ====================

and the turn is full[len(prompt):len(closed)]. No markers, no table of model families.

Policies, all of them, each with the test that asserts that nothing else differs from the masks of templates
that mark their answers with {% generation %} (tests/data/test_oracle.py):

1. What the generation prompt adds belongs to the prompt. (Qwen2.5's training template also marks the line
   break after `assistant`.)
2. All that closes a turn belongs to the answer: the end-of-turn token, the line break behind it, and what the
   template sets at the end of the conversation (Phi-3's `<|endoftext|>`).
3. Where closed is no prefix of full, the template rewrites history (Qwen3 drops the thinking of earlier
   turns). Then every trained turn becomes its own text, rendered as it is served, in which only that turn
   carries loss.
4. A generation prompt that the answer does not continue (DeepSeek-R1 opens a `<think>` that its history
   drops) ends where the two part; the row is noted as generation_prompt_differs.
5. An answer that nothing precedes is not trained, since no server can be asked for it; noted as
   leading_answer_untrained. With `"train": true` it is refused.
6. A control token that swallows white space (Phi-3's rstrip) is never part of the turn whose white space it
   took.
7. Where the template joins two answers into one turn, the row is refused: no server is asked for half a turn.
8. Where the template shows no tool calls, they are rendered as the answer's text, as JSON of name and
   arguments (noted as tool_calls_as_text): the model would be taught to say nothing instead.

What else a template leaves out is noted, not invented: tools_not_rendered, reasoning_not_rendered, and
tool_calls_not_rendered where it shows some calls and not others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from jinja2 import TemplateError as JinjaError

from tunesmith.data.records import BadRow, Record
from tunesmith.errors import TemplateError

TrainOn = Literal["assistant", "last", "all"]

# For base models. Tools take the form that Qwen2.5 and Hermes gave them.
CHATML = r"""
{%- for message in messages %}
    {%- if loop.first and tools %}
        {{- '<|im_start|>system\n' + (message.content + '\n\n' if message.role == 'system' else '') }}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}
        {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
        {{- '</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
        {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
    {%- endif %}
    {%- if not (loop.first and tools and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


# What a template raises for a row that it does not take: its own raise_exception, or Python's errors for a
# role, field or type that it did not foresee.
REFUSALS = (JinjaError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError)


class Render(Protocol):
    """Renders messages (and tools) with the chat template; raises BadRow where the template refuses them."""

    def __call__(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and its trained character spans (start, end, weight), in order and disjoint. `num_messages` is
    how many of the record's messages the text holds: all, or those up to the trained turn of an expanded
    example."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    num_messages: int
    notes: tuple[str, ...] = ()


class _HistoryRewritten(Exception):
    """The template renders a turn differently once others follow it."""


def turn_weights(record: Record, train_on: TrainOn) -> list[float]:
    """The loss weight of each message: what the row asks for, else what `train_on` says."""
    answers = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    prompted = [i for i in answers if i > 0]
    trained = {"assistant": prompted, "last": prompted[-1:], "all": range(len(record.messages))}[train_on]
    return [float(i in trained) if asked is None else asked for i, asked in enumerate(record.weights)]


def render_record(
    record: Record, render: Render, control_tokens: re.Pattern[str], train_on: TrainOn
) -> list[Rendered]:
    """The texts to train on: one, or one a trained turn where the template rewrites history.

    Raises BadRow if nothing would be trained or a turn cannot be found in what the template renders, and
    TemplateError for a template that writes no end token after an answer."""
    weights = turn_weights(record, train_on)
    if not any(weights):
        raise BadRow(
            "no_trainable_turn", "no message has a loss weight above 0; there is nothing to learn from"
        )
    turns = _Turns(record, render, control_tokens)
    if train_on != "all" and record.messages[0]["role"] == "assistant" and record.weights[0] is None:
        turns.notes.add("leading_answer_untrained")
    try:
        spans = turns.spans_of_all(weights) if train_on == "all" else turns.spans(weights)
    except _HistoryRewritten:
        return [
            _as_served(record, i, weight, render, control_tokens)
            for i, weight in enumerate(weights)
            if weight
        ]
    return [turns.rendered(spans)]


def _as_served(
    record: Record, i: int, weight: float, render: Render, control_tokens: re.Pattern[str]
) -> Rendered:
    """The conversation up to message i, which alone is trained."""
    until = replace(record, messages=record.messages[: i + 1], weights=record.weights[: i + 1])
    turns = _Turns(until, render, control_tokens)
    turns.notes.add("expanded_per_turn")
    try:
        return turns.rendered(((*turns.span(i), weight),))
    except _HistoryRewritten:
        raise BadRow(
            "template_rewrites_history",
            f"messages[{i}]: the chat template renders the messages before this turn differently when the "
            "turn follows them, so it cannot be trained as it is served",
        ) from None


class _Turns:
    """Finds turns in the render of one record's messages."""

    def __init__(self, record: Record, render: Render, control_tokens: re.Pattern[str]) -> None:
        self._messages, self._tools = record.messages, record.tools
        self._render = render
        self._control_tokens = control_tokens
        self.notes: set[str] = set()
        self.full = render(self._messages, self._tools, False)
        if any(tool.get("function", {}).get("name", "") not in self.full for tool in self._tools):
            self.notes.add("tools_not_rendered")

    def rendered(self, spans: tuple[tuple[int, int, float], ...]) -> Rendered:
        return Rendered(self.full, spans, len(self._messages), tuple(sorted(self.notes)))

    def spans(self, weights: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
        return tuple((*self.span(i), weight) for i, weight in enumerate(weights) if weight)

    def spans_of_all(self, weights: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
        """`train_on: all`: the whole text with weight 1, but for messages that ask for another."""
        spans, position = [], 0
        for i, weight in enumerate(weights):
            if weight != 1:
                start, end = self.span(i)
                spans += [(position, start, 1.0), (start, end, weight)]
                position = end
        spans.append((position, len(self.full), 1.0))
        return tuple((start, end, weight) for start, end, weight in spans if start < end and weight)

    def span(self, i: int) -> tuple[int, int]:
        """Characters [start, end) of `full` that message i produced (an answer: after the generation
        prompt)."""
        is_answer = self._messages[i]["role"] == "assistant"
        start = self._start_of_answer(i) if is_answer else self._end(i - 1)
        end = self._end(i)
        turn = self.full[start:end]
        if not turn or (not is_answer and self._messages[i]["content"].strip() not in turn):
            raise BadRow(
                "turn_not_rendered",
                f"messages[{i}]: the chat template renders this turn elsewhere or not at all",
            )
        if is_answer:
            self._check_answer(i, turn)
        return start, end

    def _start_of_answer(self, i: int) -> int:
        before = self._messages[:i]
        if not before:
            raise BadRow(
                "answer_without_prompt",
                'messages[0] is an answer that nothing precedes, and its "train" or "weight" asks to train '
                "it; no server can be asked for it. Put a user or system turn before it, or leave it "
                "untrained",
            )
        prompt = self._render(before, self._tools, True)
        if self.full.startswith(prompt):
            return len(prompt)
        # A generation prompt that opens something the answer lacks still ends where both agree, if the
        # history before it does. They may agree further by chance, an answer `<b>` with a prompt `<think>`;
        # two made-up answers that begin differently cannot both.
        history_end = self._end(i - 1)
        start = _common_prefix(prompt, self.full)
        for answer in ("a", "b"):
            made_up = self._render([*before, {"role": "assistant", "content": answer}], self._tools, False)
            start = min(start, _common_prefix(prompt, made_up))
        if start <= history_end:
            raise _HistoryRewritten
        self.notes.add("generation_prompt_differs")
        return start

    def _end(self, i: int) -> int:
        """Where message i is over in `full`."""
        if i < 0:
            return 0
        if i == len(self._messages) - 1:
            return len(self.full)
        closed = self._render(self._messages[: i + 1], self._tools, False)
        if self.full.startswith(closed):
            return len(closed)
        # Some templates close the whole conversation too (Phi-3 writes <|endoftext|>). What only a closed
        # conversation has may be control tokens and white space; anything else means that history was
        # rewritten.
        end = _common_prefix(closed, self.full)
        for token in self._control_tokens.finditer(closed):
            if token.start() < end < token.end():
                end = token.start()
        if self._control_tokens.sub("", closed[end:]).strip():
            raise _HistoryRewritten
        return end

    def _check_answer(self, i: int, answer: str) -> None:
        ends = [token.end() for token in self._control_tokens.finditer(answer)]
        if not ends or answer[ends[-1] :].strip():
            if i + 1 < len(self._messages) and self._messages[i + 1]["role"] == "assistant":
                raise BadRow(
                    "answers_merged",
                    f"messages[{i}]: the chat template joins this answer and the next into one turn, and no "
                    "server is asked for half a turn. Join them in the data",
                )
            raise TemplateError(
                f"messages[{i}]: the chat template writes no end token after this answer (it ends with "
                f"{answer[-20:]!r}), so the tuned model would never stop. Set data.template to one that "
                "does, such as chatml, or, if only the end of a conversation has one, data.train_on to last."
            )
        message = self._messages[i]
        calls = message.get("tool_calls") or ()
        if any(call["function"]["name"] not in answer for call in calls):
            self.notes.add("tool_calls_not_rendered")
        if message.get("reasoning_content", "").strip() not in answer:
            self.notes.add("reasoning_not_rendered")


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection on slices (C speed, where a loop over characters is
    not)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low

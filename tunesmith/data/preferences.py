"""Rows that judge answers, made Records: one for each answer, with the side it is on.

One row of each format:

    pairs      {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5", "margin": 1}
    labelled   {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
                "label": true}
    ranked     {"prompt": [{"role": "user", "content": "2+2?"}], "answers": ["4", "4?", "5"],
                "scores": [1, 0.5, 0]}

and the Records of the first, with what carries loss marked:

    user 2+2?   assistant 4     side 0
                          =
    user 2+2?   assistant 5     side 1
                          =

The turns that both answers of a pair begin with are context, whatever they say of their own weight; the
assistant's turns from the fork on are targets. A ranked row is all pairs of its answers, chosen and rejected
in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from tunesmith.data.formats import (
    MAX_WEIGHT,
    Message,
    Turn,
    as_chat,
    drop_leading_turn,
    field_of,
    kind_of,
    list_of,
    read_instruction,
    read_tools,
    read_turn,
    read_turns,
    rename_columns,
    with_row_system,
)
from tunesmith.data.records import BadRow, Record

_CHATS = ("messages", "conversations", "conversation")
# Columns that may hold what precedes the answers; the first that is there does.
_PROMPTS = ("prompt", "conversations", "conversation", "messages", "instruction")
_ANSWERS = ("answers", "responses", "completions")
# Why a pair is left out, for reports; the Preparer finds it.
PAIR_REASONS = {
    "identical_answers": "both answers are the same",
    "same_after_cut": "the answers differ only past data.max_length",
    "too_long": "an answer is over data.max_length",
    "no_better_answer": "no answer of the row is better than another",
}
# Tables of text write a truth value as a word.
_LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}

_Prompt = str | list[Turn]  # raw text or turns; no turns where whole conversations say it
_Answer = str | list[Turn]
_Conversation = list[Turn] | Record  # a Record of raw text


def read_answers(
    row: dict[str, Any], format: str, columns: dict[str, str]
) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """The answers of a row of `PREFERENCE_FORMATS`, and notes, which are those of `read_record`.

    pairs: chosen, rejected. labelled: one. ranked: chosen, rejected, chosen, rejected, ...; none where no
    answer is better than another. Raises BadRow for a row that cannot be trained on; answers that are equal
    are found by the Preparer, which knows what the template makes of them."""
    if columns:
        row = rename_columns(row, columns)
    notes: set[str] = set()
    if format == "labelled":
        records: tuple[Record, ...] = (_read_labelled(row, notes),)
    elif format == "ranked":
        records = _read_ranked(row, notes)
    else:
        assert format == "pairs", format
        answers = [_read_answer(field_of(row, name), name, notes) for name in ("chosen", "rejected")]
        margin = 0.0 if row.get("margin") is None else _number(row["margin"], "margin", "bad_margin")
        chosen, rejected = _conversations(row, answers, ("chosen", "rejected"), notes)
        tools = read_tools(row, notes)
        records = _pair(chosen, rejected, ("chosen", "rejected"), margin, tools, notes)
    return records, tuple(sorted(notes))


# --- the formats


def _read_ranked(row: dict[str, Any], notes: set[str]) -> tuple[Record, ...]:
    """All pairs of which the first is better: it has the higher score or, without scores, stands before."""
    name = next((name for name in _ANSWERS if row.get(name) is not None), "answers")
    values = list_of(field_of(row, name), name)
    if not values:
        raise BadRow("empty", f"{name} is an empty list; expected answers, the best first")
    names = [f"{name}[{i}]" for i in range(len(values))]
    answers = [_read_answer(value, where, notes) for value, where in zip(values, names, strict=True)]
    scores = [float(-i) for i in range(len(values))]  # the best first
    has_scores = row.get("scores") is not None
    if has_scores:
        given = list_of(row["scores"], "scores")
        if len(given) != len(values):
            said = f"scores has {len(given)} items and {name} {len(values)}"
            raise BadRow("bad_scores", f"{said}; expected a number for each answer")
        scores = [_number(score, f"scores[{i}]", "bad_scores") for i, score in enumerate(given)]
    conversations = _conversations(row, answers, names, notes)
    tools = read_tools(row, notes)
    records: list[Record] = []
    best_first = sorted(range(len(values)), key=lambda i: -scores[i])
    if len(set(scores)) < len(scores):
        notes.add("tied_answers")
    for i, j in combinations(best_first, 2):
        if scores[i] > scores[j]:
            margin = scores[i] - scores[j] if has_scores else 0.0
            both = conversations[i], conversations[j]
            records += _pair(*both, (names[i], names[j]), margin, tools, notes)
    return tuple(records)


def _read_labelled(row: dict[str, Any], notes: set[str]) -> Record:
    """Of a whole conversation the label judges the answer to the last user turn, calls of tools included."""
    side = 0 if _read_label(field_of(row, "label")) else 1
    name = next((name for name in _CHATS if row.get(name) is not None), None)
    if name is not None:
        turns = with_row_system(row, _read_chat(row[name], name, notes))
        start = _start_of_answer(turns)
        if start == len(turns):
            said = "nothing follows the last user turn; expected the answer that label judges"
            raise BadRow("no_assistant_turn", said)
    else:
        name = "completion" if row.get("instruction") is None or "completion" in row else "output"
        answer = _read_answer(field_of(row, name), name, notes)
        (conversation,) = _conversations(row, [answer], [name], notes)
        if isinstance(conversation, Record):
            return replace(conversation, side=side)
        turns = conversation
        is_whole = not isinstance(answer, str) and _is_whole(answer)
        start = _start_of_answer(turns) if is_whole else len(turns) - _num_turns(answer)
    return replace(as_chat(_judged(turns, start, name), name, read_tools(row, notes), notes), side=side)


def _read_label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return _LABELS[value.strip().lower()]
    found = f"{value!a}" if isinstance(value, str) else kind_of(value)
    raise BadRow("bad_label", f"label is {found}; expected true (desirable) or false")


# --- prompts and answers


def _read_chat(value: Any, name: str, notes: set[str]) -> list[Turn]:
    turns = read_turns(value, name, notes)
    if name != "messages":
        drop_leading_turn(turns, notes)
    return turns


def _read_prompt(row: dict[str, Any], notes: set[str]) -> tuple[_Prompt, str]:
    """What precedes the answers, and the column that says so."""
    name = next((name for name in _PROMPTS if row.get(name) is not None), "")
    if not name:
        return [], ""
    if name == "instruction":
        return read_instruction(row), name
    if name != "prompt":
        return _read_chat(row[name], name, notes), name
    if isinstance(row[name], str):
        return str(row[name]), name
    if isinstance(row[name], list):
        return read_turns(row[name], name, notes), name
    found = kind_of(row[name])
    raise BadRow("not_a_string", f"prompt is {found}; expected a string or a list of messages")


def _read_answer(value: Any, where: str, notes: set[str]) -> _Answer:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_answer", f"{where} is empty; expected the answer")
        return value
    if isinstance(value, dict):
        return [read_turn(value, where, notes)]
    if isinstance(value, list):
        return read_turns(value, where, notes)
    found = kind_of(value)
    raise BadRow("not_a_string", f"{where} is {found}; expected a string, a message or a list of messages")


def _is_whole(answer: list[Turn]) -> bool:
    """Whether these are not only answers but begin where the conversation does."""
    return answer[0][0]["role"] in ("system", "user")


def _num_turns(answer: _Answer) -> int:
    return 1 if isinstance(answer, str) else len(answer)


def _conversations(
    row: dict[str, Any], answers: Sequence[_Answer], names: Sequence[str], notes: set[str]
) -> list[_Conversation]:
    """Each answer behind the prompt: a conversation, or a Record of raw text where all of it is strings."""
    prompt, column = _read_prompt(row, notes)
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        for other in ("system", "tools", "functions"):
            if row.get(other) not in (None, "", [], "[]"):
                said = f"the row has {other}, but its prompt and answers are strings, for which no template"
                raise BadRow("not_a_list", f"{said} is used; expected prompt to be a list of messages")
        return [Record(prompt=prompt, completion=str(answer)) for answer in answers]
    conversations: list[_Conversation] = []
    for answer, name in zip(answers, names, strict=True):
        if not isinstance(answer, str) and _is_whole(answer):
            turns = answer
            if not isinstance(prompt, str):
                _check_begins_with(turns, prompt, name, column)
        elif not column:
            field_of(row, "prompt")  # says that it is missing, or null
            raise AssertionError
        else:
            turns = [*_as_turns(prompt, "user"), *_as_turns(answer, "assistant")]
        conversations.append(with_row_system(row, turns))
    return conversations


def _as_turns(value: str | list[Turn], role: str) -> list[Turn]:
    return [({"role": role, "content": value}, None)] if isinstance(value, str) else value


def _check_begins_with(turns: list[Turn], prompt: list[Turn], name: str, column: str) -> None:
    if (same := _num_shared(turns, prompt)) < len(prompt):
        raise BadRow(
            "prompt_differs",
            f"{name} is a whole conversation and {column} holds other turns, from {column}[{same}] on; "
            "expected the conversation to begin with them, or only the answer",
        )


# --- pairs


def _pair(
    chosen: _Conversation,
    rejected: _Conversation,
    names: tuple[str, str],
    margin: float,
    tools: tuple[Message, ...],
    notes: set[str],
) -> tuple[Record, Record]:
    """Two answers as Records that are targets from where they part. Equal ones part at their last answer."""
    if isinstance(chosen, Record):
        assert isinstance(rejected, Record)
        return replace(chosen, margin=margin), replace(rejected, side=1, margin=margin)
    assert not isinstance(rejected, Record)
    fork = _num_shared(chosen, rejected)
    if fork == len(chosen) == len(rejected):
        fork = min(_start_of_answer(chosen), fork - 1)
    records = []
    for turns, name in zip((chosen, rejected), names, strict=True):
        _check_fork(turns, fork, name, names)
        records.append(as_chat(_judged(turns, fork, name), name, tools, notes))
    return replace(records[0], margin=margin), replace(records[1], side=1, margin=margin)


def _check_fork(turns: list[Turn], fork: int, name: str, names: tuple[str, str]) -> None:
    if fork == len(turns):
        other = names[1] if name == names[0] else names[0]
        said = f"{other} is {name} with more turns behind it"
    elif turns[fork][0]["role"] != "assistant":
        said = f"{names[0]} and {names[1]} part at turn {fork}, in {name} a {turns[fork][0]['role']} turn"
    else:
        return
    raise BadRow("no_fork", f"{said}; expected two answers to one prompt")


def _judged(turns: list[Turn], start: int, name: str) -> list[Turn]:
    """The turns with their weights: 1 for the assistant's from `start` on, unless they ask for 0."""
    judged: list[Turn] = []
    for i, (message, weight) in enumerate(turns):
        is_answer = i >= start and message["role"] == "assistant"
        if is_answer and weight not in (None, 0, 1):
            said = f"turn {i} of {name} asks for weight {weight:g}"
            raise BadRow("bad_weight", f"{said}; an answer that is judged counts whole (1) or not at all (0)")
        judged.append((message, float(is_answer) if weight is None or not is_answer else weight))
    return judged


def _num_shared(chosen: list[Turn], rejected: list[Turn]) -> int:
    """The number of turns that both begin with."""
    pairs = zip(chosen, rejected, strict=False)
    different = (i for i, ((a, _), (b, _)) in enumerate(pairs) if a != b)
    return next(different, min(len(chosen), len(rejected)))


def _start_of_answer(turns: list[Turn]) -> int:
    """The turn behind the last that is the user's or the system prompt."""
    asked = [i for i, (message, _) in enumerate(turns) if message["role"] in ("user", "system")]
    return asked[-1] + 1 if asked else 0


def _number(value: Any, where: str, reason: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_WEIGHT:
        found = f"{value!a}" if isinstance(value, str) else kind_of(value)
        raise BadRow(reason, f"{where} is {found}; expected a number")
    return float(value)

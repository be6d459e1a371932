"""Rows that judge answers: each form of each format gives the Records written here, each fault its words."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.data.formats import detect_format
from tunesmith.data.preferences import read_answers
from tunesmith.data.records import BadRow, Record

ASK = {"role": "user", "content": "2+2?"}
YES = {"role": "assistant", "content": "4"}
NO = {"role": "assistant", "content": "5"}
BRIEF = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}


def answers(row: dict[str, Any], format: str, columns: dict[str, str] | None = None) -> list[Record]:
    """The records of a row that has nothing odd about it."""
    records, notes = read_answers(row, format, columns or {})
    assert notes == ()
    return list(records)


def bad(row: dict[str, Any], format: str = "pairs") -> str:
    with pytest.raises(BadRow) as caught:
        read_answers(row, format, {})
    return str(caught.value)


def answer(side: int, context: list[Any], answer: list[Any], margin: float = 0.0, **more: Any) -> Record:
    """A record whose assistant turns of `answer`, and no other, are targets."""
    weights = [0.0] * len(context) + [float(turn["role"] == "assistant") for turn in answer]
    return Record(messages=(*context, *answer), weights=tuple(weights), side=side, margin=margin, **more)


# --- pairs


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": YES, "rejected": {"from": "gpt", "value": "5"}},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": "2+2?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [NO]},
        {"prompt": "2+2?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"messages": [ASK], "chosen": "4", "rejected": NO},
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": YES, "rejected": NO},
        {"conversation": [{"from": "human", "value": "2+2?"}], "chosen": "4", "rejected": "5"},
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    ],
)
def test_a_pair_is_the_same_two_records_however_it_is_written(row: dict[str, Any]) -> None:
    assert answers(row, "pairs") == [answer(0, [ASK], [YES]), answer(1, [ASK], [NO])]
    assert answers(row | {"margin": 2, "prompt": row.get("prompt")}, "pairs")[1].margin == 2


def test_strings_are_raw_text_and_keep_their_margin() -> None:
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 0.5}
    assert answers(row, "pairs") == [
        Record(prompt="2+2=", completion="4", margin=0.5),
        Record(prompt="2+2=", completion="5", side=1, margin=0.5),
    ]


def test_system_tools_and_columns_reach_both_answers() -> None:
    row = {
        "q": [ASK],
        "chosen": [CALLS, RESULT, YES],
        "rejected": "5",
        "system": "Be brief.",
        "tools": [TOOL],
    }
    assert answers(row, "pairs", {"q": "prompt"}) == [
        answer(0, [BRIEF, ASK], [CALLS, RESULT, YES], tools=(TOOL,)),
        answer(1, [BRIEF, ASK], [NO], tools=(TOOL,)),
    ]


def test_turns_that_both_answers_begin_with_are_context_whatever_they_ask_for() -> None:
    shared = [ASK, YES | {"train": True}, ASK | {"weight": 1}]
    more = {"role": "assistant", "content": "Four."}
    row = {"chosen": [*shared, YES, ASK, more], "rejected": [*shared, NO, ASK, more | {"train": False}]}
    chosen, rejected = answers(row, "pairs")
    assert chosen.weights == (0, 0, 0, 1, 0, 1)
    assert rejected.weights == (0, 0, 0, 1, 0, 0)
    # The call and its result stand in both answers: only what follows them is judged.
    row = {"prompt": [ASK], "chosen": [CALLS, RESULT, YES], "rejected": [CALLS, RESULT, NO], "tools": [TOOL]}
    assert [record.weights for record in answers(row, "pairs")] == [(0, 0, 0, 1)] * 2


def test_a_leading_turn_of_sharegpt_that_is_not_the_humans_goes_as_it_does_for_sft() -> None:
    turns = [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "2+2?"}]
    records, notes = read_answers({"conversations": turns, "chosen": "4", "rejected": "5"}, "pairs", {})
    assert records == (answer(0, [ASK], [YES]), answer(1, [ASK], [NO]))
    assert notes == ("leading_turn_dropped",)


def test_the_prompt_column_of_rows_that_are_whole_conversations_is_not_read_twice() -> None:
    """As in UltraFeedback, where `prompt` is the question and `messages` the chosen conversation."""
    row = {"prompt": "2+2?", "messages": [ASK, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]}
    assert answers(row, "pairs") == [answer(0, [ASK], [YES]), answer(1, [ASK], [NO])]


# --- labels


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1", "desirable"])
def test_each_way_to_write_a_label_is_a_side(label: Any) -> None:
    opposite = {True: False, "true": "false", "True": "FALSE", "1": "0", "desirable": "undesirable"}[label]
    row = {"messages": [ASK, YES]}
    assert answers(row | {"label": label}, "labelled") == [answer(0, [ASK], [YES])]
    assert answers(row | {"label": opposite}, "labelled") == [answer(1, [ASK], [YES])]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, YES]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": [ASK], "completion": [YES]},
        {"prompt": [ASK], "completion": "4"},
        {"prompt": "2+2?", "completion": [YES]},
        {"instruction": "2+2?", "output": "4"},
    ],
)
def test_a_labelled_answer_is_the_same_record_however_it_is_written(row: dict[str, Any]) -> None:
    assert detect_format([row | {"label": False}], "f", of_preferences=True) == "labelled"
    assert answers(row | {"label": False}, "labelled") == [answer(1, [ASK], [YES])]


def test_a_label_judges_the_answer_to_the_last_question_with_its_calls() -> None:
    row = {"messages": [ASK, YES, ASK, CALLS, RESULT, YES], "tools": [TOOL], "label": True}
    assert answers(row, "labelled") == [answer(0, [ASK, YES, ASK], [CALLS, RESULT, YES], tools=(TOOL,))]
    row = {"prompt": "2+2=", "completion": "4", "label": 0}
    assert answers(row, "labelled") == [Record(prompt="2+2=", completion="4", side=1)]


# --- rankings


def test_a_ranking_is_all_its_pairs_best_first() -> None:
    expected = [("a", "b"), ("a", "c"), ("b", "c")]
    for row in (
        {"answers": ["a", "b", "c"]},
        {"responses": ["b", "c", "a"], "scores": [3, -1, 3.5]},
        {"completions": [[ASK, {"role": "assistant", "content": text}] for text in "abc"]},
    ):
        records = answers({"prompt": [ASK]} | row, "ranked")
        said = [record.messages[-1]["content"] for record in records]
        assert list(zip(said[::2], said[1::2], strict=True)) == expected
        assert [record.side for record in records] == [0, 1] * 3
        margins = [0.5, 4.5, 4] if "scores" in row else [0, 0, 0]
        assert [record.margin for record in records] == [margin for margin in margins for _ in range(2)]
        assert all(record.weights == (0, 1) for record in records)


def test_equal_scores_make_no_pair() -> None:
    row = {"prompt": "a", "answers": ["b", "c", "d"], "scores": [1, 0, 1]}
    records, notes = read_answers(row, "ranked", {})
    assert [(r.completion, r.side, r.margin) for r in records] == [
        ("b", 0, 1),
        ("c", 1, 1),
        ("d", 0, 1),
        ("c", 1, 1),
    ]
    assert notes == ("tied_answers",)
    assert read_answers(row | {"scores": [1, 1, 1]}, "ranked", {})[0] == ()
    assert answers({"prompt": "a", "answers": ["b"]}, "ranked") == []


# --- bad rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "4"}, "missing_field: the row has no 'rejected'; it has 'chosen'"),
        ({"chosen": None, "rejected": "5"}, "null_field: chosen is null; expected a value"),
        (
            {"chosen": "4", "rejected": "5"},
            "missing_field: the row has no 'prompt'; it has 'chosen', 'rejected'",
        ),
        ({"prompt": None, "chosen": [YES], "rejected": [NO]}, "null_field: prompt is null; expected a value"),
        (
            {"prompt": 3, "chosen": "4", "rejected": "5"},
            "not_a_string: prompt is the number 3; expected a string or a list of messages",
        ),
        ({"prompt": [], "chosen": "4", "rejected": "5"}, "empty: prompt is an empty list; expected turns"),
        (
            {"prompt": "a", "chosen": " ", "rejected": "5"},
            "empty_answer: chosen is empty; expected the answer",
        ),
        (
            {"prompt": [ASK], "chosen": YES, "rejected": [{"role": "assistant", "content": ""}]},
            "empty_answer: rejected[0].content is empty; expected the answer",
        ),
        (
            {"prompt": [ASK], "chosen": YES, "rejected": 5},
            "not_a_string: rejected is the number 5; expected a string, a message or a list of messages",
        ),
        (
            {"prompt": [ASK], "chosen": YES, "rejected": ASK},
            "no_fork: chosen is rejected with more turns behind it; expected two answers to one prompt",
        ),
        (
            {"prompt": [BRIEF, ASK], "chosen": [ASK, YES], "rejected": "5"},
            "prompt_differs: chosen is a whole conversation and prompt holds other turns, from prompt[0] on; "
            "expected the conversation to begin with them, or only the answer",
        ),
        (
            {"chosen": [ASK, YES], "rejected": [{"role": "user", "content": "3+3?"}, NO]},
            "no_fork: chosen and rejected part at turn 0, in chosen a user turn; "
            "expected two answers to one prompt",
        ),
        (
            {"chosen": [ASK, YES], "rejected": [ASK, YES, ASK, NO]},
            "no_fork: rejected is chosen with more turns behind it; expected two answers to one prompt",
        ),
        (
            {"prompt": [ASK], "chosen": [YES | {"weight": 0.5}], "rejected": [NO]},
            "bad_weight: turn 1 of chosen asks for weight 0.5; an answer that is judged counts whole (1) or "
            "not at all (0)",
        ),
        (
            {"prompt": [ASK], "chosen": [YES | {"train": False}], "rejected": [NO]},
            "no_assistant_turn: every assistant turn has weight 0; expected one to learn",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"},
            "bad_margin: margin is 'big'; expected a number",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
            "bad_margin: margin is true; expected a number",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be brief."},
            "not_a_list: the row has system, but its prompt and answers are strings, for which no template "
            "is used; expected prompt to be a list of messages",
        ),
    ],
)
def test_a_bad_pair_is_named_with_what_was_found_and_expected(row: dict[str, Any], said: str) -> None:
    assert bad(row) == said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, YES]}, "missing_field: the row has no 'label'; it has 'messages'"),
        ({"messages": [ASK, YES], "label": None}, "null_field: label is null; expected a value"),
        (
            {"messages": [ASK, YES], "label": "good"},
            "bad_label: label is 'good'; expected true (desirable) or false",
        ),
        (
            {"messages": [ASK, YES], "label": 2},
            "bad_label: label is the number 2; expected true (desirable) or false",
        ),
        (
            {"messages": [ASK, YES, ASK], "label": True},
            "no_assistant_turn: nothing follows the last user turn; expected the answer that label judges",
        ),
        (
            {"prompt": "a", "label": True},
            "missing_field: the row has no 'completion'; it has 'prompt', 'label'",
        ),
    ],
)
def test_a_bad_labelled_row_is_named(row: dict[str, Any], said: str) -> None:
    assert bad(row, "labelled") == said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "missing_field: the row has no 'answers'; it has 'prompt'"),
        ({"answers": "b"}, "not_a_list: answers is a string; expected a list"),
        ({"answers": []}, "empty: answers is an empty list; expected answers, the best first"),
        ({"prompt": "a", "answers": ["b", ""]}, "empty_answer: answers[1] is empty; expected the answer"),
        (
            {"prompt": "a", "responses": ["b", {"text": "c"}]},
            "missing_field: responses[1] has no 'role'; it has 'text'",
        ),
        (
            {"prompt": "a", "answers": ["b", "c"], "scores": [1]},
            "bad_scores: scores has 1 items and answers 2; expected a number for each answer",
        ),
        (
            {"prompt": "a", "answers": ["b", "c"], "scores": [1, None]},
            "bad_scores: scores[1] is null; expected a number",
        ),
    ],
)
def test_a_bad_ranking_is_named(row: dict[str, Any], said: str) -> None:
    assert bad(row, "ranked") == said

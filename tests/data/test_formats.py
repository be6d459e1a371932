"""Each format gives the Record written here by hand; each way a row can be bad has its own words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import detect_format, read_record
from tunesmith.data.records import BadRow, Record
from tunesmith.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
SCHEMA = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def chat(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def shared_gpt(*turns: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": side, "value": value} for side, value in turns], **columns}


def record(row: dict[str, Any], format: str = "messages", columns: dict[str, str] | None = None) -> Record:
    """The record of a row that has nothing odd about it."""
    made, notes = read_record(row, format, columns or {})
    assert notes == ()
    return made


def bad(row: dict[str, Any], format: str = "messages", columns: dict[str, str] | None = None) -> str:
    with pytest.raises(BadRow) as caught:
        read_record(row, format, columns or {})
    return str(caught.value)


# --- messages


def test_messages_keep_what_a_template_reads_and_nothing_else() -> None:
    made = record(
        chat(
            {"role": "developer", "content": "Add."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
                "name": "Al",
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", **CALL}],
                "function_call": None,
            },
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {
                "role": "assistant",
                "content": "4",
                "reasoning_content": "Easy.",
                "train": None,
                "weight": None,
            },
            tools=[TOOL],
            id=7,
        )
    )
    assert made == Record(
        messages=(
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "2+2?", "name": "Al"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "4", "reasoning_content": "Easy."},
        ),
        weights=(None,) * 5,
        tools=(TOOL,),
    )


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_tool_calls_old_and_new_have_their_arguments_as_objects(arguments: Any) -> None:
    function = {"name": "add", "arguments": arguments}
    old = {"role": "assistant", "function_call": function}
    flat = {"role": "assistant", "content": "", "tool_calls": [function]}
    assert record(chat(USER, old)).messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert record(chat(USER, flat)).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "function", "name": "add", "content": "4"}
    assert record(chat(USER, old, result, ANSWER)).messages[2] == {**result, "role": "tool"}


def test_tools_may_be_text_or_bare_schemas() -> None:
    assert record(chat(USER, ANSWER, tools=json.dumps([TOOL]))).tools == (TOOL,)
    assert record(chat(USER, ANSWER, tools="[]", functions=None)).tools == ()
    assert record(chat(USER, ANSWER, tools=[{"type": "retrieval"}])).tools == ({"type": "retrieval"},)
    for given in ({"tools": [SCHEMA]}, {"functions": [SCHEMA]}, {"tools": [{"type": "function", **SCHEMA}]}):
        made, notes = read_record(chat(USER, ANSWER, **given), "messages", {})
        assert (made.tools, notes) == ((TOOL,), ("tools_wrapped",))


def test_train_and_weight_become_weights_and_do_not_reach_the_template() -> None:
    made = record(
        chat(
            {**USER, "train": True},
            {**ANSWER, "train": False},
            {**USER, "weight": 0},
            {**ANSWER, "weight": 0.5, "train": True},
            USER,
            ANSWER,
        )
    )
    assert made.weights == (1.0, 0.0, 0.0, 0.5, None, None)
    assert made.messages == (USER, ANSWER) * 3


def test_fields_that_no_template_is_given_are_noted_and_so_are_trailing_turns() -> None:
    assert record(chat(USER, {**ANSWER, "thinking": None})).messages == (USER, ANSWER)
    made, notes = read_record(chat(USER, {**ANSWER, "thinking": "Hm."}, USER), "messages", {})
    assert made.messages == (USER, ANSWER, USER)
    assert notes == ("trailing_turns_without_answer", "turn_fields_ignored")


# --- sharegpt


def test_sharegpt_sides_calls_and_results_become_messages() -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    made = record(
        shared_gpt(
            ("human", "2+2?"),
            ("gpt", "Let me see."),
            ("function_call", json.dumps(call)),
            ("observation", "4"),
            ("tool_call", json.dumps([call, call])),
            ("function_response", "4"),
            ("tool", "4"),
            ("chatgpt", "4"),
            system="Add.",
            tools=json.dumps([TOOL]),
        ),
        "sharegpt",
    )
    assert made.messages == (
        {"role": "system", "content": "Add."},
        USER,
        {"role": "assistant", "content": "Let me see."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "4"},
        ANSWER,
    )
    assert made.tools == (TOOL,)


def test_a_leading_turn_that_is_not_the_humans_is_dropped_once_and_noted() -> None:
    dropped = ("leading_turn_dropped",)
    made, notes = read_record(shared_gpt(("gpt", "Hi"), ("human", "2+2?"), ("gpt", "4")), "sharegpt", {})
    assert (made.messages, notes) == ((USER, ANSWER), dropped)
    made, notes = read_record(
        shared_gpt(("system", "S"), ("gpt", "Hi"), ("user", "2+2?"), ("bot", "4")), "sharegpt", {}
    )
    assert (made.messages, notes) == (({"role": "system", "content": "S"}, USER, ANSWER), dropped)
    made, notes = read_record(shared_gpt(("gpt", "Hi"), ("gpt", "4")), "sharegpt", {})
    assert (made.messages, notes) == ((ANSWER,), dropped)
    assert bad(shared_gpt(("system", "S")), "sharegpt").startswith("no_assistant_turn: the roles are system;")
    only = bad(shared_gpt(("gpt", "Hi")), "sharegpt")
    assert (
        only
        == "no_assistant_turn: no turn is left but the leading one, which is not the human's and is dropped"
    )
    assert record(chat(ANSWER, USER, ANSWER)).messages == (ANSWER, USER, ANSWER)


def test_either_chat_format_takes_turns_of_the_other() -> None:
    assert record({"conversations": [USER, ANSWER]}, "sharegpt") == record(chat(USER, ANSWER))
    assert record({"conversation": [USER, ANSWER]}, "sharegpt") == record(chat(USER, ANSWER))
    turns = [{"from": "human", "value": "2+2?"}, {"from": "model", "value": "4", "weight": 2}]
    assert record({"messages": turns}) == Record((USER, ANSWER), (None, 2.0))


def test_the_row_system_prompt_comes_first_and_may_not_contradict_the_turns() -> None:
    system = {"role": "system", "content": "S"}
    expected = Record((system, USER, ANSWER), (None,) * 3)
    assert (
        record(chat(USER, ANSWER, system="S")) == record(chat(system, USER, ANSWER, system="S")) == expected
    )
    assert record(chat(USER, ANSWER, system="")) == record(chat(USER, ANSWER, system=None))
    assert bad(chat(system, USER, ANSWER, system="T")).startswith("two_system_prompts: ")


# --- alpaca, prompt_completion, text


def test_alpaca_joins_instruction_and_input_by_a_line_break_after_the_history() -> None:
    row = {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Ho"]], "system": "S"}
    assert record(row, "alpaca") == Record(
        messages=(
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "Add.\n2+2"},
            ANSWER,
        ),
        weights=(None,) * 5,
    )
    for empty in ({}, {"input": ""}, {"input": None, "history": None}):
        made = record({"instruction": "2+2?", "output": "4", **empty}, "alpaca")
        assert made.messages == (USER, ANSWER)


def test_prompt_and_completion_are_raw_text_or_both_messages() -> None:
    text = record({"prompt": "2+2=", "completion": "4"}, "prompt_completion")
    assert text == Record(prompt="2+2=", completion="4")
    assert not text.is_chat
    turns = record({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt_completion")
    assert turns == Record((USER, ANSWER, USER, ANSWER), (0.0, 0.0, 0.0, None))
    mixed = bad({"prompt": [USER], "completion": "4"}, "prompt_completion")
    assert mixed == (
        "not_a_string: prompt is a list and completion is a string; "
        "expected two strings or two lists of messages"
    )


def test_text_is_all_completion() -> None:
    assert record({"text": " a\n"}, "text") == Record(completion=" a\n")


def test_columns_are_renamed_and_a_mapped_one_wins() -> None:
    columns = {"question": "instruction", "answer": "output"}
    row = {"question": "2+2?", "answer": "4", "output": "unused"}
    assert record(row, "alpaca", columns).messages == (USER, ANSWER)
    assert record({"input": "2+2?", "output": "4"}, "alpaca", {"input": "instruction"}).messages == (
        USER,
        ANSWER,
    )
    assert bad({"questoin": "2+2?", "answer": "4"}, "alpaca", columns) == (
        "missing_field: the row has no 'question', which columns: maps to instruction; "
        "it has 'questoin', 'answer'. Did you mean 'questoin'?"
    )


# --- bad rows


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "empty: messages is an empty list; expected turns"),
        (
            [USER, ANSWER, {"role": "asistant", "content": "4"}],
            "unknown_role: messages[2].role is 'asistant'; expected system, user, assistant or tool. "
            "Did you mean 'assistant'?",
        ),
        (
            [{"role": "User", "content": "a"}],
            "unknown_role: messages[0].role is 'User'; expected system, user, assistant or tool. "
            "Did you mean 'user'?",
        ),
        (
            [{"from": "narrator", "value": "a"}],
            "unknown_role: messages[0].from is 'narrator'; "
            "expected system, human, gpt, function_call or observation",
        ),
        (["hi"], "not_an_object: messages[0] is a string; expected an object"),
        ([{"role": "user"}], "missing_field: messages[0] has no 'content'; it has 'role'"),
        (
            [{"role": "user", "contents": "a"}],
            "missing_field: messages[0] has no 'content'; it has 'role', 'contents'. "
            "Did you mean 'contents'?",
        ),
        ([{"role": "user", "content": None}], "null_field: messages[0].content is null; expected a value"),
        (
            [USER, {"role": "assistant", "content": None}],
            "null_field: messages[1].content is null; expected a value",
        ),
        (
            [{"role": "user", "content": 4}],
            "not_a_string: messages[0].content is the number 4; expected a string",
        ),
        ([{"role": True, "content": ""}], "not_a_string: messages[0].role is true; expected a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "unsupported_content: messages[0].content[0].type is 'image_url'; expected 'text', the only kind",
        ),
        (
            [USER, {"role": "assistant", "content": " \n"}],
            "empty_answer: messages[1].content is empty; expected the answer",
        ),
        ([USER], "no_assistant_turn: the roles are user; expected an answer to learn"),
        (
            [USER, {**ANSWER, "train": False}],
            "no_assistant_turn: every assistant turn has weight 0; expected one to learn",
        ),
        (
            [USER, {"role": "system", "content": "S"}, ANSWER],
            "wrong_order: messages[1] is a system turn; expected it first or not at all",
        ),
        (
            [USER, {"role": "tool", "content": "4"}, ANSWER],
            "wrong_order: messages[1] is a tool turn after a user turn; expected it after a call",
        ),
        (
            [{"role": "tool", "content": "4"}, ANSWER],
            "wrong_order: messages[0] is a tool turn after nothing; expected it after a call",
        ),
        ([USER, {**ANSWER, "train": "no"}], "bad_weight: messages[1].train is 'no'; expected true or false"),
        (
            [USER, {**ANSWER, "weight": -1}],
            "bad_weight: messages[1].weight is -1; expected a number of 0 or more",
        ),
        (
            [USER, {**ANSWER, "weight": True}],
            "bad_weight: messages[1].weight is True; expected a number of 0 or more",
        ),
        (
            [USER, {**ANSWER, "weight": 1, "train": False}],
            "bad_weight: messages[1] has train false and weight 1, which contradict each other; "
            "give one of them",
        ),
        ([USER, {**ANSWER, "name": 3}], "not_a_string: messages[1].name is the number 3; expected a string"),
    ],
)
def test_a_bad_turn_is_named_with_what_was_found_and_expected(turns: list[Any], said: str) -> None:
    assert bad({"messages": turns}) == said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"name": "f", "arguments": "{"},
            ".arguments is not sound JSON (not_json): column 2: Expecting property name",
        ),
        ({"name": "f", "arguments": '{"a": NaN}'}, ".arguments is not sound JSON (nan): holds NaN"),
        ({"name": "f", "arguments": "[1]"}, ".arguments is a list; expected an object, {} for none"),
        ({"name": "f"}, ".arguments is missing; expected an object, {} for none"),
        ({"name": "f", "arguments": None}, ".arguments is null; expected an object, {} for none"),
        ({"arguments": {}}, " is an object without a name; expected name and arguments"),
        ("f()", " is a string without a name; expected name and arguments"),
    ],
)
def test_a_bad_tool_call_is_named(call: Any, said: str) -> None:
    for turn in ({"tool_calls": [call]}, {"tool_calls": [{"function": call}]}):
        found = bad(chat(USER, {"role": "assistant", "content": None, **turn}))
        if call != "f()" or turn["tool_calls"] == [call]:
            assert found.startswith(f"bad_tool_call: messages[1].tool_calls[0]{said}")
    found = bad(shared_gpt(("human", "2+2?"), ("function_call", json.dumps([call]))), "sharegpt")
    assert found.startswith(f"bad_tool_call: conversations[1].value[0]{said}")


def test_tool_calls_out_of_place_are_bad() -> None:
    assert bad(chat({**USER, "tool_calls": [CALL]})) == (
        "bad_tool_call: messages[0] is a user turn with tool calls; expected an assistant's"
    )
    both = {**ANSWER, "tool_calls": [CALL], "function_call": CALL["function"]}
    assert (
        bad(chat(USER, both))
        == "bad_tool_call: messages[1] has tool_calls and function_call; give one of them"
    )
    assert bad(chat(USER, {**ANSWER, "tool_calls": {}})).endswith("tool_calls is an object; expected a list")
    assert bad(shared_gpt(("human", "a"), ("function_call", "[]")), "sharegpt") == (
        "bad_tool_call: conversations[1].value is an empty list; expected a call"
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tools": "[{"}, "bad_tools: tools is not sound JSON (not_json): column 3: Expecting property name"),
        ({"tools": {"name": "f"}}, "bad_tools: tools is an object; expected a list of function schemas"),
        ({"tools": ["f"]}, "bad_tools: tools[0] is a string; expected a function schema"),
        (
            {"functions": [{"title": "f"}]},
            "bad_tools: functions[0] is no function schema: it has no name; it has 'title'",
        ),
        (
            {"tools": [TOOL], "functions": [TOOL]},
            "bad_tools: the row has tools and functions; give one of them",
        ),
    ],
)
def test_bad_tools_are_named(columns: dict[str, Any], said: str) -> None:
    assert bad(chat(USER, ANSWER, **columns)).startswith(said)


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        (
            "messages",
            {"mesages": []},
            "missing_field: the row has no 'messages'; it has 'mesages'. Did you mean 'mesages'?",
        ),
        ("messages", {"messages": None}, "null_field: messages is null; expected a value"),
        ("messages", {"messages": "[]"}, "not_a_list: messages is a string; expected a list"),
        ("sharegpt", {}, "missing_field: the row has no 'conversations'; it has nothing"),
        ("alpaca", {"instruction": "a"}, "missing_field: the row has no 'output'; it has 'instruction'"),
        ("alpaca", {"instruction": "a", "output": None}, "null_field: output is null; expected a value"),
        (
            "alpaca",
            {"instruction": "a", "output": " "},
            "empty_answer: output is empty; expected text to learn",
        ),
        (
            "alpaca",
            {"instruction": " ", "output": "a"},
            "empty: instruction and input are empty; expected a task",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["q"]]},
            "not_a_pair: history[0] has 1 items; expected [question, answer]",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["q", ""]]},
            "empty_answer: history[0][1] is empty; expected the answer",
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": ""},
            "empty_answer: completion is empty; expected text to learn",
        ),
        (
            "prompt_completion",
            {"prompt": 1, "completion": "b"},
            "not_a_string: prompt is the number 1; expected a string",
        ),
        ("text", {"text": "\n"}, "empty: text is empty; expected text to learn"),
        ("text", {"text": ["a"]}, "not_a_string: text is a list; expected a string"),
    ],
)
def test_a_bad_column_is_named(format: str, row: dict[str, Any], said: str) -> None:
    assert bad(row, format) == said


# --- detection


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [], "prompt": "a", "text": "a"}, "messages"),
        ({"conversations": [], "system": ""}, "sharegpt"),
        ({"conversation": []}, "sharegpt"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "prompt": "b", "messages": None}, "text"),
    ],
)
def test_the_format_is_told_by_the_columns(row: dict[str, Any], format: str) -> None:
    assert detect_format([row], "f") == format
    other = {"text": "x"} if format != "text" else {"messages": []}
    assert detect_format([{"junk": 1}, other, row, row], "f") == format


@pytest.mark.parametrize(
    ("keys", "mapping"),
    [
        (["question", "answer"], "{question: instruction, answer: output}"),
        (["instruction", "response"], "{response: output}"),
        (["mesages"], "{mesages: messages}"),
        (["prompt", "response"], "{response: completion}"),
        (["id", "content"], "{content: text}"),
    ],
)
def test_unknown_columns_are_answered_with_the_mapping_that_mends_them(keys: list[str], mapping: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format([dict.fromkeys(keys, "a")], "data/a.jsonl")
    lines = str(caught.value).split("\n")
    assert (
        lines[0] == f"data/a.jsonl: the format cannot be told from the columns {', '.join(map(repr, keys))}."
    )
    assert [line.split(" needs ") for line in lines[1:-1]] == [
        ["  messages          ", "messages"],
        ["  sharegpt          ", "conversations or conversation"],
        ["  alpaca            ", "instruction and output"],
        ["  prompt_completion ", "prompt and completion"],
        ["  text              ", "text"],
    ]
    assert lines[-1] == f"Map them: columns: {mapping}."


def test_columns_without_a_likely_mapping_get_no_made_up_one() -> None:
    with pytest.raises(DataError, match=r"Map them to one of these with columns: \{\.\.\.\}\.$"):
        detect_format([{"x": 1, "y": 2}], "f")


# --- the real sets


def shared(name: str) -> list[dict[str, Any]]:
    text = (SHARED / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


@needs_shared
def test_the_glaive_set_gives_every_turn_call_and_schema() -> None:
    rows = shared("glaive_toolcall_en_demo.json")
    assert detect_format(rows[:32], "f") == "sharegpt"
    read = [read_record(row, "sharegpt", {}) for row in rows]
    assert Counter(message["role"] for made, _ in read for message in made.messages) == {
        "user": 746,
        "assistant": 746 + 211,
        "tool": 211,
    }
    for row, (made, notes) in zip(rows, read, strict=True):
        bare = json.loads(row["tools"])
        assert [tool["function"] for tool in made.tools] == bare
        assert notes == (("tools_wrapped",) if bare else ())
        calls = [t["value"] for t in row["conversations"] if t["from"] == "function_call"]
        assert [m["tool_calls"][0]["function"] for m in made.messages if "tool_calls" in m] == list(
            map(json.loads, calls)
        )
    assert sum(bool(made.tools) for made, _ in read) == 300 - 109


@needs_shared
def test_the_alpaca_kto_and_gsm8k_sets_are_read_whole() -> None:
    rows = shared("alpaca_en_demo.json")
    assert detect_format(rows[:32], "f") == "alpaca"
    for row in rows:
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert [m["content"] for m in record(row, "alpaca").messages] == [question, row["output"]]
    rows = shared("kto_en_demo.json")
    assert detect_format(rows[:32], "f") == "messages"
    assert [list(record(row).messages) for row in rows] == [row["messages"] for row in rows]
    rows = shared("gsm8k_train.jsonl")
    columns = {"question": "prompt", "answer": "completion"}
    for row in rows:
        expected = Record(prompt=row["question"], completion=row["answer"])
        assert record(row, "prompt_completion", columns) == expected

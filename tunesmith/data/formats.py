r"""Rows in the shapes that data sets come in, made Records: which format it is, and one reader for each.

One row of each format:

    messages           {"messages": [{"role": "system", "content": "Be brief."},
                                     {"role": "user", "content": "2+2?"},
                                     {"role": "assistant", "content": "4", "weight": 0.5}], "tools": [...]}
    sharegpt           {"conversations": [{"from": "human", "value": "2+2?"},
                                          {"from": "function_call", "value": "{\"name\": \"add\", ...}"},
                                          {"from": "observation", "value": "4"},
                                          {"from": "gpt", "value": "4"}], "system": "", "tools": "[...]"}
    alpaca             {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Ho"]]}
    prompt_completion  {"prompt": "2+2=", "completion": "4"}, or both as lists of messages
    text               {"text": "Two and two is four."}

Known by all chat formats: a turn is {role, content} or {from, value}; a null counts as absent, since tables
fill absent fields with null; `"train": true|false` or `"weight": number` on a turn is its loss weight.
Columns of a row that its format does not name are left alone; fields of a turn that are not read are noted.
Rows that judge answers (pairs, labelled, ranked) are told apart here and read in preferences.py.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from tunesmith.data.decode import parse_json
from tunesmith.data.records import BadRow, Record
from tunesmith.errors import DataError

FormatName = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "text", "pairs", "labelled", "ranked"
]
PREFERENCE_FORMATS: tuple[FormatName, ...] = ("pairs", "labelled", "ranked")
_T = TypeVar("_T")
Message = dict[str, Any]
Turn = tuple[Message, float | None]  # a message and the loss weight it asks for

# Sets of columns that each make a row readable, most telling format first: a row with `messages` and `prompt`
# (UltraChat has both) is a conversation.
_NEEDS: dict[FormatName, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
_PREFERENCE_NEEDS: dict[FormatName, tuple[tuple[str, ...], ...]] = {
    "pairs": (("chosen", "rejected"),),
    "labelled": (
        ("messages", "label"),
        ("conversations", "label"),
        ("conversation", "label"),
        ("prompt", "completion", "label"),
        ("instruction", "output", "label"),
    ),
    "ranked": (("answers",), ("responses",), ("completions",)),
}
_SYNONYMS = {
    "messages": ("message", "dialog", "dialogue", "dialogs", "chat", "chats", "turns"),
    "instruction": ("question", "query", "problem", "request", "user", "human"),
    "output": ("answer", "response", "solution", "target", "assistant", "reply"),
    "prompt": ("context", "source", "input"),
    "completion": ("continuation", "target", "output", "response", "answer"),
    "text": ("content", "document", "article", "body", "passage"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted", "winner", "better"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "loser", "worse"),
    "label": ("kto_tag", "desirable", "is_desirable", "thumbs_up", "liked"),
    "answers": ("candidates", "generations", "outputs", "ranking"),
}

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_SHAREGPT_FIELDS = frozenset({"from", "value", "train", "weight"})
_OPENAI_FIELDS = frozenset({"role", "content", "train", "weight", "tool_calls", "function_call"})
_OPENAI_FIELDS |= {"reasoning_content", "name", "tool_call_id"}
_NOUNS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
MAX_WEIGHT = 2.0**127  # weights become float32


def detect_format(rows: Sequence[dict[str, Any]], name: str, *, of_preferences: bool = False) -> FormatName:
    """The format that most of these rows, their columns renamed, fit: one of `PREFERENCE_FORMATS` with
    `of_preferences`, else one of the others. `name` is the source, for messages.

    Raises DataError when no row fits any: what was found, what each needs, and a `columns:` that may do."""
    if found := fitting_format(rows, of_preferences=of_preferences):
        return found
    known = _PREFERENCE_NEEDS if of_preferences else _NEEDS
    keys = list(dict.fromkeys(key for row in rows for key in row))
    needs = "\n".join(
        f"  {fmt:<18} needs {' or '.join(' and '.join(columns) for columns in sets)}"
        for fmt, sets in known.items()
    )
    mapping = _suggest_columns(keys, known)
    fix = f"Map them: columns: {{{mapping}}}" if mapping else "Map them to one of these with columns: {...}"
    raise DataError(
        f"{name}: the format cannot be told from the columns {', '.join(map(repr, keys)) or '(none)'}.\n"
        f"{needs}\n{fix}."
    )


def fitting_format(rows: Sequence[dict[str, Any]], *, of_preferences: bool) -> FormatName | None:
    """The same, or None where no row fits any."""
    known = _PREFERENCE_NEEDS if of_preferences else _NEEDS
    fits = Counter(fmt for row in rows if (fmt := _format_of(row, known)))
    return fits.most_common(1)[0][0] if fits else None


def _format_of(
    row: dict[str, Any], known: Mapping[FormatName, tuple[tuple[str, ...], ...]]
) -> FormatName | None:
    for fmt, sets in known.items():
        if any(all(row.get(column) is not None for column in columns) for columns in sets):
            return fmt
    return None


def _suggest_columns(keys: Sequence[str], known: Mapping[FormatName, tuple[tuple[str, ...], ...]]) -> str:
    """`question: instruction, answer: output`, for the first format whose columns all have a stand-in."""
    for fmt, sets in known.items():
        if fmt == "ranked":
            continue  # `answer` is one letter from `answers`, and no list of them
        for columns in sets:
            stand_ins = [_stand_in(column, keys) for column in columns]
            if all(stand_ins) and len(set(stand_ins)) == len(columns):
                pairs = zip(stand_ins, columns, strict=True)
                return ", ".join(f"{theirs}: {ours}" for theirs, ours in pairs if theirs != ours)
    return ""


def _stand_in(column: str, keys: Sequence[str]) -> str | None:
    if column in keys:
        return column
    known = [key for key in keys if key.lower() in _SYNONYMS.get(column, ())]
    return next(iter(known or difflib.get_close_matches(column, keys, n=1, cutoff=0.8)), None)


def read_record(row: dict[str, Any], format: str, columns: dict[str, str]) -> tuple[Record, tuple[str, ...]]:
    """The row as a Record, and notes: short fixed names of what was done to it or is odd about it.

    `columns` maps the file's names to ours. Raises BadRow for a row that cannot be trained on. Notes:
    leading_turn_dropped (sharegpt), trailing_turns_without_answer (nothing after the last answer can be a
    target), tools_wrapped (a bare function schema was put into the {"type": "function", ...} that servers
    send), and turn_fields_ignored (a turn has fields that no template is given)."""
    if columns:
        row = rename_columns(row, columns)
    notes: set[str] = set()
    if format == "messages":
        record = _read_conversation(row, ("messages",), notes)
    elif format == "sharegpt":
        record = _read_conversation(row, ("conversations", "conversation"), notes)
    elif format == "alpaca":
        record = _read_alpaca(row, notes)
    elif format == "prompt_completion":
        record = _read_prompt_completion(row, notes)
    else:
        assert format == "text", format
        record = Record(completion=text_of(row, "text", "empty"))
    return record, tuple(sorted(notes))


def rename_columns(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A column that is mapped wins over one that has our name already."""
    for theirs, ours in columns.items():
        if theirs not in row:
            said = f"the row has no {theirs!a}, which columns: maps to {ours}"
            raise BadRow("missing_field", f"{said}; {_has(row)}{_near(theirs, row)}")
    kept = {key: value for key, value in row.items() if key not in columns}
    return kept | {ours: row[theirs] for theirs, ours in columns.items()}


# --- the formats


def _read_conversation(row: dict[str, Any], names: tuple[str, ...], notes: set[str]) -> Record:
    """`messages` and `sharegpt` rows; they differ in the column's name and in the leading turn."""
    name = next((name for name in names if name in row), names[0])
    turns = read_turns(field_of(row, name), name, notes)
    turns = with_row_system(row, turns)
    if "conversations" in names:
        drop_leading_turn(turns, notes)
    return as_chat(turns, name, read_tools(row, notes), notes)


def drop_leading_turn(turns: list[Turn], notes: set[str]) -> None:
    """Drop the first turn of a sharegpt row (after the system prompt) if it is not the human's, as the Qwen
    and BELLE fine-tuning scripts do (`if source[0]["from"] != "human": source = source[1:]`): those data
    sets were cut from longer chats. Only that one turn goes, and it is noted."""
    first = 1 if turns[0][0]["role"] == "system" else 0
    if first < len(turns) and turns[first][0]["role"] != "user":
        del turns[first]
        notes.add("leading_turn_dropped")
        if not turns:
            said = "no turn is left but the leading one, which is not the human's and is dropped"
            raise BadRow("no_assistant_turn", said)


def _read_alpaca(row: dict[str, Any], notes: set[str]) -> Record:
    turns = read_instruction(row)
    turns.append(({"role": "assistant", "content": text_of(row, "output", "empty_answer")}, None))
    return as_chat(with_row_system(row, turns), "history", read_tools(row, notes), notes)


def read_instruction(row: dict[str, Any]) -> list[Turn]:
    """`history`, then `instruction` and `input` joined by a line break as LLaMA-Factory does."""
    instruction = text_of(row, "instruction", None)
    extra = text_of(row, "input", None) if row.get("input") is not None else ""
    question = "\n".join(part for part in (instruction, extra) if part)
    if not question.strip():
        raise BadRow("empty", "instruction and input are empty; expected a task")
    turns: list[Turn] = []
    for i, pair in enumerate(list_of(row.get("history") or [], "history")):
        if len(list_of(pair, f"history[{i}]")) != 2:
            raise BadRow("not_a_pair", f"history[{i}] has {len(pair)} items; expected [question, answer]")
        for j, role in enumerate(("user", "assistant")):
            turns.append(({"role": role, "content": _string(pair[j], f"history[{i}][{j}]")}, None))
            if role == "assistant" and not pair[j].strip():
                raise BadRow("empty_answer", f"history[{i}][1] is empty; expected the answer")
    turns.append(({"role": "user", "content": question}, None))
    return turns


def _read_prompt_completion(row: dict[str, Any], notes: set[str]) -> Record:
    prompt, completion = field_of(row, "prompt"), field_of(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = read_turns(prompt, "prompt", notes)
        turns: list[Turn] = [(message, 0.0 if weight is None else weight) for message, weight in asked]
        turns += read_turns(completion, "completion", notes)
        return as_chat(turns, "prompt + completion", read_tools(row, notes), notes)
    if isinstance(prompt, list) or isinstance(completion, list):
        found = f"prompt is {kind_of(prompt)} and completion is {kind_of(completion)}"
        raise BadRow("not_a_string", f"{found}; expected two strings or two lists of messages")
    return Record(prompt=text_of(row, "prompt", None), completion=text_of(row, "completion", "empty_answer"))


# --- conversations


def as_chat(turns: list[Turn], name: str, tools: tuple[Message, ...], notes: set[str]) -> Record:
    """The checks that all conversations share."""
    roles = [message["role"] for message, _ in turns]
    for i, role in enumerate(roles):
        if role == "system" and i > 0:
            raise BadRow("wrong_order", f"{name}[{i}] is a system turn; expected it first or not at all")
        if role == "tool" and (i == 0 or roles[i - 1] not in ("assistant", "tool")):
            before = f"a {roles[i - 1]} turn" if i else "nothing"
            raise BadRow(
                "wrong_order", f"{name}[{i}] is a tool turn after {before}; expected it after a call"
            )
    if "assistant" not in roles:
        raise BadRow("no_assistant_turn", f"the roles are {', '.join(roles)}; expected an answer to learn")
    if not any(weight or (weight is None and message["role"] == "assistant") for message, weight in turns):
        raise BadRow("no_assistant_turn", "every assistant turn has weight 0; expected one to learn")
    if roles[-1] != "assistant":
        notes.add("trailing_turns_without_answer")
    messages, weights = zip(*turns, strict=True)
    return Record(messages=messages, weights=weights, tools=tools)


def read_turns(items: Any, name: str, notes: set[str]) -> list[Turn]:
    if not list_of(items, name):
        raise BadRow("empty", f"{name} is an empty list; expected turns")
    return [read_turn(_object(item, f"{name}[{i}]"), f"{name}[{i}]", notes) for i, item in enumerate(items)]


def read_turn(item: dict[str, Any], where: str, notes: set[str]) -> Turn:
    is_sharegpt = "from" in item and "role" not in item
    role_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
    known = _SHAREGPT_FIELDS if is_sharegpt else _OPENAI_FIELDS
    if any(value is not None and key not in known for key, value in item.items()):
        notes.add("turn_fields_ignored")
    role = _read_role(item, role_key, where)
    weight = _read_weight(item, where)
    if role == "call":
        text = _string(field_of(item, text_key, where), f"{where}.{text_key}")
        calls = _read_call_text(text, f"{where}.{text_key}")
        return {"role": "assistant", "content": "", "tool_calls": calls}, weight
    calls = [] if is_sharegpt else _read_tool_calls(item, where)
    if calls and role != "assistant":
        raise BadRow("bad_tool_call", f"{where} is a {role} turn with tool calls; expected an assistant's")
    # Null stays null beside calls, as a server hands it on: some templates ask `content is none`.
    is_null = bool(calls) and item.get(text_key) is None
    message: Message = {"role": role, "content": None if is_null else _read_content(item, text_key, where)}
    for key in () if is_sharegpt else ("reasoning_content", "name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = _string(item[key], f"{where}.{key}")
    if calls:
        message["tool_calls"] = calls
    elif role == "assistant" and not (message["content"] + message.get("reasoning_content", "")).strip():
        raise BadRow("empty_answer", f"{where}.{text_key} is empty; expected the answer")
    return message, weight


def _read_role(item: dict[str, Any], key: str, where: str) -> str:
    role = _string(field_of(item, key, where), f"{where}.{key}")
    if role in _ROLES:
        return _ROLES[role]
    expected = "user, assistant or tool" if key == "role" else "human, gpt, function_call or observation"
    plain = role.strip().lower()
    near = [plain] if plain in _ROLES else difflib.get_close_matches(plain, _ROLES, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise BadRow("unknown_role", f"{where}.{key} is {role!a}; expected system, {expected}{hint}")


def _read_content(item: dict[str, Any], key: str, where: str) -> str:
    content = field_of(item, key, where)
    where = f"{where}.{key}"
    if not isinstance(content, list):
        return _string(content, where)
    texts = []
    for i, part in enumerate(content):
        kind = _object(part, f"{where}[{i}]").get("type")
        if kind != "text":
            raise BadRow(
                "unsupported_content", f"{where}[{i}].type is {kind!a}; expected 'text', the only kind"
            )
        texts.append(_string(field_of(part, "text", f"{where}[{i}]"), f"{where}[{i}].text"))
    return "".join(texts)


def _read_weight(item: dict[str, Any], where: str) -> float | None:
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise BadRow("bad_weight", f"{where}.train is {train!a}; expected true or false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
            raise BadRow("bad_weight", f"{where}.weight is {weight!a}; expected a number of 0 or more")
        if train is not None and train != (weight > 0):
            said = f"train {kind_of(train)} and weight {weight}"
            raise BadRow("bad_weight", f"{where} has {said}, which contradict each other; give one of them")
        return float(weight)
    return None if train is None else float(train)


def with_row_system(row: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """The row's `system` column as the first turn. Empty counts as absent, as in LLaMA-Factory."""
    if not row.get("system"):
        return turns
    system = _string(row["system"], "system")
    first = turns[0][0]
    if first["role"] != "system":
        return [({"role": "system", "content": system}, None), *turns]
    if first["content"] != system:
        raise BadRow("two_system_prompts", "the column 'system' and the first turn differ; keep one of them")
    return turns


# --- tools


def read_tools(row: dict[str, Any], notes: set[str]) -> tuple[Message, ...]:
    """`tools`, or `functions` as it was once called; a list, or JSON text of one as in the glaive set."""
    given = {key: row[key] for key in ("tools", "functions") if row.get(key) not in (None, "", [], "[]")}
    if len(given) == 2:
        raise BadRow("bad_tools", "the row has tools and functions; give one of them")
    for key, value in given.items():
        tools = _parse(value, key, "bad_tools") if isinstance(value, str) else value
        if not isinstance(tools, list):
            raise BadRow("bad_tools", f"{key} is {kind_of(tools)}; expected a list of function schemas")
        return tuple(_wrapped(tool, f"{key}[{i}]", notes) for i, tool in enumerate(tools))
    return ()


def _wrapped(tool: Any, where: str, notes: set[str]) -> Message:
    if not isinstance(tool, dict):
        raise BadRow("bad_tools", f"{where} is {kind_of(tool)}; expected a function schema")
    is_builtin = isinstance(tool.get("type"), str) and tool["type"] != "function"
    if isinstance(tool.get("function"), dict) or is_builtin:
        return tool
    if not isinstance(tool.get("name"), str):
        raise BadRow("bad_tools", f"{where} is no function schema: it has no name; {_has(tool)}")
    # OpenAI-compatible servers take a schema only in this wrapping: it is what a template sees when serving.
    notes.add("tools_wrapped")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _read_tool_calls(item: dict[str, Any], where: str) -> list[Message]:
    calls, old = item.get("tool_calls"), item.get("function_call")
    if calls and old is not None:
        raise BadRow("bad_tool_call", f"{where} has tool_calls and function_call; give one of them")
    if old is not None:
        return [_read_call(old, f"{where}.function_call")]
    if calls is not None and not isinstance(calls, list):
        raise BadRow("bad_tool_call", f"{where}.tool_calls is {kind_of(calls)}; expected a list")
    return [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls or [])]


def _read_call_text(text: str, where: str) -> list[Message]:
    """A sharegpt function_call turn: JSON of one call or of a list of calls."""
    calls = _parse(text, where, "bad_tool_call")
    if not isinstance(calls, list):
        return [_read_call(calls, where)]
    if not calls:
        raise BadRow("bad_tool_call", f"{where} is an empty list; expected a call")
    return [_read_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> Message:
    """{"type": "function", "function": {"name", "arguments"}} with arguments as an object: templates `tojson`
    them, and would quote a string once more."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(
            "bad_tool_call", f"{where} is {kind_of(call)} without a name; expected name and arguments"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse(arguments, f"{where}.arguments", "bad_tool_call")
    if not isinstance(arguments, dict):
        found = kind_of(arguments) if "arguments" in function else "missing"
        raise BadRow("bad_tool_call", f"{where}.arguments is {found}; expected an object, {{}} for none")
    made: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": _string(outer["id"], f"{where}.id"), **made} if outer.get("id") is not None else made


def _parse(text: str, where: str, reason: str) -> Any:
    try:
        return parse_json(text)
    except BadRow as problem:
        raise BadRow(reason, f"{where} is not sound JSON ({problem.reason}): {problem.detail}") from None


# --- single values


def field_of(holder: dict[str, Any], key: str, where: str = "") -> Any:
    """A field that must be there and not be null."""
    if key not in holder:
        said = f"{where or 'the row'} has no {key!r}"
        raise BadRow("missing_field", f"{said}; {_has(holder)}{_near(key, holder)}")
    if holder[key] is None:
        raise BadRow("null_field", f"{f'{where}.{key}' if where else key} is null; expected a value")
    return holder[key]


def text_of(row: dict[str, Any], key: str, if_blank: str | None) -> str:
    """A column of text; `if_blank` is the reason to refuse it when nothing is written there."""
    text = _string(field_of(row, key), key)
    if if_blank and not text.strip():
        raise BadRow(if_blank, f"{key} is empty; expected text to learn")
    return text


def _string(value: Any, where: str) -> str:
    return _expect(value, str, where)


def list_of(value: Any, where: str) -> list[Any]:
    return _expect(value, list, where)


def _object(value: Any, where: str) -> dict[str, Any]:
    return _expect(value, dict, where)


def _expect(value: Any, kind: type[_T], where: str) -> _T:
    if isinstance(value, kind):
        return value
    noun = _NOUNS[kind]
    reason = "null_field" if value is None else f"not_{noun.replace(' ', '_')}"
    raise BadRow(reason, f"{where} is {kind_of(value)}; expected {noun}")


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    return _NOUNS.get(type(value), f"a {type(value).__name__}")


def _has(holder: Iterable[str]) -> str:
    return f"it has {', '.join(f'{key!a}' for key in holder) or 'nothing'}"


def _near(key: str, holder: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(holder), n=1, cutoff=0.75)
    return f". Did you mean {near[0]!a}?" if near else ""

"""Rows of any of our formats as questions to a model: all up to the last answer, and that answer apart.

    rows.jsonl --decode, read--> Asked (record up to the answer, expected)

A row need not have an answer: `{"instruction": ...}`, `{"prompt": ...}` and messages that end with the user's
are questions too. An answer that is there is not shown to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.config import SourceConfig
from tunesmith.config.schema import Format
from tunesmith.data.decode import decode
from tunesmith.data.formats import detect_format, read_record
from tunesmith.data.prepare import Preparer
from tunesmith.data.records import BadRow, RawRow, Record
from tunesmith.data.sources import iter_rows
from tunesmith.errors import ConfigError, DataError

_MAX_ROW_BYTES = 16 * 2**20  # the default of data.max_row_bytes
_SAMPLE_ROWS = 32  # looked at to find the format
_BAD_ROWS_SHOWN = 20
# Stands where a row has no answer, so that it is found and read as one that has; never shown to a model.
_STAND_IN = "-"
_ANSWER = {"role": "assistant", "content": _STAND_IN, "weight": 1}


@dataclass(frozen=True)
class Asked:
    """One row. `prompt` is what precedes its last answer: a conversation, or raw text to go on with. `whole`
    is the row with its answer, None if it has none."""

    place: str
    prompt: Record
    whole: Record | None

    @property
    def shown(self) -> dict[str, Any]:
        """The question as a line of output has it."""
        if not self.prompt.is_chat:
            return {"prompt": self.prompt.prompt}
        tools = {"tools": list(self.prompt.tools)} if self.prompt.tools else {}
        return {"messages": list(self.prompt.messages), **tools}


def read_asked(path: str, *, format: Format = "auto", columns: Sequence[str] = ()) -> list[Asked]:
    """All rows of a path as in data.train; `columns` are `theirs=ours`.

    Raises DataError that lists the first bad rows, ConfigError for a column that is not `theirs=ours`."""
    renamed = dict(_column(text) for text in columns)
    rows = list(iter_rows(SourceConfig(path=path, columns=renamed), max_row_bytes=_MAX_ROW_BYTES))
    name = _detect(rows, path, renamed) if format == "auto" else format
    asked: list[Asked] = []
    problems: list[str] = []
    for row in rows:
        try:
            asked.append(_read(row, name, renamed))
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
    if problems:
        more = len(problems) - _BAD_ROWS_SHOWN
        listed = problems[:_BAD_ROWS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise DataError("\n".join(listed))
    if not asked:
        raise DataError(f"{path}: there is no row in it.")
    return asked


def question(messages: Any, tools: Any = None) -> Record:
    """A conversation that awaits an answer, as a client sends it, read as rows of data are. Raises BadRow."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("empty", "messages must be a list of turns, and not empty")
    record, _ = read_record({"messages": [*messages, _ANSWER], "tools": tools}, "messages", {})
    return _without_last(record)


def prompts(asked: Sequence[Asked], preparer: Preparer) -> list[NDArray[np.int32]]:
    """Their token ids as a server would show them to the model. Raises DataError for rows that the template
    refuses."""
    ids, problems = [], []
    for row in asked:
        try:
            ids.append(preparer.prompt_ids(row.prompt))
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
    if problems:
        raise DataError("\n".join(problems[:_BAD_ROWS_SHOWN]))
    return ids


def _column(text: str) -> tuple[str, str]:
    name, separator, ours = text.partition("=")
    if not (name and separator and ours):
        raise ConfigError(f"--column {text}: expected NAME=OURS, such as question=instruction.")
    return name, ours


def _completed(row: dict[str, Any], columns: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """The row with our names and with some answer, and whether that is its own."""
    kept = {key: value for key, value in row.items() if key not in columns}
    kept |= {ours: row[theirs] for theirs, ours in columns.items() if theirs in row}
    has_answer = True
    for question, answer in (("instruction", "output"), ("prompt", "completion")):
        given = kept.get(answer)
        if kept.get(question) is not None and (given is None or given == [] or not str(given).strip()):
            is_chat = isinstance(kept[question], list)
            kept[answer] = [{"role": "assistant", "content": _STAND_IN}] if is_chat else _STAND_IN
            has_answer = False
    return kept, has_answer


def _detect(rows: Sequence[RawRow], path: str, columns: dict[str, str]) -> Format:
    sample, problems = [], []
    for row in islice(rows, _SAMPLE_ROWS):
        try:
            sample.append(_completed(decode(row), columns)[0])
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
    if not sample:
        raise DataError("\n".join(problems) or f"{path}: there is no row in it.")
    return detect_format(sample, path)


def _read(row: RawRow, format: Format, columns: dict[str, str]) -> Asked:
    filled, has_answer = _completed(decode(row), columns)
    name = next((key for key in ("messages", "conversations", "conversation") if key in filled), None)
    if format in ("messages", "sharegpt") and name is not None and isinstance(filled[name], list):
        # An answer behind the last turn, whatever that is: it is taken off again.
        filled[name] = [*filled[name], _ANSWER]
        record = _without_last(read_record(filled, format, {})[0])
        has_answer = bool(record.messages) and record.messages[-1]["role"] == "assistant"
        prompt = _without_last(record) if has_answer else record
        is_chat = True
    else:
        record, _ = read_record(filled, format, {})
        is_chat = record.is_chat
        text = record.completion if format == "text" else record.prompt
        prompt = _without_last(record) if is_chat else Record(prompt=text)
    if is_chat and not prompt.messages:
        raise BadRow("no_prompt", "nothing precedes the answer; expected a question")
    if not is_chat and not prompt.prompt:
        raise BadRow("no_prompt", "the prompt is empty; expected text to go on with")
    return Asked(row.place, prompt, record if has_answer else None)


def _without_last(record: Record) -> Record:
    return replace(record, messages=record.messages[:-1], weights=record.weights[:-1])

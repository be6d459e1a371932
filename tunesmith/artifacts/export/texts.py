"""What an export is checked with: texts that tokenizers split differently, conversations, a run's rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tunesmith.artifacts.found import Say
from tunesmith.config import Config
from tunesmith.data.decode import decode
from tunesmith.data.formats import read_record
from tunesmith.data.loading import open_source
from tunesmith.data.records import BadRow, Record
from tunesmith.errors import UserError

Messages = list[dict[str, Any]]

# What an editor would not show, or would change, in texts.txt.
_HIDDEN = (
    "e\u0301 (two code points) and \u00e9 (one), \ufb01 ligature, \u2168 roman, full\u3000width\uff01\uff11",
    '"curly" \u201cquotes\u201d \u2018and\u2019 en\u2013 em\u2014 dots\u2026 \u00a0no-break\u00a0space',
    "zero\u200bwidth, soft\u00adhyphen, bom\ufeff, tab\there, bell\u0007, del\u007f",
)
_SPACES = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\r",
    " \t \n  \n",
)
_ENDS = ("a{0}b", "{0}a", "a{0}", "1{0}2", "it's{0}{0}.")


def texts() -> list[str]:
    """Some 220 texts: languages, code, digits, punctuation, emoji, rare code points, and white space in each
    place."""
    shown = Path(__file__).with_name("texts.txt").read_text(encoding="utf-8").splitlines()
    lines = [*shown, *_HIDDEN]
    middles = [line[len(line) // 3 : 2 * len(line) // 3] for line in lines]  # cut within words and characters
    indented = [f"    {line}\n\n\tthen {other}" for line, other in pairwise(lines)]
    folded = [line.swapcase() + "  " for line in lines]
    spaces = [end.format(space) for space in _SPACES for end in _ENDS]
    return list(dict.fromkeys([*lines, *middles, *indented, *folded, *spaces]))


def conversations(system: str | None) -> list[Messages]:
    """Conversations of one to five turns, with and without a system prompt: with `system` where one is
    given."""
    said = system or "You answer in one short sentence."
    asked = [
        "What is two and two?",
        "Write a haiku about rain.",
        "  Indented,\n\n\twith tabs and  two spaces  ",
        "Translate 'stra\u00dfe' and '\u6625\u7720' to English.",
        "def f(x):\n    return x ** 2\n\nWhat does f(3) give?",
        "Name three colours, then 3 numbers: 1, 22, 333.",
        "\U0001f600?",
    ]
    alone: list[Messages] = [[_turn("user", text)] for text in asked]
    told = [[_turn("system", said), *chat] for chat in alone]
    longer = [
        [*chat, _turn("assistant", "Here it is:\n1. one\n2. two"), _turn("user", "And the next?")]
        for chat in (alone[0], told[1], told[4])
    ]
    longest = [*longer[1], _turn("assistant", "Three."), _turn("user", "Thanks! Bye.")]
    return [*told, *longer, longest, *([] if system else alone)]


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def rows_of(run: Config | None, number: int, say: Say) -> tuple[list[str], list[Messages]]:
    """Strings and prompts of the first rows that a run was trained on: (texts, conversations up to an
    answer). Nothing, with a word, where its data are no longer there."""
    if run is None:
        return [], []
    try:
        records = list(_records(run, number))
    except (UserError, OSError) as error:
        say(f"without the run's own rows: {error}")
        return [], []
    strings = [text for record in records for text in _strings(record)]
    prompts = [prompt for record in records if (prompt := _prompt(record, run.data.system))]
    return strings, prompts


def _records(run: Config, number: int) -> Iterator[Record]:
    source = run.data.train[0]
    rows, options, _ = open_source(source, run, lambda _: None)
    for row in islice(rows(), number):
        try:
            yield read_record(decode(row), options.format, options.columns)[0]
        except BadRow:
            continue


def _strings(record: Record) -> list[str]:
    found = [message["content"] for message in record.messages] + [record.prompt, record.completion]
    return [text[:2000] for text in found if text]


def _prompt(record: Record, system: str | None) -> Messages:
    """What stands before a record's last answer, if it can be asked without tools."""
    messages = [dict(message) for message in record.messages]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if record.tools or any("tool_calls" in message for message in messages):
        return []
    if messages and system:
        own = messages[0]["role"] == "system"
        messages = [_turn("system", system), *messages[own:]]
    return messages

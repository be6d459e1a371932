"""What is wrong with the values of a config, in plain words, all of it in one go.

Unknown keys are found first, by walking the values beside the schema; a misspelled key is then read as the
one it was near to, so that what stands below it is checked as well. pydantic finds the rest. Contradictions
are looked for last, with the wrong keys left out, and one that rests on such a key is not reported: it may
vanish with the mistake.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from pydantic import ValidationError

from tunesmith.config.checks import Contradictions
from tunesmith.config.keys import (
    alternatives,
    branches,
    description,
    expected,
    key_names,
    lookup,
    nearest,
    suggest_key,
)
from tunesmith.config.schema import Config
from tunesmith.config.yaml_text import FLOAT_PATTERN, INT_PATTERN, Document, KeyPath, Problem, dotted, show

# Put in for what is wrong or missing, so that the contradictions among the rest can be found.
_STAND_INS: dict[tuple[str, str], str] = {("data", "train"): "missing"}


def correct_keys(document: Document) -> tuple[list[Problem], set[KeyPath]]:
    """Name the unknown keys and take them out of the values, reading misspelled ones as the keys they are
    near to.

    Returns the problems, and the right keys that may have been meant: their values are not known."""
    problems: list[Problem] = []
    meant: set[KeyPath] = set()

    def walk(path: KeyPath, value: Any) -> None:
        if isinstance(value, list):
            for i, item in enumerate(value):
                walk((*path, i), item)
        if not isinstance(value, dict) or not (names := key_names(path)):
            return
        for key in [key for key in value if key not in names]:
            wrong = (*path, key)
            hint, right = suggest_key(wrong)
            mark = "" if hint.endswith("?") else "."
            problems.append(Problem(document.place_of(wrong), f"unknown key {dotted(wrong)}. {hint}{mark}"))
            meant.update(right or ((*path, name) for name in names if name not in value))
            item = value.pop(key)
            if len(right) == 1 and right[0][:-1] == path and right[0][-1] not in value and hint.endswith("?"):
                value[str(right[0][-1])] = item
                _move_places(document, wrong, right[0])
        for key, child in value.items():
            walk((*path, key), child)

    walk((), document.values)
    return problems, meant


def _move_places(document: Document, old: KeyPath, new: KeyPath) -> None:
    moved = {(*new, *p[len(old) :]): place for p, place in document.places.items() if p[: len(old)] == old}
    document.places.update(moved)


def check_values(document: Document, meant: set[KeyPath]) -> tuple[Config | None, list[Problem]]:
    """The config, or what is wrong with its values. `meant` are keys whose value is not known (see
    `correct_keys`)."""
    try:
        return Config.model_validate(document.values), []
    except ValidationError as error:
        problems = _contradictions(error, document, meant)
        wrong = _wrong_paths(error, document.values)
    if not wrong:
        return None, problems
    for path, is_missing in wrong.items():
        if not (is_missing and _touches(path, meant)):
            place = document.place_of(path)
            problems.append(
                Problem(place, _missing(path) if is_missing else _unexpected(path, document.values))
            )
    unknown = meant | {path[:2] for path in wrong}
    try:
        Config.model_validate(_without(document.values, unknown))
    except ValidationError as error:
        problems += _contradictions(error, document, unknown)
    return None, problems


def _touches(path: KeyPath, others: set[KeyPath]) -> bool:
    """Whether `path` is one of the others, or above or below one."""
    return any(path[: len(other)] == other[: len(path)] for other in others)


def _without(values: dict[str, Any], unknown: set[KeyPath]) -> dict[str, Any]:
    """A copy of the values in which what stands at the unknown paths is left out, or stood in for if
    required."""
    values = copy.deepcopy(values)
    for section, *rest in unknown:
        if not rest or not isinstance(values.get(str(section)), dict):
            values[str(section)] = {}
        else:
            values[str(section)].pop(rest[0], None)
    for (section, key), stand_in in _STAND_INS.items():
        values.setdefault(section, {}).setdefault(key, stand_in)
    return values


def _contradictions(error: ValidationError, document: Document, unknown: set[KeyPath]) -> list[Problem]:
    """The contradictions among pydantic's findings, without those that rest on an unknown key."""
    problems = []
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if not isinstance(cause, Contradictions):
            continue
        for keys, message in cause.found:
            paths = [_as_path(key) for key in keys]
            if not any(_touches(path, unknown) for path in paths):
                written = [path for path in paths if path in document.places]
                place = document.place_of(written[0] if written else paths[0])
                problems.append(Problem(place, message if message.endswith("?") else f"{message}."))
    return problems


def _as_path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


def _wrong_paths(error: ValidationError, values: Any) -> dict[KeyPath, bool]:
    """Path -> whether it is missing, for each value that pydantic refuses.

    The branches of a union each complain; what is said deeper down is said by the branch that was meant."""
    wrong: dict[KeyPath, bool] = {}
    for item in error.errors(include_url=False):
        if not isinstance(item.get("ctx", {}).get("error"), Contradictions):
            path, is_missing = _path_in(values, item["loc"]), item["type"] == "missing"
            wrong[path] = wrong.get(path, True) and is_missing
    return {
        path: gone
        for path, gone in wrong.items()
        if not any(p != path and p[: len(path)] == path for p in wrong)
    }


def _path_in(values: Any, location: tuple[str | int, ...]) -> KeyPath:
    """pydantic's location as a path in the values: without the names of union branches, which are no keys,
    and without the index where `train: a.jsonl` stands for a list of one."""
    path: KeyPath = ()
    for part in location:
        if isinstance(part, int):
            if isinstance(values, list):
                path, values = (*path, part), values[part]
        elif isinstance(values, dict) and (part in values or part in key_names(path)):
            path, values = (*path, part), values.get(part)
    return path


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _missing(path: KeyPath) -> str:
    what = re.split(r"[.:;]\s", description(path), maxsplit=1)[0].rstrip(".")
    what = " ".join(what.split())
    return f"{dotted(path)} is missing; expected {expected(path)}: {what[:1].lower()}{what[1:]}."


def _unexpected(path: KeyPath, values: Any) -> str:
    value = _value_at(values, path)
    return f"{dotted(path)} is {show(value)}; expected {expected(path)}.{_hint(path, value)}"


_TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _hint(path: KeyPath, value: Any) -> str:
    """How to mend a value, where that can be told from what was written; begins with a space unless empty."""
    nodes = lookup(path)
    types = {str(node.get("type")) for node in nodes}
    choices = [word for node in nodes if "enum" in node or "const" in node for word in alternatives([node])]
    choices += ["true", "false"] if "boolean" in types else []
    if value in ("", []):
        return " It is empty."
    if isinstance(value, str):
        if types & {"integer", "number"} and (number := _as_number(value)) is not None:
            is_plain = INT_PATTERN.match(value) or FLOAT_PATTERN.match(value)
            return f" Remove the quotes: {value}." if is_plain else f" Write it as {number}."
        if "boolean" in types and value.lower() in ("true", "false"):
            return f" Remove the quotes: {value.lower()}."
        word = _TRUTH.get(value.lower()) if "boolean" in types else None
        if word or (word := nearest(value, choices, 0.5)):
            return f" Did you mean {word}?"
        # What a section wants most: the key it cannot be without, or the place of a model.
        keys = [
            key
            for node in nodes
            for key in node.get("required") or ("path",)
            if key in node.get("properties", {})
        ]
        if keys and "string" not in types:
            return f" Did you mean {dotted((*path, keys[0]))}: {value}?"
    if isinstance(value, float) and "integer" in types and value.is_integer():
        return f" Write it as {int(value)}."
    if isinstance(value, float) and not math.isfinite(value):
        return " It is not finite."
    if isinstance(value, int) and value >= 2**53:
        return " It is too large."
    if isinstance(value, (int, float)) and types <= {"string", "null"} and not choices:
        return f" Put it in quotes: '{show(value)}'."
    if isinstance(value, (str, int, float)) and "array" in types and "string" not in types:
        items = [
            choice for node in nodes if "items" in node for choice in alternatives(branches(node["items"]))
        ]
        word = nearest(str(value), items, 0.5) or show(value)
        return f" Write it as a list: [{word}]."
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and types == {"object"}:
        return " Remove the '-' before its first key."
    if (
        isinstance(value, list)
        and len(value) == 1
        and types <= {"string", "integer", "number", "boolean", "null"}
    ):
        return f" Write it without the brackets: {show(value[0])}."
    return ""


def _as_number(text: str) -> int | float | None:
    """The number that text stands for when it was quoted, or written in a way that a config does not read."""
    plain = text.strip()
    if len(plain) > 30:
        return None
    if re.fullmatch(r"\d{1,3}([_,]\d{3})+|\d+(_\d+)+", plain):
        return int(re.sub(r"[_,]", "", plain))
    if re.fullmatch(r"0\d+", plain):
        return int(plain)
    if re.fullmatch(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+", plain):
        return int(plain, 0)
    if INT_PATTERN.match(plain):
        return int(plain)
    if FLOAT_PATTERN.match(plain) and (plain[-1].isdigit() or plain[-1] == "."):
        return float(plain)
    return None

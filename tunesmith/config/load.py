"""From a YAML file and `section.key=value` overrides to a Config, with every mistake named in one go.

file --read_yaml--> values + the place of every key --overrides--> values --explain--> Config
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunesmith.config.explain import check_values, correct_keys
from tunesmith.config.keys import all_keys, lookup, nearest
from tunesmith.config.schema import Config
from tunesmith.config.yaml_text import Document, KeyPath, Place, Problem, dotted, dump_yaml, read_yaml, show
from tunesmith.errors import ConfigError

__all__ = ["all_keys", "dump_config", "load_config"]

_AFTER_THE_FILE = 10**9  # overrides are reported after all lines of the file


def load_config(
    source: str | os.PathLike[str] | dict[str, Any] | Config,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    recipe: str | None = None,
) -> Config:
    """Read and check a config.

    `source` is a YAML file, a dict of the same shape, or a Config (returned as it is when there are no
    overrides; otherwise defaults that nobody set are worked out again). `overrides` are `section.key=value`
    texts, applied in order. `recipe` is what the verb asks for: `run.recipe` where the config names none.
    Raises ConfigError with every mistake in it.
    """
    if isinstance(source, Config) and not overrides and recipe in (None, source.run.recipe):
        return source
    default_name = None
    if isinstance(source, (Config, dict)):
        document = Document("config", values={})
        document.values = _plain(source, (), document)
    else:
        document = _read_file(Path(source))
        default_name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._") or None
    for number, text in enumerate(overrides):
        _override(document, text, Place(_AFTER_THE_FILE + number, f"override {text!r}"))
    problems, meant = correct_keys(document)
    # A section left empty in YAML is null; it means all defaults.
    for section in Config.model_fields:
        if document.values.get(section) is None:
            document.values[section] = {}
    run = document.values["run"]
    if isinstance(run, dict) and run.get("name") is None and default_name:
        run["name"] = default_name
    if isinstance(run, dict) and recipe is not None and run.setdefault("recipe", recipe) is None:
        run["recipe"] = recipe
    config, more = check_values(document, meant)
    problems = [*document.problems, *problems, *more]
    if config is not None and recipe not in (None, config.run.recipe):
        said = f"run.recipe is {config.run.recipe}, so this is a config for `tunesmith {config.run.recipe}`."
        problems.append(Problem(document.place_of(("run", "recipe")), said))
    if problems or config is None:
        raise ConfigError(_report(document.name, problems))
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML: every default written out, so that it reruns the run."""
    return dump_yaml(config.model_dump())


def _report(name: str, problems: list[Problem]) -> str:
    lines = [f"{place.label}: {message}" for place, message in sorted(problems, key=lambda p: p.place.order)]
    lines = list(dict.fromkeys(lines))
    return "\n".join([f"{name}: {len(lines)} mistakes", *lines] if len(lines) > 1 else lines)


def _read_file(path: Path) -> Document:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.{_near_files(path)}") from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}.") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text. Save the file as UTF-8.") from error
    document = read_yaml(text, str(path))
    if document.values is None:  # empty, or comments only
        document.values = {}
    if not isinstance(document.values, dict):
        found = show(document.values)
        raise ConfigError(f"{path}:1: expected sections such as 'model:' and 'data:', found {found}.")
    return document


def _plain(value: Any, path: KeyPath, document: Document) -> Any:
    """A copy of Python values in YAML's kinds: paths as text, tuples as lists, models as what was set in
    them."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                problem = f"a key of {dotted(path) or 'the config'} is {key!r}; expected text"
                document.problems.append(Problem(Place(0, document.name), f"{problem}."))
        return {
            key: _plain(item, (*path, key), document) for key, item in value.items() if isinstance(key, str)
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, i), document) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Subclasses, such as numpy.float64, become what YAML can write.
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)


def _override(document: Document, text: str, place: Place) -> None:
    """Apply one `section.key=value` to the document. `data.train[0].weight=2` reaches into a list."""

    def refuse(message: str) -> None:
        document.problems.append(Problem(place, f"{message.rstrip('.')}."))

    key, separator, value_text = text.partition("=")
    key = key.strip()
    if not separator or not re.fullmatch(r"[^.\[\]\s]+(\.[^.\[\]]+|\[\d+\])*", key) or key.startswith("-"):
        near = key.lstrip("-") + "=" + (value_text or "VALUE")
        hint = f" Write it as {near}" if key.startswith("-") and key.lstrip("-") in all_keys() else ""
        return refuse(f"expected section.key=value, such as train.batch_size=8.{hint}")
    path: KeyPath = tuple(int(p[1:-1]) if p[0] == "[" else p for p in re.findall(r"\[\d+\]|[^.\[\]]+", key))
    try:
        value = _override_value(path, value_text)
    except ConfigError as error:
        return refuse(str(error))
    target = document.values
    for depth, part in enumerate(path):
        here = path[: depth + 1]
        if isinstance(part, int):
            if not isinstance(target, list):
                return refuse(f"{dotted(path[:depth])} is {show(target)}, which is no list")
            if part >= len(target):
                last = f"the last is [{len(target) - 1}]" if target else "it is empty"
                return refuse(f"{dotted(path[:depth])} has no item [{part}]; {last}")
        elif not isinstance(target, dict):
            return refuse(f"{dotted(path[:depth])} is {show(target)}, which has no keys")
        if depth == len(path) - 1:
            target[part] = value
        elif isinstance(part, str) and target.get(part) is None:
            target[part] = {}
            document.places[here] = place
        target = target[part]
    # What the file said below this key is gone, and so are its places.
    document.places = {p: old for p, old in document.places.items() if p[: len(path)] != path}
    document.places[path] = place


def _override_value(path: KeyPath, text: str) -> Any:
    """The value of an override, read as YAML; but a field that takes only text takes it as it stands, since
    a shell has removed the quotes that `run.name="2024"` was written with."""
    text = text.strip()
    nodes = lookup(path)
    is_text = bool(nodes) and all(
        node.get("type") in ("string", "null") and "enum" not in node for node in nodes
    )
    if is_text and text not in ("", "~", "null") and text[0] not in "'\"":
        return text
    inner = read_yaml(text, "the value")
    if inner.problems:
        raise ConfigError(f"the value: {inner.problems[0].message}")
    return inner.values


def _near_files(path: Path) -> str:
    if (path / "config.yaml").is_file():
        return f" Did you mean {path / 'config.yaml'}?"
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    if near := nearest(path.name, names, 0.5):
        return f" Did you mean {folder / near}?"
    return f" YAML files in {folder}: {', '.join(names[:10])}." if names else ""

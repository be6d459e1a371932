"""From a YAML file and `section.key=value` overrides to a Config, with every mistake named in one go.

    file --compose--> values + the line of every key --overrides--> values --pydantic--> Config

PyYAML's composer is used, not its loader: the node tree knows lines and shows a key that is written twice, which
the loader would silently resolve to the last.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from tunesmith.config.checks import Contradictions
from tunesmith.config.schema import Config
from tunesmith.errors import ConfigError

KeyPath = tuple[str | int, ...]
_MISSING_PLACEHOLDERS: dict[KeyPath, Any] = {("model", "path"): "missing", ("data", "train"): "missing"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text and `no` as false; these are config values people mean as 1.2 has them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Document:
    """The values of a YAML text, the place of every key, and what is wrong with the text itself."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.places: dict[KeyPath, str] = {}
        self.problems: list[str] = []
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
            raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}.") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: not valid YAML: {error}") from error
        self._loader = loader
        self.values = {} if node is None else self._read(node, ())
        if not isinstance(self.values, dict):
            raise ConfigError(f"{name}:1: expected sections such as 'model:' and 'data:', found {_show(self.values)}.")

    def _read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = f"{self.name}:{node.start_mark.line + 1}"
        if isinstance(node, yaml.SequenceNode):
            return [self._read(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, child in node.value:
                key = str(self._loader.construct_object(key_node, deep=True))
                line = key_node.start_mark.line + 1
                if key in values:
                    first = self.places[(*path, key)].rsplit(":", 1)[1]
                    self.problems.append(
                        f"{self.name}:{line}: {_dotted((*path, key))} is written twice (first in line {first}). Remove one."
                    )
                values[key] = self._read(child, (*path, key))
                self.places[(*path, key)] = f"{self.name}:{line}"
            return values
        return self._loader.construct_object(node, deep=True)

    def place_of(self, path: KeyPath) -> str:
        """Where `path` stands, or the nearest thing around it that stands in the file."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def override(self, text: str) -> None:
        """Apply one `section.key=value`; the value is read as YAML."""
        key, separator, value_text = text.partition("=")
        path = tuple(key.split("."))
        if not separator or not all(path):
            self.problems.append(f"override {text!r}: expected section.key=value, such as train.batch_size=8.")
            return
        try:
            value = yaml.load(value_text, _Loader)
        except yaml.YAMLError as error:
            self.problems.append(f"override {text!r}: the value is not valid YAML ({error}).")
            return
        target: Any = self.values
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                self.problems.append(f"override {text!r}: {part} is no section.")
                return
        target[path[-1]] = value
        # What the file said below this key is gone, and so are its places.
        self.places = {p: place for p, place in self.places.items() if p[: len(path)] != path}
        self.places[path] = f"override {text!r}"


def load_config(source: str | Path | dict[str, Any] | Config, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a config.

    `source` is a YAML file, a dict of the same shape, or a Config (returned as it is when there are no overrides).
    `overrides` are `section.key=value` texts, applied in order. Raises ConfigError with every mistake in it.
    """
    if isinstance(source, Config):
        if not overrides:
            return source
        source = source.model_dump(mode="json")
    if isinstance(source, dict):
        document = _Document(yaml.safe_dump(source), "config")
        document.places = {(): "config"}
        default_name = None
    else:
        path = Path(source)
        try:
            document = _Document(path.read_text(encoding="utf-8"), str(source))
        except OSError as error:
            raise ConfigError(f"{source}: cannot be read: {error.strerror}.{_near_files(path)}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: not UTF-8 text at byte {error.start}.") from error
        default_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or None
    for text in overrides:
        document.override(text)
    run = document.values.setdefault("run", {}) if document.values.get("run") is not None else {}
    if document.values.get("run") is None:
        document.values["run"] = run
    if isinstance(run, dict) and run.get("name") is None and default_name:
        run["name"] = default_name
    # A section left empty in YAML is null; it means all defaults.
    for section in Config.model_fields:
        if section in document.values and document.values[section] is None:
            document.values[section] = {}
    return _validate(document)


def _validate(document: _Document) -> Config:
    """Check the values against the schema; when something is wrong go on without it, to find what else is."""
    values, problems = document.values, list(document.problems)
    config: Config | None = None
    seen: set[KeyPath] = set()
    while config is None:
        try:
            config = Config.model_validate(values)
        except ValidationError as error:
            progressed = False
            for path, line in _explain(error, document):
                problems.append(line)
                if path in seen:
                    continue
                seen.add(path)
                progressed |= _neutralise(values, path)
            if not progressed:
                break
    if problems:
        problems = list(dict.fromkeys(problems))
        head = f"{document.name}: {len(problems)} mistakes\n" if len(problems) > 1 else ""
        raise ConfigError(head + "\n".join(problems))
    assert config is not None
    return config


def _neutralise(values: dict[str, Any], path: KeyPath) -> bool:
    """Take the wrong key away (or put a stand-in where one is required), so that a next pass can see further."""
    path = path[:2] if path[:2] in _MISSING_PLACEHOLDERS else path
    target: Any = values
    for part in path[:-1]:
        if isinstance(target, dict):
            if not isinstance(target.get(str(part)), (dict, list)):
                target[str(part)] = {}
            target = target[str(part)]
        elif isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        else:
            return False
    if path in _MISSING_PLACEHOLDERS and isinstance(target, dict):
        target[str(path[-1])] = _MISSING_PLACEHOLDERS[path]
        return True
    if isinstance(target, dict):
        if path and path[-1] in ("model", "data") and len(path) == 1:
            key = "path" if path[-1] == "model" else "train"
            target[str(path[-1])] = {key: "missing"}
            return True
        return target.pop(path[-1] if path else "", None) is not None
    if isinstance(target, list) and isinstance(path[-1], int) and path[-1] < len(target):
        target.pop(path[-1])
        return True
    return False


def _explain(error: ValidationError, document: _Document) -> list[tuple[KeyPath, str]]:
    """(key path, one line of plain words) for each of pydantic's findings; branches of one union become one line."""
    found: dict[KeyPath, list[Any]] = {}
    lines: list[tuple[KeyPath, str]] = []
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            for key, message in cause.problems:
                path: KeyPath = tuple(key.split("."))
                line = f"{document.place_of(path)}: {key}: {message}."
                # An override that came after the file is the likelier cause, yet both keys are in the message.
                lines.append((path, line))
        else:
            found.setdefault(_key_path(item["loc"], document.values), []).append(item)
    for path, items in found.items():
        place, key = document.place_of(path), _dotted(path)
        item = items[0]
        if item["type"] == "extra_forbidden":
            lines.append((path, f"{place}: unknown key {key}.{_did_you_mean(path)}"))
        elif item["type"] == "missing":
            hint = _field_hint(path)
            lines.append((path, f"{place}: {key} is missing.{hint}"))
        else:
            expected = _expected(path, items)
            lines.append((path, f"{place}: {key} is {_show(item['input'])}; expected {expected}.{_near_value(path, item['input'])}"))
    return lines


def _key_path(loc: tuple[str | int, ...], values: Any) -> KeyPath:
    """pydantic's location as a path in the file: without the names of union branches, which are no keys, and
    without the index where `train: a.jsonl` stands for a list of one."""
    path: list[str | int] = []
    model: Any = Config
    for part in loc:
        if isinstance(part, int):
            if isinstance(values, list):
                path.append(part)
                values = values[part] if part < len(values) else None
        elif model is not None and part in model.model_fields:
            path.append(part)
            model = _section_of(model.model_fields[part].annotation)
            values = values.get(part) if isinstance(values, dict) else None
        elif isinstance(values, dict) and part in values:
            path.append(part)
            values = values[part]
    return tuple(path)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if (section := _section_of(argument)) is not None:
            return section
    return None


def _field(path: KeyPath) -> Any:
    model: type[BaseModel] | None = Config
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = _section_of(field.annotation)
    return field


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for argument in typing.get_args(annotation) for value in _literals(argument)]


def _type_words(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return [", ".join(str(value) for value in typing.get_args(annotation))]
    if origin is typing.Annotated:
        return _type_words(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [word for argument in typing.get_args(annotation) if argument is not type(None) for word in _type_words(argument)]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"}
    if annotation in names:
        return [names[annotation]]
    if origin in names:
        return [names[origin]]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["a section with the keys " + ", ".join(annotation.model_fields)]
    return [str(annotation)]


def _expected(path: KeyPath, items: list[Any]) -> str:
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "more than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
        "string_pattern_mismatch": "letters, digits, '.', '_' and '-' only",
        "too_short": "at least one",
        "finite_number": "a finite number",
    }
    for item in items:
        if item["type"] in bounds:
            words = " or ".join(_type_words(_field(path).annotation)) if _field(path) else "a value"
            return f"{words}, {bounds[item['type']].format(**item.get('ctx', {}))}"
    field = _field(path)
    if field is None:
        return str(items[0]["msg"])
    return " or ".join(dict.fromkeys(_type_words(field.annotation)))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every `section.key` of the schema, lists of sections as `section.key[]`."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if (section := _section_of(field.annotation)) is not None:
            is_list = "list" in str(field.annotation)
            keys += all_keys(section, f"{prefix}{name}{'[]' if is_list else ''}.")
    return keys


def _did_you_mean(path: KeyPath) -> str:
    """The nearest right key: in the same section by spelling, else in any section by name."""
    *parent, name = path
    field = _field(tuple(parent)) if parent else None
    section = Config if not parent else _section_of(field.annotation) if field else None
    siblings = list(section.model_fields) if section else []
    near = difflib.get_close_matches(str(name), siblings, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {_dotted((*parent, near[0]))}?"
    everywhere: dict[str, str] = {}
    for key in all_keys():
        everywhere.setdefault(key.rsplit(".", 1)[-1], key)
    near = difflib.get_close_matches(str(name), everywhere, n=1, cutoff=0.75)
    if near:
        return f" Did you mean {everywhere[near[0]]}?"
    where = _dotted(tuple(parent)) or "a config"
    return f" {where} has the keys {', '.join(siblings)}." if siblings else ""


def _near_value(path: KeyPath, value: Any) -> str:
    field = _field(path)
    choices = [str(choice) for choice in _literals(field.annotation)] if field else []
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def _field_hint(path: KeyPath) -> str:
    field = _field(path)
    return f" It is: {field.description.splitlines()[0]}" if field is not None and field.description else ""


def _near_files(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {folder / near[0]}?"
    return f" YAML files in {folder}: {', '.join(sorted(names)[:10])}." if names else ""


def dump_config(config: Config) -> str:
    """The resolved config as YAML: every default written out, so that it reruns the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)

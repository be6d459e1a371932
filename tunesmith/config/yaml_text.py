"""YAML as a config means it: text to values and the line of every key, and values back to text.

Scalars follow the YAML 1.2 core schema and not PyYAML's 1.1, under which `1e-4` is text, `no` is false,
`010` is eight, `1:30` is ninety and `2024-01-01` is a date. PyYAML's composer is used and not its loader:
the node tree knows lines, and shows a key that is written twice, which the loader would silently resolve to
the last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from tunesmith.errors import ConfigError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MAX_NODES = 100_000  # a few nested aliases can spell a billion values; no config needs this many

NULL_PATTERN = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL_PATTERN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# 010 is left as text on purpose: YAML 1.1 reads eight, 1.2 ten, and a number field then refuses it by name.
INT_PATTERN = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(f"{_TAG}null", NULL_PATTERN, ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", BOOL_PATTERN, list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", INT_PATTERN, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", FLOAT_PATTERN, list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile("^<<$"), ["<"])


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds U+0085 and U+2028 like line ends and reads back another text; double quotes escape them.
    is_plain = text.replace("\n", "").isprintable()
    return dumper.represent_scalar(f"{_TAG}str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}float", FLOAT_PATTERN, list("-+.0123456789"))


class Place(NamedTuple):
    """Where something was said: `label` for the reader, `order` for the sorting of messages."""

    order: int
    label: str


class Problem(NamedTuple):
    """One mistake, in plain words."""

    place: Place
    message: str


@dataclass
class Document:
    """The values of a YAML text, the place of every key, and what is wrong with the text itself."""

    name: str
    values: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place_of(self, path: KeyPath) -> Place:
        """Where `path` stands, or the nearest thing around it that stands somewhere."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(0, self.name))


def dotted(path: KeyPath) -> str:
    """A path as people write it: `data.train[0].weight`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part or "''")
    return text


def show(value: Any) -> str:
    """A value as it would be written in a config, cut to a length that fits a line."""
    if value is None:
        text = "empty"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value[:8])}{', ...' if len(value) > 8 else ''}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {show(item)}' for key, item in list(value.items())[:8])}}}"
    elif isinstance(value, int) and value.bit_length() > 1000:
        text = (
            f"a number of about {int(value.bit_length() * 0.30103)} digits"  # repr refuses over 4,300 digits
        )
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_yaml(text: str, name: str) -> Document:
    """Read one YAML document. Raises ConfigError when the text is not YAML; other mistakes are in
    `problems`."""
    document = Document(name)
    try:
        node = yaml.compose(text, _Loader)
        if node is not None:
            _Reader(document).read_root(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_message(error, name)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}: the character U+{error.character:04X} cannot stand in YAML."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply, or a YAML alias that holds itself.") from error
    return document


def dump_yaml(values: dict[str, Any]) -> str:
    """Values as YAML text that `read_yaml` reads back the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Reader:
    """Turns a node tree into a document's values, noting places and problems as it goes."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.num_nodes = 0

    def read_root(self, node: yaml.Node) -> None:
        self.document.values = self._read(node, ())

    def _place(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(line, f"{self.document.name}:{line}")

    def _problem(self, node: yaml.Node, message: str) -> None:
        self.document.problems.append(Problem(self._place(node), f"{message}."))

    def _read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise ConfigError(f"{self._place(node).label}: more than {_MAX_NODES:,} values.")
        self.document.places[path] = self._place(node)
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._read_scalar(node, path)

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, child in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged = {**self._merged(child), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                where = dotted(path) or "the config"
                self._problem(key_node, f"a key of {where} is a list or a mapping; expected a name")
                continue
            key = key_node.value
            if key in values:
                first = self.document.places[(*path, key)].order
                twice = f"{dotted((*path, key))} is written twice (first in line {first}). Remove one"
                self._problem(key_node, twice)
            values[key] = self._read(child, (*path, key))
            self.document.places[(*path, key)] = self._place(key_node)
        for key, (_, child) in merged.items():
            if key not in values:
                values[key] = self._read(child, (*path, key))
        return values

    def _merged(self, node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """What `<<: *base` or `<<: [*first, *second]` brings; the first to name a key wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        keys: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self._problem(source, "<< takes a mapping or a list of mappings, such as <<: *base")
                continue
            for key_node, child in source.value:
                if key_node.tag == f"{_TAG}merge":
                    keys = {**self._merged(child), **keys}
                elif isinstance(key_node, yaml.ScalarNode):
                    keys.setdefault(key_node.value, (key_node, child))
        return keys

    def _read_scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        try:
            if tag == "null":
                return None
            if tag == "bool" and BOOL_PATTERN.match(text):
                return text.lower() == "true"
            if tag == "int":
                return int(text)
            if tag == "float":
                return float(re.sub(r"\.(?=[in])", "", text.lower()))  # .inf and .nan
        except ValueError:
            return text  # `!!int eight`, or more digits than Python takes: no number field accepts the text
        if tag not in ("str", "bool", "merge"):
            name = node.tag.replace(_TAG, "!!")
            self._problem(
                node, f"{dotted(path)} has the YAML tag {name}, which means nothing here. Remove the tag"
            )
        return text


# PyYAML's words -> ours. The first that occurs in its message is used.
_SYNTAX = {
    "but found another document": "a second document ('---') begins here; a config is one document",
    "found character '\\t'": "a tab stands where YAML wants spaces. Indent with spaces",
    "mapping values are not allowed here": (
        "a ':' where no key can be. Put text that holds ': ' in quotes, and check the indentation"
    ),
    "could not find expected ':'": "a key without ':' after it",
    "expected <block end>": "the indentation does not line up with the lines above",
    "found undefined alias": (
        "an alias (*name) without an anchor (&name) before it. Put text that begins with * in quotes"
    ),
    "found unknown escape character": "a backslash in double quotes. Use single quotes",
    "expected escape sequence": "a backslash in double quotes. Use single quotes",
    "found unexpected end of stream": "a quote is opened and never closed",
    "expected ',' or ']'": "a '[' is not closed",
    "expected ',' or '}'": "a '{' is not closed",
    "that cannot start any token": "text cannot begin with this character. Put it in quotes",
    "expected the node content": "a value is missing here",
}


def _syntax_message(error: yaml.MarkedYAMLError, name: str) -> str:
    theirs = f"{error.context or ''} {error.problem or ''}".strip()
    words = next((words for part, words in _SYNTAX.items() if part in theirs), theirs)
    # What is never closed is best looked for where it was opened, not where the text ran out.
    is_open = "closed" in words and error.context_mark is not None
    mark = error.context_mark if is_open else error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    return f"{place}: not valid YAML: {words}."

"""The schema for readers: as JSON for editors, as Markdown for people.

python -m tunesmith.config.reference > docs/config.md
python -m tunesmith.config.reference schema > docs/config.schema.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel

from tunesmith.config.keys import description, expected, json_schema, lookup
from tunesmith.config.schema import BatchSizeWarmup, Config, SourceConfig
from tunesmith.config.yaml_text import KeyPath, dump_yaml

_HEAD = """\
# Config reference

Made from the schema by `python -m tunesmith.config.reference > docs/config.md`; do not edit.

A config is a YAML file of the sections below. A minimal one names `model.path` (or `model.config`) and
`data.train`; every other key has a default. Any key can be set on the command line as `section.key=value`,
and `data.train[0].weight=2` reaches into a list. An empty section stands for its defaults. YAML is read as
version 1.2 has it: `1e-4` is a number, `no` is text, `010` is no number, and a quoted number is text.
Editors complete and check a config that begins with `# yaml-language-server: $schema=` and the path of
`docs/config.schema.json`, which `tunesmith schema` prints.
"""


def schema_json() -> str:
    """The JSON schema of a config file, for editors; ends with a newline."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_tidy(json_schema()),
        "title": "tunesmith config",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """A copy with descriptions on one line, and without the titles that only repeat the keys."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidy = {key: _tidy(item) for key, item in node.items() if not (key == "title" and isinstance(item, str))}
    if isinstance(text := node.get("description"), str):
        tidy["description"] = " ".join(text.split())
    return tidy


def reference_markdown() -> str:
    """The text of `docs/config.md`: a table a section, a row a key."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        parts.append(_table(f"## {name}", (name,), field.annotation))
    parts.append(_table("## A source of `data.train` or `data.valid`", ("data", "train", 0), SourceConfig))
    warmup = ("train", "batch_size_warmup")
    parts.append(_table("## `train.batch_size_warmup`", warmup, BatchSizeWarmup))
    return "\n".join(parts)


def _table(heading: str, path: KeyPath, section: type[BaseModel]) -> str:
    lines = [heading, "", " ".join((section.__doc__ or "").split()), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key_path = (*path, name)
        nullable = any(node.get("type") == "null" for node in lookup(key_path))
        cells = [
            f"`{name}`",
            expected(key_path) + (" (or null)" if nullable else ""),
            "**required**" if field.is_required() else f"`{_as_yaml(field.default)}`",
            " ".join(description(key_path).split()),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    return dump_yaml({"x": value}).removeprefix("x:").strip()


if __name__ == "__main__":
    sys.stdout.write(schema_json() if sys.argv[1:] == ["schema"] else reference_markdown())

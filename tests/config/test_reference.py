"""The committed reference and JSON schema are those that the schema makes, and say what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.config import Config, all_keys
from tunesmith.config.keys import FORMER_NAMES, description
from tunesmith.config.reference import reference_markdown, schema_json

REPOSITORY = Path(__file__).parents[2]


def test_the_committed_reference_is_the_generated_one() -> None:
    committed = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    assert committed == reference_markdown(), (
        "docs/config.md is out of date. Regenerate it: python -m tunesmith.config.reference > docs/config.md"
    )


def test_the_committed_json_schema_is_the_generated_one() -> None:
    committed = (REPOSITORY / "docs/config.schema.json").read_text(encoding="utf-8")
    assert committed == schema_json(), (
        "docs/config.schema.json is out of date. Regenerate it: "
        "python -m tunesmith.config.reference schema > docs/config.schema.json"
    )


def test_every_key_has_documentation_and_a_row_in_the_reference() -> None:
    markdown = reference_markdown()
    for key in all_keys():
        path = tuple(key.replace("[]", "").split("."))
        if len(path) > 1:
            assert description(path), f"{key} has no docstring"
            assert f"| `{path[-1]}` |" in markdown


def test_the_json_schema_has_a_title_and_one_line_descriptions() -> None:
    schema = json.loads(schema_json())
    assert schema["title"] == "tunesmith config"
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["model", "data"]
    batch_size = schema["$defs"]["TrainConfig"]["properties"]["batch_size"]
    assert batch_size["minimum"] == 1
    assert batch_size["description"].startswith("Rows per optimiser step over all ranks.")
    assert "\n" not in schema["$defs"]["ModelConfig"]["properties"]["dtype"]["description"]


def test_the_json_schema_takes_the_short_forms_of_a_source() -> None:
    branches = json.loads(schema_json())["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]
    assert [branch.get("type", branch.get("$ref")) for branch in branches] == [
        "string",
        "#/$defs/SourceConfig",
        "array",
    ]


def test_former_names_lead_to_keys_that_exist_and_are_none_themselves() -> None:
    names = {key.rpartition(".")[2] for key in all_keys()}
    for former, ours in FORMER_NAMES.items():
        assert former not in names
        assert ours in all_keys() or "not supported yet" in ours


def test_all_keys_names_sections_keys_and_keys_of_sources() -> None:
    keys = all_keys()
    assert {"train", "train.batch_size", "data.train", "data.train[].weight", "data.valid[].path"} <= set(
        keys
    )
    assert len(keys) == len(set(keys))
    sections = [key for key in keys if "." not in key]
    assert sections == list(Config.model_fields)

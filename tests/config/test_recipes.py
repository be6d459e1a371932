"""Every config in the repository is valid, and the recipes are commented and carry the editor's modeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tunesmith.config import dump_config, load_config

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
SKIPPED = {"runs", "build", "dist", "node_modules", "__pycache__", "shared"}


def _configs() -> Iterator[Path]:
    """Every YAML file below the repository, hidden folders and runs aside, that looks like a config of
    ours: it has `model` or `data`, so that one with a typo in the other is found too."""
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED)
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix in (".yaml", ".yml"):
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
                if isinstance(values, dict) and {"model", "data"} & set(values):
                    yield path


CONFIGS = list(_configs())


def test_the_walk_finds_the_recipes() -> None:
    assert set(RECIPES) <= set(CONFIGS)
    assert {path.stem for path in RECIPES} >= {
        "qwen2.5-0.5b-full",
        "qwen2.5-1.5b-instruct-lora",
        "qwen2.5-1.5b-qlora",
        "smollm2-135m-demo",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_config_in_the_repository_is_valid_and_survives_a_dump(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_modeline_and_says_why_of_every_value(path: Path) -> None:
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=../docs/config.schema.json"
    assert (path.parent / first.partition("$schema=")[2]).is_file()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert "#" in line or before.lstrip().startswith("#"), f"no reason given: {line}"


def test_the_recipes_say_what_their_names_say() -> None:
    recipes = {path.stem: load_config(path) for path in RECIPES}
    assert recipes["qwen2.5-0.5b-full"].adapter.method == "none"
    assert recipes["qwen2.5-0.5b-full"].model.path == "Qwen/Qwen2.5-0.5B"
    assert recipes["qwen2.5-1.5b-qlora"].model.quantization == "nf4"
    assert recipes["qwen2.5-1.5b-instruct-lora"].adapter.method == "lora"
    assert recipes["smollm2-135m-demo"].model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipes["smollm2-135m-demo"].eval.answer_rows == 50
    assert recipes["pretrain-from-scratch"].model.config == "recipes/qwen2-10m.json"
    assert recipes["pretrain-continue"].model.path == "Qwen/Qwen2.5-0.5B"

"""Small runs in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import conversations, make_tiny_model, write_rows


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """family -> folder of a tiny model, made when first asked for."""
    made: dict[str, Path] = {}

    def get(family: str = "llama") -> Path:
        if family not in made:
            made[family] = make_tiny_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


@pytest.fixture
def run_config(tiny_models, tmp_path):
    """Makes a config dict for a small run in a folder of its own; keyword arguments override sections."""

    def make(family: str = "llama", rows: int = 20, **sections) -> dict:
        base = {
            "run": {"name": "r", "output_dir": str(tmp_path / "runs"), "seed": 3},
            "model": {"path": str(tiny_models(family)), "dtype": "float32"},
            "adapter": {"r": 4, "alpha": 8},
            "data": {
                "train": str(write_rows(tmp_path / "train.jsonl", conversations(rows))),
                "max_length": 256,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "micro_batch_tokens": 512},
            "eval": {"stop_rate_rows": 0},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return base

    return make

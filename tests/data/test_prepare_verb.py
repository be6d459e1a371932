"""`tunesmith prepare`: a run finds what it prepared, and a Ray cluster prepares what this machine would."""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import conversations, make_tiny_model, write_rows

import tunesmith
import tunesmith.data.ray_engine as ray_engine_module
from tunesmith import cli
from tunesmith.config import Config, load_config
from tunesmith.data.loading import Data, load_data, local_engine
from tunesmith.data.prepare_ahead import prepare_ahead
from tunesmith.data.ray_engine import ray_cluster, ray_engine
from tunesmith.data.report import SourceReport
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ConfigError, DataError, MissingExtraError, TemplateError


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tunesmith[ray]'")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config_of(tmp_path: Path, recipe: str, cache: str, **data: Any) -> Config:
    if not (tmp_path / "model").exists():
        make_tiny_model(tmp_path / "model")
    values = {"train": str(tmp_path / "rows"), "cache_dir": str(tmp_path / cache), "max_length": 200}
    return load_config(
        {
            "run": {"recipe": recipe, "output_dir": str(tmp_path / "runs"), "name": "a"},
            "model": {"path": str(tmp_path / "model")},
            "data": values | data,
            "train": {"max_steps": 1, "batch_size": 2},
        }
    )


def write_folder(folder: Path, recipe: str) -> None:
    """Files of 300, 3, 2, 260 and 40 rows, 6 of them bad; one file is compressed."""
    folder.mkdir()
    rng = random.Random(3)
    for name, number in (("a", 300), ("b", 3), ("c", 2), ("d", 260), ("e", 40)):
        rows: list[dict[str, Any]] = conversations(number, seed=number)
        if recipe == "pretrain":
            rows = [{"text": "x y " * rng.randint(1, 90)} for _ in range(number)]
        lines = [json.dumps(row) for row in rows]
        if number > 3:
            lines[5:7] = ["{", "", "[1]"]  # not JSON, no row, not an object
        text = "\n".join(lines) + "\n"
        if name == "e":
            (folder / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def loaded(config: Config, engine: Any) -> tuple[list[dict[str, Any]], Data]:
    data = load_data(config, load_tokenizer(config), engine=engine)
    shards = sorted(Path(config.data.cache_dir or "").glob("*/examples*.arrow"))
    from datasets import Dataset

    return [row for shard in shards for row in Dataset.from_file(str(shard)).to_list()], data


def blocks_of(config: Config) -> list[tuple[str, list[int]]]:
    rows = load_data(config, load_tokenizer(config), engine=cannot).train.rows
    return [(rows[i].place, rows[i].examples[0].input_ids.tolist()) for i in range(0, len(rows), 7)]


def cannot(*_: Any) -> None:
    raise AssertionError("it is in the cache")


@pytest.mark.parametrize("recipe", ["sft", "pretrain"])
def test_a_cluster_writes_the_examples_that_this_machine_writes(
    recipe: str, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each chunk of 256 rows is a part; b and c are a group with d.
    monkeypatch.setattr(ray_engine_module, "_LEAST_PART", 3000)
    monkeypatch.setattr(ray_engine_module, "_LARGEST_PART", 3000)
    write_folder(tmp_path / "rows", recipe)
    here, data_here = loaded(config_of(tmp_path, recipe, "here", on_bad_row="skip"), local_engine)
    there, data_there = loaded(config_of(tmp_path, recipe, "there", on_bad_row="skip"), ray_engine)
    assert len({row["row"] for row in here}) > 500
    assert there == here
    assert data_there.report() == data_here.report()
    assert data_there.train.lengths.tolist() == data_here.train.lengths.tolist()
    report = data_there.train.reports[0]
    assert (report.rows_read, report.rows_bad) == (605, 6)
    assert [entry["place"].rpartition("/")[2] for entry in report.bad] == [
        "a.jsonl:6", "a.jsonl:8", "d.jsonl:6", "d.jsonl:8", "e.jsonl.gz:6", "e.jsonl.gz:8",
    ]  # fmt: skip
    shards = [shard.name for shard in (tmp_path / "there").glob("*/*.arrow")]
    assert sorted(shards) == [
        "examples-000000-000000.arrow",
        "examples-000000-000001.arrow",
        "examples-000001-000000.arrow",
        "examples-000001-000001.arrow",
        "examples-000002-000000.arrow",
    ]
    for packing in ("flat", "concatenate") if recipe == "pretrain" else ():
        blocks = [
            blocks_of(config_of(tmp_path, recipe, cache, on_bad_row="skip", packing=packing))
            for cache in ("here", "there")
        ]
        assert len(blocks[0]) > 40
        assert blocks[1] == blocks[0]


def said_by(config: Config, engine: Any) -> str:
    with pytest.raises((DataError, TemplateError)) as caught:
        load_data(config, load_tokenizer(config), engine=engine)
    assert not list(Path(config.data.cache_dir or "").glob("*.tmp"))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_bad_rows_and_templates_are_refused_in_the_same_words(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine_module, "_LEAST_PART", 3000)
    monkeypatch.setattr(ray_engine_module, "_LARGEST_PART", 3000)
    write_folder(tmp_path / "rows", "sft")
    (tmp_path / "no_end.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for data, expected in (
        ({}, "6 of 605 rows of"),
        ({"template": str(tmp_path / "no_end.jinja")}, "TemplateError: .*a.jsonl:1: .*no end token"),
        ({"train": {"path": str(tmp_path / "blank.jsonl"), "format": "messages"}}, "no row is left"),
    ):
        here, there = (
            said_by(config_of(tmp_path, "sft", cache, **data), engine)
            for cache, engine in (("here", local_engine), ("there", ray_engine))
        )
        assert there == here
        assert re.search(expected, here.replace("\n", " "))


def test_a_worker_that_dies_ends_the_preparation_with_the_reason(tmp_path: Path, cluster: None) -> None:
    write_rows(tmp_path / "rows.jsonl", conversations(10))
    config = config_of(tmp_path, "sft", "there", train=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows.jsonl: a Ray task died while preparing it.*data.workers"):
        ray_engine(
            config.data.train[0],
            config,
            functools.partial(os._exit, 1),  # type: ignore[arg-type]
            SourceReport("a", "messages"),
            lambda _: None,
            tmp_path,
        )


def test_a_machine_with_other_code_or_without_the_folder_is_named(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", conversations(10))
    config = config_of(tmp_path, "sft", "there", train=str(tmp_path / "rows.jsonl"))
    prepare = functools.partial(
        ray_engine,
        config.data.train[0],
        config,
        functools.partial(os._exit, 1),  # type: ignore[arg-type]
        SourceReport("a", "messages"),
        lambda _: None,
    )
    with pytest.raises(DataError, match=r"does not see the folder .*nowhere.*it is the data.cache_dir"):
        prepare(tmp_path / "nowhere")
    monkeypatch.setattr(ray_engine_module.cache, "code_version", lambda: "another")
    with pytest.raises(DataError, match=r"its tunesmith differs.*Install the same version"):
        prepare(tmp_path)


# --- the verb


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(("recipe", "engine"), [("sft", "local"), ("pretrain", "local"), ("pretrain", "ray")])
def test_a_run_finds_what_was_prepared(
    recipe: str,
    engine: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if engine == "ray":
        request.getfixturevalue("cluster")
    write_folder(tmp_path / "rows", recipe)
    write_rows(tmp_path / "valid.jsonl", conversations(9) if recipe == "sft" else [{"text": "x y z"}] * 9)
    config = config_of(tmp_path, recipe, "cache", on_bad_row="skip", valid=str(tmp_path / "valid.jsonl"))
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    assert cli.main(["prepare", str(file), "--engine", engine]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 sources prepared now" in said
    assert f"`tunesmith {recipe}` finds them in {tmp_path / 'cache'}" in said
    rows = "blocks of 200 tokens" if recipe == "pretrain" else "of 605 rows"
    assert rows in said
    before = contents(tmp_path / "cache")
    assert len(before) == 4
    assert cli.main(["prepare", str(file)]) == 0
    assert "0 of 2 sources prepared now" in capsys.readouterr().out
    getattr(tunesmith, recipe)(config)
    assert contents(tmp_path / "cache") == before


def test_what_cannot_be_prepared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "rows", "sft")
    config = config_of(tmp_path, "sft", "cache", loading="streaming")
    with pytest.raises(ConfigError, match=r"data.loading=streaming: .*nothing to prepare"):
        prepare_ahead(config, engine="local")
    config = config_of(tmp_path, "sft", "cache")
    with pytest.raises(ConfigError, match="--ray-address is for --engine ray"):
        prepare_ahead(config, engine="local", ray_address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--engine ray needs .*pip install 'tunesmith\[ray\]'"):
        prepare_ahead(config, engine="ray")


def test_a_cluster_that_is_not_there_is_said() -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tunesmith[ray]'")
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ConfigError, match=r"^data.workers=0 "), ray_cluster(None, 0):
        pass
    with pytest.raises(ConfigError, match=r"^--ray-address ray://h:1: .*--ray-address auto"):
        ray_cluster("ray://h:1", None).__enter__()
    for address in ("127.0.0.1:1", "head", "head:99999"):
        with pytest.raises(ConfigError, match=rf"^--ray-address {address}: no Ray cluster .*HOST:PORT"):
            ray_cluster(address, None).__enter__()

"""The account of rows agrees with a count made here, however the rows were prepared."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tunesmith.data.cache as cache_module
from tunesmith.config import Config
from tunesmith.data.cache import open_or_prepare, write_here
from tunesmith.data.loading import Data, load_data
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import BadRow, Example, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.errors import DataError, TemplateError

MAX_LENGTH = 40


def _write_rows(file: Path, number: int, *, bad: bool = True) -> list[tuple[str, str] | None]:
    """Chats of random length, every seventh bad; returns (question, answer) of each row, None for bad
    ones."""
    rng = random.Random(5)
    lines, chats = [], []
    bad_lines = ["{", '{"messages": []}', '{"messages": [{"role": "usr", "content": "a"}]}']
    for i in range(number):
        if bad and i % 7 == 3:
            lines.append(bad_lines[i % 3])
            chats.append(None)
            continue
        question, answer = ("x" * rng.randint(1, 45) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
        chats.append((question, answer))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return chats


def _config(tmp_path: Path, tokenizer: Any, **data: Any) -> Config:
    tokenizer.save_pretrained(tmp_path / "model")
    values = {
        "train": str(tmp_path / "rows.jsonl"),
        "cache_dir": str(tmp_path / "cache"),
        "max_length": MAX_LENGTH,
    }
    return Config.model_validate({"model": {"path": str(tmp_path / "model")}, "data": values | data})


def _expected(tokenizer: Any, chats: list[tuple[str, str] | None], too_long: str) -> dict[str, int]:
    """Counted with the tokenizer alone: a row is header + question + header + answer + end."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    counts = dict.fromkeys(
        [
            "rows_read",
            "rows_kept",
            "rows_bad",
            "rows_too_long",
            "rows_cut",
            "tokens",
            "target_tokens",
            "tokens_cut",
            "target_tokens_cut",
            "tokens_too_long",
            "target_tokens_too_long",
        ],
        0,
    )
    for chat in chats:
        counts["rows_read"] += 1
        if chat is None:
            counts["rows_bad"] += 1
            continue
        prompt = length(f"<|im_start|>user\n{chat[0]}<|im_end|>\n<|im_start|>assistant\n")
        targets = length(f"{chat[1]}<|im_end|>\n")
        tokens = prompt + targets
        left = MAX_LENGTH - prompt
        if tokens <= MAX_LENGTH:
            counts["rows_kept"] += 1
            counts["tokens"] += tokens
            counts["target_tokens"] += targets
        elif too_long == "truncate" and left > 0:
            counts["rows_kept"] += 1
            counts["rows_cut"] += 1
            counts["tokens"] += MAX_LENGTH
            counts["target_tokens"] += left
            counts["tokens_cut"] += tokens - MAX_LENGTH
            counts["target_tokens_cut"] += targets - left
        else:
            counts["rows_too_long"] += 1
            counts["tokens_too_long"] += tokens
            counts["target_tokens_too_long"] += targets
    return counts


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_the_report_agrees_with_an_independent_count(
    too_long: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    chats = _write_rows(tmp_path / "rows.jsonl", 300)
    config = _config(tmp_path, tiny_tokenizer, too_long=too_long, on_bad_row="skip")
    report = load_data(config, tiny_tokenizer).report()["train"][0]
    expected = _expected(tiny_tokenizer, chats, too_long)
    assert {key: report[key] for key in expected} == expected
    assert report["rows_read"] == report["rows_kept"] + report["rows_bad"] + report["rows_too_long"] == 300
    assert sum(report["bad_by_reason"].values()) == report["rows_bad"] == len(report["bad"])
    assert len(report["shortened"]) == report["rows_cut"] + report["rows_too_long"]
    assert report["not_listed"] == 0
    assert expected["rows_kept"] > 40
    assert expected["rows_too_long"] > 10
    assert expected["rows_cut"] > 10 or too_long != "truncate"


def test_too_long_error_stops_with_the_rows_and_their_count(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chats = _write_rows(tmp_path / "rows.jsonl", 300)
    config = _config(tmp_path, tiny_tokenizer, too_long="error")
    expected = _expected(tiny_tokenizer, chats, "drop")
    with pytest.raises(DataError, match=rf"too_long {expected['rows_too_long']}\b"):
        load_data(config, tiny_tokenizer)


def _contents(data: Data) -> list[tuple[str, list[int], list[float]]]:
    rows = [data.train.rows[i] for i in range(len(data.train.rows))]
    return [
        (row.place, row.examples[0].input_ids.tolist(), row.examples[0].token_weights().tolist())
        for row in rows
    ]


def test_worker_processes_change_nothing(tmp_path: Path, tiny_tokenizer: Any) -> None:
    _write_rows(tmp_path / "rows.jsonl", 600)
    loaded = []
    for workers in (0, 2):
        folder = str(tmp_path / f"cache{workers}")
        config = _config(tmp_path, tiny_tokenizer, workers=workers, cache_dir=folder, on_bad_row="skip")
        loaded.append(load_data(config, tiny_tokenizer))
    assert _contents(loaded[0]) == _contents(loaded[1])
    assert loaded[0].report() == loaded[1].report()


def test_bad_rows_stop_the_run_with_the_first_twenty_and_the_counts(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    _write_rows(tmp_path / "rows.jsonl", 300)
    with pytest.raises(DataError) as caught:
        load_data(_config(tmp_path, tiny_tokenizer), tiny_tokenizer)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[0].startswith(f"{tmp_path / 'rows.jsonl'}:4: not_json: ")
    assert lines[20] == "... and 23 more"
    assert lines[21].startswith("43 of 300 rows of ")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def _key(tmp_path: Path, tokenizer: Any, **data: Any) -> str:
    load_data(_config(tmp_path, tokenizer, **data), tokenizer)
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime_ns).name


def test_the_cache_key_covers_content_template_tokenizer_and_options(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    _write_rows(tmp_path / "rows.jsonl", 10, bad=False)
    _key(tmp_path, tiny_tokenizer)
    _key(tmp_path, tiny_tokenizer)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    changes: list[dict[str, Any]] = [
        {"train_on": "all"},
        {"train_on": "last"},
        {"max_length": 41},
        {"system": "s"},
        {"too_long": "truncate"},
        {"on_bad_row": "skip"},
        {"max_row_bytes": 9999},
        {"columns": {"messages": "messages"}},
    ]
    keys = {_key(tmp_path, tiny_tokenizer)} | {_key(tmp_path, tiny_tokenizer, **change) for change in changes}
    tiny_tokenizer.chat_template += " "
    keys.add(_key(tmp_path, tiny_tokenizer))
    tiny_tokenizer.add_tokens(["xx"])
    keys.add(_key(tmp_path, tiny_tokenizer))
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(" \n")
    keys.add(_key(tmp_path, tiny_tokenizer))
    assert len(keys) == 1 + len(changes) + 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_preparation_leaves_nothing(
    workers: int, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_rows(tmp_path / "rows.jsonl", 600, bad=False)
    real_merge = SourceReport.merge

    def merge(self: SourceReport, other: SourceReport) -> None:
        real_merge(self, other)
        if self.rows_read > 256:
            raise KeyboardInterrupt

    monkeypatch.setattr(SourceReport, "merge", merge)
    config = _config(tmp_path, tiny_tokenizer, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        load_data(config, tiny_tokenizer)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert load_data(config, tiny_tokenizer).report()["train"][0]["rows_read"] == 600


def test_an_error_in_a_worker_ends_the_preparation_though_more_rows_wait(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK_ROWS", 4)
    _write_rows(tmp_path / "rows.jsonl", 200, bad=False)
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # has no end token
    with pytest.raises(
        TemplateError, match=r"rows.jsonl:1: messages\[1\]: the chat template writes no end token"
    ):
        load_data(_config(tmp_path, tiny_tokenizer, workers=1), tiny_tokenizer)


# --- the report itself


def _example(length: int, targets: int, cut: int = 0, cut_targets: int = 0) -> Example:
    spans = np.asarray([[length - targets, length]], dtype=np.int32)
    ids = np.arange(length, dtype=np.int32)
    return Example(ids, spans, np.ones(1, dtype=np.float32), cut, cut_targets)


ROWS = [
    PreparedRow("a:1", (_example(9, 4),), notes=("x", "x")),
    PreparedRow("a:2", problem=BadRow("not_json", "at byte 3")),
    PreparedRow("a:3", (_example(8, 2, 5, 3), _example(8, 1, 7, 7)), too_long=((20, 6),), notes=("x",)),
    PreparedRow("a:4", too_long=((30, 1), (40, 2))),
]


def test_a_row_of_many_examples_is_counted_once_and_its_examples_each() -> None:
    report = SourceReport("a", "messages")
    for row in ROWS:
        report.add(row)
    values = report.as_dict()
    assert {key: value for key, value in values.items() if isinstance(value, int)} == {
        "rows_read": 4, "rows_kept": 2, "rows_bad": 1, "rows_too_long": 1, "rows_cut": 1,
        "examples": 3, "tokens": 25, "target_tokens": 7,
        "text_bytes": 0, "rows_split": 0, "pieces": 0,
        "examples_cut": 2, "tokens_cut": 12, "target_tokens_cut": 10,
        "examples_too_long": 3, "tokens_too_long": 90, "target_tokens_too_long": 9, "not_listed": 0,
        "pairs": 0, "rows_without_pair": 0, "desirable": 0, "undesirable": 0,
    }  # fmt: skip
    assert values["notes"] == {"x": 2}
    assert [entry["place"] for entry in values["shortened"]] == ["a:3", "a:3", "a:3", "a:4", "a:4"]
    assert values["bad"] == [{"place": "a:2", "what": "not_json", "detail": "at byte 3"}]
    assert SourceReport.from_dict(json.loads(json.dumps(values))) == report


def test_parts_merge_to_the_whole() -> None:
    whole, merged = SourceReport("a", "messages"), SourceReport("a", "messages")
    for row in ROWS:
        whole.add(row)
        part = SourceReport("a", "messages")
        part.add(row)
        merged.merge(part)
    assert merged == whole


def test_bad_rows_are_listed_however_many_others_were_cut() -> None:
    report = SourceReport("a", "messages")
    for i in range(10_005):
        report.add(PreparedRow(f"a:{i}", (_example(8, 2, 5, 3),)))
    report.add(ROWS[1])
    with pytest.raises(
        DataError, match=r"^a:2: not_json: at byte 3\n1 of 10006 rows of a cannot be used \(not_json 1\)"
    ):
        report.refuse_bad_rows()
    assert report.as_dict()["not_listed"] == 5


def test_a_worker_that_dies_ends_the_preparation_with_the_reason(tmp_path: Path) -> None:
    rows = [RawRow(f"a:{i}", b"{}") for i in range(3000)]
    report = SourceReport("a", "messages")
    write = functools.partial(
        write_here,
        rows=iter(rows),
        make_preparer=functools.partial(os._exit, 1),  # type: ignore[arg-type]
        report=report,
        workers=2,
        progress=lambda _: None,
    )
    with pytest.raises(DataError, match=r"a worker process died.*Use fewer than data.workers=2"):
        open_or_prepare(tmp_path / "key", write, report, refuse_bad_rows=True)
    assert not (tmp_path / "key").exists()


def test_a_changed_validation_file_is_prepared_anew_under_streaming(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    _write_rows(tmp_path / "rows.jsonl", 30, bad=False)
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    values = {
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "valid": str(tmp_path / "valid.jsonl"),
            "loading": "streaming",
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"max_steps": 2},
    }
    for number in (10, 14):
        _write_rows(tmp_path / "valid.jsonl", number, bad=False)
        report = load_data(Config.model_validate(values), tiny_tokenizer).report()
        assert report["valid"][0]["rows_read"] == number
        assert report["train"][0]["fingerprint"] == ""  # a stream is not read to its end for a hash

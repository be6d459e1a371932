"""The committed example data is what its generator makes, and is as its docstring says."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
GENERATOR = EXAMPLES / "make_bookings.py"
FOLDER = EXAMPLES / "bookings"
DAYS = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}

Chat = list[dict[str, str]]


def read(name: str) -> list[Chat]:
    with (FOLDER / name).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert all(list(row) == ["messages"] for row in rows)
    return [row["messages"] for row in rows]


def bookings(chats: list[Chat]) -> list[dict[str, Any]]:
    return [json.loads(chat[-1]["content"]) for chat in chats]


@pytest.fixture(scope="module")
def train() -> list[Chat]:
    return read("train.jsonl")


@pytest.fixture(scope="module")
def valid() -> list[Chat]:
    return read("valid.jsonl")


def test_the_generator_makes_the_committed_files_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(GENERATOR), str(tmp_path)])
    runpy.run_path(str(GENERATOR), run_name="__main__")
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_data_set_is_small_enough_for_the_repository(train: list[Chat], valid: list[Chat]) -> None:
    assert (len(train), len(valid)) == (600, 100)
    assert sum(file.stat().st_size for file in FOLDER.glob("*.jsonl")) < 300_000


def test_every_row_is_a_system_prompt_a_message_and_a_strict_answer(
    train: list[Chat], valid: list[Chat]
) -> None:
    for chat in train + valid:
        assert [message["role"] for message in chat] == ["system", "user", "assistant"]
        answer = chat[-1]["content"]
        booking = json.loads(answer)
        assert list(booking) == ["name", "guests", "day", "time", "seating"]
        assert answer == json.dumps(booking)
        assert type(booking["guests"]) is int
        assert 1 <= booking["guests"] <= 8
        assert booking["day"] in DAYS
        hour, minute = map(int, booking["time"].split(":"))
        assert 17 <= hour <= 21
        assert minute in (0, 15, 30, 45)
        assert booking["seating"] in ("inside", "outside", None)
        assert booking["name"] in chat[1]["content"]


def test_no_message_is_written_twice(train: list[Chat], valid: list[Chat]) -> None:
    messages = [chat[1]["content"] for chat in train + valid]
    assert len(set(messages)) == len(messages)


def test_no_name_and_no_booking_of_the_valid_rows_is_trained_on(train: list[Chat], valid: list[Chat]) -> None:
    def names(chats: list[Chat]) -> set[str]:
        return {part for booking in bookings(chats) for part in booking["name"].split()}

    def tables(chats: list[Chat]) -> set[tuple[int, str, str]]:
        return {(booking["guests"], booking["day"], booking["time"]) for booking in bookings(chats)}

    assert names(train) & names(valid) == set()
    assert tables(train) & tables(valid) == set()


def test_an_answer_copied_from_the_message_is_hardly_ever_right(train: list[Chat], valid: list[Chat]) -> None:
    """A row in 50 at most spells guests, day and time as the answer does."""
    can_be_copied = [
        all(f" {booking[key]}" in chat[1]["content"] for key in ("guests", "day", "time"))
        for chat, booking in zip(train + valid, bookings(train + valid), strict=True)
    ]
    assert sum(can_be_copied) <= len(can_be_copied) / 50

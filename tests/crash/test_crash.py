"""A run that is killed at any instant goes on and ends as the run that was never killed, bit for bit: a
sample of the points. `make test-crash` tries them all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash.harness import (
    Driver,
    Point,
    Untouched,
    difference,
    operation_points,
    spread,
    time_points,
    train_untouched,
    try_point,
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def untouched(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    return train_untouched(driver, "LoRA", tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_run_killed_at_a_file_operation_ends_as_if_it_had_not_been(
    driver: Driver, untouched: Untouched, share: float
) -> None:
    points = operation_points(untouched)
    outcome = try_point(driver, untouched, points[int(share * len(points))], f"at-{share}")
    assert outcome.fault is None, outcome


def test_a_run_killed_while_a_checkpoint_gets_its_name_goes_on_from_the_one_before(
    driver: Driver, untouched: Untouched
) -> None:
    (number,) = (
        i
        for i, (name, path) in enumerate(untouched.operations, 1)
        if name == "rename" and path.endswith("/step-000006")
    )
    outcome = try_point(driver, untouched, Point(number), "renamed")
    assert (outcome.found, outcome.fault) == ("step 3, .step-000006.tmp", None)


@pytest.mark.parametrize("number", range(4))
def test_a_run_killed_at_a_time_ends_as_if_it_had_not_been(
    driver: Driver, untouched: Untouched, number: int
) -> None:
    outcome = try_point(driver, untouched, time_points(untouched, 4)[number], f"time-{number}")
    assert outcome.fault is None, outcome


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.safetensors", lambda b: b[:-100], "optimizer.safetensors has "),
        ("rng-0.safetensors", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:], "rng-0.safetensors differs"),
        ("scheduler.safetensors", None, "scheduler.safetensors is missing"),
        ("manifest.json", lambda b: b[: len(b) // 2], "its manifest cannot be read"),
        ("more.bin", lambda _: b"x", "more.bin was not saved with it"),
    ],
    ids=["truncated", "bit flipped", "deleted", "half a manifest", "extra"],
)
def test_a_damaged_checkpoint_is_named_and_the_run_from_the_one_before_ends_the_same(
    driver: Driver, untouched: Untouched, name: str, damage, said: str
) -> None:
    output_dir = untouched.folder.with_name(f"damaged-{name}")
    run = shutil.copytree(untouched.folder, output_dir / untouched.folder.name)
    file = run / "checkpoints" / "step-000010" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes() if file.exists() else b""))
    section = {**untouched.config["run"], "name": run.name, "output_dir": str(output_dir)}
    config = untouched.config | {"run": section}
    log = run.with_suffix(".log")
    status, _, _ = driver.run(config, log)
    assert status == 0
    printed = " ".join(log.read_text().split())
    assert f"damaged checkpoint passed over: {run}/checkpoints/step-000010: {said}" in printed
    assert difference(untouched.folder, run) is None


def test_the_comparison_sees_one_bit(untouched: Untouched) -> None:
    """What all of this rests on."""
    for name in ("final/adapter_model", "best/adapter_model", "checkpoints/step-000010/optimizer"):
        run = shutil.copytree(untouched.folder, untouched.folder.with_name("other"))
        file = run / f"{name}.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        assert str(difference(untouched.folder, run)).startswith(f"{name}.safetensors: ")
        shutil.rmtree(run)
    run = shutil.copytree(untouched.folder, untouched.folder.with_name("other"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert difference(untouched.folder, run) == f"metrics.jsonl has {len(lines) - 1} lines, not {len(lines)}"


def test_points_are_spread_over_all_operations(untouched: Untouched) -> None:
    points = operation_points(untouched)
    numbers = [point.operation for point in points if not point.is_midway]
    assert numbers == list(range(1, len(untouched.operations) + 1))
    names = {name for name, _ in untouched.operations}
    assert names == {"make_folder", "write", "sync", "rename", "remove"}
    assert [point.operation for point in spread(points[:10], 5)] == [
        point.operation for point in points[:10:2]
    ]
    paths = [Path(path) for _, path in untouched.operations]
    for part in ("best", "final", "checkpoints"):
        assert any(part in path.parts or path.name == part for path in paths), part

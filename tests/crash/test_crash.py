"""A run that is killed at any instant goes on and ends as the run that was never killed, bit for bit: a
sample of the points. `make test-crash` tries them all."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from crash.harness import (
    Driver,
    Point,
    Untouched,
    difference,
    operation_points,
    points_killed_twice,
    points_of_one_rank,
    scenario_config,
    spread,
    time_points,
    train_untouched,
    training_points,
    try_point,
)

from tunesmith.training.run_folder import read_metrics
from tunesmith.training.state_files import read_state


@pytest.fixture(scope="module")
def untouched(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    return train_untouched(driver, "LoRA", tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize("share", [0.05, 0.35, 0.65, 0.95])
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
        for i, (name, path) in enumerate(untouched.places[0], 1)
        if name == "rename" and path.endswith("/step-000006")
    )
    outcome = try_point(driver, untouched, Point(number), "renamed")
    assert (outcome.found, outcome.fault) == ("step 3, .step-000006.tmp", None)


@pytest.mark.parametrize(
    ("name", "step"),
    [("pass", 4), ("pass", 6), ("update", 12), ("evaluation", 8)],
    ids=["in mid-epoch", "in a last, partial step", "before the last update", "in an evaluation"],
)
def test_a_run_killed_between_two_passes_ends_as_if_it_had_not_been(
    driver: Driver, untouched: Untouched, name: str, step: int
) -> None:
    numbers = [
        point.number
        for point in training_points(untouched)
        if untouched.places[0][point.number - 1][0] == name
        and untouched.places[0][point.number - 1][1].split(",")[0] == f"step {step}"
    ]
    outcome = try_point(driver, untouched, Point(numbers[-1]), f"{name}-{step}")
    assert outcome.fault is None, outcome


def test_a_run_killed_again_after_it_has_gone_on_ends_as_if_it_had_not_been(
    driver: Driver, untouched: Untouched
) -> None:
    outcome = try_point(driver, untouched, points_killed_twice(untouched, 3)[1], "twice")
    assert outcome.fault is None, outcome


@pytest.fixture(scope="module")
def two_ranks(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    return train_untouched(driver, "2 ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_of_which_one_is_killed_end_as_if_it_had_not_been(
    driver: Driver, two_ranks: Untouched, rank: int
) -> None:
    point = [point for point in points_of_one_rank(two_ranks, 4) if point.rank == rank][1]
    outcome = try_point(driver, two_ranks, point, f"alone-{rank}")
    assert outcome.fault is None, outcome
    assert "the other one ended with 1" in outcome.what


def test_all_ranks_go_on_from_a_checkpoint_that_a_kill_left_half_replaced(
    driver: Driver, two_ranks: Untouched
) -> None:
    """Rank 0 brings it back. The other one used to look before that, and to go on from the one before it."""
    run = shutil.copytree(two_ranks.folder, two_ranks.folder.with_name("replaced") / two_ranks.folder.name)
    (run / "checkpoints" / "step-000012").rename(run / "checkpoints" / ".step-000012.old")
    section = {**two_ranks.config["run"], "output_dir": str(run.parent)}
    log = run.with_suffix(".log")
    ended = driver.run(two_ranks.config | {"run": section | {"name": run.name}}, log, ranks=2)
    assert ended.statuses == [0, 0], log.read_text()
    assert difference(two_ranks.folder, run) is None


def test_each_rank_has_a_random_state_of_its_own(two_ranks: Untouched) -> None:
    """With one state the dropout of two ranks would be one mask, laid over both."""
    folder = two_ranks.folder / "checkpoints" / "step-000012"
    states = [read_state(folder / f"rng-{rank}.safetensors") for rank in (0, 1)]
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    assert states[0]["python"] != states[1]["python"]


@pytest.mark.parametrize("number", range(2))
def test_a_run_killed_at_a_time_ends_as_if_it_had_not_been(
    driver: Driver, untouched: Untouched, number: int
) -> None:
    outcome = try_point(driver, untouched, time_points(untouched, 2)[number], f"time-{number}")
    assert outcome.fault is None, outcome


def test_a_run_that_goes_on_with_another_number_of_ranks_has_the_same_losses(
    driver: Driver, tmp_path: Path
) -> None:
    """Without dropout, since each rank draws its own. Sums of a step are added in another order: float32
    rounds by 6e-8, and a few such steps stay below 1e-6."""
    config = scenario_config({"adapter": {"dropout": 0.0}}, tmp_path)
    lines = {}
    for name, ranks in {"untouched": (1,), "more": (1, 2), "fewer": (2, 1)}.items():
        named = config | {"run": config["run"] | {"name": name}}
        log = tmp_path / f"{name}.log"
        if len(ranks) > 1:
            ended = driver.run(named, log, ranks=ranks[0], kill_before=["rows", "step 7"])
            assert ended.statuses[0] == -signal.SIGKILL  # another rank may have noticed before it is killed
        ended = driver.run(named, log, ranks=ranks[-1])
        assert not any(ended.statuses), log.read_text()
        assert ended.places[0].count(["rows", "step 7"]) == 1
        assert (["rows", "step 6, the last of its epoch"] in ended.places[0]) == (len(ranks) == 1)
        lines[name] = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
    for name in ("more", "fewer"):
        for line, other in zip(lines["untouched"], lines[name], strict=True):
            assert [line.get(key) for key in ("step", "rows", "tokens", "target_tokens")] == [
                other.get(key) for key in ("step", "rows", "tokens", "target_tokens")
            ]
            for key in ("loss", "eval_loss"):
                assert line.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-6), (name, line, other)


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
    file = run / "checkpoints" / "step-000012" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes() if file.exists() else b""))
    section = {**untouched.config["run"], "name": run.name, "output_dir": str(output_dir)}
    config = untouched.config | {"run": section}
    log = run.with_suffix(".log")
    assert driver.run(config, log).statuses == [0]
    printed = " ".join(log.read_text().split())
    assert f"damaged checkpoint passed over: {run}/checkpoints/step-000012: {said}" in printed
    assert difference(untouched.folder, run) is None


def test_the_comparison_sees_one_bit(untouched: Untouched) -> None:
    """What all of this rests on."""
    for name in ("final/adapter_model", "best/adapter_model", "checkpoints/step-000012/optimizer"):
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


def test_points_are_spread_over_all_places(untouched: Untouched) -> None:
    points = operation_points(untouched) + training_points(untouched)
    numbers = [point.number for point in points if not point.is_midway]
    assert sorted(numbers) == list(range(1, len(untouched.places[0]) + 1))
    counts = Counter(name for name, _ in untouched.places[0])
    operations = {"make_folder", "write", "sync", "rename", "remove", "append"}
    assert counts.keys() == operations | {"rows", "pass", "update", "evaluation"}
    # 12 steps of three passes, and four evaluations, of which a line is written too; then a few answers.
    assert counts["rows"] == counts["update"] == 12
    assert (counts["pass"], counts["append"]) == (36, 16)
    assert counts["evaluation"] % 4 == 1
    assert [point.number for point in spread(points[:10], 5)] == [point.number for point in points[:10:2]]
    paths = [Path(what) for name, what in untouched.places[0] if name in operations]
    for part in ("best", "final", "checkpoints"):
        assert any(part in path.parts or path.name == part for path in paths), part

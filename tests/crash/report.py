"""Every point: `make test-crash`, or

    PYTHONPATH=tests python -m crash.report [--scenario NAME] [--points N] [--processes N] [--out FILE]

Kills runs before and in the midst of every file operation of one scenario, at fewer of the others, at places
of training and at times spread over them, one rank of two alone, and what goes on again; prints a line a
point and a table of totals, writes all of it to FILE as JSON, and exits with 1 if one did not end as the
untouched run. `--points` tries so many only, spread over all, `--scenario` those of one scenario.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from crash.harness import (
    SCENARIOS,
    Driver,
    Outcome,
    Point,
    Untouched,
    operation_points,
    points_killed_twice,
    points_of_one_rank,
    spread,
    time_points,
    train_untouched,
    training_points,
    try_point,
)
from rich.console import Console
from rich.table import Table

_ALL = "LoRA"  # the scenario of which every operation is tried
# Points of each other scenario at file operations, at places of training, at times; more of _ALL.
_OPERATIONS, _TRAINING, _TIMES = 8, 8, 6
_MORE, _ALONE, _TWICE = 3, 12, 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, help="this one only")
    parser.add_argument("--points", type=int, help="so many only")
    parser.add_argument("--processes", type=int, default=2, help="runs at once (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/crash-report.json"))
    options = parser.parse_args()
    outcomes = []
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        for outcome in _try_all(Path(folder), options.scenario, options.points, options.processes):
            outcomes.append(outcome)
            verdict = "identical" if outcome.fault is None else f"FAULT: {outcome.fault}"
            console.print(
                f"{outcome.scenario} | {outcome.point} | {outcome.what} | {outcome.found} | {verdict}"
            )
    console.print(_totals(outcomes))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8"
    )
    console.print(f"wrote {options.out}")
    return int(any(outcome.fault for outcome in outcomes))


def _try_all(folder: Path, only: str | None, number: int | None, processes: int) -> Iterator[Outcome]:
    """In several drivers at once; in the order of the points."""
    drivers: SimpleQueue[Driver] = SimpleQueue()
    for _ in range(processes):
        drivers.put(Driver())
    tried: list[tuple[Untouched, Point]] = []
    driver = drivers.get()
    for scenario in [only] if only else SCENARIOS:
        untouched = train_untouched(driver, scenario, folder)
        tried += [(untouched, point) for point in _points(untouched)]
    drivers.put(driver)
    if number is not None:
        tried = [tried[i * len(tried) // number] for i in range(min(number, len(tried)))]

    def try_one(i: int) -> Outcome:
        driver = drivers.get()
        try:
            return try_point(driver, *tried[i], f"point-{i}")
        finally:
            drivers.put(driver)

    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(try_one, range(len(tried)))
    for _ in range(processes):
        drivers.get().close()


def _points(untouched: Untouched) -> list[Point]:
    operations, training = operation_points(untouched), training_points(untouched)
    if untouched.scenario == _ALL:
        points = [*operations, *spread(training, _MORE * _TRAINING), *time_points(untouched, _MORE * _TIMES)]
        return points + points_killed_twice(untouched, _TWICE)
    points = [*spread(operations, _OPERATIONS), *spread(training, _TRAINING)]
    points += time_points(untouched, _TIMES)
    return points + (points_of_one_rank(untouched, _ALONE) if untouched.ranks > 1 else [])


def _totals(outcomes: list[Outcome]) -> Table:
    """What was killed, how often, and how often it ended the same."""
    table = Table("scenario", "killed", "points", "identical")
    counts: dict[tuple[str, str], list[bool]] = {}
    for outcome in outcomes:
        counts.setdefault((outcome.scenario, outcome.kind), []).append(outcome.fault is None)
    for (scenario, kind), verdicts in counts.items():
        table.add_row(scenario, kind, str(len(verdicts)), str(sum(verdicts)))
    table.add_section()
    table.add_row("all", "", str(len(outcomes)), str(sum(outcome.fault is None for outcome in outcomes)))
    return table


if __name__ == "__main__":
    sys.exit(main())

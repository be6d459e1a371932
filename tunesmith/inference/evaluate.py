"""`tunesmith eval`: a tuned model against the one it was tuned from, on rows with answers.

rows --> loss of both, by the objective of training      --> rows.jsonl (a line a row)
     --> answers of both, to the same prompts --> scores --> result.json, and a table
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.artifacts.found import Say, find_model, run_folder
from tunesmith.artifacts.tuned import Tuned, base_of, load_tuned
from tunesmith.config.schema import Format
from tunesmith.data.prepare import PreparedRow, Preparer
from tunesmith.data.records import BadRow, Example
from tunesmith.errors import ConfigError, DataError
from tunesmith.inference.asked import Asked, prompts, read_asked
from tunesmith.inference.generate import Manner, answer_all, system_of
from tunesmith.inference.metrics import (
    Interval,
    bootstrap,
    exact_match,
    json_equal,
    json_valid,
    rouge_l,
    token_f1,
)
from tunesmith.packing.collate import collate_flat
from tunesmith.training import durable_files
from tunesmith.training.answers import Written
from tunesmith.training.objectives import next_token_loss
from tunesmith.training.run_folder import write_json

# Scores of an answer beside the one expected; all but the loss are better when higher.
SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge": rouge_l,
    "json_valid": json_valid,
    "json_equal": json_equal,
}
METRICS = ("loss", *SCORES)


@dataclass
class Side:
    """What one model did, row by row: `nats` [N] summed over the targets of a row, and what it wrote."""

    nats: NDArray[np.float64] | None = None
    written: list[Written] = field(default_factory=list)
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def evaluate(
    model: str,
    *,
    data: str,
    metrics: Sequence[str],
    manner: Manner,
    out: Path | None = None,
    resamples: int = 10_000,
    format: Format = "auto",
    columns: Sequence[str] = (),
    say: Say,
) -> dict[str, Any]:
    """Measure the model, and the one it was tuned from where there is one; write rows.jsonl and result.json
    to `out` (by default a folder of the run, named for the data), print a table, return the result.

    Raises ConfigError for an unknown metric, for settings out of range or no place to write to; DataError,
    ModelError and TemplateError for what cannot be read, loaded or rendered."""
    manner.check()
    _check(metrics, resamples)
    folder = out or _folder(model, data)
    asked = read_asked(data, format=format, columns=columns)
    expects = [row for row in asked if row.whole is None]
    if expects:
        raise DataError(
            f"{expects[0].place}: has no answer to measure against. Answer it by: tunesmith generate"
        )
    is_chat = any(row.prompt.is_chat for row in asked)
    tuned = load_tuned(find_model(model, say), say, needs_template=is_chat)
    system = system_of(tuned, say)
    scored = [name for name in metrics if name in SCORES]
    expected, ids = _questions(asked, tuned, system) if scored else ([], [])
    examples = _examples(asked, tuned, system) if "loss" in metrics else []
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Side] = {}

    def measure(name: str, one: Any) -> None:
        side = sides[name] = Side()
        if examples:
            side.nats = _losses(one, examples)
        if scored:
            journal = folder / f"answers-{name}.part"
            side.written = answer_all(tuned, one, ids, manner, journal, say)
            side.scores = {name: _score(SCORES[name], side.written, expected) for name in scored}

    with ExitStack() as stack:
        base = stack.enter_context(base_of(tuned, say))
        if base is not None:
            measure("base", base)
        else:
            say("there is no base model to compare with")
    measure("tuned", tuned.model)
    targets = np.array([_weight(example) for example in examples])
    result = {
        "model": tuned.found.home,
        "data": data,
        "rows": len(asked),
        "metrics": _intervals(sides, targets, resamples, manner.seed),
        "resamples": resamples,
        "answers": asdict(manner) if scored else None,
        "stop_rate": {
            name: sum(one.is_ended for one in side.written) / len(asked) for name, side in sides.items()
        }
        if scored
        else None,
    }
    lines = [_line(i, row, sides, targets, expected) for i, row in enumerate(asked)]
    durable_files.replace_file(folder / "rows.jsonl", "".join(lines).encode())
    write_json(folder / "result.json", result)
    for name in sides:
        durable_files.remove(folder / f"answers-{name}.part")
    print_result(Console(), result)
    say(f"row by row: {folder / 'rows.jsonl'}")
    return result


def _check(metrics: Sequence[str], resamples: int) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ConfigError(f"--metrics {','.join(unknown)}: expected some of {', '.join(METRICS)}.")
    if resamples < 1:
        raise ConfigError(f"--resamples {resamples}: expected 1 or more.")


def _folder(model: str, data: str) -> Path:
    run = run_folder(Path(model).expanduser())
    if run is None:
        raise ConfigError(f"{model} is no run that could hold the result. Name a folder: --out DIR.")
    return run / "eval" / (Path(data).name.partition(".")[0] or "data")


# --- rows


def _questions(
    asked: Sequence[Asked], tuned: Tuned, system: str | None
) -> tuple[list[str], list[NDArray[np.int32]]]:
    """The answers expected, and the prompts. Raises DataError where rows are documents."""
    if any(not row.prompt.is_chat and row.whole and not row.whole.prompt for row in asked):
        raise DataError("the rows are documents, without questions: only --metrics loss can be told of them.")
    preparer = tuned.preparer_of(system=system, train_on="last")
    return [_expected(row, preparer) for row in asked], prompts(asked, preparer)


def _expected(row: Asked, preparer: Preparer) -> str:
    """The answer the row has, as the model is to write it: a tool call in the template's own words."""
    assert row.whole is not None
    if not row.whole.is_chat:
        return row.whole.completion
    message = row.whole.messages[-1]
    if not message.get("tool_calls") and not message.get("reasoning_content"):
        return str(message["content"])
    example = _made(row, preparer)[-1]
    start, end = example.spans[-1]
    return str(preparer.tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True))


def _examples(asked: Sequence[Asked], tuned: Tuned, system: str | None) -> list[list[Example]]:
    run = tuned.found.run
    preparer = tuned.preparer_of(system=system, train_on=run.data.train_on if run else "assistant")
    limit = getattr(tuned.model.config, "max_position_embeddings", None)
    examples = [_made(row, preparer) for row in asked]
    for row, of_row in zip(asked, examples, strict=True):
        length = max(len(example.input_ids) for example in of_row)
        if limit is not None and length > limit:
            raise DataError(
                f"{row.place}: {length} tokens; the model has positions for {limit}. Leave it out."
            )
    return examples


def _made(row: Asked, preparer: Preparer) -> list[Example]:
    assert row.whole is not None
    try:
        return preparer.examples(row.whole)
    except BadRow as problem:
        raise DataError(f"{row.place}: {problem}") from problem


def _weight(examples: Sequence[Example]) -> float:
    return float(sum(example.token_weights().sum(dtype=np.float64) for example in examples))


# --- measures


@torch.no_grad()
def _losses(model: Any, examples: Sequence[Sequence[Example]]) -> NDArray[np.float64]:
    """Nats [N] of each row, summed over its targets by their weights, as training counts them."""
    device = next(model.parameters()).device
    nats = []
    for of_row in examples:
        total = 0.0
        for example in of_row:
            pack = collate_flat([PreparedRow("", (example,))])
            pack = {key: item.to(device) if torch.is_tensor(item) else item for key, item in pack.items()}
            total += float(next_token_loss(model, {**pack, "layout": None}))  # one example: nothing to part
        nats.append(total)
    return np.array(nats)


def _score(
    score: Callable[[str, str], float], written: Sequence[Written], expected: Sequence[str]
) -> NDArray[np.float64]:
    return np.array([score(one.text, text) for one, text in zip(written, expected, strict=True)])


def _intervals(
    sides: dict[str, Side], targets: NDArray[np.float64], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """metric -> side (and `difference`) -> value, low, high."""
    one = next(iter(sides.values()))
    of_metrics = {}
    if one.nats is not None:
        of_metrics["loss"] = ([side.nats for side in sides.values() if side.nats is not None], targets)
    for name, scores in one.scores.items():
        of_metrics[name] = ([side.scores[name] for side in sides.values()], np.ones(len(scores)))
    names = [*sides, "difference"] if len(sides) == 2 else list(sides)
    return {
        metric: {
            name: asdict(interval)
            for name, interval in zip(
                names, bootstrap(sums, weights, resamples=resamples, seed=seed), strict=True
            )
        }
        for metric, (sums, weights) in of_metrics.items()
    }


def _line(
    i: int, row: Asked, sides: dict[str, Side], targets: NDArray[np.float64], expected: Sequence[str]
) -> str:
    content: dict[str, Any] = {"row": row.place, **row.shown}
    if expected:
        content["expected"] = expected[i]
    for name, side in sides.items():
        of_side: dict[str, Any] = {}
        if side.nats is not None:
            of_side |= {"loss": side.nats[i] / targets[i], "target_weight": targets[i]}
        if side.written:
            one = side.written[i]
            of_side |= {"answer": one.text, "finish": "stop" if one.is_ended else "length"}
        content[name] = of_side | {metric: float(scores[i]) for metric, scores in side.scores.items()}
    return json.dumps(content, ensure_ascii=False) + "\n"


def print_result(console: Console, result: dict[str, Any]) -> None:
    """The figures with their intervals, a metric a row."""
    metrics = result["metrics"]
    sides = list(next(iter(metrics.values())))
    rows = f"{result['rows']:,} rows of {result['data']}"
    console.print(Text(f"{rows} (95 % of {result['resamples']:,} resamples)"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for side in sides:
        table.add_column("tuned - base" if side == "difference" else side, justify="right")
    for metric, of_sides in metrics.items():
        table.add_row(metric, *(_shown(Interval(**of_sides[side]), side == "difference") for side in sides))
    if result["stop_rate"]:
        rates = [f"{rate:.3f}" for rate in result["stop_rate"].values()]
        table.add_row("stop_rate", *rates)
    console.print(table, highlight=False)


def _shown(interval: Interval, is_difference: bool) -> str:
    sign = "+" if is_difference else ""
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"

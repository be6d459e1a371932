"""Whether preference tuning prefers what people preferred: accuracy on held-out pairs before and after.

    python -m benchmarks.prefer_accuracy [--folds 3] [--pairs N] [--seed 1] [--data FILE] [--model FOLDER]
                                         [--out FILE] [SECTION.KEY=VALUE ...]

The demo model (or `--model`), LoRA, `tunesmith prefer` in bfloat16, on dpo_en_demo (or `--data`, JSON with
the same columns). The pairs are dealt out to the folds, those of one conversation to the same one; in turn
each is held out and the others are trained on, from the untouched model, so that every pair is judged by a
model that has not seen it. Settings of the run can be given as on the command line of tunesmith, such as
`train.epochs=2 prefer.beta=0.3`. No step or epoch is chosen by what is held out: it is the model at the end
that is judged.

A pair is judged right where the chosen answer has the higher

    per_token   mean log-probability of its tokens
    whole       log-probability
    reward      log-probability less that under the untouched model, which itself judges none: 1/2 each

Accuracies before and after, and their difference, with 95 % intervals of a bootstrap over conversations that
draws the same ones for both. Each pair's numbers are in the JSON, which is written after each fold; folds
that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tunesmith
from benchmarks.ladder import record
from benchmarks.ladder.steps import autocast
from benchmarks.ladder.workloads import SHARED, model_of
from tunesmith.config import Config, load_config
from tunesmith.data.loading import load_data
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.inference.metrics import bootstrap
from tunesmith.models.adapt import build_model
from tunesmith.packing.answers import collate_answers_tree
from tunesmith.packing.plan import fill_passes
from tunesmith.training.preference import target_logps
from tunesmith.training.reference import adapter_off

_PASS_TOKENS = 2048
_RESAMPLES = 10_000
Pair = dict[str, Any]


def main() -> None:
    options = _options()
    rows = json.loads(options.data.read_text(encoding="utf-8"))[: options.pairs]
    conversations = conversations_of(rows, options.seed)
    asked = {"folds": options.folds, "seed": options.seed, "pairs": len(rows), "settings": options.settings}
    result: dict[str, Any] = {"machine": record.machine(), "asked": asked, "runs": []}
    if options.out.is_file():
        result = json.loads(options.out.read_text(encoding="utf-8"))
        if result["asked"] != asked:
            raise SystemExit(f"{options.out} holds {result['asked']}, and not {asked}. Name another --out.")
    for fold in range(len(result["runs"]), options.folds):
        with tempfile.TemporaryDirectory() as folder:
            result["runs"].append(_run(rows, conversations, fold, Path(folder), options))
        pairs = [pair for run in result["runs"] for pair in run["pairs"]]
        result["accuracy"] = accuracies(pairs, conversations, options.seed)
        options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(table(result), flush=True)


def conversations_of(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """A number for the conversation of each row, which its first message tells, in random order."""
    openings = [json.dumps(row["conversations"][0]) for row in rows]
    order = sorted(set(openings))
    random.Random(seed).shuffle(order)
    numbers = {opening: number for number, opening in enumerate(order)}
    return [numbers[opening] for opening in openings]


def accuracies(pairs: list[Pair], conversations: list[int], seed: int) -> dict[str, dict[str, Any]]:
    """By each way to judge: the share of pairs judged right before and after, and the difference."""
    before, after, tokens = (
        np.array([pair[name] for pair in pairs]) for name in ("before", "after", "tokens")
    )
    ways = {
        "per_token": (before / tokens, after / tokens),
        "whole": (before, after),
        "reward": (np.zeros_like(before), after - before),
    }
    _, whose = np.unique([conversations[pair["row"]] for pair in pairs], return_inverse=True)
    found = {}
    for way, scores in ways.items():
        right = [np.bincount(whose, _right(each[:, 0] - each[:, 1])).astype(np.float64) for each in scores]
        intervals = bootstrap(right, np.bincount(whose).astype(np.float64), resamples=_RESAMPLES, seed=seed)
        names = ("before", "after", "difference")
        found[way] = {name: asdict(each) for name, each in zip(names, intervals, strict=True)}
    return found


def _right(margins: Any) -> Any:
    """1 where the chosen answer is ahead, 1/2 where neither is."""
    return (margins > 0) + 0.5 * (margins == 0)


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a way to judge."""
    number = sum(len(run["pairs"]) for run in result["runs"])
    lines = [
        f"| {number} held-out pairs, judged by | before, % | after, % | difference (95 %) |",
        "|---|---|---|---|",
    ]
    for way, found in result["accuracy"].items():
        before, after, apart = (found[name] for name in ("before", "after", "difference"))
        lines.append(
            f"| {way} | {_percent(before)} | {_percent(after)} | {100 * apart['value']:+.1f} "
            f"({100 * apart['low']:+.1f} to {100 * apart['high']:+.1f}) |"
        )
    return "\n".join(lines)


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _run(
    rows: list[Any], conversations: list[int], fold: int, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train on the other folds, and judge this one."""
    held_out, trained = folder / "held_out.jsonl", folder / "trained.jsonl"
    numbers = [number for number, of in enumerate(conversations) if of % options.folds == fold]
    others = sorted(set(range(len(rows))) - set(numbers))
    for file, some in ((held_out, numbers), (trained, others)):
        file.write_text("".join(json.dumps(rows[number]) + "\n" for number in some), encoding="utf-8")
    values = {
        "run": {"name": f"fold-{fold}", "output_dir": str(folder), "seed": options.seed},
        "model": {"path": str(options.model)},
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.0},
        "data": {"train": str(trained), "max_length": 1024, "cache_dir": str(folder / "cache")},
        "prefer": {"method": "dpo", "beta": 0.1},
        # Twenty times our default for LoRA: there are some fifty steps, not thousands.
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-4},
        "checkpoint": {"every_steps": 10**6},
    }
    config = load_config(values, options.settings, recipe="prefer")
    start = time.perf_counter()
    done = tunesmith.prefer(config)
    trained_s = time.perf_counter() - start
    pairs = judge(config, done.final, held_out)
    for pair in pairs:
        line = int(pair["row"].rpartition(":")[2])
        pair["row"] = numbers[line - 1]
    names = ("rows", "steps", "train_s", "first_loss", "last_loss", "tokens_per_s", "peak_memory_gib")
    return {
        "fold": fold,
        "whole_run_s": trained_s,
        "judged_s": time.perf_counter() - start - trained_s,
        "summary": {name: done.summary[name] for name in names if name in done.summary},
        "pairs": pairs,
    }


def judge(config: Config, adapter: Path, file: Path) -> list[Pair]:
    """What the model of the config says of each pair in the file, without the adapter and with it: the
    log-probability of the chosen and of the rejected answer, in nats, and how many tokens they have."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer, lambda _: None).eval()
    read = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not read.unexpected_keys
    rows = load_data(load_config(config, [f"data.train={file}"], recipe="prefer"), tokenizer).train
    ways: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
        "before": adapter_off,
        "after": nullcontext,
    }
    pairs: list[Pair] = []
    for items in fill_passes(rows.lengths, _PASS_TOKENS):
        pack = collate_answers_tree([rows.rows[item] for item in items])
        found: dict[str, list[list[float]]] = {}
        for when, context in ways.items():
            with torch.no_grad(), context(model), autocast(model):
                found[when] = _of_pairs(target_logps(model, pack), pack)
        found["tokens"] = _of_pairs(torch.ones_like(pack["shares"]), pack)
        pairs += [
            {"row": row.place} | {name: values[number] for name, values in found.items()}
            for number, row in enumerate(pack["rows"])
        ]
    return pairs


def _of_pairs(values: Tensor, pack: dict[str, Any]) -> list[list[float]]:
    """[chosen, rejected] of each pair: the sum over the answer's targets."""
    sums = torch.zeros(len(pack["sides"]), dtype=torch.float64)
    found: list[list[float]] = sums.index_add_(0, pack["answers"], values.double()).reshape(-1, 2).tolist()
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefer_accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="of the data that are dealt out; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dpo_en_demo.json")
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("prefer-accuracy.json"))
    parser.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE", help="of the run")
    options = parser.parse_args()
    options.model = options.model or model_of("c")
    return options


if __name__ == "__main__":
    main()

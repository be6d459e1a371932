"""Ten million parameters from scratch on a text file, beside a plain loop of torch and transformers.

    python -m benchmarks.pretrain_wiki wiki_demo.txt               both curves, in float32 and as users run it
    python -m benchmarks.pretrain_wiki wiki_demo.txt --speed 3     tokens/s and memory, in turn; no evaluation
    python -m benchmarks.pretrain_wiki --table benchmarks/pretrain-wiki.json

A tokenizer is learnt from the file with `tunesmith tokenizer train`, and recipes/pretrain-from-scratch.yaml
is run as a command line would run it. The plain loop is a process that never imports tunesmith. It is
handed the weights that tunesmith draws, and token ids: the pieces of documents of each step. That these are
the file's text is found out apart, by cutting it here. It runs the pieces of a step a few of one length at
a time, without padding and without packing, with torch's own AdamW and the schedule's formula. Runs are
added to those that the result holds (`--runs`). Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.ladder.curves import write_svg
from benchmarks.ladder.record import memory_gib, versions

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "recipes" / "pretrain-from-scratch.yaml"
VOCABULARY = 8192
RUNS = {  # name -> number format, and pieces in a pass of the plain loop: 4 of 512 are what tunesmith chooses
    "plain_fp32": ("float32", 4),
    "plain_fp32_singly": ("float32", 1),
    "tunesmith_fp32": ("float32", None),
    "plain_bf16": ("bfloat16", 4),
    "tunesmith": ("auto", None),
}
# The second is the plain loop against itself: how far the order of float32 sums alone drives a run.
PAIRS = (("plain_fp32", "tunesmith_fp32"), ("plain_fp32", "plain_fp32_singly"), ("plain_fp32", "tunesmith"))
LOSSES = ["plain_fp32", "tunesmith_fp32", "tunesmith"]

Job = dict[str, Any]


# --- the plain loop: torch and transformers alone


def plain_loop(job: Job) -> dict[str, Any]:
    """Train the model of `job["model"]` on `job["steps"]`, each a list of lists of token ids; evaluate it.

    A step's loss is in nats, over all tokens but the first of each list, divided by their number."""
    import torch
    from transformers import AutoModelForCausalLM

    train = job["train"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": train["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, train["adam_beta2"]),
        eps=1e-8,
        fused=True,
    )
    losses, seconds = [], []
    for number, pieces in enumerate(job["steps"]):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(job["steps"]), train)
        targets = sum(len(piece) - 1 for piece in pieces)
        total = 0.0
        for rows in by_length(pieces, job["at_once"]):
            nats = summed_nats(model, rows, job["dtype"]) / targets
            nats.backward()
            total += nats.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - start)
    peak = memory_gib("VmHWM")
    model.eval()
    nats = 0.0
    with torch.no_grad():
        for rows in by_length(job["valid"], job["at_once"]):
            nats += summed_nats(model, rows, job["dtype"]).item()
    return {"losses": losses, "step_s": seconds, "peak_gib": peak, "eval_nats": nats}


def learning_rate(step: int, steps: int, train: Job) -> float:
    """A line up over the warm-up, then half a cosine down to the floor; `step` counts from 0."""
    peak, floor, warmup = train["learning_rate"], train["min_learning_rate"], train["warmup"]
    if step < warmup:
        return float(peak * step / warmup)
    fall = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return float(floor + (peak - floor) * fall)


def by_length(pieces: list[list[int]], at_once: int) -> list[list[list[int]]]:
    """Pieces of one length, so many at a time."""
    groups: dict[int, list[list[int]]] = {}
    for piece in pieces:
        groups.setdefault(len(piece), []).append(piece)
    return [
        group[at : at + at_once]
        for _, group in sorted(groups.items(), reverse=True)
        for at in range(0, len(group), at_once)
    ]


def summed_nats(model: Any, rows: list[list[int]], dtype: str) -> Any:
    """-log p of each token but the first of its row [B, T], summed."""
    import torch

    ids = torch.tensor(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )


# --- what both are given


def prepare(corpus: Path, folder: Path, overrides: list[str]) -> Job:
    """Tokenizer, initial weights, and the pieces of each step and of the held-out documents. The job of a
    plain loop but for its number format; `overrides` are those of the command line that tunesmith runs."""
    from transformers import set_seed

    from tunesmith.config import load_config
    from tunesmith.data.loading import load_data
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.models.initialise import initialise_model

    config = load_config(RECIPE, overrides, recipe="pretrain")
    tokenizer = load_tokenizer(config)
    set_seed(config.run.seed)
    initialise_model(config, tokenizer, print).save_pretrained(folder / "initial")

    data = load_data(config, tokenizer)
    rows, starts = data.train.rows, data.train.row_starts.tolist()
    steps = rows_of_steps(
        config.run.seed, len(starts) - 1, config.train.batch_size, config.train.max_steps or 1
    )
    pieces = [[rows[i].examples[0].input_ids.tolist() for b in step for i in range(starts[b], starts[b + 1])]
              for step in steps]  # fmt: skip
    held_out = data.valid.rows if data.valid else []
    valid = [held_out[i].examples[0].input_ids.tolist() for i in range(len(held_out))]

    # That these are the text of the file, each document once: cut here.
    documents = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    expected = Counter(
        tuple(piece) for text in documents for piece in cut(tokenizer, text, config.data.max_length)
    )
    everything = Counter(tuple(rows[i].examples[0].input_ids.tolist()) for i in range(len(rows)))
    everything.update(map(tuple, valid))
    if everything != expected:
        raise SystemExit("The pieces that tunesmith trains on are not those of the file.")
    return {
        "model": str(folder / "initial"),
        "steps": pieces,
        "valid": valid,
        "valid_bytes": sum(target_bytes(tokenizer, piece) for piece in valid),
        "train": {
            "learning_rate": config.train.learning_rate,
            "min_learning_rate": config.train.min_learning_rate,
            "warmup": int(config.train.warmup),
            "weight_decay": config.train.weight_decay,
            **config.train.trainer_args,
        },
        "corpus": {
            "documents": len(documents),
            "blocks": len(starts) - 1,
            "tokens": sum(len(piece) for piece in expected.elements()),
            "vocabulary": len(tokenizer),
        },
    }


def rows_of_steps(seed: int, blocks: int, batch_size: int, steps: int) -> list[list[int]]:
    """The blocks of each step: an epoch is a permutation by seed and epoch, its last step what is left."""
    import numpy as np

    found: list[list[int]] = []
    epoch = 0
    while len(found) < steps:
        order = np.random.default_rng([seed, epoch]).permutation(blocks).tolist()
        found += [order[at : at + batch_size] for at in range(0, blocks, batch_size)]
        epoch += 1
    return found[:steps]


def cut(tokenizer: Any, text: str, size: int) -> list[list[int]]:
    """A document and its end token, every `size` tokens; no piece is a single token."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [pieces[-2][:-1], pieces[-2][-1:] + pieces[-1]]
    return pieces


def target_bytes(tokenizer: Any, piece: list[int]) -> int:
    """UTF-8 bytes of the text of all tokens but the first: a character of a byte-level token is a byte."""
    tokens = tokenizer.convert_ids_to_tokens([i for i in piece[1:] if i != tokenizer.eos_token_id])
    return sum(map(len, tokens))


# --- runs


def run(name: str, job: Job, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    dtype, at_once = RUNS[name]
    if at_once:
        file = folder / "job.json"
        file.write_text(json.dumps(job | {"dtype": dtype, "at_once": at_once}), encoding="utf-8")
        done = child([sys.executable, "-m", "benchmarks.pretrain_wiki", "--plain", str(file)])
        result: dict[str, Any] = json.loads(done.splitlines()[-1])
    else:
        place = folder / "runs" / f"{name}-{len(list((folder / 'runs').glob('*')))}"
        command = [sys.executable, "-m", "tunesmith", "pretrain", str(RECIPE), *overrides]
        child([*command, f"model.dtype={dtype}", f"run.name={place.name}", f"run.output_dir={place.parent}"])
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        evals = [line for line in lines if "eval_loss" in line]
        result = {
            "losses": [line["loss"] for line in steps],
            "step_s": [line["step_s"] for line in steps],
            "peak_gib": steps[-1]["peak_memory_gib"],
            "evaluations": [
                {key: line[key] for key in ("step", "eval_loss", "eval_perplexity", "eval_bits_per_byte")}
                for line in evals
            ],
        }
        if (samples := place / "samples.jsonl").is_file():
            result["samples"] = [json.loads(line) for line in samples.read_text().splitlines()]
    if "eval_nats" in result and job["valid"]:  # the plain loop's, told as tunesmith tells it
        nats, targets = result.pop("eval_nats"), sum(len(piece) - 1 for piece in job["valid"])
        result["evaluations"] = [
            {
                "step": len(job["steps"]),
                "eval_loss": nats / targets,
                "eval_perplexity": math.exp(nats / targets),
                "eval_bits_per_byte": nats / math.log(2) / job["valid_bytes"],
            }
        ]
    # The first step is left out: it meets every shape for the first time.
    tokens = sum(len(piece) for pieces in job["steps"][1:] for piece in pieces)
    result["tokens_per_s"] = tokens / sum(result.pop("step_s")[1:])
    return result


def speed(names: list[str], repeats: int, job: Job, overrides: list[str], folder: Path) -> dict[str, Any]:
    """tokens/s and peak memory of each run, in turn so that all meet the machine's better and worse minutes.
    Involuntary switches in the thousands say that it was shared."""
    timed: dict[str, Any] = {name: {"tokens_per_s": [], "peak_gib": [], "switches": []} for name in names}
    for _ in range(repeats):
        for name, found in timed.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_nivcsw
            one = run(name, job, overrides, folder)
            one["switches"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_nivcsw - before
            for key, values in found.items():
                values.append(one[key])
            print(name, round(one["tokens_per_s"]), "tokens/s", flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return {"steps": len(job["steps"]), "threads": threads, "runs": timed}


def child(command: list[str]) -> str:
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said.stdout}\n{said.stderr}")
    return said.stdout


def compare(runs: dict[str, dict[str, Any]], plain: str, ours: str) -> dict[str, Any]:
    """How far the losses of two runs part, relative to the plain one's."""
    pairs = list(zip(runs[plain]["losses"], runs[ours]["losses"], strict=True))
    apart = [abs(a - b) for a, b in pairs]
    relative = [difference / a for difference, (a, _) in zip(apart, pairs, strict=True)]
    return {
        "plain": plain,
        "ours": ours,
        "losses": pairs,
        "largest_difference": max(apart),
        "at_step": apart.index(max(apart)) + 1,
        "largest_relative": max(relative),
        "largest_relative_of_first_ten": max(relative[:10]),
        "mean_difference": statistics.mean(apart),
    }


def table(results: dict[str, Any]) -> str:
    """Of each run its loss and evaluation, of each comparison how far it parts, as markdown."""
    lines = [
        "| run | first loss | last loss | eval loss | perplexity | bits/byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in results.get("runs", {}).items():
        last = one["evaluations"][-1]
        lines.append(
            f"| {name} | {one['losses'][0]:.4f} | {one['losses'][-1]:.4f} | {last['eval_loss']:.4f} | "
            f"{last['eval_perplexity']:.1f} | {last['eval_bits_per_byte']:.4f} |"
        )
    for one in results.get("compared", []):
        lines.append(
            f"\n{one['ours']} against {one['plain']}, {len(one['losses'])} steps: first ten within "
            f"{one['largest_relative_of_first_ten']:.1e} of the loss, all within "
            f"{one['largest_relative']:.1e} ({one['largest_difference']:.1e} at step {one['at_step']}), "
            f"{one['mean_difference']:.1e} on average"
        )
    if "speed" in results:
        lines += ["", "| run | tokens/s, median (lowest-highest) | peak GiB |", "|---|---|---|"]
        for name, one in results["speed"]["runs"].items():
            rates = one["tokens_per_s"]
            lines.append(
                f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) | "
                f"{statistics.median(one['peak_gib']):.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="?", type=Path, help="a .txt file whose lines are documents")
    parser.add_argument("--steps", type=int, help="default: the recipe's, 12 with --speed")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=LOSSES)
    parser.add_argument("--speed", type=int, metavar="REPEATS", help="time runs of a few steps, in turn")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "pretrain-wiki.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print tables again; nothing is run")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain_loop(json.loads(options.plain.read_text(encoding="utf-8")))))
        return
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.corpus is None:
        parser.error("name the text file")
    steps = options.steps or (12 if options.speed else None)
    out: Path = options.out
    results: dict[str, Any] = {"versions": versions()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learn = ["tokenizer", "train", str(options.corpus.resolve()), "--vocab-size", str(VOCABULARY)]
        child([sys.executable, "-m", "tunesmith", *learn, "--out", str(folder / "tokenizer")])
        overrides = [f"data.train={options.corpus.resolve()}", f"model.tokenizer={folder / 'tokenizer'}"]
        overrides += [f"data.cache_dir={folder / 'cache'}"] + ([f"train.max_steps={steps}"] if steps else [])
        if options.speed:  # nothing but steps
            overrides += ["data.valid=null", "eval.prompts=[]", "eval.temperature=0", "eval.every_steps=null"]
        os.chdir(REPOSITORY)  # the recipe names its config from here
        job = prepare(options.corpus, folder, overrides)
        if options.speed:
            results["speed"] = speed(options.runs, options.speed, job, overrides, folder)
        else:
            results["corpus"] = {
                "bytes": options.corpus.stat().st_size,
                **job["corpus"],
                "held_out_tokens": sum(map(len, job["valid"])),
                "held_out_target_bytes": job["valid_bytes"],
            }
            results["runs"] = {each: run(each, job, overrides, folder) for each in options.runs}
            for one in results["runs"].values():
                del one["tokens_per_s"], one["peak_gib"]  # of a quiet machine only: --speed
    before: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    runs = results["runs"] = before.get("runs", {}) | results.get("runs", {})
    results["compared"] = [compare(runs, *pair) for pair in PAIRS if set(pair) <= set(runs)]
    if results["compared"]:
        write_svg(results["compared"], out.with_suffix(".svg"))
    out.write_text(json.dumps(before | results, indent=1) + "\n", encoding="utf-8")
    print(table(before | results))


if __name__ == "__main__":
    main()

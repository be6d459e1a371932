"""Preference tuning step by step against TRL, on the real demo model in float32.

    python -m benchmarks.prefer_trl [--method dpo|kto] [--data FILE] [--model FOLDER] [--steps 20]
                                    [--rows-per-step N] [--max-length 384] [--threads N] [--out FILE]

LoRA by `tunesmith prefer` at its defaults (packs, shared prompts, fused pieces, cached reference), and by
TRL's DPOTrainer or KTOTrainer in an environment of its own (ladder/trl_env.py): the same token ids, rows of
each step in the same order, first weights of the adapter, AdamW, learning rate and clipping; no dropout. Rows
over --max-length are left out. TRL gets a whole step as one batch, since it estimates KTO's reference point
batch by batch. The answers to other prompts that this point is the mean of are tunesmith's on both sides: it
pairs a prompt with the answer of the next row of the data set, TRL with that of the row before in the batch.

Loss, rewards and log-probabilities of each step are written as JSON, with the largest differences; the losses
are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ladder import record, trl_env
from benchmarks.ladder.workloads import SHARED, model_of, of_config
from tunesmith.config import Config, load_config

_ROOT = Path(__file__).parents[1]
_DATA = {"dpo": "dpo_en_demo.json", "kto": "kto_en_demo.json"}
_ROWS = {"dpo": 3, "kto": 4}  # of a step: of dpo_en_demo 61 pairs are no longer than --max-length
# Ours and TRL's names of the same figure.
_FIGURES = {
    "dpo": {
        "loss": "loss",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "logp_chosen": "logps/chosen",
        "logp_rejected": "logps/rejected",
    },
    "kto": {
        "loss": "loss",
        "kl": "kl",
        "reward_desirable": "rewards/chosen",
        "reward_undesirable": "rewards/rejected",
        "logp_desirable": "logps/chosen",
        "logp_undesirable": "logps/rejected",
    },
}
Step = dict[str, float]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(options, folder)
        workload = of_config(options.method, config)
        workload.write(folder / "workload.json")
        _save_first_weights(config, folder / "adapter.safetensors")
        ours = _run_tunesmith(config, folder, options)
        trl, versions = _run_trl(folder, options)
    result = {
        "machine": record.machine(),
        "versions": versions,
        "method": options.method,
        "threads": options.threads,
        "config": workload.config,
        "tokens_per_step": [sum(map(workload.tokens, step)) for step in workload.steps],
        "rows": workload.steps,  # counted from 0 among those that are not too long
        **compare(ours, trl),
    }
    result["config"]["run"].pop("output_dir")
    result["config"]["data"].pop("cache_dir")
    result["config"]["model"]["path"] = Path(result["config"]["model"]["path"]).name
    result["config"]["data"]["train"] = options.data.name
    out = options.out or Path(__file__).with_name(f"prefer-trl-{options.method}.json")
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def compare(ours: list[Step], trl: list[Step]) -> dict[str, Any]:
    """The steps of both by our names, and the largest difference of each figure with its step."""
    largest = {}
    for name in ours[0]:
        apart = [
            (abs(a[name] - b[name]), number)
            for number, (a, b) in enumerate(zip(ours, trl, strict=True), 1)
            if name in a and name in b  # a step of KTO may hold answers of one kind only
        ]
        difference, step = max(apart)
        values = [one[name] for one in trl if name in one]
        largest[name] = {"difference": difference, "step": step, "from": min(values), "to": max(values)}
    return {"largest": largest, "tunesmith": ours, "trl": trl}


def table(result: dict[str, Any]) -> str:
    """Markdown: loss and margin of each step of both, then the largest difference of every figure."""
    names = ["loss", "reward_margin"] if result["method"] == "dpo" else ["loss", "kl"]
    head = [title for name in names for title in (f"{name}, tunesmith", "TRL")]
    lines = ["| step | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for number, (a, b) in enumerate(zip(result["tunesmith"], result["trl"], strict=True), 1):
        cells = [f"{one[name]:.7f}" for name in names for one in (a, b)]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    lines += ["", "| figure | largest difference | at step | TRL's, from | to |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {one['difference']:.1e} | {one['step']} | {one['from']:.4f} | {one['to']:.4f} |"
        for name, one in result["largest"].items()
    ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefer_trl", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--method", choices=list(_DATA), default="dpo")
    parser.add_argument("--data", type=Path, help="default: the demo data of the method")
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows-per-step", type=int, help=f"default: {_ROWS}")
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a prompt with its answer")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: prefer-trl-METHOD.json beside this file")
    options = parser.parse_args()
    options.data = options.data or SHARED / "data" / _DATA[options.method]
    options.model = options.model or model_of("c")
    options.rows_per_step = options.rows_per_step or _ROWS[options.method]
    return options


def _config(options: argparse.Namespace, folder: Path) -> Config:
    values = {
        "run": {"name": "tunesmith", "output_dir": str(folder / "runs"), "seed": 42},
        "model": {"path": str(options.model), "dtype": "float32"},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.0},
        "data": {
            "train": str(options.data),
            "max_length": options.max_length,
            "cache_dir": str(folder / "cache"),
        },
        "prefer": {"method": options.method, "beta": 0.1},
        "train": {
            "max_steps": options.steps,
            "batch_size": options.rows_per_step,
            "learning_rate": options.learning_rate,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "log_every_steps": 1,
        },
        "checkpoint": {"every_steps": 10**6},
    }
    return load_config(values, recipe="prefer")


def _save_first_weights(config: Config, file: Path) -> None:
    """The adapter as a run of this config begins with it: drawn from its seed."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.models.adapt import build_model

    model = build_model(config, load_tokenizer(config), lambda _: None)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def _environment(options: argparse.Namespace) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | {"OMP_NUM_THREADS": str(options.threads)}


def _run_tunesmith(config: Config, folder: Path, options: argparse.Namespace) -> list[Step]:
    """A run as a user starts it; the figures are those of its metrics.jsonl."""
    import yaml

    file = folder / "tunesmith.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "tunesmith", "prefer", str(file)],
        cwd=_ROOT,
        env=_environment(options),
        stdout=sys.stderr,
        check=True,
    )
    lines = (folder / "runs" / "tunesmith" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    return [{name: step[name] for name in _FIGURES[options.method] if name in step} for step in steps]


def _run_trl(folder: Path, options: argparse.Namespace) -> tuple[list[Step], dict[str, str]]:
    spec, out = folder / "spec.json", folder / "trl.json"
    content = {
        "workload": str(folder / "workload.json"),
        "num_steps": options.steps,
        "threads": options.threads,
        "dtype": "float32",
        "rows_per_pass": options.rows_per_step,
        "padding_free": False,
        "reference": "live",
        "adapter": str(folder / "adapter.safetensors"),
        "out": str(out),
    }
    spec.write_text(json.dumps(content), encoding="utf-8")
    program = Path(__file__).with_name("ladder") / "trl_run.py"
    subprocess.run(
        [str(trl_env.python()), str(program), str(spec)],
        env=_environment(options),
        stdout=sys.stderr,
        check=True,
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    names = _FIGURES[options.method]
    steps = [
        {ours: step[theirs] for ours, theirs in names.items() if theirs in step} for step in found["steps"]
    ]
    return steps, found["versions"]


if __name__ == "__main__":
    main()

"""Every method of `adapter.method` on the quickstart's task: accuracy, what is trained, memory and time.

    python -m benchmarks.adapter_methods MODEL [--methods lora,ia3] [--factors 10] [--steps N] [--out FILE]

MODEL is the quickstart's (`tunesmith demo-model` says where). Each method is a run of its own process by
recipes/smollm2-135m-demo.yaml, one after the other, at its default learning rate times each of the factors
(the recipe takes ten times LoRA's, since its 225 steps are few); of several the one of lowest eval loss is
told. Results are written as JSON after each run, runs that are there are not repeated, and the table is
printed as Markdown. Some three minutes a run on two cores; leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.config.methods import METHODS

_RECIPE = "recipes/smollm2-135m-demo.yaml"
# The recipe sets a rank, which not all read; tokens to train have to be named.
_OPTIONS = {
    "trainable_tokens": ["adapter.trainable_tokens=[<|im_start|>, <|im_end|>]"],
    "loftq": ["model.quantization=nf4"],
    "qlora": ["model.quantization=nf4"],
}
# LoRA on a base of 4 bits is a setting of the base; here it has a line of its own.
_NAMES = ("lora", "qlora", *(method for method in METHODS if method != "lora"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--methods", default=",".join(_NAMES))
    parser.add_argument("--factors", default="10")
    parser.add_argument("--steps", type=int, help="of each run, fewer than the recipe's 225")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("adapter-methods.json"))
    asked = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.is_file() else []
    for method in asked.methods.split(","):
        for factor in map(float, asked.factors.split(",")):
            if not any((one["method"], one["factor"]) == (method, factor) for one in results):
                results.append(_measure(method, factor, asked.model, asked.steps))
                asked.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def _measure(method: str, factor: float, model: str, steps: int | None) -> dict[str, Any]:
    base = "lora" if method == "qlora" else method
    rate = METHODS[base].learning_rate * factor  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"model.path={model}",
            f"run.output_dir={folder}",
            "run.name=run",
            f"adapter.method={base}",
            "adapter.r=null",
            f"train.learning_rate={rate:g}",
            *_OPTIONS.get(method, []),
        ]
        if steps:
            options += ["train.epochs=null", f"train.max_steps={steps}"]
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", "sft", _RECIPE, *options], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{method}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        size = sum(file.stat().st_size for file in (Path(folder) / "run" / "final").glob("*.safetensors"))
    trained, share = re.findall(r"trained parameters: ([\d,]+) of [\d,]+ \(([\d.]+) %\)", done.stdout)[0]
    names = (
        "exact_match_before",
        "exact_match_after",
        "eval_loss_before",
        "eval_loss",
        "train_s",
        "tokens_per_s",
        "steps",
    )
    return {
        "method": method,
        "factor": factor,
        "learning_rate": rate,
        "trained_parameters": int(trained.replace(",", "")),
        "share_percent": float(share),
        "saved_mib": size / 2**20,
        "peak_memory_gib": summary["peak_memory_gib"],
        **{name: summary[name] for name in names},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a method, in the order of the config's documentation, each at its best rate."""
    lines = [
        "| method | learning rate | trained parameters | exact match, % | eval loss | time of training, s | "
        "peak memory, GiB | saved, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in _NAMES:
        of_method = [one for one in results if one["method"] == method]
        if not of_method:
            continue
        best = min(of_method, key=lambda one: one["eval_loss"])
        lines.append(
            f"| `{method}` | {best['learning_rate']:g} | {best['trained_parameters']:,} "
            f"({best['share_percent']:g} %) | {100 * best['exact_match_after']:.0f} | "
            f"{best['eval_loss']:.4f} | {best['train_s']:.0f} | {best['peak_memory_gib']:.1f} | "
            f"{best['saved_mib']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

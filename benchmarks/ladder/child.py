"""One run of one rung in this process; the parent reads the file it writes.

    python -m benchmarks.ladder.child SPEC.json

SPEC.json: rung (its name), workload (file), num_steps, dtype, threads, out (file).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ladder import pairs, record, steps
from benchmarks.ladder.rungs import RUNGS, Rung
from benchmarks.ladder.workloads import Workload
from tunesmith.config import load_config
from tunesmith.training.startup import Startup


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(spec["threads"])
    rung, workload = RUNGS[spec["rung"]], Workload.read(Path(spec["workload"]))
    dtype = spec["dtype"]
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "versions": record.versions()}
    run = _run_tunesmith if rung.loop == "tunesmith" else _run_loop
    result["steps"] = run(rung, workload, spec["num_steps"], dtype, result)
    # After the run as well: on a virtual machine the ceiling moves with the neighbours.
    result["matmul_after"] = record.matmul_ceiling(getattr(torch, dtype))
    Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")


def _run_loop(
    rung: Rung, workload: Workload, num_steps: int, dtype: str, result: dict[str, Any]
) -> list[dict[str, float]]:
    import torch

    if rung.loop == "padded":
        model, tokenizer = _plain_model(workload, dtype)
    else:
        model, tokenizer = _tunesmith_model(rung, workload, dtype)
    result["matmul_before"] = record.matmul_ceiling(getattr(torch, dtype))
    if workload.is_pairs and rung.loop == "padded":
        passes, loss = (
            pairs.padded_passes(rung, workload, tokenizer.pad_token_id),
            pairs.padded_loss(workload),
        )
    elif workload.is_pairs:
        passes = pairs.pack_passes(rung, workload, model, tokenizer, num_steps, result)
        loss = pairs.pack_loss(workload)
    elif rung.loop == "padded":
        passes, loss = steps.padded_passes(rung, workload, tokenizer.pad_token_id), steps.padded_loss
    else:
        passes, loss = steps.pack_passes(rung, workload, tokenizer), steps.pack_loss(rung)
    with record.watch(result):
        return list(steps.train(model, workload, num_steps, passes, loss))


def _plain_model(workload: Workload, dtype: str) -> tuple[Any, Any]:
    """The model as a script of transformers and PEFT loads it: frozen weights in the format of the
    run, LoRA in float32 (PEFT's default)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    config = workload.config
    set_seed(config["run"]["seed"])
    path, adapter = config["model"]["path"], config["adapter"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter["r"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules="all-linear",
    )
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(path)


def _tunesmith_model(rung: Rung, workload: Workload, dtype: str) -> tuple[Any, Any]:
    """tunesmith's model with the rung's pieces on. Attention is not one of those that are put under a loaded
    model: it is chosen when the model is loaded."""
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.models.adapt import build_model

    attention = "auto" if "attention" in rung.pieces else "sdpa"
    config = load_config(
        workload.config,
        [f"model.dtype={dtype}", f"model.attention={attention}", f"data.packing={rung.packing}"],
    )
    tokenizer = load_tokenizer(config)
    pieces = [piece for piece in rung.pieces if piece != "attention"]
    return build_model(config, tokenizer, lambda _: None, pieces=pieces), tokenizer


def _run_tunesmith(
    rung: Rung, workload: Workload, num_steps: int, dtype: str, result: dict[str, Any]
) -> list[dict[str, float]]:
    """A run as a user starts it; the figures are those of its metrics.jsonl."""
    import torch

    import tunesmith

    result["matmul_before"] = record.matmul_ceiling(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run.output_dir={folder}",
            f"model.dtype={dtype}",
            f"train.max_steps={num_steps}",
        ]
        startup = Startup()
        with record.watch(result):  # loads the model too: all of it is within the peak
            if workload.is_pairs:
                # A cache of its own, or the reference would have been asked in a run before.
                tunesmith.prefer(
                    workload.config, [*overrides, f"data.cache_dir={folder}/cache"], startup=startup
                )
                result["reference_s"] = startup.stages["reference log-probabilities"]
            else:
                tunesmith.sft(workload.config, overrides)
        lines = Path(folder, "ladder", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [line for line in map(json.loads, lines) if "loss" in line]
    return [
        {
            "loss": line["loss"],
            "seconds": line["step_s"],
            "computed_tokens": line["computed_tokens"],
        }
        for line in metrics
    ]


if __name__ == "__main__":
    main()

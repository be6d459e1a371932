"""One run of TRL's SFTTrainer or DPOTrainer over the rows of a workload, in TRL's environment.

    PYTHON_OF_THAT_ENVIRONMENT trl_run.py SPEC.json

The same token ids, targets and rows of each step as the other rungs; bf16, no gradient checkpointing, rows
of a step sorted by length so that a batch pads little. Nothing of tunesmith is imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# By its path: this folder's package imports tunesmith, which is not installed here.
_spec = importlib.util.spec_from_file_location("record", Path(__file__).with_name("record.py"))
assert _spec is not None
assert _spec.loader is not None
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)


class Steps(TrainerCallback):
    """Seconds and loss of each step. Time runs from the end of the step before, so that fetching counts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.steps.append({"seconds": now - self._since})
        self._since = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            self.steps[state.global_step - 1]["loss"] = logs["loss"]


class InOrder:
    """Rows as they lie: they are in the order of the plan."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class OrderedSFT(InOrder, SFTTrainer):
    pass


class OrderedDPO(InOrder, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # tokenised already


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    workload = json.loads(Path(spec["workload"]).read_text(encoding="utf-8"))
    config, is_pairs = workload["config"], workload["name"] == "c"
    set_seed(config["run"]["seed"])
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=dtype)
    adapter = config["adapter"]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter["r"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules="all-linear",
    )
    model = get_peft_model(model, lora)
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    dataset = _dataset(workload, spec["num_steps"], is_pairs)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "versions": record.versions()}
    callback = Steps()
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(spec, config["train"], folder)
        if is_pairs:
            args = DPOConfig(max_length=None, beta=0.1, **settings)
            trainer: Any = OrderedDPO(
                model=model,
                args=args,
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[callback],
            )
        else:
            args = SFTConfig(max_length=None, padding_free=spec["padding_free"], **settings)
            trainer = OrderedSFT(
                model=model,
                args=args,
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[callback],
            )
        result["matmul_before"] = record.matmul_ceiling(dtype)
        with record.watch(result):
            trainer.train()
        result["matmul_after"] = record.matmul_ceiling(dtype)
    result["steps"] = callback.steps
    Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")


def _settings(spec: dict[str, Any], train: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": spec["rows_per_pass"],
        "gradient_accumulation_steps": train["batch_size"] // spec["rows_per_pass"],
        "max_steps": spec["num_steps"],
        "learning_rate": train["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": train["weight_decay"],
        "max_grad_norm": train["max_grad_norm"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _dataset(workload: dict[str, Any], num_steps: int, is_pairs: bool) -> Dataset:
    """The rows of all steps in turn, longest first within a step."""
    rows = []
    for step in workload["steps"][:num_steps]:
        rows += sorted((workload["rows"][str(index)] for index in step), key=_length, reverse=True)
    if is_pairs:
        return Dataset.from_list(
            [{f"{kind}_ids": row[kind] for kind in ("prompt", "chosen", "rejected")} for row in rows]
        )
    return Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "labels": [
                    token if is_target else -100
                    for token, is_target in zip(row["input_ids"], row["targets"], strict=True)
                ],
            }
            for row in rows
        ]
    )


def _length(row: dict[str, list[int]]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))


if __name__ == "__main__":
    main()

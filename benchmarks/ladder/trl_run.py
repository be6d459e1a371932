"""One run of TRL's SFTTrainer, DPOTrainer or KTOTrainer over the rows of a workload, in TRL's environment.

    PYTHON_OF_THAT_ENVIRONMENT trl_run.py SPEC.json

The same token ids, targets and rows of each step as the other rungs; no gradient checkpointing, rows of a
step sorted by length so that a batch pads little. Nothing of tunesmith is imported.

SPEC.json: workload (file), num_steps, dtype, threads, rows_per_pass, padding_free, reference, out (file), and
perhaps adapter (file): the weights that LoRA begins with.
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
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

# By its path: this folder's package imports tunesmith, which is not installed here.
_spec = importlib.util.spec_from_file_location("record", Path(__file__).with_name("record.py"))
assert _spec is not None
assert _spec.loader is not None
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)


_FIGURES = ("loss", "kl", "rewards/", "logps/")  # of what TRL logs


class Steps(TrainerCallback):
    """Seconds, loss and rewards of each step. Time runs from the end of the step before, so that fetching
    counts."""

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
            found = {name: value for name, value in logs.items() if name.startswith(_FIGURES)}
            self.steps[state.global_step - 1] |= found


class InOrder:
    """Rows as they lie: they are in the order of the plan."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class OrderedSFT(InOrder, SFTTrainer):
    pass


class Prepared:
    """Rows that are tokenised already; how long the reference was asked about them before training."""

    reference_s = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        start = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]
        self.reference_s = time.perf_counter() - start
        return found


class OrderedDPO(InOrder, Prepared, DPOTrainer):
    pass


class OrderedKTO(InOrder, Prepared, KTOTrainer):
    pass


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    workload = json.loads(Path(spec["workload"]).read_text(encoding="utf-8"))
    config = workload["config"]
    set_seed(config["run"]["seed"])
    dtype = getattr(torch, spec["dtype"])
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "versions": record.versions()}
    callback = Steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, workload, folder, callback)
        if "adapter" in spec:
            set_peft_model_state_dict(trainer.model, load_file(spec["adapter"]))
        result["matmul_before"] = record.matmul_ceiling(dtype)
        with record.watch(result):
            trainer.train()
        result["matmul_after"] = record.matmul_ceiling(dtype)
    if spec["reference"] == "cached":
        result["reference_s"] = trainer.reference_s
    result["steps"] = callback.steps
    Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")


def _trainer(spec: dict[str, Any], workload: dict[str, Any], folder: str, callback: Steps) -> Any:
    config = workload["config"]
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=getattr(torch, spec["dtype"]))
    adapter = config["adapter"]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter["r"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules="all-linear",
    )
    common = {
        "train_dataset": _dataset(workload, spec["num_steps"]),
        "processing_class": AutoTokenizer.from_pretrained(config["model"]["path"]),
        "callbacks": [callback],
    }
    settings = _settings(spec, config["train"], folder) | {"max_length": None}
    if workload["kind"] == "text":
        args = SFTConfig(padding_free=spec["padding_free"], **settings)
        return OrderedSFT(model=get_peft_model(model, lora), args=args, **common)
    settings |= {
        "beta": config["prefer"]["beta"],
        "precompute_ref_log_probs": spec["reference"] == "cached",
    }
    # Handed a model that has LoRA already, these two copy it as the reference, and run the copy each time.
    common |= {"model": model, "peft_config": lora}
    if workload["kind"] == "pairs":
        return OrderedDPO(args=DPOConfig(**settings), **common)
    return OrderedKTO(args=KTOConfig(**settings), **common)


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


def _dataset(workload: dict[str, Any], num_steps: int) -> Dataset:
    """The rows of all steps in turn, longest first within a step."""
    rows = []
    for step in workload["steps"][:num_steps]:
        rows += sorted((workload["rows"][str(index)] for index in step), key=_length, reverse=True)
    make = {"text": _text, "pairs": _pair, "labelled": _labelled}[workload["kind"]]
    return Dataset.from_list([make(row) for row in rows])


def _text(row: dict[str, Any]) -> dict[str, Any]:
    marked = zip(row["input_ids"], row["targets"], strict=True)
    return {
        "input_ids": row["input_ids"],
        "labels": [token if is_target else -100 for token, is_target in marked],
    }


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")}


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    """TRL would take the answer of the row before for the mismatched one."""
    return {
        "prompt_ids": row["prompt"],
        "completion_ids": row["completion"],
        "KL_completion_ids": row["mismatched"],
        "label": row["label"],
    }


def _length(row: dict[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    answers = (row[name] for name in ("chosen", "rejected", "completion") if name in row)
    return len(row["prompt"]) + max(map(len, answers))


if __name__ == "__main__":
    main()

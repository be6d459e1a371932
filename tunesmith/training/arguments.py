"""transformers' TrainingArguments from our config: one place where the two meet."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import Config, TrainConfig
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.models.devices import default_device
from tunesmith.packing.plan import StepPlan
from tunesmith.training.strategy import strategy_arguments

_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
}


def num_steps(config: Config, plan: StepPlan) -> int:
    """Optimiser steps of the whole run."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return plan.steps.num_steps(config.train.epochs)


def training_arguments(config: Config, plan: StepPlan, folder: Path, *, dtype: torch.dtype) -> Any:
    """TrainingArguments that do what the config says. When to log, evaluate and save is our callback's
    business.

    Raises ConfigError for an unknown `train.trainer_args` key, MissingExtraError for an optimizer not
    installed."""
    from transformers import TrainingArguments

    train = config.train
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in train.trainer_args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"train.trainer_args.{name}: TrainingArguments has no such field.{hint}")
    if "8bit" in train.optimizer:
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise MissingExtraError(f"train.optimizer={train.optimizer}", "bitsandbytes", "quant")
    steps = num_steps(config, plan)
    warmup_steps = int(train.warmup) if train.warmup >= 1 else round(train.warmup * steps)
    schedule, schedule_options = _schedule(train, steps, warmup_steps)
    extra = strategy_arguments(config.distributed)
    if schedule_options:
        extra["lr_scheduler_kwargs"] = schedule_options
    extra |= train.trainer_args
    try:
        return TrainingArguments(
            output_dir=str(folder),
            run_name=config.run.name,
            seed=config.run.seed,
            use_cpu=default_device().type == "cpu",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            max_steps=steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=plan.passes,
            learning_rate=train.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=warmup_steps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=_OPTIMIZERS[train.optimizer],
            neftune_noise_alpha=train.neftune_alpha,
            dataloader_num_workers=train.loader_workers,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **extra,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train: TrainingArguments refuses these settings: {error}") from error


def _schedule(train: TrainConfig, steps: int, warmup_steps: int) -> tuple[str, dict[str, Any]]:
    """transformers' name of the schedule, and its own settings."""
    peak, floor = train.learning_rate, train.min_learning_rate
    assert peak is not None  # the config writes out its default
    if train.schedule == "constant":
        return "constant_with_warmup", {}  # its `constant` ignores the warm-up
    if train.schedule == "cosine_with_min_lr" or (train.schedule == "cosine" and floor is not None):
        return "cosine_with_min_lr", {"min_lr_rate": 0.1 if floor is None else floor / peak}
    if train.schedule == "linear" and floor is not None and warmup_steps < steps:
        return "polynomial", {"lr_end": floor, "power": 1.0}
    if train.schedule == "warmup_stable_decay":
        decay = int(train.decay) if train.decay >= 1 else max(1, round(train.decay * steps))
        # What does not fit beside the warm-up would be cut off at its end, above the floor.
        options: dict[str, Any] = {"num_decay_steps": min(decay, max(1, steps - warmup_steps))}
        return train.schedule, options | {"decay_type": "1-sqrt", "min_lr_ratio": (floor or 0.0) / peak}
    return train.schedule, {}

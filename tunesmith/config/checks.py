"""Defaults that follow from other settings, and contradictions between settings.

Each contradiction is one line in `CONTRADICTIONS`: the key to blame, when it holds, and what to do about it. All
that hold are reported together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.config.schema import Config, Section

# TrainingArguments fields that a setting of ours decides. Setting a thing both ways is an error.
OWNED_TRAINER_ARGS = {
    "output_dir": "run.output_dir and run.name",
    "run_name": "run.name",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "full_determinism": "run.seed",
    "resume_from_checkpoint": "run.resume",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size and train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_tokens",
    "per_device_eval_batch_size": "eval.batch_tokens",
    "auto_find_batch_size": "train.micro_batch_tokens",
    "average_tokens_across_devices": "train.batch_size (the loss is always that of the whole step)",
    "train_sampling_strategy": "run.seed (the step plan orders rows)",
    "ignore_data_skip": "run.resume",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "optim": "train.optimizer",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "neftune_noise_alpha": "train.neftune_alpha",
    "dataloader_num_workers": "train.loader_workers",
    "logging_steps": "train.log_every_steps",
    "logging_strategy": "train.log_every_steps",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops the run",
    "eval_strategy": "eval.every_steps",
    "eval_steps": "eval.every_steps",
    "eval_on_start": "eval.answer_rows (there is always an evaluation before training)",
    "metric_for_best_model": "nothing: the best adapter is the one of lowest eval loss",
    "greater_is_better": "nothing: the best adapter is the one of lowest eval loss",
    "load_best_model_at_end": "nothing: the best adapter is kept in best/",
    "save_strategy": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "nothing: a checkpoint is complete or absent",
    "enable_jit_checkpoint": "nothing: SIGTERM always saves",
    "report_to": "tracking.report_to",
    "project": "tracking.project",
    "remove_unused_columns": "nothing: the collator decides what the model is given",
    "label_names": "nothing: the collator decides what the model is given",
    "prediction_loss_only": "nothing: evaluation computes the loss",
    "disable_tqdm": "nothing: tunesmith draws its own progress line",
    "label_smoothing_factor": "nothing: label smoothing is not supported yet",
    "use_liger_kernel": "nothing: it replaces the loss, whose masks and weights tunesmith owns",
}


def _set(section: Section, **values: Any) -> None:
    """Fill fields of a frozen section while its config is being built; it counts as default, not as set."""
    for key, value in values.items():
        object.__setattr__(section, key, value)


def resolve_defaults(config: Config) -> None:
    """Write out each default that depends on another setting, so that the saved config says what was run."""
    train, data = config.train, config.data
    if train.epochs is None and train.max_steps is None:
        _set(train, epochs=3.0)
    if train.micro_batch_tokens is None:
        _set(train, micro_batch_tokens=max(2048, data.max_length))
    if train.learning_rate is None:
        _set(train, learning_rate=1e-5 if config.adapter.method == "none" else 2e-4)
    if config.eval.batch_tokens is None:
        _set(config.eval, batch_tokens=train.micro_batch_tokens)


def _adapter_only_keys(config: Config) -> list[str]:
    return sorted(config.adapter.model_fields_set - {"method"})


# (config key, does it hold?, message). The message may use {config}.
CONTRADICTIONS: list[tuple[str, Callable[[Config], bool], str]] = [
    (
        "train.epochs",
        lambda c: c.train.max_steps is not None and c.train.epochs is not None,
        "set beside train.max_steps; the run can only end by one of them. Remove one",
    ),
    (
        "train.micro_batch_tokens",
        lambda c: (c.train.micro_batch_tokens or 0) < c.data.max_length,
        "{config.train.micro_batch_tokens} is less than data.max_length={config.data.max_length}, so the longest "
        "example would not fit in a pass. Raise it, or lower data.max_length",
    ),
    (
        "eval.batch_tokens",
        lambda c: (c.eval.batch_tokens or 0) < c.data.max_length,
        "{config.eval.batch_tokens} is less than data.max_length={config.data.max_length}, so the longest example "
        "would not fit in a pass. Raise it, or lower data.max_length",
    ),
    (
        "train.max_steps",
        lambda c: c.data.loading == "streaming" and c.train.max_steps is None,
        "missing; with data.loading=streaming the number of rows is not known. Set it, or use data.loading=cached",
    ),
    (
        "data.valid",
        lambda c: c.data.loading == "streaming" and isinstance(c.data.valid, float),
        "a fraction cannot be split off a stream. Name a validation file, or use data.loading=cached",
    ),
    (
        "data.train",
        lambda c: c.data.loading == "streaming" and any(s.weight != 1 for s in c.data.train),
        "source weights need the number of rows, which data.loading=streaming does not know. Use cached or lazy",
    ),
    (
        "eval",
        lambda c: c.data.valid is None and bool(c.eval.model_fields_set),
        "set, but data.valid is not, so there is nothing to evaluate on. Set data.valid to a file or a fraction",
    ),
    (
        "adapter",
        lambda c: c.adapter.method == "none" and bool(_adapter_only_keys(c)),
        "method is none, so adapter settings would do nothing. Remove them, or set adapter.method=lora",
    ),
    (
        "model.freeze",
        lambda c: c.adapter.method != "none" and bool(c.model.freeze),
        "an adapter freezes the whole base model already. Remove it, or set adapter.method=none",
    ),
    (
        "model.quantization",
        lambda c: c.adapter.method == "none" and c.model.quantization != "none",
        "{config.model.quantization} weights cannot be trained in full. Set adapter.method=lora or quantization=none",
    ),
    (
        "adapter.alpha",
        lambda c: c.adapter.rslora and c.adapter.dora,
        "rslora and dora both rescale the update. Choose one",
    ),
]


def _trainer_arg_problems(config: Config) -> list[tuple[str, str]]:
    return [
        (f"train.trainer_args.{name}", f"is decided by {OWNED_TRAINER_ARGS[name]}. Use that instead")
        for name in config.train.trainer_args
        if name in OWNED_TRAINER_ARGS
    ]


class Contradictions(ValueError):
    """Settings that exclude one another: (config key, message) of each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = problems


def check_consistency(config: Config) -> None:
    """Raise `Contradictions` with every pair of settings that cannot both hold."""
    problems = [(key, text.format(config=config)) for key, holds, text in CONTRADICTIONS if holds(config)]
    problems += _trainer_arg_problems(config)
    if config.data.template not in ("auto", "chatml") and not Path(config.data.template).is_file():
        problems.append(
            ("data.template", f"no file {config.data.template!r}; expected auto, chatml or a Jinja file")
        )
    if problems:
        raise Contradictions(problems)

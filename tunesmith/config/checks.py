"""Defaults that follow from other settings, and contradictions between settings.

Each contradiction is one entry of `CONTRADICTIONS`: the keys it reads (the first is the one to blame), when
it holds, and what to do about it. All that hold are reported together.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.config.yaml_text import show

if TYPE_CHECKING:  # for types only: the schema calls this file, not the other way about
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
    "logging_nan_inf_filter": "train.on_bad_step",
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
    "label_smoothing_factor": "train.label_smoothing",
    "deepspeed": "distributed.strategy (zero2 or zero3) and distributed.config",
    "fsdp": "distributed.strategy (fsdp)",
    "fsdp_config": "distributed.config",
    "ddp_timeout": "distributed.timeout_s",
    "use_liger_kernel": "nothing: it replaces the loss, whose masks and weights tunesmith owns",
}


class Contradiction(NamedTuple):
    """Settings that cannot all hold. `keys` are those it was read from; the first is the one to blame."""

    keys: tuple[str, ...]
    message: str


class Contradictions(ValueError):
    """All contradictions of a config."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("\n".join(item.message for item in found))
        self.found = found


def _set(section: Section, **values: Any) -> None:
    """Fill fields of a frozen section while its config is being built; they still count as defaults, not as
    set."""
    for key, value in values.items():
        object.__setattr__(section, key, value)


# Defaults that depend on the recipe: section, key, value. The texts of a corpus have too little in common for
# a tree.
_OF_TUNING = (("data", "too_long", "drop"), ("data", "packing", "tree"))
_OF_PRETRAINING = (("data", "too_long", "split"), ("data", "packing", "flat"))


def resolve_defaults(config: Config) -> None:
    """Write out each default that depends on another setting, so that the saved config says what was run."""
    train, is_from_scratch = config.train, config.model.is_from_scratch
    if config.run.name is None:
        _set(config.run, name="run")
    if config.run.recipe is None:
        _set(config.run, recipe="sft")
    if config.adapter.method is None:
        is_full = is_from_scratch or config.run.recipe == "pretrain"
        _set(config.adapter, method="none" if is_full else "lora")
    defaults = _OF_PRETRAINING if config.run.recipe == "pretrain" else _OF_TUNING
    for section, key, value in defaults:
        if getattr(getattr(config, section), key) is None:
            _set(getattr(config, section), **{key: value})
    if train.epochs is None and train.max_steps is None:
        _set(train, epochs=3.0)
    if train.learning_rate is None:
        full = 6e-4 if is_from_scratch else 1e-5
        _set(train, learning_rate=full if config.adapter.method == "none" else 2e-4)


def _changed(section: Section) -> list[str]:
    """The keys whose value is not the default.

    Not `model_fields_set`: in a saved config, where every default is written out, every key is set."""
    fields = type(section).model_fields
    return [key for key in fields if getattr(section, key) != fields[key].default]


# The others have values of their own without a validation set, or only matter beside these.
_EVAL_KEYS = ("every_steps", "early_stopping_patience", "answer_rows", "prompts")


_NEVER_END = ("constant", "inverse_sqrt")


# (keys read, does it hold?, message). The message may use {c}, the config.
CONTRADICTIONS: list[tuple[tuple[str, ...], Callable[[Config], bool], str]] = [
    (
        ("model.path", "model.config"),
        lambda c: c.model.path is None and c.model.config is None,
        "model.path is missing, and so is model.config. Name the model to go on from (model.path: a folder "
        "or hub id), or the config of one that begins with random weights (model.config)",
    ),
    (
        ("model.config", "model.path"),
        lambda c: c.model.path is not None and c.model.config is not None,
        "model.config is {c.model.config} and model.path is {c.model.path}; a model begins with random "
        "weights (config) or goes on from trained ones (path). Remove one",
    ),
    (
        ("model.config_changes", "model.config"),
        lambda c: bool(c.model.config_changes) and c.model.config is None,
        "model.config_changes change the config of a model from scratch (model.config), which is not set; a "
        "trained model has the shape it was trained with. Remove them",
    ),
    (
        ("model.initialisation", "model.config"),
        lambda c: c.model.initialisation != "scaled" and c.model.config is None,
        "model.initialisation is {c.model.initialisation}, but weights are drawn only for a model from "
        "scratch (model.config), which is not set. Remove it",
    ),
    (
        ("adapter.method", "model.config"),
        lambda c: c.adapter.method != "none" and c.model.config is not None,
        "adapter.method is {c.adapter.method}, but a model from scratch (model.config) trains all of its "
        "weights: an adapter would leave them random. Set adapter.method to none, or name trained weights "
        "with model.path",
    ),
    (
        ("model.freeze", "model.config"),
        lambda c: bool(c.model.freeze) and c.model.config is not None,
        "model.freeze is {c.model.freeze}, but a model from scratch (model.config) has random weights, which "
        "would stay so. Remove it",
    ),
    (
        ("model.rope_scaling", "model.config"),
        lambda c: c.model.rope_scaling != "auto" and c.model.config is not None,
        "model.rope_scaling is {c.model.rope_scaling}, but a model from scratch (model.config) has not been "
        "trained at any length that could be stretched. Remove it, or set rope_parameters in "
        "model.config_changes",
    ),
    (
        ("train.epochs", "train.max_steps"),
        lambda c: c.train.max_steps is not None and c.train.epochs is not None,
        "train.epochs is {c.train.epochs} and train.max_steps is {c.train.max_steps}; a run ends by one "
        "of them. Remove one, or set it to null",
    ),
    (
        ("train.batch_size_warmup", "train.batch_size"),
        lambda c: (
            c.train.batch_size_warmup is not None and c.train.batch_size_warmup.start >= c.train.batch_size
        ),
        "train.batch_size_warmup.start is {c.train.batch_size_warmup.start}, not below train.batch_size "
        "{c.train.batch_size}, which it grows to. Lower it",
    ),
    (
        ("train.min_learning_rate", "train.learning_rate"),
        lambda c: (
            c.train.min_learning_rate is not None
            and c.train.min_learning_rate >= (c.train.learning_rate or 0.0)
        ),
        "train.min_learning_rate is {c.train.min_learning_rate}, not below train.learning_rate "
        "{c.train.learning_rate}, which the schedule falls from. Lower it",
    ),
    (
        ("train.min_learning_rate", "train.schedule"),
        lambda c: c.train.min_learning_rate is not None and c.train.schedule in _NEVER_END,
        "train.min_learning_rate is {c.train.min_learning_rate}, but train.schedule {c.train.schedule} falls "
        "to no floor. Remove it, or use cosine, linear or warmup_stable_decay",
    ),
    (
        ("train.decay", "train.schedule"),
        lambda c: c.train.decay != 0.1 and c.train.schedule != "warmup_stable_decay",
        "train.decay is {c.train.decay}, but train.schedule is {c.train.schedule}, which has no such phase. "
        "Remove it, or set train.schedule to warmup_stable_decay",
    ),
    (
        ("train.micro_batch_tokens", "data.max_length"),
        lambda c: c.train.micro_batch_tokens is not None and c.train.micro_batch_tokens < c.data.max_length,
        "train.micro_batch_tokens is {c.train.micro_batch_tokens}, less than data.max_length "
        "{c.data.max_length}: the longest example would not fit in a pass. Raise the one or lower the "
        "other",
    ),
    (
        # When it only repeats train.micro_batch_tokens (its default), that one is to blame and is reported.
        ("eval.batch_tokens", "data.max_length", "train.micro_batch_tokens"),
        lambda c: (
            c.eval.batch_tokens is not None
            and c.eval.batch_tokens < c.data.max_length
            and c.eval.batch_tokens != c.train.micro_batch_tokens
        ),
        "eval.batch_tokens is {c.eval.batch_tokens}, less than data.max_length {c.data.max_length}: the "
        "longest example would not fit in a pass. Raise the one or lower the other",
    ),
    (
        ("data.too_long", "data.on_bad_row"),
        lambda c: c.data.too_long == "error" and c.data.on_bad_row == "skip",
        "data.too_long is error, but data.on_bad_row skip would pass over the rows it finds. Set the one to "
        "drop or the other to error",
    ),
    (
        ("train.max_steps", "data.loading"),
        lambda c: c.data.loading == "streaming" and c.train.max_steps is None,
        "train.max_steps is missing: with data.loading streaming the number of rows is not known. Set it,"
        " or use data.loading cached",
    ),
    (
        ("data.valid", "data.loading"),
        lambda c: c.data.loading == "streaming" and isinstance(c.data.valid, float),
        "data.valid is {c.data.valid}, but a fraction cannot be split off a stream. Name a validation "
        "file, or use data.loading cached",
    ),
    (
        ("data.train", "data.loading"),
        lambda c: c.data.loading == "streaming" and any(source.weight != 1 for source in c.data.train),
        "data.train has weights, which need the number of rows; with data.loading streaming it is not "
        "known. Use data.loading cached or lazy",
    ),
    (
        ("data.too_long", "run.recipe"),
        lambda c: c.data.too_long == "split" and c.run.recipe != "pretrain",
        "data.too_long is split, but half a conversation is none. Use drop or truncate; `tunesmith pretrain` "
        "splits texts",
    ),
    (
        ("data.packing", "run.recipe"),
        lambda c: c.data.packing == "concatenate" and c.run.recipe != "pretrain",
        "data.packing is concatenate, which is for `tunesmith pretrain`: conversations would see each other. "
        "Use tree, flat or none",
    ),
    (
        ("data.too_long", "data.packing"),
        lambda c: c.data.packing == "concatenate" and c.data.too_long != "split",
        "data.too_long is {c.data.too_long}, but with data.packing concatenate no text is too long: all are "
        "joined and cut. Remove it, or set data.packing to flat",
    ),
    (
        ("data.loading", "run.recipe"),
        lambda c: c.data.loading == "lazy" and c.run.recipe == "pretrain",
        "data.loading is lazy, but `tunesmith pretrain` must know how long texts are to fill its blocks. Use "
        "cached, or streaming for a corpus too large to be tokenised beforehand",
    ),
    (
        ("data.packing", "data.loading", "run.recipe"),
        lambda c: (
            c.run.recipe == "pretrain"
            and c.data.loading == "streaming"
            and c.data.packing in ("none", "tree")
        ),
        "data.packing is {c.data.packing}, but `tunesmith pretrain` with data.loading streaming trains whole "
        "blocks. Use flat or concatenate, or data.loading cached",
    ),
    (
        ("eval.answer_rows", "run.recipe"),
        lambda c: c.run.recipe == "pretrain" and c.eval.answer_rows > 0,
        "eval.answer_rows is {c.eval.answer_rows}, but the texts of `tunesmith pretrain` hold no question. "
        "Name beginnings of texts in eval.prompts",
    ),
    (
        ("eval.temperature", "eval.prompts"),
        lambda c: c.eval.temperature > 0 and not c.eval.prompts,
        "eval.temperature is {c.eval.temperature}, but eval.prompts names no text to go on with. Name one, "
        "or remove it",
    ),
    (
        ("model.freeze", "adapter.method"),
        lambda c: c.adapter.method != "none" and bool(c.model.freeze),
        "model.freeze is {c.model.freeze}, but with adapter.method {c.adapter.method} the whole base "
        "model is frozen already. Remove it, or set adapter.method to none",
    ),
    (
        ("model.quantization", "adapter.method"),
        lambda c: c.adapter.method == "none" and c.model.quantization != "none",
        "model.quantization is {c.model.quantization}, but adapter.method is none, and quantised weights "
        "cannot be trained in full. Set adapter.method to lora, or model.quantization to none",
    ),
    (
        ("model.double_quantization", "model.quantization"),
        lambda c: not c.model.double_quantization and c.model.quantization != "nf4",
        "model.double_quantization is false, but model.quantization is {c.model.quantization}, and only nf4 "
        "has scales that can be quantised. Remove it, or set model.quantization to nf4",
    ),
    (
        ("distributed.strategy", "model.quantization"),
        lambda c: c.distributed.strategy in ("fsdp", "zero3") and c.model.quantization != "none",
        "distributed.strategy is {c.distributed.strategy}, but weights in {c.model.quantization} cannot be "
        "shared out. Use ddp or zero2, where each process holds the whole (small) base, or set "
        "model.quantization to none",
    ),
    (
        ("distributed.strategy", "train.optimizer"),
        lambda c: c.distributed.strategy != "ddp" and c.train.optimizer not in ("adamw", "sgd"),
        "distributed.strategy is {c.distributed.strategy}, which shares out the state of adamw and sgd only, "
        "and train.optimizer is {c.train.optimizer}. Set it to adamw, or the strategy to ddp",
    ),
    (
        ("distributed.strategy", "train.on_bad_step"),
        lambda c: c.distributed.strategy in ("zero2", "zero3") and c.train.on_bad_step != "stop",
        "train.on_bad_step is {c.train.on_bad_step}, but with distributed.strategy {c.distributed.strategy} "
        "a step has been made before it can be judged. Set it to stop, or the strategy to fsdp or ddp",
    ),
    (
        ("distributed.strategy", "train.on_bad_step"),
        lambda c: c.distributed.strategy == "fsdp" and c.train.on_bad_step == "rollback",
        "train.on_bad_step is rollback, but with distributed.strategy fsdp the weights are shared out and "
        "cannot be taken back in a running process. Set it to skip or stop, or the strategy to ddp",
    ),
    (
        ("distributed.offload", "distributed.strategy"),
        lambda c: (
            (c.distributed.offload, c.distributed.strategy)
            not in {("none", name) for name in ("ddp", "fsdp", "zero2", "zero3")}
            | {("all", "fsdp"), ("optimizer", "zero2"), ("optimizer", "zero3"), ("all", "zero3")}
        ),
        "distributed.offload is {c.distributed.offload}, which distributed.strategy "
        "{c.distributed.strategy} does not know: fsdp has none and all, zero2 none and optimizer, zero3 all "
        "three, ddp none",
    ),
    (
        ("distributed.config", "distributed.strategy"),
        lambda c: c.distributed.strategy == "ddp" and c.distributed.config is not None,
        "distributed.config is set, but with distributed.strategy ddp nothing reads it. Set the strategy to "
        "fsdp, zero2 or zero3, or remove it",
    ),
]


def _nothing_to_evaluate(config: Config) -> list[Contradiction]:
    if config.data.valid is not None:
        return []
    return [
        Contradiction(
            (f"eval.{key}", "data.valid"),
            f"eval.{key} is {show(getattr(config.eval, key))}, but there is nothing to evaluate on. "
            "Set data.valid to a file, or to a fraction such as 0.05",
        )
        for key in _changed(config.eval)
        if key in _EVAL_KEYS
    ]


def _nothing_to_adapt(config: Config) -> list[Contradiction]:
    if config.adapter.method != "none":
        return []
    return [
        Contradiction(
            (f"adapter.{key}", "adapter.method"),
            f"adapter.{key} is {show(getattr(config.adapter, key))}, but adapter.method is none, so it "
            "would do nothing. Remove it, or set adapter.method to lora",
        )
        for key in _changed(config.adapter)
        if key != "method"
    ]


def _owned_trainer_args(config: Config) -> list[Contradiction]:
    found = []
    for name in config.train.trainer_args:
        if name in OWNED_TRAINER_ARGS:
            key, owner = f"train.trainer_args.{name}", OWNED_TRAINER_ARGS[name]
            nothing, _, why = owner.partition("nothing: ")
            message = (
                f"{key} cannot be set: {why}" if why else f"{key} is decided by {nothing}. Use that instead"
            )
            found.append(Contradiction((key,), message))
    return found


def _bad_patterns(config: Config) -> list[Contradiction]:
    """Regular expressions that are none; found here, they do not cost a download of the model first."""
    patterns = {f"model.freeze[{i}]": pattern for i, pattern in enumerate(config.model.freeze)}
    if isinstance(config.adapter.target_modules, str):
        patterns["adapter.target_modules"] = config.adapter.target_modules
    found = []
    for key, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"{key} is {pattern!r}; expected a regular expression, but this one is faulty: {error}"
            found.append(Contradiction((key,), message))
    return found


def _number_as_path(config: Config) -> list[Contradiction]:
    """`valid: "0.1"` and `valid: 10%` are paths to the schema, and fractions to whoever wrote them."""
    valid = config.data.valid
    if isinstance(valid, list) and len(valid) == 1:
        path = valid[0].path
        number = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", path)
        if number and not os.path.exists(path):
            fraction = float(number[1]) / (100 if number[2] else 1)
            message = (
                f"data.valid is {path!r}, and no such file exists. For a fraction of the training rows "
                f"write it as a number without quotes, such as {fraction if 0 < fraction < 1 else 0.05:g}"
            )
            return [Contradiction(("data.valid",), message)]
    return []


def _missing_template(config: Config) -> list[Contradiction]:
    template = config.data.template
    if template in ("auto", "chatml") or os.path.isfile(template):
        return []
    near = next((name for name in ("auto", "chatml") if sorted(name) == sorted(template.lower())), None)
    message = (
        f"data.template is {show(template)}; expected auto, chatml or a Jinja file, and there is no such file"
    )
    return [Contradiction(("data.template",), message + (f". Did you mean {near}?" if near else ""))]


def check_consistency(config: Config) -> None:
    """Raise `Contradictions` with every combination of settings that cannot hold."""
    found = [
        Contradiction(keys, text.format(c=config)) for keys, holds, text in CONTRADICTIONS if holds(config)
    ]
    for check in (
        _nothing_to_evaluate,
        _nothing_to_adapt,
        _owned_trainer_args,
        _bad_patterns,
        _number_as_path,
        _missing_template,
    ):
        found += check(config)
    if found:
        raise Contradictions(found)

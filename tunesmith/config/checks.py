"""Defaults that follow from other settings, and contradictions between settings.

Each contradiction is one entry of `CONTRADICTIONS`: the keys it reads (the first is the one to blame), when
it holds, and what to do about it. All that hold are reported together.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.config.methods import METHODS, Method
from tunesmith.config.preferences import PREFERENCES
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
    assert config.adapter.method is not None
    method = METHODS[config.adapter.method]
    for key, value in method.defaults.items():
        if getattr(config.adapter, key) is None:
            _set(config.adapter, **{key: value})
    if config.data.packing is None and not method.packs:
        _set(config.data, packing="none")
    defaults = _OF_PRETRAINING if config.run.recipe == "pretrain" else _OF_TUNING
    for section, key, value in defaults:
        if getattr(getattr(config, section), key) is None:
            _set(getattr(config, section), **{key: value})
    is_preference = config.run.recipe == "prefer"
    if is_preference:
        _resolve_preference(config)
    if train.epochs is None and train.max_steps is None:
        _set(train, epochs=1.0 if is_preference else 3.0)
    if train.learning_rate is None:
        rate = _preference_rate(config, method) if is_preference else method.learning_rate
        _set(train, learning_rate=6e-4 if is_from_scratch and not is_preference else rate)


def _resolve_preference(config: Config) -> None:
    """Fill the keys of `prefer` that its method reads; the others stay open."""
    prefer = config.prefer
    if prefer.method is None:
        _set(prefer, method="dpo")
    row = PREFERENCES[prefer.method or "dpo"]
    special = row.when_normalized if prefer.length_normalized else {}
    defaults = {**row.defaults, **special} | ({"reference": "cached"} if row.needs_reference else {})
    for key, value in defaults.items():
        if getattr(prefer, key) is None:
            _set(prefer, **{key: value})


def _preference_rate(config: Config, method: Method) -> float:
    """The learning rate of `prefer.method`. An adapter that wants another than LoRA's in fine-tuning gets as
    many times that of the table (an assumption: the table knows LoRA)."""
    row = PREFERENCES[config.prefer.method or "dpo"]
    if config.adapter.method == "none":
        return row.learning_rate
    times = method.learning_rate / METHODS["lora"].learning_rate
    return float(f"{row.adapter_learning_rate * times:.3g}")


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
        lambda c: c.data.packing == "concatenate" and c.run.recipe == "sft",
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
        ("data.loading", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.data.loading != "cached",
        "data.loading is {c.data.loading}, but `tunesmith prefer` looks at both answers of each row before "
        "it begins, and keeps what the reference makes of them beside the prepared rows. Use cached",
    ),
    (
        ("data.train_on", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.data.train_on != "assistant",
        "data.train_on is {c.data.train_on}, but `tunesmith prefer` always trains the assistant turns that "
        "its answers differ in. Remove it",
    ),
    (
        ("data.packing", "run.recipe", "adapter.method"),
        lambda c: (
            c.run.recipe == "prefer"
            and c.data.packing in ("none", "concatenate")
            and METHODS[c.adapter.method or "lora"].packs
        ),
        "data.packing is {c.data.packing}, but the answers of a pair lie in one pass. Use tree, where they "
        "share their prompt, or flat",
    ),
    (
        ("adapter.method", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and not METHODS[c.adapter.method or "lora"].packs,
        "adapter.method is {c.adapter.method}, which puts virtual tokens before every example, but the "
        "answers of a pair lie in one pass. Use another method, such as lora",
    ),
    (
        ("train.label_smoothing", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.train.label_smoothing > 0,
        "train.label_smoothing is {c.train.label_smoothing}, which spreads a token's probability; the "
        "losses of `tunesmith prefer` are of whole answers. Remove it; for pairs that may be the wrong way "
        "about there is prefer.label_smoothing",
    ),
    (
        ("train.z_loss", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.train.z_loss > 0,
        "train.z_loss is {c.train.z_loss}, which is added to the loss of a token; the losses of `tunesmith "
        "prefer` are of whole answers. Remove it",
    ),
    (
        ("train.neftune_alpha", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.train.neftune_alpha is not None,
        "train.neftune_alpha is {c.train.neftune_alpha}, but `tunesmith prefer` compares exact "
        "log-probabilities, and noise on the embeddings would change them. Remove it",
    ),
    (
        ("eval.answer_rows", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.eval.answer_rows > 0,
        "eval.answer_rows is {c.eval.answer_rows}, but a pair holds no answer that is the right one word "
        "for word; evaluation reports how often the chosen one is preferred. Remove it",
    ),
    (
        ("eval.prompts", "prefer.method", "run.recipe"),
        lambda c: c.has_scalar_head and bool(c.eval.prompts),
        "eval.prompts names texts to go on with, but prefer.method {c.prefer.method} makes a model that "
        "gives scores and writes nothing. Remove it",
    ),
    (
        ("model.config", "prefer.method", "run.recipe"),
        lambda c: c.has_scalar_head and c.model.config is not None,
        "model.config asks for random weights, but prefer.method {c.prefer.method} puts a score on what a "
        "model has learnt. Name a trained one with model.path",
    ),
    (
        ("adapter.method", "prefer.method", "run.recipe"),
        lambda c: (
            c.has_scalar_head
            and METHODS[c.adapter.method or "lora"].packs
            and c.adapter.method != "none"
            and "modules_to_save" not in METHODS[c.adapter.method or "lora"].keys
        ),
        "adapter.method is {c.adapter.method}, which trains nothing beside itself, but prefer.method "
        "{c.prefer.method} trains the score head in full. Use another method, such as lora",
    ),
    (
        ("train.batch_size", "prefer.method", "run.recipe"),
        lambda c: c.run.recipe == "prefer" and c.prefer.method == "kto" and c.train.batch_size < 2,
        "train.batch_size is {c.train.batch_size}, but prefer.method kto estimates a divergence from "
        "answers read after the prompts of other rows of the step. Use at least 2, and rather 16",
    ),
    (
        ("train.batch_size_warmup", "prefer.method", "run.recipe"),
        lambda c: (
            c.run.recipe == "prefer"
            and c.prefer.method == "kto"
            and c.train.batch_size_warmup is not None
            and c.train.batch_size_warmup.start < 2
        ),
        "train.batch_size_warmup.start is {c.train.batch_size_warmup.start}, but prefer.method kto "
        "estimates a divergence from answers read after the prompts of other rows of the step. Use at "
        "least 2",
    ),
    (
        ("prefer.reference", "adapter.method", "distributed.strategy"),
        lambda c: (
            c.prefer.reference == "live"
            and c.adapter.method == "none"
            and c.distributed.strategy in ("fsdp", "zero3")
        ),
        "prefer.reference is live, but with adapter.method none that is a second whole model in each "
        "process, and distributed.strategy {c.distributed.strategy} is for models too large for one. Use "
        "cached",
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


def _unread_adapter_keys(config: Config) -> list[Contradiction]:
    """Keys of `adapter` that the method does not read."""
    method = config.adapter.method or "lora"
    found = []
    for key in _changed(config.adapter):
        if key == "method" or key in METHODS[method].keys:
            continue
        others = _or([name for name, other in METHODS.items() if key in other.keys])
        value = show(getattr(config.adapter, key))
        message = (
            f"adapter.{key} is {value}, but adapter.method is {method}, so it would do nothing. Remove it, "
            f"or set adapter.method to {others}"
        )
        found.append(Contradiction((f"adapter.{key}", "adapter.method"), message))
    return found


def _unread_preference_keys(config: Config) -> list[Contradiction]:
    """Keys of `prefer` that the method does not read, or that another recipe does not."""
    found, recipe, name = [], config.run.recipe, config.prefer.method or "dpo"
    for key in _changed(config.prefer):
        where = f"prefer.{key} is {show(getattr(config.prefer, key))}, but "
        if recipe != "prefer":
            message = (
                f"{where}under `tunesmith {recipe}` it would do nothing. Remove it, or train with "
                "`tunesmith prefer`"
            )
            found.append(Contradiction((f"prefer.{key}", "run.recipe"), message))
        elif key != "method" and key not in PREFERENCES[name].keys:
            others = _or([other for other, row in PREFERENCES.items() if key in row.keys])
            message = (
                f"{where}prefer.method is {name}, so it would do nothing. Remove it, or set prefer.method to "
                f"{others}"
            )
            found.append(Contradiction((f"prefer.{key}", "prefer.method", "run.recipe"), message))
    return found


def _live_reference(config: Config) -> list[Contradiction]:
    """A reference by the adapter's off-switch, where that does not lead to the model training began with."""
    name = config.adapter.method or "lora"
    if config.prefer.reference != "live" or not (why := METHODS[name].no_off_switch):
        return []
    message = (
        "prefer.reference is live, which is the model with its adapter switched off, but adapter.method "
        f"{name} {why}. Use cached, or adapter.method lora"
    )
    return [Contradiction(("prefer.reference", "adapter.method"), message)]


def _unfit_method(config: Config) -> list[Contradiction]:
    """What the method does not go with (methods.py)."""
    name = config.adapter.method or "lora"
    method, found = METHODS[name], []
    quantization, packing = config.model.quantization, config.data.packing
    strategy = config.distributed.strategy
    if quantization == "none" and method.needs_quantization:
        message = (
            f"model.quantization is none, but adapter.method {name} begins with what rounding the base "
            f"weights loses. Set model.quantization to {_or(method.quantizations)}, or adapter.method to lora"
        )
        found.append(Contradiction(("model.quantization", "adapter.method"), message))
    elif quantization not in ("none", *method.quantizations) and name != "none":
        able = _or([other for other, of in METHODS.items() if quantization in of.quantizations])
        goes_with = _or(["none", *method.quantizations][method.needs_quantization :])
        message = (
            f"model.quantization is {quantization}, but adapter.method {name} goes with {goes_with} only. "
            f"Set it so, or adapter.method to {able}"
        )
        found.append(Contradiction(("model.quantization", "adapter.method"), message))
    if not method.packs and packing != "none":
        message = (
            f"data.packing is {packing}, but adapter.method {name} puts virtual tokens before an example, so "
            "that each needs a pass of its own. Set data.packing to none, or remove it"
        )
        found.append(Contradiction(("data.packing", "adapter.method"), message))
    if strategy not in method.strategies:
        able = _or([other for other, of in METHODS.items() if strategy in of.strategies])
        message = (
            f"distributed.strategy is {strategy}, but adapter.method {name} goes with "
            f"{_or(list(method.strategies))} only. Set it so, or adapter.method to {able}"
        )
        found.append(Contradiction(("distributed.strategy", "adapter.method"), message))
    if not method.recomputes and config.train.gradient_checkpointing is True:
        message = (
            f"train.gradient_checkpointing is true, but with it transformers drops the cache that "
            f"adapter.method {name} puts its virtual tokens in. Remove it, or set adapter.method to prompt"
        )
        found.append(Contradiction(("train.gradient_checkpointing", "adapter.method"), message))
    if name == "trainable_tokens" and not config.adapter.trainable_tokens:
        message = (
            "adapter.method is trainable_tokens, but adapter.trainable_tokens names none. Name the tokens "
            "whose embeddings are to be trained"
        )
        found.append(Contradiction(("adapter.method", "adapter.trainable_tokens"), message))
    if name == "p_tuning" and config.adapter.encoder_size == 0:
        message = (
            "adapter.encoder_size is 0, but adapter.method p_tuning is that network. Set it to 1 or more, or "
            "adapter.method to prompt"
        )
        found.append(Contradiction(("adapter.encoder_size", "adapter.method"), message))
    return found


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


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
        _unread_adapter_keys,
        _unread_preference_keys,
        _live_reference,
        _unfit_method,
        _owned_trainer_args,
        _bad_patterns,
        _number_as_path,
        _missing_template,
    ):
        found += check(config)
    if found:
        raise Contradictions(found)

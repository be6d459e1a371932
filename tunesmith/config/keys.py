"""What the schema says about a key: which keys there are, what a value may be, and which key a wrong one
meant.

Everything is read from the JSON schema, which spells out unions, bounds and sections in one plain shape.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from tunesmith.config.checks import OWNED_TRAINER_ARGS
from tunesmith.config.schema import Config
from tunesmith.config.yaml_text import KeyPath, dotted

Node = dict[str, Any]

# Names that people bring from other tools and from the scripts this one replaces: near in meaning, not in
# spelling.
FORMER_NAMES = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "config_name": "model.config",
    "config_overrides": "model.config_changes",
    "tokenizer_name": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "attn_implementation": "model.attention",
    "q_lora": "model.quantization",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "use_lora": "adapter.method",
    "finetuning_type": "adapter.method",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "use_rslora": "adapter.method",
    "use_dora": "adapter.method",
    "rslora": "adapter.method",
    "dora": "adapter.method",
    "init_lora_weights": "adapter.method",
    "peft_type": "adapter.method",
    "bottleneck_size": "adapter.r",
    "prefix_length": "adapter.num_virtual_tokens",
    "pre_seq_len": "adapter.num_virtual_tokens",
    "encoder_hidden_size": "adapter.encoder_size",
    "prompt_tuning_init_text": "adapter.init_text",
    "dataset": "data.train",
    "train_file": "data.train",
    "train_files": "data.train",
    "data_path": "data.train",
    "eval_data_path": "data.valid",
    "validation_file": "data.valid",
    "validation_files": "data.valid",
    "val_size": "data.valid",
    "block_size": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "lazy_preprocess": "data.loading",
    "streaming": "data.loading",
    "preprocessing_num_workers": "data.workers",
    "train_on_inputs": "data.train_on",
    "loss_type": "prefer.method",
    "pref_loss": "prefer.method",
    "dpo_beta": "prefer.beta",
    "pref_beta": "prefer.beta",
    "dpo_label_smoothing": "prefer.label_smoothing",
    "cpo_alpha": "prefer.sft_weight",
    "rpo_alpha": "prefer.sft_weight",
    "pref_ftx": "prefer.sft_weight",
    "simpo_gamma": "prefer.gamma",
    "kto_chosen_weight": "prefer.desirable_weight",
    "kto_rejected_weight": "prefer.undesirable_weight",
    "precompute_ref_log_probs": "prefer.reference",
    "global_batch_size": "train.batch_size",
    "lr": "train.learning_rate",
    "min_lr": "train.min_learning_rate",
    "num_epochs": "train.epochs",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "fsdp": "distributed.strategy",
    "deepspeed": "distributed.config",
}


@functools.cache
def json_schema() -> Node:
    """The JSON schema of a config as a dict; not to be changed."""
    return Config.model_json_schema()


def branches(node: Node) -> list[Node]:
    """A schema node without references and unions: each thing a value may be, once."""
    if "$ref" in node:
        target = json_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]]
        # The documentation of a section; see `lookup`.
        return branches({key: value for key, value in target.items() if key != "description"})
    if "anyOf" in node:
        return [leaf for branch in node["anyOf"] for leaf in branches(branch)]
    return [node]


def lookup(path: KeyPath) -> list[Node]:
    """The branches of what may stand at `path`; none when the schema has no such key."""
    nodes = [json_schema()]
    for part in path:
        below: list[Node] = []
        for node in nodes:
            if isinstance(part, int):
                child = node.get("items")
            else:
                child = node.get("properties", {}).get(part, node.get("additionalProperties"))
            if isinstance(child, dict):
                # The field's documentation; a description that is left is the name of one branch of a union.
                below += branches({key: value for key, value in child.items() if key != "description"})
        nodes = below
    return nodes


def key_names(path: KeyPath) -> list[str]:
    """The keys of the section at `path`; none when no section stands there."""
    return [name for node in lookup(path) for name in node.get("properties", {})]


def description(path: KeyPath) -> str:
    """The documentation of a key; empty when it has none."""
    for node in lookup(path[:-1]):
        if found := node.get("properties", {}).get(path[-1], {}).get("description"):
            return str(found)
    return ""


def all_keys() -> list[str]:
    """Every `section.key` of the schema, sections themselves too, and keys of listed sections as
    `data.train[].path`."""

    def below(nodes: list[Node], prefix: str) -> list[str]:
        keys = []
        for node in nodes:
            for name, child in node.get("properties", {}).items():
                leaves = branches(child)
                items = [leaf for array in leaves if "items" in array for leaf in branches(array["items"])]
                keys.append(prefix + name)
                keys += below(items, f"{prefix}{name}[].") or below(leaves, f"{prefix}{name}.")
        return keys

    return below([json_schema()], "")


def alternatives(nodes: list[Node]) -> list[str]:
    """What each branch allows, in words: `auto`, `true`, `a whole number of at least 1`."""
    words: list[str] = []
    for node in nodes:
        if "const" in node or "enum" in node:
            words += [str(value) for value in node.get("enum", [node.get("const")])]
        elif node.get("type") == "boolean":
            words += ["true", "false"]
        elif node.get("type") == "array":
            items = alternatives(branches(node["items"]))
            known = len(items) > 1 and set(items) <= set(words)
            words.append("a list of these" if known else f"a list of {join_words(items)}")
        elif "properties" in node:
            words.append(f"a section (keys {', '.join(node['properties'])})")
        elif node.get("type") == "object":
            values = branches(node["additionalProperties"])
            kinds = f" of names to {' or '.join(alternatives(values))}" if values[0] else ""
            words.append(f"a mapping{kinds}")
        elif node.get("type") != "null":
            words.append(_scalar_words(node))
    return words


def _scalar_words(node: Node) -> str:
    if "description" in node:
        return str(node["description"])
    name = {"string": "text", "integer": "a whole number", "number": "a number"}.get(
        node.get("type", ""), "a value"
    )
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    bounds = [f"of at least {low}"] if low is not None else []
    bounds += [f"above {above}"] if above is not None else []
    bounds += [f"of at most {high}"] if high is not None else []
    bounds += [f"below {below}"] if below is not None and below < 2**53 else []
    return f"{name} {' and '.join(bounds)}".strip()


def expected(path: KeyPath) -> str:
    """What may stand at `path`, as the end of `expected ...`."""
    return join_words(alternatives(lookup(path)) or ["a value"])


def join_words(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`, each once."""
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest(name: str, candidates: list[str], cutoff: float) -> str | None:
    """The candidate spelled most like `name`, whatever the case and whether '-' or '_' is used."""
    by_plain = {candidate.lower().replace("-", "_"): candidate for candidate in reversed(candidates)}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), list(by_plain), n=1, cutoff=cutoff)
    return by_plain[near[0]] if near else None


def suggest_key(path: KeyPath) -> tuple[str, list[KeyPath]]:
    """(a sentence, the right keys it names) for an unknown key; the sentence lists the section's keys when
    no key is near.

    A name from another tool is looked up first, then spelling among the keys beside it, then in all
    sections."""
    *parent, name = path
    beside = key_names(tuple(parent))
    text = str(name)
    if text in (keys := all_keys()):
        section, _, key = text.rpartition(".")
        return f"Write {key} on a line of its own below {section}:", [tuple(text.split("."))]
    if text not in beside and (meaning := FORMER_NAMES.get(text) or _owner(text)):
        right = [tuple(key.split(".")) for key in re.findall(r"[a-z]+\.[a-z_]+", meaning)]
        return f"Here that is {meaning}", right
    if near := nearest(text, beside, 0.6):
        right_path = (*parent, near)
        return f"Did you mean {dotted(right_path)}?", [right_path]
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys) if "." in key}
    if near := nearest(text, list(by_name), 0.75):
        return f"Did you mean {by_name[near]}?", [tuple(by_name[near].replace("[]", "").split("."))]
    extra = "; other TrainingArguments go below train.trainer_args" if parent == ["train"] else ""
    return f"{dotted(tuple(parent)) or 'A config'} has the keys {', '.join(beside)}{extra}", []


def _owner(name: str) -> str | None:
    """The setting of ours that decides a field of TrainingArguments, if one does."""
    owner = OWNED_TRAINER_ARGS.get(name, "nothing")
    return None if owner.startswith("nothing") else owner

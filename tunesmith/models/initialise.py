"""A model from scratch: a config read, changed and checked, and weights drawn from the seed.

    config.json --model.config_changes--> config --vocabulary and special tokens--> random weights --scaled-->

Nothing here reads weights. What is known of an architecture is asked of transformers and of the model itself.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.config import Config
from tunesmith.errors import ModelError
from tunesmith.models.held import EVERYWHERE, Held, shape_of

Say = Callable[[str], None]

# Rows of the embedding are rounded up to a multiple of this: matrix products on accelerators are fastest when
# every size is one (NVIDIA, "Matrix multiplication background", of 16-bit numbers).
VOCABULARY_MULTIPLE = 64
# What architectures raise for sizes and names that do not fit together.
_CANNOT_BE = (ValueError, LookupError, ImportError, RuntimeError, ArithmeticError, TypeError, AttributeError)
_STANDARD_STD = 0.02  # what transformers draws with where a config has no `initializer_range`


def initialise_model(config: Config, tokenizer: Any, say: Say, held: Held = EVERYWHERE) -> Any:
    """The causal LM of `model.config` and `model.config_changes` with random float32 weights, a function of
    torch's random state (which the caller seeds with `run.seed`).

    Raises ModelError if there is no such config, or no model can be made by it."""
    from transformers import AutoModelForCausalLM

    place = config.model.config
    model_config = scratch_config(config, tokenizer)
    options = {} if config.model.attention == "auto" else {"attn_implementation": config.model.attention}
    make = AutoModelForCausalLM.from_config if held.here else shape_of
    try:
        model = make(
            model_config,
            dtype=torch.float32,
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    except _CANNOT_BE as error:
        raise ModelError(f"model.config={place}: no model can be made by it: {_short(error)}") from error
    _name_pad_token(model, tokenizer)
    say(f"model by {place} with random weights of seed {config.run.seed}: {_sizes(model)}")
    if config.model.initialisation == "scaled" and held.here:
        try:
            scale_residual_projections(model, say)
        except _CANNOT_BE as error:
            raise ModelError(f"model.config={place}: the model cannot run: {_short(error)}") from error
    return model


# --- the config


def scratch_config(config: Config, tokenizer: Any) -> Any:
    """transformers' config of the model to be made. Raises ModelError for what cannot be."""
    place, changes = config.model.config, config.model.config_changes
    assert place is not None
    base, raw = _read(config)
    _refuse_unknown(changes, type(base), raw, place)
    try:
        made = type(base).from_dict(_changed(raw, base, changes))
    except Exception as error:  # also of huggingface_hub's strict dataclasses
        raise ModelError(f"model.config={place}: {_short(error)}") from error
    text = made.get_text_config()
    _check_heads(text, place)
    if (getattr(text, "max_position_embeddings", None) or config.data.max_length) < config.data.max_length:
        text.max_position_embeddings = config.data.max_length  # there is no length it was trained for
    tokens = vocabulary_size(tokenizer)
    is_asked = "vocab_size" in changes
    if is_asked and text.vocab_size < tokens:
        raise ModelError(
            f"model.config_changes.vocab_size={text.vocab_size}, but the tokenizer has {tokens} tokens. "
            f"Leave it out: it is then {_rounded(tokens)}."
        )
    for part in {id(part): part for part in (made, text)}.values():
        if not is_asked:
            part.vocab_size = _rounded(tokens)
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id = None  # see _name_pad_token
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # of weights that are not read
    return made


def vocabulary_size(tokenizer: Any) -> int:
    """Rows an embedding needs: the highest token id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def _rounded(tokens: int) -> int:
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _name_pad_token(model: Any, tokenizer: Any) -> None:
    """Set the pad token's id after the embedding is made, which would else neither draw nor train that row;
    and only where the token is nothing but padding, since whoever loads the model makes such a row again."""
    pad = tokenizer.pad_token_id
    if pad not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        model.config.pad_token_id = pad
    if model.generation_config is not None:
        model.generation_config.pad_token_id = pad


def _read(config: Config) -> tuple[Any, dict[str, Any]]:
    """The config as transformers reads it, and the fields its file has."""
    from transformers import AutoConfig, PreTrainedConfig

    place = config.model.config
    assert place is not None
    if place.endswith(".json") and not Path(place).is_file():
        raise ModelError(f"model.config={place}: there is no such file.")
    where = {"revision": config.model.revision}
    try:
        base = AutoConfig.from_pretrained(place, trust_remote_code=config.model.trust_remote_code, **where)
        raw, _ = PreTrainedConfig.get_config_dict(place, **where)
    except Exception as error:  # ours to tell, whatever a file that is no config makes it raise
        raise ModelError(f"model.config={place}: no config there: {_short(error)}") from error
    return base, raw


def _refuse_unknown(changes: Mapping[str, Any], kind: Any, raw: Mapping[str, Any], place: str) -> None:
    """A misspelled field would be kept by transformers, and change nothing."""
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | set(raw)
    if "rope_parameters" in known:
        known.add("rope_theta")
    for name in changes:
        if name not in known or name == "model_type":
            near = difflib.get_close_matches(name, sorted(known - {"model_type"}), n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(sorted(known))}."
            if name == "model_type":
                hint = "It decides what all others mean: name another config."
            raise ModelError(
                f"model.config_changes.{name}: the config of {place} ({kind.model_type}) has no such field "
                f"to change. {hint}"
            )


def _changed(raw: Mapping[str, Any], base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the file with the changes, and without what was derived from a field that changes."""
    fields = copy.deepcopy(dict(raw))
    layers = getattr(base, "num_hidden_layers", None)
    new_layers = changes.get("num_hidden_layers", layers)
    heads, hidden = getattr(base, "num_attention_heads", None), getattr(base, "hidden_size", None)
    if {"hidden_size", "num_attention_heads"} & set(changes) and heads and hidden:
        if fields.get("head_dim") == hidden // heads:
            del fields["head_dim"]
        if fields.get("num_key_value_heads") == heads and "num_attention_heads" in changes:
            fields["num_key_value_heads"] = changes["num_attention_heads"]  # it shared none, and goes on so
    if isinstance(layers, int) and isinstance(new_layers, int) and new_layers != layers:
        for name in [
            name for name, value in fields.items() if isinstance(value, list) and len(value) == layers
        ]:
            fields[name] = fields[name][:new_layers]  # what each layer is
            if new_layers > layers:
                del fields[name]
    if "rope_theta" in changes and "rope_theta" not in fields:
        rope = {"rope_theta": changes["rope_theta"]}
        changes = {name: value for name, value in changes.items() if name != "rope_theta"}
        changes["rope_parameters"] = rope | dict(changes.get("rope_parameters") or {})
    return _merged(fields, changes)


def _merged(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        own = fields.get(name)
        fields[name] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return fields


def _check_heads(text: Any, place: str) -> None:
    """Sizes that do not fit together, before torch meets them as shapes."""
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    own = getattr(text, "head_dim", None)
    if hidden % heads and own in (None, hidden // heads):
        below = hidden // heads * heads
        divisors = [n for n in range(1, hidden + 1) if hidden % n == 0 and (hidden // n) % 2 == 0]
        near = min(divisors, key=lambda n: abs(n - heads), default=1)
        raise ModelError(
            f"model.config={place}: hidden_size={hidden} does not divide over num_attention_heads={heads}. "
            f"Use hidden_size {below or heads} or {below + heads}, or {near} heads."
        )
    size = own or hidden // heads
    if size % 2 and getattr(text, "rope_parameters", None):
        raise ModelError(
            f"model.config={place}: heads of {size} numbers cannot be turned in pairs by rotary positions. "
            "Make hidden_size / num_attention_heads (or head_dim) even."
        )
    if isinstance(groups, int) and (groups < 1 or heads % groups):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ModelError(
            f"model.config={place}: num_attention_heads={heads} does not divide over "
            f"num_key_value_heads={groups}. Use one of {', '.join(map(str, fitting))}."
        )


def _sizes(model: Any) -> str:
    text = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return ", ".join(f"{name} {getattr(text, name)}" for name in names if hasattr(text, name))


# --- scaled weights


def scale_residual_projections(model: Any, say: Say = lambda _: None) -> list[str]:
    """Divide the weights that write into the residual stream by sqrt(2 L), L layers: the sum of 2 L such
    outputs then has the variance of one (Radford et al. 2019, section 2.3). Those that the architecture has
    drawn smaller already (GPT-2's own) stay. Returns the names of those that were scaled."""
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None) or 0
    std = getattr(text, "initializer_range", None) or _STANDARD_STD
    found = residual_projections(model) if layers else []
    parameters = dict(model.named_parameters())
    # A sample of 2,000 numbers has its standard deviation to 2 %; dividing by sqrt(2) changes it by 29 %.
    scaled = [name for name in found if float(parameters[name].detach().std()) > 0.85 * std]
    with torch.no_grad():
        for name in scaled:
            parameters[name].mul_(1 / math.sqrt(2 * layers))
    if scaled:
        say(
            f"{len(scaled)} projections into the residual stream have standard deviation {std:g} / "
            f"sqrt(2 x {layers}) = {std / math.sqrt(2 * layers):.4g}, the others {std:g}"
        )
    else:
        why = "the architecture draws them smaller itself" if found else "none was found"
        say(f"projections into the residual stream are not scaled: {why}")
    return scaled


# Beyond these a product decides how much of something passes, such as a router; it is not what is added.
_NONLINEAR = re.compile(r"Softmax|Sigmoid|Silu|Gelu|Tanh|Relu|Elu|Exp|Erf|Topk|Sort|Softplus|AccumulateGrad")
_NUMBER = re.compile(r"\.\d+(?=\.)")  # of a layer or an expert
_PRODUCT = re.compile(r"[Mm]m|Linear")


def residual_projections(model: Any) -> list[str]:
    """Names of the weights whose product is added to the residual stream, in the model's order: o_proj and
    down_proj where they are called so.

    Found from the graph of a forward pass: from the last hidden state back, through sums, norms, gates and
    changes of shape, to the first matrix product on each way. Such a product's weight is one if it makes as
    many numbers as the stream is wide. Experts that the pass did not visit are named as those it did."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    was_training = model.training
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    model.eval()
    try:
        with torch.enable_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [hidden.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or _NONLINEAR.search(node.name()):
            continue
        seen.add(node)
        inputs = [function for function, _ in node.next_functions]
        weights = list(_weights(inputs)) if _PRODUCT.search(node.name()) else []
        if not weights:
            waiting += inputs
        found.update(
            names[id(weight)]
            for weight, width in weights
            if width == hidden.shape[-1] and id(weight) in names and id(weight) not in tables
        )
    alike = {_NUMBER.sub(".#", name) for name in found}
    return [name for name in names.values() if _NUMBER.sub(".#", name) in alike]


def _weights(inputs: list[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """(weight, numbers it makes) of the inputs of a product that are a parameter, transposed or reshaped or
    not."""
    for node in inputs:
        is_transposed = False
        while node is not None and len(node.next_functions) == 1:
            is_transposed ^= node.name().startswith(("TBackward", "Transpose", "Permute"))
            node = node.next_functions[0][0]
        weight = getattr(node, "variable", None)
        if weight is not None and weight.ndim >= 2:
            yield weight, weight.shape[-2 if is_transposed else -1]


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__

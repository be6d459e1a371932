"""The base model: found, checked, and loaded in the right number format; or made from scratch."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import Config
from tunesmith.errors import ModelError
from tunesmith.models.attention_choice import set_attention
from tunesmith.models.devices import compute_dtype
from tunesmith.models.held import EVERYWHERE, Held, shape_of
from tunesmith.models.initialise import initialise_model, scratch_config
from tunesmith.models.quantize import (
    check_stored_quantization,
    memory_line,
    prepare_quantized,
    quantization_config,
    stored_quantization,
)
from tunesmith.models.score import as_scorer, auto_class, is_classifier

Say = Callable[[str], None]
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_LOOKED_AT, _PLACE_BYTES = 64, 4096  # places of a weights file that its fingerprint covers


def load_model(config: Config, tokenizer: Any, say: Say, held: Held = EVERYWHERE) -> Any:
    """The causal LM of `model.path` or `model.config`, or the sequence classifier that is made of it where
    answers are to be given scores, ready to be adapted: embeddings as large as the tokenizer, cache off.

    Weights that will be trained in full are float32, all others in the compute format. Raises ModelError if
    there is no such model, or its weights are pickles."""
    if config.model.is_from_scratch:
        dtype, why = compute_dtype(config.model)
        model = initialise_model(config, tokenizer, say, held)
        say(f"it is trained in {str(dtype).removeprefix('torch.')}: {why}")
    else:
        model = _load_trained(config, tokenizer, say, held)
    held.finish(model)
    set_attention(model, config, say, held)
    model.config.use_cache = False
    _freeze(model, config.model.freeze)
    return model


def _load_trained(config: Config, tokenizer: Any, say: Say, held: Held) -> Any:
    dtype, why = compute_dtype(config.model)
    kind = auto_class(config.has_scalar_head)
    is_trained = config.adapter.method == "none"
    assert config.model.path is not None  # the config's checks see to it
    say(f"model {config.model.path} in {str(dtype).removeprefix('torch.')}: {why}")
    _refuse_pickles(config.model.path)
    model_config = _load_model_config(config)
    scale_rope(model_config, config, say)
    is_scorer = is_classifier(model_config.architectures)
    if config.has_scalar_head:
        as_scorer(model_config, config.model.path)
        origin = "goes on from the model's" if is_scorer else f"is drawn from seed {config.run.seed}"
        say(f"its score head {origin}")
    elif is_scorer:
        raise ModelError(
            f"model.path={config.model.path}: it is a sequence classifier, which gives scores and has no "
            "head for next tokens. It goes on under `tunesmith prefer` with prefer.method reward; else take "
            "the causal LM that it was made of."
        )
    options: dict[str, Any] = {}
    if config.model.attention != "auto":
        options["attn_implementation"] = config.model.attention
    stored = stored_quantization(model_config)
    if stored is not None:
        check_stored_quantization(config.model.path, stored, config.model, is_adapted=not is_trained)
        if not held.by_all:
            raise ModelError(
                f"model.path={config.model.path}: its weights are quantised ({stored}), and "
                f"distributed.strategy={config.distributed.strategy} cannot share such weights out. "
                "Use ddp or zero2."
            )
    if config.model.quantization != "none":
        options["quantization_config"] = quantization_config(config.model, dtype)
    options |= {
        "dtype": torch.float32 if is_trained else dtype,
        "trust_remote_code": config.model.trust_remote_code,
    }
    try:
        if held.here:
            model = kind.from_pretrained(
                config.model.path,
                config=model_config,
                use_safetensors=True,
                revision=config.model.revision,
                **options,
            )
        else:
            model = shape_of(model_config, kind=kind, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.path={config.model.path}: cannot be loaded: {_short(error)}") from error
    if stored is not None or config.model.quantization != "none":
        model = prepare_quantized(model)
        say(memory_line(model))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        say(f"embeddings grow from {rows} to {len(tokenizer)} rows for the tokens added to the tokenizer")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=held.here)
    return model


def _load_model_config(config: Config) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            config.model.path,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={config.model.path}: no model there: {_short(error)}") from error


def _refuse_pickles(path: str) -> None:
    """A pickle can run code when it is opened; say how to convert it instead."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"model.path={path}: its weights are a pickle ({pickles[0]}), which can run code when loaded; "
            "only safetensors are read. If you trust it, convert it once:\n"
            f'  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', use_safetensors=False).save_pretrained('{path}-safetensors')\""
        )


def weights_fingerprint(config: Config, tokenizer: Any) -> str:
    """Tells one set of base weights from another without reading them all: the size of each file, and what
    stands at places spread over it, which another training changes everywhere. Of a hub model its commit, of
    one from scratch its config.

    Raises ModelError if there is no such model."""
    if config.model.path is None:
        return hashlib.sha256(scratch_config(config, tokenizer).to_json_string().encode()).hexdigest()
    folder = Path(config.model.path)
    if not folder.is_dir():
        return str(_load_model_config(config)._commit_hash)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for i in range(_LOOKED_AT):
                stream.seek(i * max(0, size - _PLACE_BYTES) // (_LOOKED_AT - 1))
                digest.update(stream.read(_PLACE_BYTES))
    return digest.hexdigest()


def scale_rope(model_config: Any, config: Config, say: Say) -> None:
    """Stretch rotary positions where `data.max_length` is longer than the model was trained for."""
    trained = getattr(model_config, "max_position_embeddings", None)
    wanted = config.data.max_length + (config.adapter.num_virtual_tokens or 0)
    rope = getattr(model_config, "rope_parameters", None)
    kind = config.model.rope_scaling
    if not trained or wanted <= trained or kind == "none":
        return
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ModelError(
            f"data.max_length={wanted} exceeds the {trained} positions of {config.model.path}, "
            f"which cannot be scaled. Set data.max_length to {trained} or less."
        )
    own = rope.get("rope_type", "default")
    if own != "default":
        kind = own if kind == "auto" else kind
    elif kind == "auto":
        kind = "linear"
    factor = float(math.ceil(wanted / trained))
    virtual = config.adapter.num_virtual_tokens
    length = f"data.max_length={config.data.max_length}" + (
        f" and {virtual} virtual tokens exceed" if virtual else " exceeds"
    )
    say(
        f"warning: {length} the {trained} positions {config.model.path} was "
        f"trained for; rotary positions are scaled ({kind}, factor {factor:g}). "
        "Serving must use the same scaling."
    )
    model_config.rope_parameters = rope | {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", trained),
    }
    model_config.max_position_embeddings = int(trained * factor)


def _freeze(model: Any, patterns: list[str]) -> None:
    """Stop training parameters that a pattern finds; a pattern that finds none is an error."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ModelError(f"model.freeze: {pattern!r} is no regular expression: {error}.") from error
        if not found:
            raise ModelError(
                f"model.freeze: {pattern!r} finds no parameter. Names look like {names[0]}, {names[-1]}."
            )
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()) and patterns:
        raise ModelError("model.freeze: nothing is left to train.")


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""A tuned model, loaded with plain transformers and PEFT, as a user of what we wrote would."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.artifacts.found import Found, Say, first_line
from tunesmith.config import Config, ModelConfig
from tunesmith.data.prepare import PrepareOptions, Preparer
from tunesmith.data.records import BadRow, Record
from tunesmith.data.templates import TrainOn
from tunesmith.errors import ModelError, TemplateError
from tunesmith.models.adapter_folder import load_adapter
from tunesmith.models.devices import compute_dtype, default_device
from tunesmith.models.load import scale_rope
from tunesmith.models.quantize import prepare_quantized, quantization_config, stored_quantization
from tunesmith.models.score import as_scorer, auto_class


@dataclass(frozen=True)
class Tuned:
    """A model that answers, and the tokenizer that was trained with it. Its generation_config names what ends
    an answer and what pads. `preparer` renders and encodes as in training, but gives no system prompt of its
    own."""

    found: Found
    model: Any
    tokenizer: Any
    preparer: Preparer

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""
        stops = self.model.generation_config.eos_token_id
        return [stops] if isinstance(stops, int) else list(stops or [])

    def prompt_ids(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """`prompt_ids` of its tokenizer."""
        return prompt_ids(self.preparer, messages, tools)

    def preparer_of(self, *, system: str | None, train_on: TrainOn) -> Preparer:
        """One that gives every conversation this system prompt, and takes these tokens for targets."""
        options = replace(self.preparer.options, system=system, train_on=train_on)
        return Preparer(self.tokenizer, options)


def prompt_ids(
    preparer: Preparer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """The messages as the model was trained to see them, up to where its answer begins: what they say is
    never a control token. Raises TemplateError where the template refuses them."""
    try:
        ids = preparer.prompt_ids(Record(messages=tuple(messages), tools=tuple(tools)))
    except BadRow as error:
        raise TemplateError(f"the model's chat template refuses this conversation: {error.detail}") from error
    return [int(id_) for id_ in ids]


def preparer_for(tokenizer: Any) -> Preparer:
    """What renders conversations for this tokenizer as they are."""
    return Preparer(tokenizer, _OPTIONS)


# Of rows that are read already, and of which nothing is to be cut.
_OPTIONS = PrepareOptions("messages", {}, None, "assistant", sys.maxsize, "error")


def load_tuned(
    found: Found, say: Say, adapter_name: str = "default", *, needs_template: bool = True
) -> Tuned:
    """Load what was found, on the fastest device that is there, in evaluation mode; an adapter on its base as
    it was trained, in 4 or 8 bits if it was. The config of its run says how its base is to be loaded.

    `adapter_name` is what the model calls the adapter. Raises ModelError if it cannot be loaded,
    TemplateError if it has no chat template and needs one."""
    tokenizer = load_own_tokenizer(found)
    if needs_template and not tokenizer.chat_template:
        raise TemplateError(f"{found.home}: its tokenizer has no chat template; it is no chat model.")
    dtype, why = compute_dtype(found.run.model if found.run is not None else ModelConfig(path=found.base))
    model = load_own_model(found, tokenizer, dtype, say, adapter_name)
    _complete(model.generation_config, tokenizer)
    adapter = f"adapter {found.adapter} on " if found.adapter else ""
    kind = found.base_settings.quantization
    held = "" if kind == "none" else f" held in {kind}"
    say(f"{adapter}{found.base}{held}, {str(dtype).removeprefix('torch.')}: {why}")
    return Tuned(found, model, tokenizer, preparer_for(tokenizer))


def _complete(settings: Any, tokenizer: Any) -> None:
    """What ends an answer and what pads, where the generation settings do not say."""
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


@contextmanager
def base_of(tuned: Tuned, say: Say) -> Iterator[Any | None]:
    """The model that was tuned, as it was before; None if the run began with random weights, or the folder
    does not say what it was made of. An adapter is turned off for the time; else the base is loaded beside
    the tuned model."""
    found = tuned.found
    if found.adapter is not None:
        with tuned.model.disable_adapter():
            yield tuned.model
    elif found.run is None or found.run.model.path is None:
        yield None
    else:
        yield _load_base(found.run, tuned, say)


def _load_base(run: Config, tuned: Tuned, say: Say) -> Any:
    found = Found(str(run.model.path), run=run)
    dtype, _ = compute_dtype(run.model)
    model = load_own_model(found, tuned.tokenizer, dtype, say)
    if len(tuned.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tuned.tokenizer))  # it knows nothing of tokens the run added
    _complete(model.generation_config, tuned.tokenizer)
    say(f"base model {found.base}")
    return model


def load_own_tokenizer(found: Found) -> Any:
    """The tokenizer that was trained with the adapter, or the model's. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    own = found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file()
    source = str(found.adapter) if own else found.base
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer can be loaded from it: {first_line(error)}") from error


def load_own_model(
    found: Found,
    tokenizer: Any,
    dtype: torch.dtype,
    say: Say,
    adapter_name: str = "default",
    held: ModelConfig | None = None,
) -> Any:
    """What was found, in evaluation mode; what its base computes in is `dtype`, and it is `held` as it was
    trained unless that is given. Raises ModelError if it cannot be loaded."""
    from transformers import GenerationConfig

    try:
        model = load_base(found, len(tokenizer), dtype, say, held)
        if found.adapter is not None:
            model = load_adapter(model, found.adapter, adapter_name)
            if (found.adapter / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(found.adapter))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f"{found.adapter} on its base model {found.base}" if found.adapter else found.base
        raise ModelError(f"{what}: cannot be loaded: {first_line(error)}") from error
    return model.eval()


def load_base(
    found: Found, vocabulary: int, dtype: torch.dtype, say: Say, held: ModelConfig | None = None
) -> Any:
    """The base model as an adapter was trained on it, on the fastest device: quantised if it was, with rows
    for the tokens that the run added (of which the adapter has the values)."""
    settings, options = base_config(found, say), source_options(found)
    wanted = held or found.base_settings
    if wanted.quantization != "none":
        options["quantization_config"] = quantization_config(wanted, dtype)
    model = auto_class(found.gives_scores).from_pretrained(
        found.base, config=settings, dtype=dtype, use_safetensors=True, **options
    )
    if wanted.quantization != "none" or stored_quantization(settings) is not None:
        model = prepare_quantized(model)  # loading has put it where it computes
    else:
        model = model.to(default_device())
    if found.adapter is not None and vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary)
    return model


def base_config(found: Found, say: Say) -> Any:
    """transformers' config of the base, its positions scaled as in the run."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(found.base, **source_options(found))
    if found.gives_scores:
        as_scorer(settings, found.base)
    if found.run is not None:
        scale_rope(settings, found.run, say)
    return settings


def source_options(found: Found) -> dict[str, Any]:
    """Which revision of the base, and whether its code may be run."""
    run = found.run
    if run is None or (found.adapter is None and found.base != run.model.path):
        return {}
    return {"trust_remote_code": run.model.trust_remote_code, "revision": run.model.revision}

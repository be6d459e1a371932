"""A tuned model, loaded with plain transformers and PEFT, as a user of what we wrote would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.artifacts.found import Found, Say, first_line
from tunesmith.config import ModelConfig
from tunesmith.data.encoding import Encoder
from tunesmith.data.records import BadRow
from tunesmith.data.templates import REFUSALS
from tunesmith.errors import ModelError, TemplateError
from tunesmith.models.devices import compute_dtype, default_device
from tunesmith.models.load import scale_rope
from tunesmith.models.quantize import prepare_quantized, quantization_config, stored_quantization


@dataclass(frozen=True)
class Tuned:
    """A model that answers, and the tokenizer that was trained with it. Its generation_config names what ends
    an answer and what pads."""

    found: Found
    model: Any
    tokenizer: Any
    encoder: Encoder

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""
        stops = self.model.generation_config.eos_token_id
        return [stops] if isinstance(stops, int) else list(stops or [])

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """`prompt_ids` of its tokenizer."""
        return prompt_ids(self.tokenizer, self.encoder, messages)


def prompt_ids(tokenizer: Any, encoder: Encoder, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The messages as the model was trained to see them, up to where its answer begins: what they say is
    never a control token. Raises TemplateError where the template refuses them."""
    try:
        stand_ins = encoder.stand_ins(messages)
        text = tokenizer.apply_chat_template(
            encoder.shield(messages, stand_ins), add_generation_prompt=True, tokenize=False
        )
    except (*REFUSALS, BadRow) as error:
        raise TemplateError(f"the model's chat template refuses this conversation: {error}") from error
    ((ids, _),) = encoder.encode([encoder.name_control_tokens(text, stand_ins)])
    return [int(id_) for id_ in ids]


def load_tuned(found: Found, say: Say) -> Tuned:
    """Load what was found, on the fastest device that is there, in evaluation mode; an adapter on its base as
    it was trained, in 4 or 8 bits if it was. The config of its run says how its base is to be loaded.

    Raises ModelError if it cannot be loaded, TemplateError if it has no chat template."""
    tokenizer = load_own_tokenizer(found)
    if not tokenizer.chat_template:
        raise TemplateError(f"{found.home}: its tokenizer has no chat template; it is no chat model.")
    dtype, why = compute_dtype(ModelConfig(path=found.base))
    model = load_own_model(found, tokenizer, dtype, say)
    settings = model.generation_config
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    adapter = f"adapter {found.adapter} on " if found.adapter else ""
    kind = found.base_settings.quantization
    held = "" if kind == "none" else f" held in {kind}"
    say(f"{adapter}{found.base}{held}, {str(dtype).removeprefix('torch.')}: {why}")
    return Tuned(found, model, tokenizer, Encoder(tokenizer))


def load_own_tokenizer(found: Found) -> Any:
    """The tokenizer that was trained with the adapter, or the model's. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    own = found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file()
    source = str(found.adapter) if own else found.base
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer can be loaded from it: {first_line(error)}") from error


def load_own_model(found: Found, tokenizer: Any, dtype: torch.dtype, say: Say) -> Any:
    """What was found, in evaluation mode; what its base computes in is `dtype`. Raises ModelError if it
    cannot be loaded."""
    from transformers import GenerationConfig

    try:
        model = load_base(found, len(tokenizer), dtype, say)
        if found.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(found.adapter))
            if (found.adapter / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(found.adapter))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f"{found.adapter} on its base model {found.base}" if found.adapter else found.base
        raise ModelError(f"{what}: cannot be loaded: {first_line(error)}") from error
    return model.eval()


def load_base(found: Found, vocabulary: int, dtype: torch.dtype, say: Say) -> Any:
    """The base model as an adapter was trained on it, on the fastest device: quantised if it was, with rows
    for the tokens that the run added (of which the adapter has the values)."""
    from transformers import AutoModelForCausalLM

    settings, options = base_config(found, say), source_options(found)
    wanted = found.base_settings
    if wanted.quantization != "none":
        options["quantization_config"] = quantization_config(wanted, dtype)
    model = AutoModelForCausalLM.from_pretrained(
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
    if found.run is not None:
        scale_rope(settings, found.run, say)
    return settings


def source_options(found: Found) -> dict[str, Any]:
    """Which revision of the base, and whether its code may be run."""
    if found.run is None or found.adapter is None:
        return {}
    return {"trust_remote_code": found.run.model.trust_remote_code, "revision": found.run.model.revision}

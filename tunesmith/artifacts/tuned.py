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


def load_tuned(found: Found, say: Say, *, needs_template: bool = True) -> Tuned:
    """Load what was found, on the fastest device that is there, in evaluation mode. The config of its run
    says how its base is to be loaded.

    Raises ModelError if it cannot be loaded, TemplateError if it needs a chat template and has none."""
    tokenizer = load_tokenizer(found)
    if needs_template and not tokenizer.chat_template:
        raise TemplateError(f"{found.home}: its tokenizer has no chat template; it is no chat model.")
    dtype, why = compute_dtype(ModelConfig(path=found.base))
    model = _load_model(found, tokenizer, dtype, say)
    settings = model.generation_config
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    adapter = f"adapter {found.adapter} on " if found.adapter else ""
    say(f"{adapter}{found.base}, {str(dtype).removeprefix('torch.')}: {why}")
    return Tuned(found, model, tokenizer, Encoder(tokenizer))


def load_tokenizer(found: Found) -> Any:
    """The tokenizer that the model was trained with. Raises ModelError if it cannot be loaded."""
    from transformers import AutoTokenizer

    own = found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file()
    source = str(found.adapter) if own else found.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer can be loaded from it: {first_line(error)}") from error
    return tokenizer


def _load_model(found: Found, tokenizer: Any, dtype: torch.dtype, say: Say) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    run, source = found.run, dict[str, Any]()
    if run is not None and found.adapter is not None:
        source = {"trust_remote_code": run.model.trust_remote_code, "revision": run.model.revision}
    try:
        settings = AutoConfig.from_pretrained(found.base, **source)
        if run is not None:
            scale_rope(settings, run, say)
        model = AutoModelForCausalLM.from_pretrained(
            found.base, config=settings, dtype=dtype, use_safetensors=True, **source
        )
        if found.adapter is not None:
            from peft import PeftModel

            # Tokens that the run added; the adapter has their rows.
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer))
            model = PeftModel.from_pretrained(model, str(found.adapter))
            if (found.adapter / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(found.adapter))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f"{found.adapter} on its base model {found.base}" if found.adapter else found.base
        raise ModelError(f"{what}: cannot be loaded: {first_line(error)}") from error
    return model.to(default_device()).eval()

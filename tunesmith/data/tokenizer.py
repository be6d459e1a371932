"""The tokenizer with the chat template that training uses, set up so that the tuned model can stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import Config
from tunesmith.data.templates import CHATML
from tunesmith.errors import ModelError, TemplateError


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of `model.tokenizer` (or `model.path`) with `data.template` and `adapter.trainable_tokens` in it.

    Raises ModelError if there is none, TemplateError if `data.template` is a file that is no Jinja template."""
    from transformers import AutoTokenizer

    name = config.model.tokenizer or config.model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        key = "model.tokenizer" if config.model.tokenizer else "model.path"
        raise ModelError(f"{key}={name}: no tokenizer can be loaded from it: {_first_line(error)}") from error
    new_tokens = [token for token in config.adapter.trainable_tokens if token not in tokenizer.get_vocab()]
    if new_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": new_tokens}, replace_extra_special_tokens=False)
    if config.data.template == "chatml":
        _set_up_chatml(tokenizer)
    elif config.data.template != "auto":
        tokenizer.chat_template = Path(config.data.template).read_text(encoding="utf-8")
    if tokenizer.chat_template:
        _check_template(tokenizer, config.data.template)
    if tokenizer.pad_token is None:
        # Training never pads. Generation wants one; masks are by position, so sharing EOS hides nothing.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_up_chatml(tokenizer: Any) -> None:
    """ChatML on a base model: its template, its two tokens, and `<|im_end|>` as the end that generation stops at."""
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"


def _check_template(tokenizer: Any, name: str) -> None:
    from jinja2 import TemplateError as JinjaError

    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
        )
    except JinjaError as error:
        line = getattr(error, "lineno", None)
        place = f"line {line}: " if line else ""
        raise TemplateError(
            f"data.template={name}: the chat template cannot render one question and one answer: {place}{error}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""The tokenizer with the chat template that training uses, set up so that the tuned model can stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import Config
from tunesmith.data.templates import CHATML, REFUSALS
from tunesmith.errors import ModelError, TemplateError


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of `model.tokenizer` (or beside `model.path` or `model.config`) with `data.template` and
    `adapter.trainable_tokens` in it.

    Raises ModelError if there is none, TemplateError if `data.template` is a file that is no Jinja
    template."""
    from transformers import AutoTokenizer

    key, name = config.model.tokenizer_origin
    hint = " Name one with model.tokenizer." if key == "model.config" else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{key}={name}: no tokenizer can be loaded from it: {_first_line(error)}{hint}"
        ) from error
    vocab = tokenizer.get_vocab()
    if set(vocab) <= set(tokenizer.all_special_tokens):
        # What transformers 5 makes of a config.json alone, without a word.
        raise ModelError(f"{key}={name}: no tokenizer is there (tokenizer.json).{hint}")
    _add_control_tokens(tokenizer, [token for token in config.adapter.trainable_tokens if token not in vocab])
    if config.data.template == "chatml":
        _set_up_chatml(tokenizer)
    elif config.data.template != "auto":
        tokenizer.chat_template = _read_template(config.data.template)
    if tokenizer.chat_template:
        _check_template(tokenizer, config.data.template)
    if tokenizer.pad_token is None:
        # Training never pads. Generation wants one; masks are by position, so sharing EOS hides nothing.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_up_chatml(tokenizer: Any) -> None:
    """ChatML on a base model: its template, its two tokens, and `<|im_end|>` as the end that generation stops
    at."""
    _add_control_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"


def _add_control_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Make each a control token: a new one, or the word of the vocabulary that it is already."""
    if tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": tokens}, replace_extra_special_tokens=False
        )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"data.template={path}: byte {error.start} is not UTF-8; expected a Jinja file"
        ) from error
    except OSError as error:
        raise TemplateError(f"data.template={path}: it cannot be read: {error.strerror}") from error


def _check_template(tokenizer: Any, name: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except REFUSALS as error:
        line = getattr(error, "lineno", None)
        place = f"line {line}: " if line else ""
        raise TemplateError(
            f"data.template={name}: the chat template cannot render one question and one answer: "
            f"{place}{error}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""What tests share: small tokenizers built in code, and the real ones where they are to be had.

make_tokenizer     function: control tokens -> tiny tokenizer without a template
tiny_tokenizer     byte-level BPE with the ChatML control tokens; made in milliseconds, needs no file
chat_tokenizer     function: the name of a shared chat template -> tiny tokenizer with it and its tokens
shared             the folder ../shared of the repository; skips where there is none
qwen_tokenizer     the real Qwen2.5 tokenizer, with its own template
qwen_with          function like chat_tokenizer, on the real Qwen2.5 vocabulary
driver             starts runs in processes of their own, of several ranks too (crash/driver.py)
demo_model         folder of SmolLM2-135M-Instruct, as `tunesmith demo-model` makes it
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# The gate draws the same examples each time; `--hypothesis-profile default` goes looking for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_SHARED = Path(__file__).parents[1].parent / "shared"
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is two and two? It is four, and never five. "
    'Please write a short answer: {"name": "add", "arguments": {"a": 2, "b": 2}} user assistant system tool'
)


@dataclass(frozen=True)
class Family:
    """The control tokens a template writes, and which of them begin and end a text."""

    control: tuple[str, ...]
    bos: str | None
    eos: str


FAMILIES = {
    "qwen2_5": Family(tuple(CHATML_TOKENS), None, "<|im_end|>"),
    "qwen3": Family(tuple(CHATML_TOKENS), None, "<|im_end|>"),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "phi3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), None, "<|endoftext|>"
    ),
    "gemma3": Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
}


def _build(
    control: tuple[str, ...], *, bos: str | None = None, eos: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens, trained on two sentences, without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([_CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _build


@pytest.fixture(scope="session")
def shared() -> Path:
    if not _SHARED.is_dir():
        pytest.skip(f"the shared templates, tokenizers and data sets are not at {_SHARED}")
    return _SHARED


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """With plain ChatML; eos is `<|im_end|>`, pad `<|endoftext|>`."""
    tokenizer = _build(tuple(CHATML_TOKENS), bos=None, eos="<|im_end|>")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer(shared: Path) -> Callable[[str], Any]:
    @functools.cache
    def make(name: str) -> Any:
        family = FAMILIES[name]
        tokenizer = _build(family.control, bos=family.bos, eos=family.eos)
        tokenizer.chat_template = (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture(scope="session")
def qwen_tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(shared / "models" / "qwen2.5-tokenizer"))


@pytest.fixture(scope="session")
def qwen_with(shared: Path, qwen_tokenizer: Any) -> Callable[[str], Any]:
    @functools.cache
    def make(name: str) -> Any:
        family, tokenizer = FAMILIES[name], copy.deepcopy(qwen_tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": list(family.control)})
        tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
        tokenizer.chat_template = (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture(scope="session")
def demo_model() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tunesmith" / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"the demo model is not at {folder}; make it with `tunesmith demo-model`")
    return folder


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from crash.harness import Driver

    driver = Driver()
    yield driver
    driver.close()

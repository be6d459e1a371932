"""Tiny random models of several families with a tokenizer, and conversations for them: whole runs in a
second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.data.templates import CHATML

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
_WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "one",
    "two",
    "three",
    "four",
    "red",
    "green",
    "blue",
    "sun",
    "moon",
    "star",
    "tree",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with ChatML's control tokens; EOS is also the pad token, as in many real ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(["<|im_start|>", "<|im_end|>", "<|endoftext|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_tiny_model(folder: Path, family: str = "llama") -> Path:
    """A two-layer model of 64 hidden units with random weights, saved with its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=family != "mistral",
        sliding_window=None if family == "mistral" else 256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Random weights as large as trained ones: with transformers' 0.02 the gradients say little.
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(number: int, seed: int = 0, *, max_turns: int = 2) -> list[dict]:
    """Rows in the messages format, of uneven length."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 9)))

    return [
        {
            "messages": [
                message
                for _ in range(rng.randint(1, max_turns))
                for message in ({"role": "user", "content": text()}, {"role": "assistant", "content": text()})
            ]
        }
        for _ in range(number)
    ]


def judged_pairs(number: int, seed: int = 0) -> list[dict]:
    """Chats whose last answer is judged; about half of the rejected ones begin as the chosen one does."""
    rng = random.Random(seed)
    rows = []
    for mine, other in zip(conversations(number, seed), conversations(number, seed + 1), strict=True):
        chosen, rejected = mine["messages"][-1]["content"], other["messages"][-1]["content"]
        if rng.random() < 0.5:
            rejected = f"{chosen[: len(chosen) // 2]} {rejected}"
        rows.append(
            {"messages": mine["messages"][:-1], "chosen": f"{chosen} yes", "rejected": f"{rejected} or no"}
        )
    return rows


def labelled_answers(number: int, desirable: float = 0.6, seed: int = 0) -> list[dict]:
    """Answers with a label; about so large a share of them is desirable."""
    rng = random.Random(seed)
    return [
        {"messages": row["messages"][-2:], "label": rng.random() < desirable}
        for row in conversations(number, seed)
    ]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file

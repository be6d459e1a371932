"""Ids from the memory of words are the tokenizer's own, for every text."""

from __future__ import annotations

import json
import random

import pytest
from tiny import tiny_tokenizer as byte_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from tunesmith.data import words
from tunesmith.data.encoding import Encoder
from tunesmith.data.words import WordMemory

_TELLING = [*" \n\r\t'.,a1B-sStT<|>", "  ", "\n\n", " \n", "'S", "'ll", "IT'S", "\u00e9", "\u00a0", "\u2014"]
_ELSEWHERE = ["\u4f60\u597d", "\x1c", "\x85", "e\u0301", "\u017f", "\U0001f600", "\u3000", "\u212a"]


@pytest.fixture(params=["qwen", "smollm2", "bytes", "llama3"])
def tokenizer(request):
    if request.param == "qwen":
        return request.getfixturevalue("qwen_tokenizer")
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("demo_model"))
    made = byte_tokenizer()
    if request.param == "llama3":  # its pattern, on a vocabulary of bytes
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return made


def random_texts(number, pieces, seed=0):
    rng = random.Random(seed)
    known = [chr(code) for code in words._KNOWN]
    return [
        "".join(
            rng.choice(known) if rng.random() < 0.3 else rng.choice(pieces) for _ in range(rng.randint(1, 40))
        )
        for _ in range(number)
    ]


def test_ids_of_texts_of_the_known_characters_are_the_tokenizers_own(tokenizer):
    encoder = Encoder(tokenizer)
    memory = WordMemory(encoder._twin, json.loads(encoder._twin.to_str()))
    texts = random_texts(5000, _TELLING)
    served = encoder._twin.encode_batch(texts, add_special_tokens=False)
    for text, ids, expected in zip(texts, map(memory._ids, texts), served, strict=True):
        assert ids is not None  # from memory, not handed to the tokenizer
        assert ids.tolist() == expected.ids, repr(text)


def test_ids_of_any_text_are_those_that_are_made_with_offsets(tokenizer):
    encoder = Encoder(tokenizer)
    texts = random_texts(500, _TELLING + _ELSEWHERE + ["<think>", "<|im_end|>", "</tool_call>"])
    for text, ids, (expected, _) in zip(texts, encoder.encode_ids(texts), encoder.encode(texts), strict=True):
        assert ids.tolist() == expected.tolist(), repr(text)


def test_a_tokenizer_that_splits_in_another_way_is_asked_for_every_text(tiny_tokenizer):
    for steps in (
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [
            pre_tokenizers.Split(Regex(r"\d+|\D+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    ):
        tiny_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        encoder = Encoder(tiny_tokenizer)
        text = "what is 2 and 2"
        memory = WordMemory(encoder._twin, json.loads(encoder._twin.to_str()))
        assert memory._ids(text) is None
        (ids,), (expected,) = memory.encode([text]), encoder.encode([text])
        assert ids.tolist() == expected[0].tolist()


def test_a_first_text_that_comes_out_otherwise_turns_the_memory_off(tiny_tokenizer, monkeypatch):
    encoder = Encoder(tiny_tokenizer)
    memory = WordMemory(encoder._twin, json.loads(encoder._twin.to_str()))
    monkeypatch.setitem(words._SPELLED, ord("q"), "x")
    (expected,) = encoder._twin.encode_batch(["quick"], add_special_tokens=False)
    assert memory.encode(["quick"])[0].tolist() == expected.ids
    assert memory._splitters is None

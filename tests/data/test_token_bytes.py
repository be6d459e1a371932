"""What tokens stand for adds up to the bytes of the text."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer as byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.data.token_bytes import token_bytes

TEXTS = [
    "Anarchism is a political philosophy; 1848, and all that.\n\n  Two spaces.",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u20ac5 \u4f60\u597d \U0001f600",
    "<think> is text, " + "\t\r\n " * 3,
]


@pytest.mark.parametrize("name", ["qwen", "smollm2", "bytes", "tiny"])
def test_the_tokens_of_a_document_add_up_to_its_bytes(request, name):
    if name == "qwen":
        tokenizer = request.getfixturevalue("qwen_tokenizer")
    elif name == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("demo_model"))
    else:
        tokenizer = byte_tokenizer() if name == "bytes" else request.getfixturevalue("tiny_tokenizer")
    table = token_bytes(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert table[ids].sum() == len(text.encode()), text
    assert table[tokenizer.eos_token_id] == 0
    assert len(table) == len(tokenizer)


def test_sentencepiece_counts_its_mark_as_a_space_and_a_byte_as_one():
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "\u2581a",
        "\u00e9",
    ]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    text = "a a\u00e9 \U0001f600a"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 + 1 + 1 + 1 + 4 + 1  # the emoji is four bytes
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode()) == 11

"""How many bytes of text each token stands for: what makes losses of different tokenizers comparable.

Loss in nats a token depends on how long tokens are; in bits a byte it does not (Gao et al. 2020,
arXiv:2101.00027, section 3.1).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.encoding import is_control

_SPACE = "\u2581"  # SentencePiece's


def token_bytes(tokenizer: Any) -> NDArray[np.int64]:
    """[V] UTF-8 bytes of each token's text, by id; 0 for control tokens, and for ids that no token has.

    Summed over the tokens of a text they are its bytes, where the tokenizer can give the text back: one that
    normalises (NFC, lower case) is given what it made of it, and one that puts a space before the text (Llama
    2) counts that in the first token."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    table = np.zeros(max(ids.values(), default=-1) + 1, dtype=np.int64)
    length = _length_in_byte_level if _is_byte_level(spec) else _length_in_sentencepiece
    for text, id_ in ids.items():
        table[id_] = length(text)
    for token in spec["added_tokens"]:
        table[token["id"]] = 0 if is_control(token) else len(token["content"].encode())
    return table


def _is_byte_level(spec: Any) -> bool:
    """Whether a token's text has a character for each byte, as GPT-2's."""
    parts = [spec.get("pre_tokenizer"), spec.get("decoder")]
    return '"type": "ByteLevel"' in json.dumps(parts)


def _length_in_byte_level(text: str) -> int:
    return len(text)


def _length_in_sentencepiece(text: str) -> int:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return 1  # a byte that no token has
    return len(text.replace(_SPACE, " ").encode())

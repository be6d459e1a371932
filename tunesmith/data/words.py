r"""Token ids of raw text, a word at a time from memory: a byte-level BPE tokenizer, ten times as fast.

    text  --the tokenizer's own pattern-->  words  --memory, else its own model-->  ids

`tokenizers` carries offsets and normalisation along for every character; most of its time goes there, little
to BPE. A corpus is some hundred thousand words over and over, and its ids are all that is wanted of it.

Exact, because it leaves to the tokenizer what it is not sure of: tokenizers that split in a way not known
here, texts with a character outside `_ALPHABET` (scripts of Europe and punctuation, whose classes no version
of Unicode changed, and which NFC leaves as they are), texts that hold an added token. And the first texts are
compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_WORDS = 1 << 18  # about 40 MiB
_COMPARED_TEXTS = 64
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _is_known(code: int) -> bool:
    character = chr(code)
    category = unicodedata.category(character)
    if category == "Cc":
        return character in "\t\n\r"
    # The long s is an s to patterns that ignore case, or is not, as they like it.
    return category[0] not in "CM" and unicodedata.is_normalized("NFC", character) and code != 0x17F


# ASCII, Latin, Greek, Cyrillic; general punctuation; currencies.
_RANGES = (range(0x530), range(0x2010, 0x2060), range(0x20A0, 0x20C0))
_KNOWN = [code for codes in _RANGES for code in codes if _is_known(code)]


def _characters(codes: Iterable[int]) -> str:
    """As the content of a character class."""
    return "".join(f"\\u{code:04x}" for code in codes)


_ALPHABET = re.compile(f"[{_characters(_KNOWN)}]*")
_CLASSES = {
    r"\p{L}": _characters(c for c in _KNOWN if unicodedata.category(chr(c))[0] == "L"),
    r"\p{N}": _characters(c for c in _KNOWN if unicodedata.category(chr(c))[0] == "N"),
    r"\s": _characters(c for c in _KNOWN if chr(c).isspace()),
}
_PARTS = re.compile(r"\\p\{[LN]\}|\\[sSrnt]|\\[^A-Za-z0-9]|\[\^?|.", re.DOTALL)

# The printable character that GPT-2's byte-level BPE writes for each byte.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_SPELLED = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}


class WordMemory:
    """Ids of texts by the words they are made of, with a `tokenizers.Tokenizer` and its JSON."""

    def __init__(self, tokenizer: Any, spec: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._splitters = _splitters(spec)
        self._added = [token["content"] for token in spec["added_tokens"] if token["content"]]
        self._ids_of = _IdsOf(tokenizer.model)
        self._num_compared = 0

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, without special tokens."""
        known = [self._ids(text) for text in texts]
        left = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        encoded = iter(self._tokenizer.encode_batch_fast(left, add_special_tokens=False))
        return [np.asarray(next(encoded).ids, dtype=np.int32) if ids is None else ids for ids in known]

    def _ids(self, text: str) -> NDArray[np.int32] | None:
        if self._splitters is None or not _ALPHABET.fullmatch(text):
            return None
        if any(token in text for token in self._added):
            return None
        words = [text]
        for splitter in self._splitters:
            words = [word for part in words for word in splitter.findall(part)]
        if sum(map(len, words)) != len(text):
            return None  # the pattern passes over something
        ids = np.frombuffer(b"".join(map(self._ids_of.__getitem__, words)), dtype=np.int32)
        if self._num_compared < _COMPARED_TEXTS:
            self._num_compared += 1
            if ids.tolist() != self._tokenizer.encode(text, add_special_tokens=False).ids:
                self._splitters = None
                return None
        return ids


class _IdsOf(dict[str, bytes]):
    """Word -> its ids as int32 bytes, asked of the tokenizer's model once."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __missing__(self, word: str) -> bytes:
        spelled = "".join([_SPELLED[byte] for byte in word.encode()])
        ids = np.array([token.id for token in self._model.tokenize(spelled)], dtype=np.int32).tobytes()
        if len(self) < _MAX_WORDS:
            self[word] = ids
        return ids


def _splitters(spec: dict[str, Any]) -> list[re.Pattern[str]] | None:
    """The patterns whose matches, one after the other, a text is split into; None for a tokenizer that is not
    byte-level BPE, or does more than that."""
    model, normalizer = spec["model"], spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return None
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        return None
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = []
    for step in steps[:-1]:
        if step.get("type") == "Digits":
            patterns.append(r"[\p{N}]|[^\p{N}]+" if step.get("individual_digits") else r"[\p{N}]+|[^\p{N}]+")
        elif (
            step.get("type") == "Split"
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
            and "Regex" in step.get("pattern", {})
        ):
            patterns.append(step["pattern"]["Regex"])
        else:
            return None
    if steps[-1].get("use_regex", True):
        patterns.append(_GPT2)
    compiled = [_compiled(pattern) for pattern in patterns]
    return None if None in compiled or not compiled else [pattern for pattern in compiled if pattern]


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """A tokenizer's pattern for texts of `_ALPHABET`; None if something in it is not known here."""
    written, in_class = "", False
    for part in _PARTS.findall(pattern):
        if part in _CLASSES:
            written += _CLASSES[part] if in_class else f"[{_CLASSES[part]}]"
        elif part == r"\S" and not in_class:
            written += f"[^{_CLASSES[chr(92) + 's']}]"
        elif part == r"\S" or part == "\\" or (in_class and part[0] in "[&"):
            return None
        else:
            in_class = (in_class or part[0] == "[") and part != "]"
            written += part
    try:
        found = re.compile(written)
    except re.error:  # possessive quantifiers, before Python 3.11
        return None
    return None if found.groups else found

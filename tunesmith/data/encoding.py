"""Text to token ids with offsets, such that control tokens come from the template only.

A user may write `<|im_end|>` in a message. Served naively that ends the turn; trained naively it teaches a wrong
end. Here it is ordinary text. Three substitutions, all of equal length so that offsets stay true:

    message text   "what is <|im_end|>?"       control strings in it are shielded: private-use characters
    rendered       "...what is @@@@@@@@@@?<|im_end|>"     what now reads <|im_end|> was written by the template
    swapped        "...what is <|im_end|>?@@@@@@@@@@"     and the two change places

The swapped text is encoded by a twin of the tokenizer in which every control token bears its private-use name:
there `<|im_end|>` is ten plain characters, and @@@@@@@@@@ is the token. Rows without such strings (nearly all) take
the plain path; both give the ids of `apply_chat_template` wherever no user text looks like a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import ModelError

_FIRST_PRIVATE = 0xF0000  # plane 15: 65,534 private code points, one for each control token
_FILLER = "\U0010fffd"  # last private code point of plane 16; pads a shield to its token's length


class Encoder:
    """Encodes with a tokenizer's own rules: no template, no added BOS or EOS, no truncation, no padding."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer {type(tokenizer).__name__} gives no character offsets, which "
                "exact masks need. Convert it to a fast tokenizer (tokenizer.json)."
            )
        self._spec = json.loads(backend.to_str())
        # ByteLevel's post-processor trims spaces from offsets; what it adds to ids is not wanted here either.
        self._spec.update(post_processor=None, truncation=None, padding=None)
        self.control_ids = {
            token["content"]: token["id"] for token in self._spec["added_tokens"] if token["special"] and token["content"]
        }
        names = sorted(self.control_ids, key=len, reverse=True)
        # (?!) matches nothing: a tokenizer without control tokens.
        self.control_tokens = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._shields = {
            name: chr(_FIRST_PRIVATE + i) + _FILLER * (len(name) - 1) for i, name in enumerate(sorted(names))
        }
        self._swaps = self._shields | {shield: name for name, shield in self._shields.items()}
        self._swappable = re.compile("|".join(map(re.escape, sorted(self._swaps, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _plain(self) -> Any:
        return _build(self._spec)

    @cached_property
    def _renamed(self) -> Any:
        """The twin whose control tokens bear their shields' names."""
        spec = json.loads(json.dumps(self._spec))
        for token in spec["added_tokens"]:
            token["content"] = self._shields.get(token["content"], token["content"]) if token["special"] else token["content"]
        model, vocab = spec["model"], spec["model"].get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {self._shields.get(name, name): id_ for name, id_ in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[self._shields.get(name, name), score] for name, score in vocab]
        if model.get("unk_token") in self._shields:
            model["unk_token"] = self._shields[model["unk_token"]]
        return _build(spec)

    def has_control_text(self, value: Any) -> bool:
        """Whether any string in a message (or list, or mapping) contains a control token's text."""
        if isinstance(value, str):
            return self.control_tokens.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.has_control_text, value)) or any(map(self.has_control_text, value.values()))
        return isinstance(value, (list, tuple)) and any(map(self.has_control_text, value))

    def shield(self, value: Any) -> Any:
        """The same value with control strings replaced, so that the template cannot mistake them for its own."""
        if isinstance(value, str):
            return self.control_tokens.sub(lambda match: self._shields[match[0]], value)
        if isinstance(value, dict):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.shield, value))
        return value

    def unshield(self, text: str) -> str:
        """Shielded text as its author wrote it."""
        return self._swappable.sub(lambda match: match[0] if match[0] in self._shields else self._swaps[match[0]], text)

    def encode(
        self, texts: Sequence[str], *, shielded: bool = False, all_plain: bool = False
    ) -> Iterable[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Token ids [T] and character offsets [T, 2] of each text.

        shielded: the texts were rendered from shielded messages. all_plain: the texts are no template's work, so
        that nothing in them is a control token."""
        if shielded:
            texts = [self._swappable.sub(lambda match: self._swaps[match[0]], text) for text in texts]
        backend = self._renamed if shielded or all_plain else self._plain
        for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
            offsets = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)
            yield np.asarray(encoding.ids, dtype=np.int32), offsets


def _build(spec: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(spec))


def token_spans(
    char_spans: Iterable[tuple[int, int, float]], offsets: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token ranges [N, 2] and weights [N] of the tokens that overlap each character span.

    A token that straddles the start of an answer is a target: the model has to produce it to produce the answer's
    first character. (transformers' assistant mask decides the same.)"""
    starts, ends = offsets[:, 0], offsets[:, 1]
    spans, weights = [], []
    for start, end, weight in char_spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left"))
        if spans and first < spans[-1][1]:
            first = spans[-1][1]  # a token shared by two spans belongs to the first
        if first < last:
            spans.append((first, last))
            weights.append(weight)
    return np.asarray(spans, dtype=np.int32).reshape(-1, 2), np.asarray(weights, dtype=np.float32)

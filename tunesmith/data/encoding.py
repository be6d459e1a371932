"""Text to token ids with offsets, such that control tokens come from the template only.

A user may write `<|im_end|>` in a message. Served naively that ends the turn; trained naively it teaches a
wrong end. Here it is ordinary text, by substitutions of equal length, so that offsets stay true:

    message      what is <|im_end|>?
    shielded     what is @|im_end|>?                 @: a character that the row does not have
    rendered     ...what is @|im_end|>?<|im_end|>    what still reads <|im_end|> was written by the template,
    named        ...what is @|im_end|>?##########    and gets the name it bears in a twin of the tokenizer,
    unshielded   ...what is <|im_end|>?##########    where <|im_end|> is ten plain characters

Every text goes this way, not only those that look suspicious: a tokenizer that normalises its input finds
control tokens in text that does not contain their letters.

Policy: a control token is an added token that is marked special or whose name has the form `<|name|>`
(Qwen2.5 forgets to mark `<|fim_prefix|>`, DeepSeek `<|User|>`). Other added tokens, such as `<think>` and
`<tool_call>`, are part of the text: data sets and system prompts write them out, and servers read them as
tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.records import BadRow
from tunesmith.data.words import WordMemory
from tunesmith.errors import ModelError

# Names in the twin are Tangut: letters that no normaliser changes, pads or removes (private-use characters
# are removed by BERT's), in sequences that no text has.
_FIRST_NAME, _NAME_FILLER, _MAX_NAMES = 0x17000, "\U000187f7", 6000
# Stand-ins are Linear B: printable (Python's repr keeps them), without case, and unchanged by `trim`.
_STAND_INS = tuple(map(chr, range(0x10080, 0x100FB)))
_CONTROL_FORM = re.compile(r"<[|\uff5c].+[|\uff5c]>")

StandIns = Mapping[str, str]


class Encoder:
    """Encodes with a tokenizer's own rules: no template, no added BOS or EOS, no truncation, no padding.

    Raises ModelError for a tokenizer that gives no character offsets."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer {type(tokenizer).__name__} gives no character "
                "offsets, which exact masks need. Convert it to a fast tokenizer (tokenizer.json)."
            )
        spec = json.loads(backend.to_str())
        tokens = [token for token in spec["added_tokens"] if token["content"] and is_control(token)]
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in tokens}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self.control_tokens = _any_of(longest_first)
        self._control_token_here = re.compile(f"(?={self.control_tokens.pattern})")
        self._first_characters = frozenset(name[0] for name in self.control_ids)
        self._beginnings = frozenset(name[:end] for name in self.control_ids for end in range(1, len(name)))
        self._longest = max(map(len, self.control_ids), default=0)
        self._template_text = str(tokenizer.chat_template)

        if len(tokens) > _MAX_NAMES:
            raise ModelError(
                f"{tokenizer.name_or_path}: {len(tokens)} control tokens; at most {_MAX_NAMES} can be "
                "told apart"
            )
        self._names = {
            name: chr(_FIRST_NAME + i) + _NAME_FILLER * (len(name) - 1)
            for i, name in enumerate(longest_first)
        }
        self._name = _any_of(list(self._names.values()))
        self._name_signs = frozenset(name[-1] for name in self._names.values())
        # Control tokens that swallow the white space beside them; their offsets include it.
        self._greedy_ids = np.asarray(
            [token["id"] for token in tokens if token["lstrip"] or token["rstrip"]], dtype=np.int32
        )
        self._twin = _twin(spec, self._names)
        moved = [
            name for name, id_ in self.control_ids.items() if self._twin.token_to_id(self._names[name]) != id_
        ]
        if moved:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer's control tokens {moved[:5]} cannot be told "
                "from text; its tokenizer.json gives them ids that depend on their names. Please report "
                "this tokenizer."
            )

    # --- before rendering

    def stand_ins(self, value: Any) -> StandIns:
        """What `shield` needs for this row: nothing, unless some string holds a control token's text, or
        breaks off in one, so that what the template sets behind it could complete it."""
        strings = list(_strings(value))
        if not any(map(self._is_suspicious, strings)):
            return {}
        taken = set(self._template_text).union(*strings)
        free = (character for character in _STAND_INS if character not in taken)
        try:
            return {character: next(free) for character in sorted(self._first_characters)}
        except StopIteration:
            raise BadRow(
                "reserved_characters", "the row holds every Linear B ideogram and the text of a control token"
            ) from None

    def shield(self, value: Any, stand_ins: StandIns) -> Any:
        """The same value with the first character of each control token's text replaced by its stand-in."""
        if not stand_ins:
            return value
        if isinstance(value, str):
            characters = list(value)
            for i in self._suspicious_places(value):
                characters[i] = stand_ins[characters[i]]
            return "".join(characters)
        if isinstance(value, dict):
            return {self.shield(key, stand_ins): self.shield(item, stand_ins) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.shield(item, stand_ins) for item in value)
        return value

    def _is_suspicious(self, text: str) -> bool:
        return self.control_tokens.search(text) is not None or next(self._broken_off(text), None) is not None

    def _suspicious_places(self, text: str) -> set[int]:
        return {match.start() for match in self._control_token_here.finditer(text)} | set(
            self._broken_off(text)
        )

    def _broken_off(self, text: str) -> Iterator[int]:
        """Where the text, as it is or trimmed, breaks off in the middle of a control token's text."""
        for end in {len(text), len(text.rstrip())}:
            start = max(0, end - self._longest + 1)
            if self._first_characters.isdisjoint(text[start:end]):
                continue
            yield from (i for i in range(start, end) if text[i:end] in self._beginnings)

    # --- after rendering

    def name_control_tokens(self, rendered: str, stand_ins: StandIns) -> str:
        """A rendered text as `encode` wants it: control tokens under their names, the users' own text
        restored."""
        named = self.control_tokens.sub(lambda match: self._names[match[0]], self.plain(rendered))
        return unshield(named, stand_ins)

    def plain(self, text: str) -> str:
        """Raw text as `encode` wants it: nothing in it is a control token."""
        # A look for single characters first: a pattern of many names costs a tenth of tokenising.
        if any(sign in text for sign in self._name_signs) and (found := self._name.search(text)):
            raise BadRow(
                "reserved_characters",
                f"the characters {found[0]!a} stand for a control token and cannot be text",
            )
        return text

    def encode(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Token ids [T] and character offsets [T, 2] of texts made by `name_control_tokens` or `plain`."""
        encoded = []
        for text, encoding in zip(
            texts, self._twin.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            ids = np.asarray(encoding.ids, dtype=np.int32)
            offsets = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)
            if len(self._greedy_ids):
                for i in np.flatnonzero(np.isin(ids, self._greedy_ids)):
                    offsets[i] = _trimmed(text, *offsets[i])
            encoded.append((ids, offsets))
        return encoded

    def encode_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of `encode`, without offsets."""
        return self._words.encode(texts)

    @cached_property
    def _words(self) -> WordMemory:
        return WordMemory(self._twin, json.loads(self._twin.to_str()))


def unshield(text: str, stand_ins: StandIns) -> str:
    """A text rendered from shielded messages, as their authors wrote them."""
    for character, stand_in in stand_ins.items():
        text = text.replace(stand_in, character)
    return text


def is_control(token: dict[str, Any]) -> bool:
    """Whether an added token of a tokenizer.json is a control token (see the policy above)."""
    return bool(token["special"]) or _CONTROL_FORM.fullmatch(token["content"]) is not None


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")  # (?!) matches nothing


def _strings(value: Any) -> Iterator[str]:
    """Every string in a message, list or mapping, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    token = text[start:end]
    return start + len(token) - len(token.lstrip()), end - len(token) + len(token.rstrip())


def _twin(spec: dict[str, Any], names: Mapping[str, str]) -> Any:
    """The tokenizer of a tokenizer.json in which control tokens bear other names, and nothing is added
    around."""
    from tokenizers import Tokenizer

    spec.update(post_processor=None, truncation=None, padding=None)
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(name, name): id_ for name, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:  # a merge that spells a control token would make it out of plain text
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(spec))


def token_spans(
    char_spans: Iterable[tuple[int, int, float]], offsets: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token ranges [N, 2] and weights [N] of the tokens that overlap each character span.

    A token that straddles the start of an answer is a target: the model has to produce it to produce the
    answer's first character. (transformers' assistant mask decides the same.)"""
    starts, ends = offsets[:, 0], offsets[:, 1]
    spans: list[tuple[int, int]] = []
    weights = []
    for start, end, weight in char_spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left"))
        if spans:
            first = max(first, spans[-1][1])  # a token shared by two spans belongs to the first
        if first < last:
            spans.append((first, last))
            weights.append(weight)
    return np.asarray(spans, dtype=np.int32).reshape(-1, 2), np.asarray(weights, dtype=np.float32)

"""One answer, heard while it is being written: what chatting and serving share.

prompt ids --generate, one token at a time--> text so far --> pieces that no later token changes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tunesmith.artifacts.tuned import Tuned
from tunesmith.training.answers import room

# The sign of bytes that are no character, or not yet.
_NOT_YET = "\ufffd"


@dataclass(frozen=True)
class Drawing:
    """How the next token is chosen. What is None is as the model's generation_config says; temperature 0
    takes the likeliest."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Spoken:
    """An answer: `num_tokens` of it with the one that ended it, and whether it ended by itself (`stop`, also
    at a text that the caller named) or at a limit or by being called off (`length`)."""

    text: str
    num_tokens: int
    finish: Literal["stop", "length"]


def speak(
    tuned: Tuned,
    model: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    drawing: Drawing,
    hear: Callable[[str], None],
    stop: Sequence[str] = (),
    is_called_off: Callable[[], bool] = lambda: False,
) -> Spoken:
    """Let `model` (the tuned one, or its base) answer a prompt. `hear` gets the text piece by piece, which
    together are the answer's text. The answer ends before the first of the texts `stop`."""
    limit = min(max_new_tokens, room(model, len(ids)))
    listener = _Listener(tuned, len(ids), stop, hear, is_called_off)
    if limit < 1:
        return Spoken("", 0, "length")
    if drawing.seed is not None:
        torch.manual_seed(drawing.seed)
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    try:
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=limit,
            eos_token_id=tuned.stop_ids,
            pad_token_id=tuned.model.generation_config.pad_token_id,
            stopping_criteria=StoppingCriteriaList([listener]),
            **drawn_by(tuned.model.generation_config, drawing),
        )
    finally:
        listener.finish()  # also of an answer that Ctrl-C ends
    return listener.spoken


def drawn_by(settings: Any, drawing: Drawing) -> dict[str, Any]:
    """The arguments of `generate` that choose the token. All are named: what a generation_config leaves open,
    transformers fills in (top_k 50)."""
    draws = bool(settings.do_sample) if drawing.temperature is None else drawing.temperature > 0
    draws = draws or (drawing.temperature is None and drawing.top_p is not None)
    if not draws:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    return {
        "do_sample": True,
        "temperature": settings.temperature if drawing.temperature is None else drawing.temperature,
        "top_p": settings.top_p if drawing.top_p is None else drawing.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
    }


class _Listener(StoppingCriteria):
    """Called by `generate` after each token with all there are."""

    def __init__(
        self,
        tuned: Tuned,
        start: int,
        stop: Sequence[str],
        hear: Callable[[str], None],
        is_called_off: Callable[[], bool],
    ) -> None:
        self._tokenizer, self._stop_ids = tuned.tokenizer, frozenset(tuned.stop_ids)
        self._start, self._stop, self._hear, self._is_called_off = start, stop, hear, is_called_off
        self._ids: list[int] = []
        self._sent = 0
        self._is_ended = False  # by a stop text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._ids = input_ids[0, self._start :].tolist()
        text = self._text()
        at = self._stop_at(text)
        self._is_ended = at is not None
        if at is None:
            self._send(text, self._sure(text))
        return torch.full((1,), self._is_ended or self._is_called_off(), device=input_ids.device)

    def finish(self) -> None:
        """Let the rest be heard."""
        text = self.spoken.text
        self._send(text, len(text))

    @property
    def spoken(self) -> Spoken:
        text = self._text()
        has_stopped = self._is_ended or not self._stop_ids.isdisjoint(self._ids[-1:])
        return Spoken(text[: self._stop_at(text)], len(self._ids), "stop" if has_stopped else "length")

    def _text(self) -> str:
        """All of it, decoded anew: a token's text depends on its neighbours."""
        ids = self._ids[:-1] if self._ids and self._ids[-1] in self._stop_ids else self._ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _stop_at(self, text: str) -> int | None:
        places = [text.find(stop) for stop in self._stop]
        return min((at for at in places if at >= 0), default=None)

    def _sure(self, text: str) -> int:
        """How much of the text will stay, and is not the beginning of a text to stop at."""
        sure = len(text.rstrip(_NOT_YET))
        for stop in self._stop:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    sure = min(sure, len(text) - length)
        return sure

    def _send(self, text: str, end: int) -> None:
        if end > self._sent:
            self._hear(text[self._sent : end])
            self._sent = end

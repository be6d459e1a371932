"""What passes between the stages of the data room: rows, records, examples.

    RawRow --decode, read format--> Record --render, tokenise--> Example

Every stage may say BadRow; the pipeline adds the place, counts it and lists it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class BadRow(Exception):
    """One row cannot be trained on. `reason` is a short fixed name that reports count by; `detail` tells this
    row's story: what was found, where in the row, what was expected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(
            reason, detail
        )  # both as arguments, so that it survives the way from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it lies in its file. `payload` is undecoded JSON, or the row itself where a reader already
    made one (parquet, arrow, csv, txt, hub), or the BadRow a reader met. `place` is what messages call it:
    `file:line` for line files, `file[index]` otherwise."""

    place: str
    payload: bytes | dict[str, Any] | BadRow


@dataclass(frozen=True, slots=True)
class Record:
    """A row in our one shape: a conversation, or raw text.

    Conversation: `messages` are what the chat template is given (role, content, and where present tool_calls,
    reasoning_content, name, tool_call_id); `weights[i]` is the loss weight the row itself asks for on message
    i (0 for `"train": false`), or None where `data.train_on` decides. Raw text: `prompt` is never trained and
    `completion` always is; no template is used.

    Of a preference row one record is one answer: `side` is 0 for the chosen or desirable one, 1 for the
    rejected or undesirable one; `margin` is by how much the chosen one of the pair is better, by the
    row."""

    messages: tuple[dict[str, Any], ...] = ()
    weights: tuple[float | None, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    side: int = 0
    margin: float = 0.0

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens and targets. `input_ids` [T] int32; `spans` [N, 2] int32 are token ranges that carry loss and
    `span_weights` [N] float32 their weights. A target at position 0 has no left context and is never a
    target. `side` and `margin` as in Record."""

    input_ids: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_weights: NDArray[np.float32]
    num_cut_tokens: int = 0
    num_cut_targets: int = 0
    notes: tuple[str, ...] = field(default=())
    side: int = 0
    margin: float = 0.0

    def token_weights(self) -> NDArray[np.float32]:
        """[T] float32: the loss weight of each token as a target, 0 where it is not one."""
        weights = np.zeros(len(self.input_ids), dtype=np.float32)
        for (start, end), weight in zip(self.spans, self.span_weights, strict=True):
            weights[start:end] = weight
        weights[:1] = 0
        return weights

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.token_weights()))

"""Rows to examples: decode, read the format, render, tokenise, cut, and audit, one batch at a time.

`Preparer` is what a worker process holds. It knows no files and keeps no state but the tokenizer, so that cached,
lazy and streaming loading give the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.encoding import Encoder, token_spans
from tunesmith.data.formats import read_record
from tunesmith.data.records import BadRow, Example, RawRow, Record
from tunesmith.data.sources import decode
from tunesmith.data.templates import Rendered, TrainOn, render_record
from tunesmith.errors import TemplateError


@dataclass(frozen=True)
class PrepareOptions:
    """The settings that decide what a row becomes; part of the cache key."""

    format: str
    columns: dict[str, str]
    system: str | None
    train_on: TrainOn
    max_length: int
    too_long: str


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """What became of one row: its examples, or why it has none. `too_long` holds (tokens, targets) of each example
    that `too_long: drop` left out."""

    place: str
    examples: tuple[Example, ...] = ()
    problem: BadRow | None = None
    too_long: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """How one text became tokens, before `too_long` is applied, for those who want to look at it.

    text: as rendered, control strings in messages as their author wrote them. offsets [T, 2] int32: the characters
    of `text` each token of `example` came from; empty for a BOS or EOS put around raw text. served_ids: what
    `apply_chat_template` gives, None for raw text. has_control_text: a message spells a control token, so that the
    two differ on purpose."""

    text: str
    example: Example
    offsets: NDArray[np.int32]
    served_ids: list[int] | None
    has_control_text: bool


class Preparer:
    """Turns raw rows into examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, options: PrepareOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.encoder = Encoder(tokenizer)
        self._control_ids = np.asarray(sorted(self.encoder.control_ids.values()), dtype=np.int32)
        # What the tokenizer puts around plain text by itself (Llama: BOS before), found by asking it.
        around = tokenizer("a")["input_ids"]
        inner = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._text_prefix = around[: len(around) - len(inner)] if around[-len(inner) :] == inner else around[:1]

    def prepare(self, rows: Sequence[RawRow], *, audit: bool = False) -> list[PreparedRow]:
        """The outcome of each row, in order. `audit` also compares the ids with `apply_chat_template`'s.

        Raises TemplateError if the template or tokenizer makes exact targets impossible for any row."""
        outcomes: list[PreparedRow | None] = [None] * len(rows)
        pending: list[tuple[int, Record, list[Rendered], bool]] = []
        notes: dict[int, tuple[str, ...]] = {}
        for i, row in enumerate(rows):
            try:
                record, notes[i] = read_record(decode(row), self.options.format, self.options.columns)
                pending.append((i, *self._render(record)))
            except BadRow as problem:
                outcomes[i] = PreparedRow(row.place, problem=problem)
        for i, record, examples in self._encode(pending, [row.place for row in rows], audit):
            outcomes[i] = self._fit(rows[i].place, examples, notes[i], is_chat=record.is_chat)
        return [outcome for outcome in outcomes if outcome is not None]

    def trace(self, row: RawRow) -> list[Trace]:
        """The texts of one row, in the order `prepare` makes examples of them; nothing is audited, cut or dropped.

        Raises BadRow and TemplateError as rendering does."""
        record, _ = read_record(decode(row), self.options.format, self.options.columns)
        record, texts, shielded = self._render(record)
        traces = []
        for item in texts:
            ((ids, offsets),) = self.encoder.encode([item.text], shielded=shielded, all_plain=not record.is_chat)
            example = self._example(record, item, ids, offsets)
            text = self.encoder.unshield(item.text) if shielded else item.text
            if not record.is_chat:
                before = np.zeros((len(self._text_prefix), 2), dtype=np.int32)
                after = np.full((len(example.input_ids) - len(before) - len(ids), 2), len(text), dtype=np.int32)
                offsets = np.concatenate([before, offsets, after])
            served = self._served_ids(record, item) if record.is_chat else None
            traces.append(Trace(text, example, offsets, served, shielded))
        return traces

    # --- rendering

    def _render(self, record: Record) -> tuple[Record, list[Rendered], bool]:
        """(record as rendered, its texts, whether control strings in it had to be shielded)."""
        if not record.is_chat:
            span = (len(record.prompt), len(record.prompt) + len(record.completion), 1.0)
            return record, [Rendered(record.prompt + record.completion, (span,), 0)], False
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no chat template, and these rows are conversations. "
                "Set data.template to chatml or to a Jinja file, or use an instruct model."
            )
        if self.options.system is not None:
            record = _with_system(record, self.options.system)
        shielded = self.encoder.has_control_text((record.messages, record.tools))
        rendered_from = record
        if shielded:
            rendered_from = replace(
                record, messages=self.encoder.shield(record.messages), tools=self.encoder.shield(record.tools)
            )
        texts = render_record(
            rendered_from, self._render_messages, self.encoder.control_tokens, self.options.train_on
        )
        return record, texts, shielded

    def _render_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError as JinjaError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
        except (JinjaError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise BadRow("template_refuses", f"the chat template says: {str(error).strip() or type(error).__name__}") from error

    # --- encoding

    def _encode(
        self, pending: list[tuple[int, Record, list[Rendered], bool]], places: list[str], audit: bool
    ) -> list[tuple[int, Record, list[Example]]]:
        texts: dict[tuple[bool, bool], list[str]] = {}
        for _, record, rendered, shielded in pending:
            texts.setdefault((shielded, not record.is_chat), []).extend(item.text for item in rendered)
        encoded = {
            (shielded, plain): iter(self.encoder.encode(batch, shielded=shielded, all_plain=plain))
            for (shielded, plain), batch in texts.items()
        }
        result = []
        for i, record, rendered, shielded in pending:
            examples = []
            for item in rendered:
                ids, offsets = next(encoded[shielded, not record.is_chat])
                example = self._example(record, item, ids, offsets)
                if record.is_chat:
                    self._check_targets(places[i], record, example, ids)
                    if audit and not shielded:
                        self._check_parity(places[i], record, item, ids)
                examples.append(example)
            result.append((i, record, examples))
        return result

    def _example(self, record: Record, item: Rendered, ids: NDArray[np.int32], offsets: NDArray[np.int32]) -> Example:
        spans, weights = token_spans(item.spans, offsets)
        if not record.is_chat:
            # Raw text is a document: what the tokenizer begins it with, and the end that tells it is over.
            shift = len(self._text_prefix)
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            ids = np.concatenate([self._text_prefix, ids, end]).astype(np.int32)
            spans = spans + shift
            if len(spans):
                spans[-1, 1] += len(end)
        return Example(ids, spans.astype(np.int32), weights, notes=item.notes)

    # --- audit

    def _check_targets(self, place: str, record: Record, example: Example, ids: NDArray[np.int32]) -> None:
        """Every trained answer ends with a control token that is a target, and BOS is not doubled."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise TemplateError(f"{place}: the text begins with two BOS tokens; the chat template writes one too many.")
        if self.options.train_on == "all" or not len(self._control_ids):
            return
        for start, end in example.spans:
            tail = ids[max(start, end - 4) : end]
            if not np.isin(tail, self._control_ids).any() and record.messages[-1]["role"] == "assistant":
                raise TemplateError(
                    f"{place}: the chat template writes no end token after an answer "
                    f"(it ends with {self.tokenizer.decode(tail)!r}), so the tuned model would never stop. "
                    "Set data.template to a template that does, such as chatml."
                )

    def _check_parity(self, place: str, record: Record, item: Rendered, ids: NDArray[np.int32]) -> None:
        served = self._served_ids(record, item)
        if served != ids.tolist():
            at = next((k for k, (a, b) in enumerate(zip(served, ids, strict=False)) if a != b), min(len(served), len(ids)))
            raise TemplateError(
                f"{place}: token {at} differs from apply_chat_template's "
                f"({self.tokenizer.decode(served[at : at + 3])!r} there, {self.tokenizer.decode(ids[at : at + 3])!r} here). "
                "Please report this template."
            )

    def _served_ids(self, record: Record, item: Rendered) -> list[int]:
        """What whoever serves the model gets for the same messages."""
        served = self.tokenizer.apply_chat_template(
            list(record.messages[: item.num_messages]), tools=list(record.tools) or None, tokenize=True, return_dict=True
        )
        return list(served["input_ids"])

    # --- length

    def _fit(self, place: str, examples: list[Example], notes: tuple[str, ...], *, is_chat: bool) -> PreparedRow:
        """Apply `too_long`, and refuse a row of which no target is left."""
        kept, dropped, limit = [], [], self.options.max_length
        for example in examples:
            if len(example.input_ids) <= limit:
                kept.append(example)
                continue
            targets = example.num_targets
            if self.options.too_long == "error":
                return PreparedRow(
                    place,
                    problem=BadRow("too_long", f"{len(example.input_ids)} tokens, over data.max_length={limit}"),
                    notes=notes,
                )
            cut = _truncate(example, limit) if self.options.too_long == "truncate" else None
            if cut is None or not cut.num_targets:
                dropped.append((len(example.input_ids), targets))
            else:
                kept.append(cut)
        if not dropped and not any(example.num_targets for example in kept):
            what = "no token of the answers is left to train on" if is_chat else "the text gives no target"
            return PreparedRow(place, problem=BadRow("no_target", what), notes=notes)
        notes += tuple(note for example in kept for note in example.notes)
        return PreparedRow(place, tuple(kept), too_long=tuple(dropped), notes=notes)


def _truncate(example: Example, limit: int) -> Example:
    """The first `limit` tokens; no end token is invented, so the model is not taught to stop at the cut."""
    spans = np.minimum(example.spans, limit)
    keep = spans[:, 0] < spans[:, 1]
    cut = Example(example.input_ids[:limit], spans[keep], example.span_weights[keep], notes=example.notes)
    return replace(
        cut,
        num_cut_tokens=len(example.input_ids) - limit,
        num_cut_targets=example.num_targets - cut.num_targets,
    )


def _with_system(record: Record, system: str) -> Record:
    """The conversation with this system prompt, instead of its own if it has one."""
    has_own = record.messages[0]["role"] == "system"
    messages = ({"role": "system", "content": system}, *record.messages[has_own:])
    weights = (None, *record.weights[has_own:])
    return replace(record, messages=messages, weights=weights)

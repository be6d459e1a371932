"""Rows to examples: decode, read the format, render, tokenise, cut, and audit, one batch at a time.

`Preparer` is what a worker process holds. It knows no files and keeps no state but the tokenizer, so that
cached, lazy and streaming loading give the same examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.blocks import split_lengths
from tunesmith.data.decode import decode
from tunesmith.data.encoding import Encoder, StandIns, token_spans, unshield
from tunesmith.data.formats import PREFERENCE_FORMATS, read_record
from tunesmith.data.preferences import read_answers
from tunesmith.data.records import BadRow, Example, RawRow, Record
from tunesmith.data.templates import REFUSALS, Rendered, TrainOn, render_record
from tunesmith.errors import TemplateError

if TYPE_CHECKING:  # a report counts prepared rows
    from tunesmith.data.report import SourceReport

# Texts whose ids each preparer (each worker process has one) compares with apply_chat_template's.
_COMPARED_TEXTS = 64


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
    """What became of one row: its examples, or why it has none. `too_long` holds (tokens, targets) of each
    example that `too_long: drop` left out. `pairs` says of each pair why it was left out, or nothing if it is
    kept. `text_bytes`: of raw text, as UTF-8. `stream` says where a stream
    can be taken up to get at this row (rows.py). `counts` is there for a block of a stream, whose examples
    are of many rows: the account of those that were not counted with an earlier block. `reference`: the
    log-probability that a reference model gives each target of the examples in turn, NaN where it was not
    asked. `mismatched`: this row's prompt with the answer of another row."""

    place: str
    examples: tuple[Example, ...] = ()
    problem: BadRow | None = None
    too_long: tuple[tuple[int, int], ...] = ()
    pairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    text_bytes: int = 0
    stream: dict[str, Any] | None = None
    counts: SourceReport | None = None
    reference: NDArray[np.float32] | None = None
    mismatched: PreparedRow | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """How one text became tokens, before `too_long` is applied, for those who want to look at it.

    text: as rendered, control strings in messages as their author wrote them. offsets [T, 2] int32: the
    characters of `text` each token of `example` came from; empty for a BOS or EOS put around raw text.
    served_ids: what `apply_chat_template` gives, None for raw text. has_control_text: a message spells a
    control token, so that the two differ on purpose."""

    text: str
    example: Example
    offsets: NDArray[np.int32]
    served_ids: list[int] | None
    has_control_text: bool


@dataclass(frozen=True, slots=True)
class _Draft:
    """A record before tokenisation. `rendered` are its texts with their spans, `texts` the same as the
    encoder takes them."""

    record: Record
    rendered: tuple[Rendered, ...]
    texts: tuple[str, ...]
    stand_ins: StandIns
    notes: tuple[str, ...]

    @property
    def has_control_text(self) -> bool:
        return bool(self.stand_ins)


class Preparer:
    """Turns raw rows into examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, options: PrepareOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.encoder = Encoder(tokenizer)
        self._before_text, self._after_text = text_frame(tokenizer)
        self._num_compared = 0
        self._judges_answers = options.format in PREFERENCE_FORMATS

    def prepare(self, rows: Sequence[RawRow]) -> list[PreparedRow]:
        """The outcome of each row, in order. The first rows' ids are compared with `apply_chat_template`'s.

        Raises TemplateError if the template or tokenizer makes exact targets impossible for any row."""
        if self.options.format == "text":
            return self._prepare_texts(rows)
        drafts_of_rows: list[tuple[list[_Draft], tuple[str, ...]] | BadRow] = []
        for row in rows:
            try:
                drafts_of_rows.append(self._drafts(row))
            except BadRow as problem:
                drafts_of_rows.append(problem)
        texts = [
            text
            for found in drafts_of_rows
            if not isinstance(found, BadRow)
            for draft in found[0]
            for text in draft.texts
        ]
        encoded = iter(self.encoder.encode(texts))
        outcomes = []
        for row, found in zip(rows, drafts_of_rows, strict=True):
            if isinstance(found, BadRow):
                outcomes.append(PreparedRow(row.place, problem=found))
                continue
            drafts, notes = found
            answers = [self._examples_of(row.place, draft, encoded) for draft in drafts]
            is_chat = any(draft.record.is_chat for draft in drafts)
            outcomes.append(self._fit(row.place, answers, notes, is_chat=is_chat))
        return outcomes

    def _examples_of(
        self, place: str, draft: _Draft, encoded: Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> list[Example]:
        """The examples of a draft whose texts are the next that were encoded."""
        examples = []
        for rendered in draft.rendered:
            ids, offsets = next(encoded)
            if draft.record.is_chat:
                self._check_bos(place, ids)
                if self._num_compared < _COMPARED_TEXTS and not draft.has_control_text:
                    self._num_compared += 1
                    self._check_parity(place, draft.record, rendered, ids)
            examples.append(self._example(draft.record, rendered, ids, offsets))
        return examples

    def _prepare_texts(self, rows: Sequence[RawRow]) -> list[PreparedRow]:
        """The same for documents, of which every token is a target: no offsets are needed to find them."""
        texts: list[str | BadRow] = []
        for row in rows:
            try:
                record, _ = read_record(decode(row), "text", self.options.columns)
                texts.append(self.encoder.plain(record.completion))
            except BadRow as problem:
                texts.append(problem)
        encoded = iter(self.encoder.encode_ids([text for text in texts if isinstance(text, str)]))
        outcomes = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, BadRow):
                outcomes.append(PreparedRow(row.place, problem=text))
                continue
            ids = next(encoded)
            whole = np.concatenate([self._before_text, ids, self._after_text]).astype(np.int32)
            spans = [(len(self._before_text), len(whole))] if len(ids) else []
            example = Example(
                whole,
                np.asarray(spans, dtype=np.int32).reshape(-1, 2),
                np.ones(len(spans), dtype=np.float32),
            )
            outcome = self._fit(row.place, [[example]], (), is_chat=False)
            outcomes.append(replace(outcome, text_bytes=len(text.encode())))
        return outcomes

    def trace(self, row: RawRow) -> list[Trace]:
        """The texts of one row, in the order `prepare` makes examples of them; nothing is cut or dropped.

        Raises BadRow and TemplateError as rendering does."""
        drafts, _ = self._drafts(row)
        return [trace for draft in drafts for trace in self._traces(draft)]

    def _traces(self, draft: _Draft) -> list[Trace]:
        traces = []
        for rendered, (ids, offsets) in zip(draft.rendered, self.encoder.encode(draft.texts), strict=True):
            example = self._example(draft.record, rendered, ids, offsets)
            served, text = None, unshield(rendered.text, draft.stand_ins)
            if draft.record.is_chat:
                served = self._served_ids(draft.record, rendered)
            else:
                before = np.zeros((len(self._before_text), 2), dtype=np.int32)
                after = np.full((len(self._after_text), 2), len(text), dtype=np.int32)
                offsets = np.concatenate([before, offsets, after])
            traces.append(Trace(text, example, offsets, served, draft.has_control_text))
        return traces

    def examples(self, record: Record) -> list[Example]:
        """The examples of a record that was read already; nothing is cut or dropped. Raises BadRow and
        TemplateError as rendering does."""
        draft = self._draft_of(record, ())
        return [
            self._example(record, rendered, ids, offsets)
            for rendered, (ids, offsets) in zip(draft.rendered, self.encoder.encode(draft.texts), strict=True)
        ]

    def prompt_ids(self, record: Record) -> NDArray[np.int32]:
        """What the model is shown of a conversation that awaits an answer, up to where the answer begins, or
        of a raw text to go on with (`prompt`): as it was shown in training. Raises BadRow where the template
        refuses it."""
        if not record.is_chat:
            (ids,) = self.encoder.encode_ids([self.encoder.plain(record.prompt)])
            return np.concatenate([self._before_text, ids]).astype(np.int32)
        record, _ = self._as_trained(record, ())
        shielded, stand_ins = self._shielded(record)
        text = self._render(shielded.messages, shielded.tools, True)
        ((ids, _),) = self.encoder.encode([self.encoder.name_control_tokens(text, stand_ins)])
        return ids

    # --- rendering

    def _drafts(self, row: RawRow) -> tuple[list[_Draft], tuple[str, ...]]:
        """One, or one for each answer of a preference row; and the notes of all."""
        values, format, columns = decode(row), self.options.format, self.options.columns
        if self._judges_answers:
            records, notes = read_answers(values, format, columns)
        else:
            record, notes = read_record(values, format, columns)
            records = (record,)
        try:
            drafts = [self._draft_of(record, ()) for record in records]
        except TemplateError as error:
            raise TemplateError(f"{row.place}: {error}") from error
        return drafts, notes + tuple(note for draft in drafts for note in draft.notes)

    def _draft_of(self, record: Record, notes: tuple[str, ...]) -> _Draft:
        return self._conversation(record, notes) if record.is_chat else self._raw_text(record, notes)

    def _raw_text(self, record: Record, notes: tuple[str, ...]) -> _Draft:
        text = self.encoder.plain(record.prompt + record.completion)
        span = (len(record.prompt), len(text), 1.0)
        return _Draft(record, (Rendered(text, (span,), 0),), (text,), {}, notes)

    def _conversation(self, record: Record, notes: tuple[str, ...]) -> _Draft:
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no chat template, and these rows are "
                "conversations. Set data.template to chatml or to a Jinja file, or use an instruct model."
            )
        record, notes = self._as_trained(record, notes)
        shielded, stand_ins = self._shielded(record)
        rendered = render_record(shielded, self._render, self.encoder.control_tokens, self.options.train_on)
        texts = tuple(self.encoder.name_control_tokens(item.text, stand_ins) for item in rendered)
        if stand_ins:
            notes = (*notes, "control_text")
        return _Draft(record, tuple(rendered), texts, stand_ins, notes)

    def _as_trained(self, record: Record, notes: tuple[str, ...]) -> tuple[Record, tuple[str, ...]]:
        """The conversation that the template is given, with what was changed noted."""
        if self.options.system is not None:
            record = _with_system(record, self.options.system)
        if any(message.get("tool_calls") for message in record.messages) and not self._renders_tool_calls:
            record, notes = _calls_as_text(record), (*notes, "tool_calls_as_text")
        return record, notes

    def _shielded(self, record: Record) -> tuple[Record, StandIns]:
        stand_ins = self.encoder.stand_ins((record.messages, record.tools))
        shielded = replace(
            record,
            messages=self.encoder.shield(record.messages, stand_ins),
            tools=self.encoder.shield(record.tools, stand_ins),
        )
        return shielded, stand_ins

    @cached_property
    def _renders_tool_calls(self) -> bool:
        """Whether the template shows a tool call at all; many of small models silently drop it."""
        call = {"type": "function", "function": {"name": "zebra_crossing", "arguments": {}}}
        messages = (
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        )
        try:
            return "zebra_crossing" in self._render(messages, (), False)
        except BadRow:
            return False

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
        except REFUSALS as error:
            said = str(error).strip() or type(error).__name__
            raise BadRow("template_refuses", f"the chat template says: {said}") from error

    # --- encoding

    def _example(
        self, record: Record, rendered: Rendered, ids: NDArray[np.int32], offsets: NDArray[np.int32]
    ) -> Example:
        spans, weights = token_spans(rendered.spans, offsets)
        if not record.is_chat:
            # Raw text is a document: what the tokenizer begins it with, and the end that tells it is over.
            ids = np.concatenate([self._before_text, ids, self._after_text]).astype(np.int32)
            spans += len(self._before_text)
            spans[-1:, 1] += len(self._after_text)
        return Example(ids, spans, weights, notes=rendered.notes, side=record.side, margin=record.margin)

    # --- audit

    def _check_bos(self, place: str, ids: NDArray[np.int32]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise TemplateError(
                f"{place}: the text begins with two BOS tokens ({self.tokenizer.bos_token}); the chat "
                "template writes one too many. Set data.template to a corrected copy of it."
            )

    def _check_parity(self, place: str, record: Record, rendered: Rendered, ids: NDArray[np.int32]) -> None:
        served = self._served_ids(record, rendered)
        control = list(self.encoder.control_ids.values())
        if np.isin(served, control).sum() > np.isin(ids, control).sum():
            return  # a normaliser made a control token of what a user wrote; here it stays text
        if served != ids.tolist():
            pairs = enumerate(zip(served, ids, strict=False))
            at = next((k for k, (a, b) in pairs if a != b), min(len(served), len(ids)))
            there, here = (self.tokenizer.decode(some[at : at + 3]) for some in (served, ids))
            raise TemplateError(
                f"{place}: token {at} differs from apply_chat_template's ({there!r} there, {here!r} here). "
                "Please report this template."
            )

    def _served_ids(self, record: Record, rendered: Rendered) -> list[int]:
        """What whoever serves the model gets for the same messages."""
        served = self.tokenizer.apply_chat_template(
            list(record.messages[: rendered.num_messages]),
            tools=list(record.tools) or None,
            tokenize=True,
            return_dict=True,
        )
        return list(served["input_ids"])

    # --- length

    def _fit(
        self, place: str, answers: list[list[Example]], notes: tuple[str, ...], *, is_chat: bool
    ) -> PreparedRow:
        """Apply `too_long`, leave out pairs that say nothing, and refuse a row with an example that has no
        target. `answers` are the examples of each record."""
        examples = [example for answer in answers for example in answer]
        if not all(example.num_targets for example in examples):
            what = (
                "no token of the answers has a weight"
                if is_chat
                else "the text is a single token: nothing precedes it"
            )
            return PreparedRow(place, problem=BadRow("no_target", what), notes=notes)
        limit = self.options.max_length
        longest = max((len(example.input_ids) for example in examples), default=0)
        if self.options.too_long == "error" and longest > limit:
            problem = BadRow("too_long", f"{longest} tokens, over data.max_length={limit}")
            return PreparedRow(place, problem=problem, notes=notes)
        kept: list[Example] = []
        too_long: list[tuple[int, int]] = []
        pairs = [] if answers else ["no_better_answer"]
        for group in self._kept_together(answers):
            fitted = [[self._cut(example) for example in answer] for answer in group]
            is_pair = len(group) == 2
            reason = ""
            if is_pair and _are_equal(*group):
                reason = "identical_answers"
            elif not all(pieces for answer in fitted for pieces in answer):
                reason = "too_long"
            elif is_pair and _are_equal(*([piece for [piece] in answer] for answer in fitted)):
                reason = "same_after_cut"
            if is_pair:
                pairs.append(reason)
            if not reason:
                kept += [piece for answer in fitted for pieces in answer for piece in pieces]
            elif reason != "identical_answers":
                too_long += [(len(e.input_ids), e.num_targets) for answer in group for e in answer]
        notes += tuple(note for example in examples for note in example.notes)
        return PreparedRow(place, tuple(kept), too_long=tuple(too_long), pairs=tuple(pairs), notes=notes)

    def _kept_together(self, answers: list[list[Example]]) -> list[list[list[Example]]]:
        """What is trained as a whole or not at all: each example by itself or, of a preference row, the
        examples of both answers of a pair or of the one answer."""
        if not self._judges_answers:
            return [[[example]] for answer in answers for example in answer]
        return [answers[i : i + 2] for i in range(0, len(answers), 2)]

    def _cut(self, example: Example) -> list[Example]:
        """The example as `too_long` would have it: cut, in pieces, or nothing."""
        limit = self.options.max_length
        if len(example.input_ids) <= limit:
            return [example]
        if self.options.too_long == "split":
            return _split(example, limit)
        if self.options.too_long == "truncate" and (cut := _truncate(example, limit)).num_targets:
            return [cut]
        return []


def _are_equal(chosen: list[Example], rejected: list[Example]) -> bool:
    """Whether two answers, with their prompt, are the same tokens."""
    return len(chosen) == len(rejected) and all(
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(chosen, rejected, strict=True)
    )


def _truncate(example: Example, limit: int) -> Example:
    """The first `limit` tokens; no end token is invented, so the model is not taught to stop at the cut."""
    spans = np.minimum(example.spans, limit)
    keep = spans[:, 0] < spans[:, 1]
    cut = replace(
        example,
        input_ids=example.input_ids[:limit],
        spans=spans[keep],
        span_weights=example.span_weights[keep],
        num_cut_tokens=len(example.input_ids) - limit,
    )
    return replace(cut, num_cut_targets=example.num_targets - cut.num_targets)


def _split(example: Example, limit: int) -> list[Example]:
    """A document in pieces of at most `limit` tokens. A piece begins without context, so its first token is
    no target; the last one ends with the document's end token."""
    ends = np.cumsum(split_lengths(len(example.input_ids), limit))
    pieces = []
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        spans = np.clip(example.spans, start, end) - start
        keep = spans[:, 0] < spans[:, 1]
        pieces.append(
            Example(example.input_ids[start:end], spans[keep].astype(np.int32), example.span_weights[keep])
        )
    return pieces


def _with_system(record: Record, system: str) -> Record:
    """The conversation with this system prompt, instead of its own if it has one."""
    message = {"role": "system", "content": system}
    if record.messages[0]["role"] == "system":
        return replace(record, messages=(message, *record.messages[1:]))
    return replace(record, messages=(message, *record.messages), weights=(None, *record.weights))


def _calls_as_text(record: Record) -> Record:
    """The conversation with its tool calls written out as JSON in the answers, for a template that knows
    none: else the model would be taught to say nothing where it should have called."""
    messages = []
    for message in map(dict, record.messages):
        if calls := message.pop("tool_calls", None):
            functions = [call.get("function", call) for call in calls]
            texts = [
                json.dumps({"name": f["name"], "arguments": f["arguments"]}, ensure_ascii=False)
                for f in functions
            ]
            message["content"] = "\n".join(filter(None, [message.get("content"), *texts]))
        messages.append(message)
    return replace(record, messages=tuple(messages))


def text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after raw text: what the tokenizer puts there by itself (Llama: BOS before), found
    by asking it, and EOS after."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before, after = whole[:start], whole[start + len(inner) :]
    eos = tokenizer.eos_token_id
    return before, [*after, eos] if eos is not None and eos not in after else after

"""What `tunesmith preview` shows: rows as training sees them, with the text and the state of every token.

    rows of data.train --Preparer, as training--> ShownRow

Only the rows shown are tokenised. What a row becomes is decided by `Preparer.prepare`; `Preparer.trace` adds
what training throws away: the text, and where each token stands in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np

from tunesmith.config import Config
from tunesmith.data.formats import PREFERENCE_FORMATS
from tunesmith.data.loading import open_source
from tunesmith.data.preferences import PAIR_REASONS
from tunesmith.data.prepare import PreparedRow, Preparer, Trace
from tunesmith.data.records import BadRow, Example, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.errors import TemplateError

State = Literal["trained", "context", "cut"]
_ALL = slice(None)
Glyphs = list[tuple[str, bool]]  # what to draw, and whether it stands for something that cannot be drawn


@dataclass(frozen=True)
class ShownText:
    """One text of a row, and the example it makes.

    Lists have an item for each token, those cut off among them: training gets the first `num_kept`, and
    they spell `text`. `spelled` is each token's share of the text; `pieces` are what the tokens spell one by
    one, a byte that is no whole character being a surrogate, U+DC80 and up. `verdict` says what `too_long`
    took, `parity` how the ids compare with those of apply_chat_template.

    Of a judged answer: `side` and `margin` as in Example; `pair` is the run's row, counted from 0, that it is
    in, None where it is left out; `num_shared` tokens at the beginning are the other answer's prompt too."""

    ids: list[int]
    weights: list[float]
    spelled: list[str]
    pieces: list[str]
    num_kept: int
    verdict: str
    parity: str
    side: int | None = None
    margin: float = 0.0
    pair: int | None = None
    num_shared: int = 0

    @property
    def text(self) -> str:
        """What training gets."""
        return "".join(self.spelled[: self.num_kept])

    @property
    def whole_text(self) -> str:
        return "".join(self.spelled)

    def state(self, i: int) -> State:
        """What becomes of token i."""
        if i >= self.num_kept:
            return "cut"
        return "trained" if self.weights[i] else "context"

    @property
    def num_targets(self) -> int:
        return sum(weight > 0 for weight in self.weights[: self.num_kept])

    @property
    def size(self) -> str:
        """`143 tokens, 37 trained (25.9 %)`; nothing where no token is kept."""
        if not self.num_kept:
            return ""
        share = 100 * self.num_targets / self.num_kept
        return f"{self.num_kept:,} tokens, {self.num_targets:,} trained ({share:.1f} %)"

    def runs(self, part: slice = _ALL) -> Iterator[tuple[int, int, State, float]]:
        """Longest ranges of tokens [start, end) with one state and, where they are trained, one weight; of
        all tokens, or of those of `part`."""
        start, stop, _ = part.indices(len(self.ids))
        kinds = [(self.state(i), self.weights[i] if i < self.num_kept else 0.0) for i in range(start, stop)]
        for (state, weight), group in groupby(kinds):
            end = start + len(list(group))
            yield start, end, state, weight
            start = end


@dataclass(frozen=True)
class ShownRow:
    """A row and its texts; `problem` says why none of it is trained on."""

    place: str
    format: str
    problem: str
    notes: tuple[str, ...]
    texts: list[ShownText]

    def parts(self) -> Iterator[ShownPart]:
        """What to draw one below the other. The prompt of a pair, each answer of which is one text, stands
        once, in the tokens of the chosen one."""
        num_pairs = sum(text.num_shared > 0 and text.side == 0 for text in self.texts)
        number = 0
        for i, text in enumerate(self.texts):
            heading = f"example {i + 1} of {len(self.texts)} of this row" if len(self.texts) > 1 else ""
            if text.num_shared:
                number += text.side == 0
                heading = f"pair {number} of {num_pairs} of this row" if num_pairs > 1 else ""
            if text.num_shared and text.side == 0:
                margin = f"margin {text.margin:g}" if text.margin else ""
                prompt = f"prompt of both answers: {text.num_shared:,} tokens"
                yield ShownPart(_joined(heading, prompt, margin), text, slice(0, text.num_shared), False)
            names = ("desirable", "undesirable") if self.format == "labelled" else ("chosen", "rejected")
            answer = "" if text.side is None else names[text.side]
            yield ShownPart(_joined(heading, answer), text, slice(text.num_shared, None), True)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class ShownPart:
    """Tokens `part` of a text, under a heading. `has_facts`: what is to be said of the text is said here."""

    heading: str
    text: ShownText
    part: slice
    has_facts: bool


def show_rows(
    config: Config, tokenizer: Any, limit: int, say: Callable[[str], None]
) -> tuple[list[ShownRow], SourceReport]:
    """The first `limit` rows of data.train in order, and the account that training would give of them.

    A bad row is shown as one. Raises DataError where a source cannot be read, TemplateError where there is no
    template for conversations."""
    report = SourceReport("", "")
    shown = []
    num_items = 0  # rows of the run: examples together, a pair at a time
    for row, preparer in islice(_rows(config, tokenizer, say), limit):
        shown.append(_show_row(row, preparer, config, report, num_items))
        num_items = max(
            (text.pair + 1 for text in shown[-1].texts if text.pair is not None), default=num_items
        )
    return shown, report


def _rows(config: Config, tokenizer: Any, say: Callable[[str], None]) -> Iterator[tuple[RawRow, Preparer]]:
    for source in config.data.train:
        rows, options, _ = open_source(source, config, say)
        preparer = Preparer(tokenizer, options)
        for row in rows():
            yield row, preparer


def _show_row(
    row: RawRow, preparer: Preparer, config: Config, report: SourceReport, first_pair: int
) -> ShownRow:
    """`first_pair`: the number of the row's first pair or labelled answer, if one is kept."""
    consequence = "stops the run"
    try:
        (outcome,) = preparer.prepare([row])
        if config.data.on_bad_row == "skip":
            consequence = "left out, data.on_bad_row=skip"
    except TemplateError as error:
        if not preparer.tokenizer.chat_template:
            raise  # no row can do without
        outcome = PreparedRow(
            row.place, problem=BadRow("template", str(error).removeprefix(f"{row.place}: "))
        )
    report.format = preparer.options.format  # which says what there is to count
    report.add(outcome)
    try:
        traces = preparer.trace(row)
    except BadRow:
        traces = []  # the outcome tells the same
    problem = f"bad row ({consequence}): {outcome.problem}" if outcome.problem else ""
    if not traces and outcome.pairs:
        problem = f"left out: {PAIR_REASONS[outcome.pairs[0]]}"
    kept = list(outcome.examples)
    if len(traces) == 1 and len(kept) > 1:
        is_joined = config.data.packing == "concatenate"  # the pieces are those of the cache, not of training
        texts = [_show_text(traces[0], traces[0].example if is_joined else _rejoined(kept), preparer, False)]
        return ShownRow(row.place, preparer.options.format, problem, (), texts)
    if preparer.options.format in PREFERENCE_FORMATS:
        texts = _show_answers(traces, outcome, preparer, first_pair)
        return ShownRow(row.place, preparer.options.format, problem, tuple(sorted(set(outcome.notes))), texts)
    texts = [_show_text(trace, _take_kept(kept, trace.example), preparer, bool(problem)) for trace in traces]
    assert not kept, "prepare and trace disagree"
    return ShownRow(row.place, preparer.options.format, problem, tuple(sorted(set(outcome.notes))), texts)


def _show_answers(
    traces: Sequence[Trace], outcome: PreparedRow, preparer: Preparer, first_pair: int
) -> list[ShownText]:
    """The texts of a preference row. What is trained as a whole, a pair or a labelled answer, is kept or left
    out as a whole, so the kept examples are those of its texts in order."""
    sides = [trace.example.side for trace in traces]
    starts = [i for i in range(len(traces)) if i == 0 or sides[i] < sides[i - 1]]
    kept, texts, number = list(outcome.examples), [], first_pair
    reasons = outcome.pairs if len(outcome.pairs) == len(starts) else [""] * len(starts)
    ends = [*starts[1:], len(traces)][: len(starts)]
    for start, end, reason in zip(starts, ends, reasons, strict=True):
        some = traces[start:end]
        is_kept = not reason and bool(kept)
        shown = [
            _show_text(trace, kept.pop(0) if is_kept else None, preparer, outcome.problem is not None)
            for trace in some
        ]
        if reason:
            limit = preparer.options.max_length
            verdict = f"left out: {PAIR_REASONS[reason]}"
            if reason == "too_long":
                verdict = f"left out with the other answer, which is over data.max_length={limit}"
            is_too_long = [reason == "too_long" and len(text.ids) > limit for text in shown]
            shown = [
                text if is_long else replace(text, verdict=verdict)
                for text, is_long in zip(shown, is_too_long, strict=True)
            ]
        num_shared = _num_shared(*some) if len(some) == 2 and sides[start] != sides[start + 1] else 0
        texts += [
            replace(
                text,
                side=trace.example.side,
                margin=trace.example.margin,
                pair=number if is_kept else None,
                num_shared=num_shared,
            )
            for text, trace in zip(shown, some, strict=True)
        ]
        number += is_kept
    assert not kept, "prepare and trace disagree"
    return texts


def _num_shared(chosen: Trace, rejected: Trace) -> int:
    """Tokens that both begin with, before the first target."""
    spans = chosen.example.spans
    size = int(spans[0, 0]) if len(spans) else 0
    ids = [trace.example.input_ids[:size] for trace in (chosen, rejected)]
    shorter = min(map(len, ids))
    different = np.flatnonzero(ids[0][:shorter] != ids[1][:shorter])
    return int(different[0]) if len(different) else shorter


def _rejoined(pieces: Sequence[Example]) -> Example:
    """A document that was split, as one example again, with a span for each piece. As training has it, the
    first token of a piece is no target."""
    ends = np.cumsum([len(piece.input_ids) for piece in pieces])
    starts = ends - [len(piece.input_ids) for piece in pieces] + 1
    return Example(
        np.concatenate([piece.input_ids for piece in pieces]),
        np.stack([starts, ends], axis=1).astype(np.int32),
        np.ones(len(pieces), dtype=np.float32),
    )


def _take_kept(kept: list[Example], whole: Example) -> Example | None:
    """The next kept example if it is the beginning of `whole`; None if `whole` was dropped."""
    if not kept or len(kept[0].input_ids) + kept[0].num_cut_tokens != len(whole.input_ids):
        return None
    if not np.array_equal(kept[0].input_ids, whole.input_ids[: len(kept[0].input_ids)]):
        return None
    return kept.pop(0)


def _show_text(trace: Trace, kept: Example | None, preparer: Preparer, is_bad: bool) -> ShownText:
    whole = trace.example
    is_whole = kept is not None and len(kept.input_ids) == len(whole.input_ids)
    shown = kept if kept is not None and is_whole else whole
    weights = [float(str(weight)) for weight in shown.token_weights()]  # 0.1, not float32's 0.10000000149
    num_kept = 0 if kept is None else len(kept.input_ids)
    limit = preparer.options.max_length
    verdict = ""
    if kept is None and not is_bad:
        targets = f"{whole.num_targets:,} of them targets"
        why = "dropped" if preparer.options.too_long == "drop" else "dropped, no target would be left"
        verdict = f"{why}: {len(weights):,} tokens, {targets}; data.max_length={limit}"
    elif kept is not None and is_whole and len(kept.spans) > len(whole.spans):
        verdict = f"split at data.max_length={limit}, in {len(kept.spans)} pieces"
    elif kept is not None and kept.num_cut_tokens:
        verdict = (
            f"cut at data.max_length={limit}: {kept.num_cut_tokens:,} of {len(weights):,} tokens go, "
            f"{kept.num_cut_targets:,} of them targets"
        )
    return ShownText(
        ids=whole.input_ids.tolist(),
        weights=weights,
        spelled=_spelled(trace, preparer.tokenizer),
        pieces=_pieces(trace, preparer.tokenizer),
        num_kept=num_kept,
        verdict=verdict,
        parity=_parity(trace, preparer.tokenizer),
    )


def _parity(trace: Trace, tokenizer: Any) -> str:
    ids, served = trace.example.input_ids.tolist(), trace.served_ids
    if served is None:
        return "raw text: no template"
    if ids == served:
        return "ids equal apply_chat_template"
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, served, strict=False)) if a != b), min(len(ids), len(served))
    )
    theirs, ours = tokenizer.decode(served[at : at + 3]), tokenizer.decode(ids[at : at + 3])
    where = f"from token {at} on ({theirs!a} there, {ours!a} here)"
    if trace.has_control_text:
        return (
            "a message spells a control token; it is encoded as plain text, so the ids differ from "
            f"apply_chat_template on purpose, {where}"
        )
    return f"ids differ from apply_chat_template {where}; please report this template"


# --- tokens as text


def _spelled(trace: Trace, tokenizer: Any) -> list[str]:
    """Each token's share of the text; together they are all of it, with the BOS and EOS around raw text."""
    pieces, done = [], 0
    for id_, (start, end) in zip(trace.example.input_ids.tolist(), trace.offsets.tolist(), strict=True):
        pieces.append(trace.text[done:end] if start < end else tokenizer.convert_ids_to_tokens(id_))
        done = max(done, end) if start < end else done
    last = max((i for i, (start, end) in enumerate(trace.offsets.tolist()) if start < end), default=None)
    if last is not None:
        pieces[last] += trace.text[done:]  # spaces that no token stands for
    return pieces


def _pieces(trace: Trace, tokenizer: Any) -> list[str]:
    """What to draw for each token: its share of the text, or its bytes where several share a character."""
    offsets = trace.offsets.tolist()
    pieces = _spelled(trace, tokenizer)
    for i, (start, end) in enumerate(offsets):
        shares_first = i > 0 and start < offsets[i - 1][1]
        shares_last = i + 1 < len(offsets) and offsets[i + 1][0] < end
        if start < end and (shares_first or shares_last):
            pieces[i] = _bytes_as_text(tokenizer.convert_ids_to_tokens(int(trace.example.input_ids[i])))
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2's byte-level BPE writes for each byte, and the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _bytes_as_text(name: str) -> str:
    """The bytes a token stands for, those that are no whole character as surrogates U+DC80..U+DCFF."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # SentencePiece's byte fallback
        content = bytes([int(name[3:5], 16)])
    elif all(char in _BYTES for char in name):
        content = bytes(_BYTES[char] for char in name)
    else:
        return name
    return content.decode("utf-8", "surrogateescape")


def join_pieces(pieces: Iterable[str]) -> str:
    """Pieces as one text, in which bytes that together are a character have become it."""
    return "".join(pieces).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def visible(text: str) -> Glyphs:
    """Text such that nothing in it hides, moves the cursor or turns the writing around.

    A line break is its sign and then the break itself; other controls are Unicode's control pictures, bytes
    that are no character are <F0>, and invisible characters are <U+200B>."""
    glyphs: Glyphs = []
    for char in text:
        sign = _sign(char)
        if glyphs and not sign and not glyphs[-1][1]:
            glyphs[-1] = (glyphs[-1][0] + char, False)
        else:
            glyphs.append((sign or char, bool(sign)))
        if char == "\n":
            glyphs.append((char, False))
    return glyphs


def _sign(char: str) -> str:
    """What is drawn for a character that cannot be seen, or nothing."""
    code = ord(char)
    if char == "\n":
        return "\u21b5"
    if char == "\t":
        return "\u2192"
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xDC80 <= code <= 0xDCFF:
        return f"<{code - 0xDC00:02X}>"
    if char != " " and unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"):
        return f"<U+{code:04X}>"
    return ""

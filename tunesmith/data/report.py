"""The account of every row: what was read, kept, cut and dropped, and why. It is `data_report.json`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.preferences import PAIR_REASONS
from tunesmith.data.prepare import PreparedRow
from tunesmith.errors import DataError

# Of bad, cut and left out rows, each, a report lists this many, and counts all of them.
_MAX_LISTED = 10_000


@dataclass
class SourceReport:
    """Counts of one source. For any input

        rows_read = rows_kept + rows_bad + rows_too_long + rows_without_pair

    where a row is kept if one of its examples is. `tokens` and `target_tokens` are what is trained on;
    `text_bytes` the UTF-8 bytes of kept raw text; `pieces` the examples that `too_long: split` made of
    `rows_split` rows; `..._cut` what `too_long: truncate` took from kept examples; `..._too_long` what was
    left out with whole examples.

    Of preference rows: `pairs` and `pairs_left_out` by reason; `rows_without_pair` have no two answers that
    differ; `desirable` and `undesirable` are answers with a label."""

    path: str
    format: str
    fingerprint: str = ""  # hash of the files' content; empty for a stream or a hub data set
    rows_read: int = 0
    rows_kept: int = 0
    rows_bad: int = 0
    rows_too_long: int = 0
    rows_cut: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    text_bytes: int = 0
    rows_split: int = 0
    pieces: int = 0
    examples_cut: int = 0
    tokens_cut: int = 0
    target_tokens_cut: int = 0
    examples_too_long: int = 0
    tokens_too_long: int = 0
    target_tokens_too_long: int = 0
    pairs: int = 0
    rows_without_pair: int = 0
    desirable: int = 0
    undesirable: int = 0
    pairs_left_out: Counter[str] = field(default_factory=Counter)
    bad_by_reason: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, str]] = field(default_factory=list)
    shortened: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: PreparedRow) -> None:
        """Count one row, or the rows that a block of a stream stands for."""
        if row.counts is not None:
            self.merge(row.counts)
            return
        self.rows_read += 1
        self.notes.update(set(row.notes))
        if row.problem is not None:
            self.rows_bad += 1
            self.bad_by_reason[row.problem.reason] += 1
            _list(self.bad, row.place, row.problem.reason, row.problem.detail)
            return
        self.rows_kept += bool(row.examples)
        self.text_bytes += row.text_bytes if row.examples else 0
        if self.format == "text" and len(row.examples) > 1:
            self.rows_split += 1
            self.pieces += len(row.examples)
        self.rows_too_long += bool(row.too_long) and not row.examples
        self.rows_without_pair += not row.too_long and not row.examples
        self._add_judged(row)
        for tokens, targets in row.too_long:
            self.examples_too_long += 1
            self.tokens_too_long += tokens
            self.target_tokens_too_long += targets
            lost = f"{tokens} tokens, {targets} of them targets: left out"
            _list(self.shortened, row.place, "too_long", lost)
        for example in row.examples:
            self.examples += 1
            self.tokens += len(example.input_ids)
            self.target_tokens += example.num_targets
            if example.num_cut_tokens:
                self.examples_cut += 1
                self.tokens_cut += example.num_cut_tokens
                self.target_tokens_cut += example.num_cut_targets
                lost = f"{example.num_cut_tokens} tokens cut, {example.num_cut_targets} of them targets"
                _list(self.shortened, row.place, "cut", lost)
        self.rows_cut += any(example.num_cut_tokens for example in row.examples)

    def _add_judged(self, row: PreparedRow) -> None:
        """Count the pairs or labelled answers of a preference row."""
        if self.format == "labelled":
            self.desirable += bool(row.examples) and row.examples[0].side == 0
            self.undesirable += bool(row.examples) and row.examples[0].side == 1
        for reason in row.pairs:
            self.pairs += not reason
            if reason:
                self.pairs_left_out[reason] += 1
                _list(self.left_out, row.place, reason, PAIR_REASONS[reason])

    def merge(self, other: SourceReport) -> None:
        """Add the counts of another part of the same source."""
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, int):
                setattr(self, item.name, mine + theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, list):
                mine += theirs[: _MAX_LISTED - len(mine)]

    def refuse_bad_rows(self) -> None:
        """Raise DataError with the first 20 bad rows and the counts by reason, if there is any."""
        if not self.rows_bad:
            return
        lines = [f"{item['place']}: {item['what']}: {item['detail']}" for item in self.bad[:20]]
        if self.rows_bad > len(lines):
            lines.append(f"... and {self.rows_bad - len(lines)} more")
        counts = ", ".join(f"{reason} {count}" for reason, count in self.bad_by_reason.most_common())
        lines.append(
            f"{self.rows_bad} of {self.rows_read} rows of {self.path} cannot be used ({counts}). "
            "Mend them, or set data.on_bad_row=skip to leave them out and count them."
        )
        raise DataError("\n".join(lines))

    def lines(self) -> list[str]:
        """The account for a reader: what was kept, what was not, and what is odd about the rest."""
        if not self.rows_read:
            return []
        rows = "documents" if self.format == "text" else "rows"
        parts = [
            f"{self.rows_kept:,} of {self.rows_read:,} {rows}, {self.tokens:,} tokens, "
            f"{self.target_tokens:,} targets"
        ]
        if self.text_bytes:
            parts.append(
                f"{self.tokens / self.rows_kept:,.0f} tokens a document, "
                f"{self.text_bytes / self.tokens:.2f} bytes a token"
            )
        # A pair goes whole, with an answer that is short enough: pairs are counted below.
        too_long = 0 if self.pairs_left_out else self.examples_too_long
        parts += [
            f"{count:,} {what}"
            for count, what in (
                (self.rows_bad, f"bad {rows} left out"),
                (too_long, "over data.max_length left out"),
                (self.rows_cut, "cut at data.max_length"),
                (self.rows_split, f"split at data.max_length, in {self.pieces:,} pieces"),
            )
            if count
        ]
        if self.pairs or self.pairs_left_out:
            parts.insert(1, f"{self.pairs:,} pairs")
        if self.desirable or self.undesirable:
            parts.insert(1, f"{self.desirable:,} desirable and {self.undesirable:,} undesirable answers")
        parts += [
            f"{count:,} pairs left out: {PAIR_REASONS[reason]}"
            for reason, count in self.pairs_left_out.most_common()
        ]
        if self.rows_without_pair:
            parts.append(f"{self.rows_without_pair:,} rows without a pair")
        notes = [f"{note.replace('_', ' ')}: {count:,} rows" for note, count in self.notes.most_common()]
        return [f"{self.path}: {line}" for line in ("; ".join(parts), *notes)]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; `not_listed` are the entries that `bad`, `shortened` and `left_out` had no room for."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        num_entries = self.rows_bad + self.examples_too_long + self.examples_cut + self.pairs_left_out.total()
        return values | {
            "pairs_left_out": dict(self.pairs_left_out),
            "bad_by_reason": dict(self.bad_by_reason),
            "notes": dict(self.notes),
            "not_listed": num_entries - len(self.bad) - len(self.shortened) - len(self.left_out),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceReport:
        """The inverse of `as_dict`."""
        values = {key: value for key, value in values.items() if key != "not_listed"}
        counted = ("pairs_left_out", "bad_by_reason", "notes")
        return cls(**values | {key: Counter(values[key]) for key in counted})


def _list(entries: list[dict[str, str]], place: str, what: str, detail: str) -> None:
    if len(entries) < _MAX_LISTED:
        entries.append({"place": place, "what": what, "detail": detail})

"""`tunesmith preview`: the first rows, token by token: trained, not trained, cut.

    show_rows --> [ShownRow] --> terminal | HTML page | JSON lines

Never loads the model, never tokenises more than the rows shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from tunesmith.config import Config
from tunesmith.data.preferences import PAIR_REASONS
from tunesmith.data.report import SourceReport
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ConfigError, DataError
from tunesmith.inspect.preview_page import page
from tunesmith.inspect.shown import ShownRow, ShownText, State, join_pieces, show_rows, visible


def preview(
    config: Config, *, rows: int, html: Path | None, as_json: bool, console: Console | None = None
) -> None:
    """Show the first `rows` rows of data.train: on the terminal, as a page in `html`, or as JSON lines.

    A bad row is shown as one. Raises ConfigError, DataError, ModelError, and TemplateError where there is no
    template for conversations."""
    if rows < 1:
        raise ConfigError(f"--rows {rows}: expected 1 or more")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an old terminal lacks most of Unicode
    console = console or Console()
    notes = Console(stderr=True) if as_json else console

    def say(message: str) -> None:
        notes.print(Text(message), soft_wrap=True)

    tokenizer = load_tokenizer(config)
    shown, report = show_rows(config, tokenizer, rows, say)
    if not shown:
        raise DataError("data.train: there is no row in it.")
    if config.run.recipe == "sft" and any(row.format == "text" for row in shown):
        say(
            f"Texts are shown as `tunesmith sft` takes them, data.too_long={config.data.too_long}. To see "
            "what `tunesmith pretrain` does, which splits long ones: run.recipe=pretrain"
        )
    if html is not None:
        _write(html, page(shown, _settings(config), totals(report)))
    if as_json:
        _print_json(shown, say)
    elif html is None:
        _draw(shown, console)
    say("\n" * (html is None) + "\n".join(totals(report)))
    if html is not None:
        say(f"wrote {html}")


# --- the terminal

# Told apart by more than hue: trained is bold on a filled ground, cut is struck through. Blue and vermilion
# are the pair of Okabe and Ito's palette that all common colour blindness keeps apart. Every other token is a
# shade different, which shows where tokens end.
_STYLES: dict[State, tuple[str, str]] = {
    "trained": ("bold #ffffff on #00568f", "bold #ffffff on #0072b2"),
    "context": ("", "dim"),
    "cut": ("strike #d55e00", "strike #b0764d"),
}
_SIGN_STYLE = "not bold #ffd479"
_WORDS: dict[State, str] = {"trained": "trained", "context": "not trained", "cut": "cut"}
_MARKS = (("[[", "]]"), ("{{", "}}"), ("<<", ">>"), ("((", "))"), ("[[[", "]]]"), ("{{{", "}}}"))


def _draw(shown: Sequence[ShownRow], console: Console) -> None:
    is_plain = not console.is_terminal or console.no_color or console.color_system is None
    marks = _marks(shown) if is_plain else None
    _print(console, _legend(marks))
    for number, row in enumerate(shown, 1):
        _print(
            console,
            Text(f"\nrow {number} of {len(shown)}  {row.place}  ({row.format})", "" if is_plain else "bold"),
        )
        if row.problem:
            _print(console, Text(f"  {row.problem}", "" if is_plain else "bold #d55e00"))
        if row.notes:
            _print(console, Text(f"  notes: {', '.join(row.notes)}"))
        for i, shown_part in enumerate(row.parts()):
            text, part = shown_part.text, shown_part.part
            if shown_part.heading:
                _print(console, Text("\n" * (i > 0) + f"  {shown_part.heading}"))
            if shown_part.has_facts:
                for line in filter(None, (text.size, text.verdict, text.parity)):
                    _print(console, Text(f"  {line}"))
            drawn = _drawn_plainly(text, marks, part) if marks else _drawn(text, part)
            label = "" if is_plain else "italic"
            ids = _drawn_ids(text, is_plain, part)
            spelled = Text(_harmless("".join(text.spelled[part])))
            for name, body in (("tokens", drawn), ("ids", ids), ("text", spelled)):
                _print(
                    console,
                    Text.assemble((f"\n{name}\n", label), body),
                    end="" if body.plain.endswith("\n") else "\n",
                )


def _print(console: Console, text: Text, end: str = "\n") -> None:
    # soft_wrap: a line break that rich put in would look like one of the text's.
    console.print(text, soft_wrap=True, highlight=False, end=end)


def _marks(shown: Sequence[ShownRow]) -> dict[State, tuple[str, str]]:
    """Brackets for trained and cut tokens that no text on show contains, if there are such."""
    everything = "".join(text.whole_text for row in shown for text in row.texts)
    free = [pair for pair in _MARKS if pair[0] not in everything and pair[1] not in everything]
    trained, cut = [*free, *_MARKS][:2]
    return {"trained": trained, "cut": cut}


def _legend(marks: dict[State, tuple[str, str]] | None) -> Text:
    if marks:
        items = [f"{marks[state][0]}{_WORDS[state]}{marks[state][1]}" for state in ("trained", "cut")]
        return Text("  ".join([*items, "anything else: not trained", "x0.5: weight, where it is not 1"]))
    legend = Text()
    for state in get_args(State):
        legend.append(f" {_WORDS[state]} ", _STYLES[state][0])
        legend.append("  ")
    legend.append(" x0.5 ", "reverse")
    return legend.append(" weight, where it is not 1; a change of shade is a token's end")


def _drawn(text: ShownText, part: slice) -> Text:
    drawn = Text()
    for start, end, state, weight in text.runs(part):
        if state == "trained" and weight != 1:
            drawn.append(f" x{weight:g} ", "reverse")
        for i in range(start, end):
            style = _STYLES[state][i % 2]
            for glyph, is_sign in visible(text.pieces[i]):
                # A ground that is filled to the end of the line would say that the line break is a space.
                plain = "" if glyph == "\n" else style
                drawn.append(glyph, f"{style} {_SIGN_STYLE}" if is_sign and state == "trained" else plain)
    return drawn


def _drawn_plainly(text: ShownText, marks: dict[State, tuple[str, str]], part: slice) -> Text:
    drawn = ""
    for start, end, state, weight in text.runs(part):
        run = "".join(glyph for glyph, _ in visible(join_pieces(text.pieces[start:end])))
        opening, closing = marks.get(state, ("", ""))
        if state == "trained" and weight != 1:
            opening = f"x{weight:g}{opening}"
        # A last line break goes behind the mark: its sign is inside, and a mark alone on a line looks odd.
        line_break = "\n" if run.endswith("\n") else ""
        drawn += opening + run.removesuffix("\n") + closing + line_break
    return Text(drawn)


def _drawn_ids(text: ShownText, is_plain: bool, part: slice) -> Text:
    drawn = Text()
    for start, end, state, _ in text.runs(part):
        drawn.append(" ".join(map(str, text.ids[start:end])), "" if is_plain else _STYLES[state][0])
        drawn.append(" ")
    return drawn


def _harmless(text: str) -> str:
    """The text as it is, but for what would move the cursor or hide."""
    kept = "\n\t"
    return "".join(char if char in kept else visible(char)[0][0] for char in text)


# --- JSON, totals, files


def _print_json(shown: Sequence[ShownRow], say: Callable[[str], None]) -> None:
    for row in shown:
        if row.problem:
            say(f"{row.place}: {row.problem}")
        for text in row.texts:
            if text.verdict:
                say(f"{row.place}: {text.verdict}")
            if not text.num_kept:
                continue
            line: dict[str, Any] = {
                "row": row.place,
                "input_ids": text.ids[: text.num_kept],
                "targets": [int(weight > 0) for weight in text.weights[: text.num_kept]],
                "weights": text.weights[: text.num_kept],
                "text": text.text,
            }
            if text.side is not None:
                line |= {"side": text.side, "margin": text.margin, "pair": text.pair}
            sys.stdout.write(json.dumps(line) + "\n")


def totals(report: SourceReport) -> list[str]:
    """The account of the rows shown, in lines."""
    share = 100 * report.target_tokens / max(report.tokens, 1)
    pairs = f"{_count(report.pairs, 'pair')}, " if report.pairs or report.pairs_left_out else ""
    lines = [
        f"{_count(report.rows_read, 'row')} shown: {report.rows_kept:,} kept, "
        f"{report.rows_too_long:,} too long, {report.rows_bad:,} bad; "
        f"{pairs}{_count(report.examples, 'example')}, {_count(report.tokens, 'token')}, "
        f"{report.target_tokens:,} trained ({share:.1f} %)"
    ]
    if report.tokens_cut:
        cut, targets = _count(report.tokens_cut, "token"), report.target_tokens_cut
        lines.append(f"cut from {_count(report.rows_cut, 'row')}: {cut}, {targets:,} of them targets")
    if report.tokens_too_long:
        dropped, targets = _count(report.tokens_too_long, "token"), report.target_tokens_too_long
        lines.append(
            f"dropped {_count(report.examples_too_long, 'example')}: {dropped}, {targets:,} of them targets"
        )
    lines += [
        f"left out {_count(count, 'pair')}: {PAIR_REASONS[reason]}"
        for reason, count in report.pairs_left_out.most_common()
    ]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _settings(config: Config) -> dict[str, str]:
    data = config.data
    origin, place = config.model.tokenizer_origin
    return {
        "run.recipe": str(config.run.recipe),
        origin: place,
        "data.train": ", ".join(source.path for source in data.train),
        "data.template": data.template,
        "data.train_on": data.train_on,
        "data.max_length": f"{data.max_length:,} ({data.too_long})",
    }


def _write(file: Path, content: str) -> None:
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written: {error.strerror}") from error

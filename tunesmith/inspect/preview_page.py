"""`tunesmith preview --html`: one page that needs nothing else: no script, no font, no image, no network.

Every text that comes from data passes through `escape`; the content security policy would stop what slipped
by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tunesmith.inspect.shown import ShownRow, ShownText, State, visible

# As on the terminal, states are told apart by more than hue: trained is underlined on a filled ground, cut is
# struck through. Blue and vermilion of Okabe and Ito's palette. Neighbouring tokens differ in shade.
_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2128; --soft: #5c6672; --line: #d9dee4; --chip: #eef1f4;
  --trained: #cfe6f7; --trained2: #b5d8f2; --mark: #0072b2; --context2: #f1f3f5;
  --cut: #fdebdf; --cut2: #fae0cf; --cut-ink: #a34700; --sign: #8a6a00; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1c2026; --ink: #e4e8ed; --soft: #9aa5b1; --line: #323942; --chip: #282e36;
  --trained: #12405f; --trained2: #1a5179; --mark: #56b4e9; --context2: #242a31;
  --cut: #40271a; --cut2: #4d2f1f; --cut-ink: #f3a06b; --sign: #e0b94a; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .75rem }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere }
h3 { font-size: .9rem; margin: 1.25rem 0 0; color: var(--soft) }
p { margin: .35rem 0 }
.soft { color: var(--soft) }
.total { font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1rem 1.25rem 1.1rem; margin-top: 1.25rem }
.chip { background: var(--chip); border-radius: 1rem; padding: .1rem .6rem; font-size: .8rem;
  color: var(--soft); margin-left: .5rem; white-space: nowrap }
.bad { border-left: .3rem solid var(--cut-ink); padding-left: .6rem; overflow-wrap: anywhere }
.bar { height: .35rem; border-radius: .2rem; background: var(--chip); overflow: hidden; margin: .5rem 0 }
.bar > div { height: 100%; background: var(--mark) }
.tokens, pre { font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .75rem 0 0 }
pre { line-height: 1.5; background: var(--page); border-radius: .4rem; padding: .75rem }
.n, .t, .c { border-radius: .15rem; padding: .1rem 0 }
.n:nth-of-type(even) { background: var(--context2) }
.t { background: var(--trained); border-bottom: 2px solid var(--mark) }
.t:nth-of-type(even) { background: var(--trained2) }
.c { background: var(--cut); color: var(--cut-ink); text-decoration: line-through }
.c:nth-of-type(even) { background: var(--cut2) }
.tokens > span:hover { outline: 2px solid var(--mark) }
b { font-weight: 600; color: var(--sign); text-decoration: none }
q { quotes: none; background: var(--mark); color: var(--card); border-radius: .2rem; padding: 0 .3rem;
  font-size: .8em; font-weight: 700; margin: 0 .15rem }
summary { cursor: pointer; color: var(--soft); margin-top: .75rem; width: max-content }
"""
_CLASSES: dict[State, str] = {"trained": "t", "context": "n", "cut": "c"}
_WORDS: dict[State, str] = {"trained": "trained", "context": "not trained", "cut": "cut"}


def page(shown: Sequence[ShownRow], settings: Mapping[str, str], totals: Sequence[str]) -> str:
    """The whole page. `settings` and `totals` stand above the rows."""
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in settings.items())
    sums = "".join(f'<p class="total">{escape(line)}</p>' for line in totals)
    legend = " ".join(f'<span class="{_CLASSES[state]}">{word}</span>' for state, word in _WORDS.items())
    rows = "\n".join(_row(number, row) for number, row in enumerate(shown, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>tunesmith preview</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>What is trained</h1>
<dl>{terms}</dl>
{sums}
<p class="tokens">{legend} <q>x0.5</q> <span class="soft">weight, where it is not 1.
A change of shade is a token's end; its id shows when you point at it.</span></p>
{rows}
</main>
</body>
</html>
"""


def _row(number: int, row: ShownRow) -> str:
    parts = [f'<h2>{number}. {escape(row.place)}<span class="chip">{escape(row.format)}</span></h2>']
    if row.problem:
        parts.append(f'<p class="bad">{escape(row.problem)}</p>')
    if row.notes:
        parts.append(f'<p class="soft">notes: {escape(", ".join(row.notes))}</p>')
    for part in row.parts():
        if part.heading:
            parts.append(f"<h3>{part.heading[0].upper()}{escape(part.heading[1:])}</h3>")
        parts.append(_facts(part.text) * part.has_facts + _drawn(part.text, part.part))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _facts(text: ShownText) -> str:
    share = 100 * text.num_targets / max(text.num_kept, 1)
    size = (
        f'<p>{text.size}</p><div class="bar"><div style="width:{share:.1f}%"></div></div>'
        if text.size
        else ""
    )
    verdict = f'<p class="bad">{escape(text.verdict)}</p>' if text.verdict else ""
    return f"""{size}{verdict}
<p class="soft">{escape(text.parity)}</p>
"""


def _drawn(text: ShownText, part: slice) -> str:
    spelled = escape("".join(text.spelled[part]))
    return f"""<div class="tokens" dir="auto">{_tokens(text, part)}</div>
<details><summary>ids</summary><pre>{" ".join(map(str, text.ids[part]))}</pre></details>
<details><summary>rendered text</summary><pre dir="auto">{spelled}</pre></details>"""


def _tokens(text: ShownText, part: slice) -> str:
    drawn = []
    for start, end, state, weight in text.runs(part):
        if state == "trained" and weight != 1:
            drawn.append(f"<q>x{weight:g}</q>")
        for i in range(start, end):
            glyphs = "".join(
                f"<b>{escape(glyph)}</b>" if is_sign else escape(glyph)
                for glyph, is_sign in visible(text.pieces[i])
            )
            title = f"token {i}, id {text.ids[i]}, {_WORDS[state]}, weight {weight:g}"
            drawn.append(f'<span class="{_CLASSES[state]}" title="{title}">{glyphs}</span>')
    return "".join(drawn)

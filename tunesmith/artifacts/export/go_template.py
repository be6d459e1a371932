"""A chat template as Ollama wants it: Go's text/template, derived from what the Jinja template renders.

    turn_shape   renders of marked messages, compared: a user's turn is <|im_start|>user\\n...<|im_end|>\\n
    go_template  those pieces, written as Ollama's library does
    render_go    the part of Go's language that it uses, to see what Ollama would send

Whether the result is right is not argued here: the token ids of conversations are compared (ollama.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.templates import REFUSALS
from tunesmith.errors import TemplateError

_ACTION = re.compile(r'\{\{ ((?:"(?:[^"\\]|\\.)*"|[^"])*?) \}\}', re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')
_USER, _NEXT, _ANSWER, _SYSTEM = "Qmarkuser", "Qmarknext", "Qmarkanswer", "Qmarksystem"


@dataclass(frozen=True)
class TurnShape:
    """What a chat template writes before and after a message of each role; `opening` begins a conversation
    without a system prompt (BOS, a prompt of the template's own), `asking` makes the model answer."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    opening: str
    asking: str
    trims: bool  # white space around a message, which Go's language cannot


def turn_shape(tokenizer: Any) -> TurnShape:
    """Find the pieces. Raises TemplateError for a template that is more than a row of turns."""

    def render(*messages: tuple[str, str], asks: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False))

    user, answer, after, told = ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT), ("system", _SYSTEM)
    try:
        asked, asked_again = render(user, asks=True), render(user, answer, after, asks=True)
        prefixes = [render(user), render(user, answer), render(user, answer, after)]
        trims = _split(render(("user", f" {_USER} "), asks=True), _USER) == _split(asked, _USER)
    except REFUSALS as error:
        raise TemplateError(f"the chat template refuses a plain conversation: {error}") from error
    try:
        asked_told = render(told, user, asks=True)
    except REFUSALS:
        asked_told = ""  # a template without system prompts
    before, asking = _split(asked, _USER)
    head, _, rest = asked_again.partition(_USER)
    between, back, end = *_split(rest.partition(_NEXT)[0], _ANSWER), rest.partition(_NEXT)[2]
    if (head, end) != (before, asking):
        raise TemplateError(_REFUSED.format("writes turns differently as a conversation goes on"))
    # What stands between two messages can be cut anywhere, as long as it is always cut there: where the turns
    # of renders without a question put to the model end, if those agree.
    turn = _turn(prefixes, back, asking)
    opening, system = before.removesuffix(turn[0]), None
    if asked_told.endswith(_USER + asking):
        marked = asked_told.removesuffix(_USER + asking)
        if marked.endswith(turn[0]) and _SYSTEM in marked:
            system = _split(marked.removesuffix(turn[0]), _SYSTEM)
    return TurnShape(
        user=turn,
        assistant=(between.removeprefix(turn[1]), back.removesuffix(turn[0])),
        system=system,
        opening=opening,
        asking=asking.removeprefix(turn[1]),
        trims=trims,
    )


def _turn(prefixes: list[str], back: str, asking: str) -> tuple[str, str]:
    """What is written before and after a user's message, as far as renders of one, two and three messages
    tell, each of which should go on from the one before; nothing, where they do not."""
    first, answered, again = prefixes
    if not (again.startswith(answered) and answered.startswith(first)):
        return "", ""
    before, after = _split(again[len(answered) :], _NEXT)
    is_sound = first.endswith(before + _USER + after) and back.endswith(before) and asking.startswith(after)
    return (before, after) if is_sound else ("", "")


_REFUSED = (
    "the chat template {}, so none in Ollama's language can be derived from it. Serve a GGUF file with "
    "llama-server, which has the template itself: tunesmith export gguf."
)


def _split(turn: str, marker: str) -> tuple[str, str]:
    before, found, after = turn.partition(marker)
    if not found or marker in after:
        raise TemplateError(_REFUSED.format("does not write each message once, in its place"))
    return before, after


def go_template(shape: TurnShape, bos: str) -> str:
    """The template for Ollama. `bos` is what the server puts before every prompt by itself, or ""."""
    opening = _text(shape.opening.removeprefix(bos))
    if shape.system is not None:
        before, after = shape.system
        told = _text(before.removeprefix(bos)) + "{{ .System }}" + _text(after)
        opening = "{{ if .System }}" + told + "{{ else }}" + opening + "{{ end }}"
    user, assistant = tuple(map(_text, shape.user)), tuple(map(_text, shape.assistant))
    return (
        opening
        + "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + f'{{{{ if eq $m.Role "user" }}}}{user[0]}{{{{ $m.Content }}}}{user[1]}'
        + f"{{{{ if $last }}}}{_text(shape.asking)}{{{{ end }}}}"
        + f'{{{{ else if eq $m.Role "assistant" }}}}{assistant[0]}{{{{ $m.Content }}}}'
        + f"{{{{ if not $last }}}}{assistant[1]}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _text(literal: str) -> str:
    """Text as it stands in a template; quoted where Go or the Modelfile would read it as something else."""
    if "{{" in literal or "}}" in literal or '"' in literal:
        return "{{ " + json.dumps(literal, ensure_ascii=False) + " }}"
    return literal


# --- Go's language, as far as it is written above


def render_go(template: str, messages: Sequence[dict[str, Any]]) -> str:
    """What Ollama renders: `.System` is the text of the system messages, `.Messages` all of them."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    scope = {".System": system, ".Messages": list(messages), "$.Messages": list(messages)}
    parts = iter(_ACTION.split(template))  # text, action, text, action, ..., text
    output, end = _block(parts, scope, is_shown=True)
    assert end == "", f"unexpected {{{{ {end} }}}}"
    return output


def _block(parts: Iterator[str], scope: dict[str, Any], *, is_shown: bool) -> tuple[str, str]:
    """(output, the action that ended it: "end", "else", "else if ..." or "" for the end of the template)."""
    output = []
    for text in parts:
        output.append(text)
        action = next(parts, "")
        if action in ("", "end") or action.startswith("else"):
            return ("".join(output) if is_shown else ""), action
        output.append(_act(action, parts, scope, is_shown))
    raise AssertionError("the template ended within an action")


def _act(action: str, parts: Iterator[str], scope: dict[str, Any], is_shown: bool) -> str:
    keyword, _, rest = action.partition(" ")
    if keyword == "if":
        return _if(rest, parts, scope, is_shown)
    if keyword == "range":
        return _range(rest, parts, scope, is_shown)
    if not is_shown:
        return ""
    if rest.startswith(":= "):
        scope[keyword] = _value(rest.removeprefix(":= "), scope)
        return ""
    return str(_value(action, scope))


def _if(condition: str, parts: Iterator[str], scope: dict[str, Any], is_shown: bool) -> str:
    holds = is_shown and bool(_value(condition, scope))
    output, end = _block(parts, scope, is_shown=holds)
    if end == "end":
        return output
    tail = end.removeprefix("else").removeprefix(" if ")
    is_open = is_shown and not holds
    otherwise = _if(tail, parts, scope, is_open) if tail else _block(parts, scope, is_shown=is_open)[0]
    return output + otherwise


def _range(head: str, parts: Iterator[str], scope: dict[str, Any], is_shown: bool) -> str:
    names, _, values = head.partition(" := ")
    index, item = names.split(", ")
    body: list[str] = []
    depth = 1
    while depth:  # up to the end of this range: (text, action) pairs
        body += [next(parts), action := next(parts)]
        depth += action.startswith(("if ", "range ")) - (action == "end")
    output = ""
    for i, value in enumerate(_value(values, scope)):
        output += _block(iter(body), scope | {index: i, item: value}, is_shown=is_shown)[0]
    return output


def _value(expression: str, scope: dict[str, Any]) -> Any:
    value, rest = _evaluate(_WORD.findall(expression), scope)
    assert not rest, expression
    return value


def _evaluate(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    """The value of a call or a single word, up to a closing bracket; and the words left."""
    head, *rest = words
    number = {"eq": 2, "slice": 2, "len": 1, "not": 1}.get(head)
    if number is None:
        return _operand(words, scope)
    operands = []
    for _ in range(number):
        operand, rest = _operand(rest, scope)
        operands.append(operand)
    if head == "eq":
        return operands[0] == operands[1], rest
    if head == "slice":
        return operands[0][operands[1] :], rest
    return (len(operands[0]) if head == "len" else not operands[0]), rest


def _operand(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    head, *rest = words
    if head == "(":
        value, rest = _evaluate(rest, scope)
        assert rest[:1] == [")"], words
        return value, rest[1:]
    if head.startswith('"') or head.isdigit():
        return json.loads(head), rest
    if head in scope:
        return scope[head], rest
    name, _, field = head.partition(".")
    return scope[name][field.lower()], rest

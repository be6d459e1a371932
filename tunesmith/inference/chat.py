"""`tunesmith chat`: talk to what a run made, or to any chat model, in the terminal or through a pipe.

    MODEL --find_model, load_tuned, begin--> Conversation;   a line --> prompt as trained --> streamed answer

With `--compare-base` the model that was tuned answers too, each with a history of its own. Messages are
rendered by the chat template and encoded as in training: what a user types is never a control token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import Tuned, base_of, load_tuned
from tunesmith.errors import ModelError
from tunesmith.inference.generate import check_drawing
from tunesmith.inference.speak import Drawing, drawn_by, speak
from tunesmith.training.answers import room

_HELP = (
    "/reset forgets what was said, /system TEXT sets the system prompt, /save FILE adds the conversation to\n"
    "a file of rows, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
)
_TWO_COLUMNS_FROM = 80  # characters that the terminal is wide


def chat(
    model: str,
    *,
    system: str | None,
    max_new_tokens: int,
    compares_base: bool = False,
    drawing: Drawing | None = None,
) -> None:
    """Talk to `model`: a run (`best/` if it has one, else `final/`), an adapter or model folder, or a hub id;
    with `compares_base` also to the model it was tuned from.

    On a terminal, with a prompt; else each line of stdin is a message, and stdout holds the answers alone.
    Notes go to stderr. Raises ConfigError for settings out of range, ModelError where there is no such model,
    or no base to compare with, TemplateError where it has no chat template or its template refuses the
    messages."""
    if max_new_tokens < 1:
        raise ModelError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    drawing = drawing or Drawing()
    check_drawing(drawing.temperature, drawing.top_p)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an old terminal lacks most of Unicode
    with ExitStack() as stack:
        tuned = load_tuned(find_model(model, _say), _say)
        base = _base(tuned, stack) if compares_base else None
        conversation = begin(tuned, system, max_new_tokens, drawing, base)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _say(_HELP)
            _converse(conversation, _typed_lines(), is_terminal=True)
        else:
            _converse(conversation, (line.rstrip("\r\n") for line in sys.stdin), is_terminal=False)


def _say(message: str) -> None:
    Console(stderr=True).print(Text(message, "dim"), soft_wrap=True)


def _base(tuned: Tuned, stack: ExitStack) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The model to compare with, and what must hold while it speaks: an adapter has to be off."""
    if tuned.found.adapter is not None:
        return tuned.model, tuned.model.disable_adapter
    base = stack.enter_context(base_of(tuned, _say))
    if base is None:
        raise ModelError(
            f"{tuned.found.home}: --compare-base has nothing to compare with: it is no adapter, and no run "
            "says what it was tuned from."
        )
    return base, nullcontext


def _typed_lines() -> Iterator[str]:
    """Lines that a person types, until Ctrl-D."""
    import readline  # noqa: F401  gives `input` line editing and a history

    while True:
        try:
            yield input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()  # the line is thrown away, as in a shell
            _say(_HELP)


def _converse(conversation: Conversation, lines: Iterator[str], *, is_terminal: bool) -> None:
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
            _say("forgotten")
        elif command == "/system":
            conversation.set_system(rest.strip() or None)
            _say("system prompt set" if rest.strip() else "no system prompt")
        elif command == "/save":
            _save(conversation, rest.strip())
        elif line.strip():
            try:
                conversation.answer(line)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                _say("stopped")


def _save(conversation: Conversation, name: str) -> None:
    """Add the tuned model's conversation to a file as a row that can be trained on."""
    messages = conversation.speakers[-1].messages
    if not name or not any(message["role"] == "assistant" for message in messages):
        _say("/save FILE adds the conversation to a file of JSON lines; there must be an answer in it")
        return
    file = Path(name).expanduser()
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        _say(f"{file}: cannot be written: {error.strerror}")
    else:
        _say(f"added to {file}: {len(messages)} messages")


@dataclass
class Speaker:
    """A model, what it is called beside another, and what was said to it and by it. `holds` makes it the
    model that it is while it speaks."""

    label: str
    model: Any
    holds: Callable[[], AbstractContextManager[Any]]
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Conversation:
    """One or two models that answer the same messages, the tuned one last. Answers are printed as they
    come."""

    tuned: Tuned
    speakers: list[Speaker]
    system: str | None
    max_new_tokens: int
    drawing: Drawing

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system prompt."""
        for speaker in self.speakers:
            speaker.messages = []
        self.set_system(self.system)

    def set_system(self, system: str | None) -> None:
        """Put this system prompt, or none, before what was said."""
        self.system = system
        for speaker in self.speakers:
            said = [message for message in speaker.messages if message["role"] != "system"]
            speaker.messages = said if system is None else [{"role": "system", "content": system}, *said]

    def answer(self, message: str) -> None:
        """Answer one message, and keep both. Ctrl-C keeps what was said until then and is passed on."""
        console = Console()
        if len(self.speakers) > 1 and console.is_terminal and console.width >= _TWO_COLUMNS_FROM:
            self._answer_in_columns(message, console)
            return
        for speaker in self.speakers:
            if ids := self._ask(speaker, message):
                print(f"{speaker.label}: " if len(self.speakers) > 1 else "", end="", flush=True)
                try:
                    self._speak(speaker, ids, _print_piece)
                finally:
                    print()

    def _answer_in_columns(self, message: str, console: Console) -> None:
        """Both answers side by side, as they grow."""
        texts = {speaker.label: "" for speaker in self.speakers}

        def columns() -> Table:
            table = Table(expand=True)
            for label in texts:
                table.add_column(label, ratio=1, overflow="fold")
            table.add_row(*(Text(text) for text in texts.values()))
            return table

        # What does not fit on the screen cannot be redrawn: the whole is printed when it is there.
        with Live(console=console, transient=True, get_renderable=columns, refresh_per_second=8):
            try:
                for speaker in self.speakers:

                    def hear(text: str, label: str = speaker.label) -> None:
                        texts[label] += _harmless(text)

                    if ids := self._ask(speaker, message):
                        self._speak(speaker, ids, hear)
            except KeyboardInterrupt:
                console.print(columns())
                raise
        console.print(columns())

    def _ask(self, speaker: Speaker, message: str) -> list[int]:
        """Add the message, and give the prompt; nothing where it has become too long."""
        speaker.messages.append({"role": "user", "content": message})
        ids = self.tuned.prompt_ids(speaker.messages)
        if room(speaker.model, len(ids)):
            return ids
        speaker.messages.pop()
        limit = self.tuned.model.config.max_position_embeddings
        _say(f"the conversation has become {len(ids)} tokens; the model reads {limit}. /reset begins anew.")
        return []

    def _speak(self, speaker: Speaker, ids: list[int], hear: Callable[[str], None]) -> None:
        said: list[str] = []

        def keep(text: str) -> None:
            said.append(text)
            hear(text)

        try:
            with speaker.holds():
                spoken = speak(
                    self.tuned,
                    speaker.model,
                    ids,
                    max_new_tokens=self.max_new_tokens,
                    drawing=self.drawing,
                    hear=keep,
                )
            if spoken.finish == "length" and spoken.num_tokens == self.max_new_tokens:
                _say(f"cut off at --max-new-tokens {self.max_new_tokens}")
        finally:
            if any(said):
                speaker.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                speaker.messages.pop()  # many templates want questions and answers in turn


def _print_piece(text: str) -> None:
    print(_harmless(text), end="", flush=True)


def _harmless(text: str) -> str:
    """Without the control characters by which a text could drive the terminal."""
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


def begin(
    tuned: Tuned,
    system: str | None,
    max_new_tokens: int,
    drawing: Drawing | None = None,
    base: tuple[Any, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> Conversation:
    """A conversation, and a word on how it will go. Where `system` is None, the run gives the system prompt
    that it tuned with."""
    run, drawing = tuned.found.run, drawing or Drawing()
    if system is None and run is not None and run.data.system is not None:
        system = run.data.system
        _say("with the system prompt of the run")
    stops = ", ".join(tuned.tokenizer.convert_ids_to_tokens(tuned.stop_ids)) or "nothing"
    manner = _manner(drawn_by(tuned.model.generation_config, drawing))
    origin = "as asked" if drawing != Drawing() else f"generation_config of {tuned.found.home}"
    _say(f"{manner} ({origin}); an answer ends at {stops}")
    speakers = [] if base is None else [Speaker("base", *base)]
    speakers.append(Speaker("tuned", tuned.model, nullcontext))
    return Conversation(tuned, speakers, system, max_new_tokens, drawing)


def _manner(drawn: dict[str, Any]) -> str:
    if not drawn["do_sample"]:
        return "greedy"
    values = [f"{name} {drawn[name]:g}" for name in drawn if name != "do_sample" and drawn[name] is not None]
    return ", ".join(["sampling", *values])

"""`tunesmith chat`: talk to what a run made, or to any chat model, in the terminal or through a pipe.

    MODEL --find_model, load_tuned, begin--> Talker;   a line --> prompt as trained --> streamed answer

Messages are rendered by the chat template and encoded as in training: what a user types is never a control
token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.tuned import Tuned, load_tuned
from tunesmith.errors import ModelError

_HELP = "/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(model: str, *, system: str | None, max_new_tokens: int) -> None:
    """Talk to `model`: a run (`best/` if it has one, else `final/`), an adapter or model folder, or a hub id.

    On a terminal, with a prompt; else each line of stdin is a message, and stdout holds the answers alone.
    Notes go to stderr. Raises ModelError where there is no such model, TemplateError where it has no chat
    template or its template refuses the messages."""
    if max_new_tokens < 1:
        raise ModelError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an old terminal lacks most of Unicode
    talker = begin(load_tuned(find_model(model, _say), _say), system, max_new_tokens)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _say(_HELP)
        _converse(talker, _typed_lines(), is_terminal=True)
    else:
        _converse(talker, (line.rstrip("\r\n") for line in sys.stdin), is_terminal=False)


def _say(message: str) -> None:
    Console(stderr=True).print(Text(message, "dim"), soft_wrap=True)


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


def _converse(talker: Talker, lines: Iterator[str], *, is_terminal: bool) -> None:
    for line in lines:
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            talker.reset()
            _say("forgotten")
        elif line.strip():
            try:
                talker.answer(line)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                _say("stopped")


@dataclass
class Talker:
    """A model, and what was said to it so far. Answers are printed as they come."""

    tuned: Tuned
    system: str | None
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, message: str) -> None:
        """Answer one message, and keep both. Ctrl-C keeps what was said until then and is passed on."""
        from transformers import TextStreamer

        self.messages.append({"role": "user", "content": message})
        ids, model = self.tuned.prompt_ids(self.messages), self.tuned.model
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) >= limit:
            self.messages.pop()
            _say(
                f"the conversation has become {len(ids)} tokens; the model reads {limit}. /reset begins anew."
            )
            return
        said: list[str] = []

        def hear(text: str, stream_end: bool = False) -> None:
            said.append(text)
            print(_harmless(text), end="\n" if stream_end else "", flush=True)

        streamer = TextStreamer(self.tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = hear
        input_ids = torch.tensor([ids], device=model.device)
        try:
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=self.max_new_tokens,
                streamer=streamer,
            )
            is_ended = int(output[0, -1]) in self.tuned.stop_ids
            if output.shape[1] - len(ids) == self.max_new_tokens and not is_ended:
                _say(f"cut off at --max-new-tokens {self.max_new_tokens}")
        except KeyboardInterrupt:
            streamer.end()  # the word that was being spelled
            raise
        finally:
            if any(said):
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()  # many templates want questions and answers in turn


def _harmless(text: str) -> str:
    """Without the control characters by which a text could drive the terminal."""
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


def begin(tuned: Tuned, system: str | None, max_new_tokens: int) -> Talker:
    """A conversation, and a word on how it will go. Where `system` is None, the run gives the system prompt
    that it tuned with."""
    run = tuned.found.run
    if system is None and run is not None and run.data.system is not None:
        system = run.data.system
        _say("with the system prompt of the run")
    stops = ", ".join(tuned.tokenizer.convert_ids_to_tokens(tuned.stop_ids)) or "nothing"
    manner = _manner(tuned.model.generation_config)
    _say(f"{manner} (generation_config of {tuned.found.home}); an answer ends at {stops}")
    return Talker(tuned, system, max_new_tokens)


def _manner(settings: Any) -> str:
    if not settings.do_sample:
        return "greedy"
    values = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return "sampling, " + ", ".join(
        f"{name} {value:g}" for name, value in values.items() if value is not None
    )

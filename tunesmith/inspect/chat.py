"""`tunesmith chat`: talk to what a run made, or to any chat model, in the terminal or through a pipe.

    MODEL --find_model--> folder, base --load--> Talker;   a line --> prompt as trained --> streamed answer

Messages are rendered by the chat template and encoded as in training: what a user types is never a control
token.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from tunesmith.config import Config, ModelConfig, load_config
from tunesmith.data.encoding import Encoder
from tunesmith.data.records import BadRow
from tunesmith.data.templates import REFUSALS
from tunesmith.errors import ConfigError, ModelError, TemplateError
from tunesmith.models.devices import compute_dtype, default_device
from tunesmith.models.load import scale_rope

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
    talker = load_talker(find_model(model), system, max_new_tokens, run_config(model))
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


# --- which model


@dataclass(frozen=True)
class Found:
    """What a name led to: the `base` model's folder or hub id, and the folder of an adapter on it, if any."""

    base: str
    adapter: Path | None = None

    @property
    def home(self) -> str:
        """Where its tokenizer and generation settings are, if it has its own."""
        return str(self.adapter) if self.adapter else self.base


def find_model(name: str) -> Found:
    """Where the model lies. What is no folder, nor looks like one, is a hub id.

    Raises ModelError, with what is there, if the folder holds no model."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{name} is a file; expected the folder of a run, an adapter or a model.")
    if not path.is_dir():
        is_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if is_local or ("/" in name and path.parent.is_dir()):
            raise ModelError(f"{name}: there is no such folder.{_near(path)}")
        return Found(name)
    for part in ("best", "final"):
        if (path / part).is_dir():
            return _model_in(path / part)
    return _model_in(path)


def run_config(name: str) -> Config | None:
    """The config of the run that a run folder, its best/ or its final/ belongs to; None for any other model.

    A config that no longer loads (its template file is gone, say) is passed over with a word."""
    path = Path(name).expanduser()
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and any((folder / part).is_dir() for part in ("best", "final")):
            try:
                return load_config(folder / "config.yaml")
            except ConfigError as error:
                _say(f"without the run's own settings: {_first_line(error)}")
    return None


def _near(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    return f" Near names in {path.parent}: {', '.join(near)}." if near else ""


def _model_in(folder: Path) -> Found:
    if (folder / "adapter_config.json").is_file():
        from peft import PeftConfig

        try:
            base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder}/adapter_config.json cannot be read: {_first_line(error)}") from error
        if not base:
            raise ModelError(f"{folder}/adapter_config.json names no base model (base_model_name_or_path).")
        return Found(str(base), folder)
    if (folder / "config.json").is_file():
        return Found(str(folder))
    content = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    listing = ", ".join(content[:12]) + (f" and {len(content) - 12} more" if len(content) > 12 else "")
    hint = ""
    if (folder / "config.yaml").is_file():
        hint = " It is a run that has saved nothing yet: best/ and final/ are missing."
    raise ModelError(
        f"{folder} holds no model: expected adapter_config.json or config.json, or a run's best/ or final/; "
        f"found {listing or 'nothing'}.{hint}"
    )


# --- talking


@dataclass
class Talker:
    """A model, its tokenizer, and what was said so far. Answers are printed as they come."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    system: str | None
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def prompt_ids(self) -> list[int]:
        """The messages as the model was trained to see them, up to where its answer begins."""
        try:
            stand_ins = self.encoder.stand_ins(self.messages)
            text = self.tokenizer.apply_chat_template(
                self.encoder.shield(self.messages, stand_ins), add_generation_prompt=True, tokenize=False
            )
        except (*REFUSALS, BadRow) as error:
            raise TemplateError(f"the model's chat template refuses this conversation: {error}") from error
        ((ids, _),) = self.encoder.encode([self.encoder.name_control_tokens(text, stand_ins)])
        return [int(id_) for id_ in ids]

    def answer(self, message: str) -> None:
        """Answer one message, and keep both. Ctrl-C keeps what was said until then and is passed on."""
        from transformers import TextStreamer

        self.messages.append({"role": "user", "content": message})
        ids = self.prompt_ids()
        limit = getattr(self.model.config, "max_position_embeddings", None)
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

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = hear
        input_ids = torch.tensor([ids], device=self.model.device)
        try:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=self.max_new_tokens,
                streamer=streamer,
            )
            if output.shape[1] - len(ids) == self.max_new_tokens and int(output[0, -1]) not in stop_ids(
                self.model
            ):
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


def stop_ids(model: Any) -> list[int]:
    """The ids that end an answer."""
    stops = model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


def load_talker(found: Found, system: str | None, max_new_tokens: int, run: Config | None = None) -> Talker:
    """Load what was found, and say how it will answer. The config of its `run` gives the system prompt it was
    tuned with, where `system` is None, and how its base is to be loaded."""
    tokenizer = _load_tokenizer(found)
    dtype, why = compute_dtype(ModelConfig(path=found.base))
    model = _load_model(found, tokenizer, dtype, run)
    if system is None and run is not None and run.data.system is not None:
        system = run.data.system
        _say("with the system prompt of the run")
    settings = model.generation_config
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    talker = Talker(model, tokenizer, Encoder(tokenizer), system, max_new_tokens)
    adapter = f"adapter {found.adapter} on " if found.adapter else ""
    _say(f"{adapter}{found.base}, {str(dtype).removeprefix('torch.')}: {why}")
    stops = ", ".join(tokenizer.convert_ids_to_tokens(stop_ids(model))) or "nothing"
    _say(f"{_manner(settings)} (generation_config of {found.home}); an answer ends at {stops}")
    return talker


def _manner(settings: Any) -> str:
    if not settings.do_sample:
        return "greedy"
    values = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return "sampling, " + ", ".join(
        f"{name} {value:g}" for name, value in values.items() if value is not None
    )


def _load_tokenizer(found: Found) -> Any:
    from transformers import AutoTokenizer

    own = found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file()
    source = str(found.adapter) if own else found.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer can be loaded from it: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise TemplateError(f"{source}: its tokenizer has no chat template; it is no chat model.")
    return tokenizer


def _load_model(found: Found, tokenizer: Any, dtype: torch.dtype, run: Config | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source: dict[str, Any] = {}
    if run is not None and found.adapter is not None:
        source = {"trust_remote_code": run.model.trust_remote_code, "revision": run.model.revision}
    try:
        settings = AutoConfig.from_pretrained(found.base, **source)
        if run is not None:
            scale_rope(settings, run, _say)
        model = AutoModelForCausalLM.from_pretrained(
            found.base, config=settings, dtype=dtype, use_safetensors=True, **source
        )
        if found.adapter is not None:
            from peft import PeftModel

            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(
                    len(tokenizer)
                )  # tokens the run added; the adapter has their rows
            model = PeftModel.from_pretrained(model, str(found.adapter))
            if (found.adapter / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(found.adapter))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f"{found.adapter} on its base model {found.base}" if found.adapter else found.base
        raise ModelError(f"{what}: cannot be loaded: {_first_line(error)}") from error
    return model.to(default_device()).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

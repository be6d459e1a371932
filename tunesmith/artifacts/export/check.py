"""A GGUF file, read back by llama.cpp and compared with the model it was made of in transformers, in float32.

metadata    architecture, vocabulary, special tokens, template: equal
ids         of texts, and of conversations as llama-server renders them: equal
stops       each token that ends an answer ends it there too
numbers     log-probabilities along llama.cpp's own greedy answers: within the type's limit
choices     each greedy token is transformers' choice too, or as likely within that limit
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.artifacts.export.convert import GgufType, read_gguf
from tunesmith.artifacts.export.server import Server, serving
from tunesmith.artifacts.export.texts import Messages, conversations, texts
from tunesmith.artifacts.export.tools import Tools
from tunesmith.artifacts.tuned import prompt_ids
from tunesmith.data.prepare import Preparer, text_frame
from tunesmith.errors import ExportError, TemplateError
from tunesmith.models.devices import default_device

_ANSWER, _PROMPTS = 24, 8  # tokens, prompts
_STRIDE, _LIKELIEST, _UNLIKELY = (
    3,
    64,
    math.log(1e-4),
)  # what is compared: each third position, so many tokens
_CONTEXT = 2048
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15, "bf16": 32}  # general.file_type

# By type: the largest mean difference of log-probabilities, in nats, over the tokens to which transformers
# gives a probability above 1e-4; by how many nats a greedy choice may be below transformers' own; the share
# of greedy answers that must be equal. Measured on SmolLM2-135M (docs/export.md): 0.003, 0.02, 0.11 and 0.41;
# 0, 0, 0.16 and 1.7; all, all, 5 and 3 of 8. The limits leave room for models that rounding disturbs more; a
# wrong weight costs several nats.
LIMITS: dict[str, tuple[float, float, float]] = {
    "f16": (0.02, 0.1, 0.75),
    "bf16": (0.1, 0.5, 0.5),
    "q8_0": (0.4, 1.0, 0.0),
    "q4_k_m": (1.5, 5.0, 0.0),
}


@dataclass(frozen=True)
class Reference:
    """The model as transformers has it, and the tokenizer that trained it."""

    model: Any
    tokenizer: Any
    preparer: Preparer
    stop_ids: list[int]
    system: str | None
    own_texts: list[str]
    own_chats: list[Messages]

    @property
    def positions(self) -> int:
        """How long a prompt and its answer may be in a check."""
        return min(_CONTEXT, int(getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT))

    def chats(self) -> list[tuple[Messages, list[int]]]:
        """Conversations that the template takes, as (messages, ids as trained). What servers cannot tell from
        control tokens, a user's own `<|im_end|>`, is left out."""
        if not self.tokenizer.chat_template:
            return []
        found = []
        for messages in [*conversations(self.system), *self.own_chats]:
            if self.preparer.encoder.stand_ins(messages):
                continue
            try:
                ids = prompt_ids(self.preparer, messages)
            except TemplateError:
                continue
            if len(ids) + _ANSWER < self.positions:
                found.append((messages, ids))
        if not found:
            raise ExportError(
                "the chat template takes none of the conversations that an export is tried with"
            )
        return found

    def prompts(self) -> list[list[int]]:
        """Token ids to continue: conversations, or for a model without a template texts."""
        chats = [ids for _, ids in self.chats()]
        if not chats:
            before, _ = text_frame(self.tokenizer)
            raw = [text for text in [*self.own_texts, *texts()] if len(text) > 20]
            chats = [before + ids[: self.positions // 2] for ids in self.encode(raw[:_PROMPTS])]
        return chats[:: max(1, len(chats) // _PROMPTS)][:_PROMPTS]

    @property
    def plain_id(self) -> int:
        """A token that is a whole character."""
        return self.encode(["a"])[0][0]

    def encode(self, raw: Sequence[str]) -> list[list[int]]:
        return [
            ids.tolist()
            for ids in self.preparer.encoder.encode_ids([self.preparer.encoder.plain(text) for text in raw])
        ]

    @torch.inference_mode()
    def logps(self, prompt: Sequence[int], answer: Sequence[int]) -> Any:
        """[1 + answer, V] float32 on the CPU: log-probabilities of each next token after the prompt."""
        ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
        logits = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), -1).cpu()


@dataclass(frozen=True)
class Agreement:
    """What was compared, and how near it came. `error`: mean difference of log-probabilities in nats."""

    num_texts: int
    num_composed: int
    num_chats: int
    num_prompts: int
    num_same: int
    error: float

    def __str__(self) -> str:
        composed = f" ({self.num_composed} only with composed accents, NFC)" if self.num_composed else ""
        return (
            f"read back by llama.cpp: token ids of {self.num_texts} texts{composed} and {self.num_chats} "
            f"conversations equal; log-probabilities within {self.error:.2g} nats; {self.num_same} of "
            f"{self.num_prompts} greedy answers equal"
        )


def check_metadata(file: Path, reference: Reference, type_: GgufType, tools: Tools) -> None:
    """What the file says of itself is what the model is. Raises ExportError with what differs."""
    fields, tokenizer, config = read_gguf(file, tools)["fields"], reference.tokenizer, reference.model.config
    architecture = fields["general.architecture"]
    expected: dict[str, Any] = {
        "general.file_type": _FILE_TYPES[type_],
        f"{architecture}.context_length": getattr(config, "max_position_embeddings", None),
        f"{architecture}.block_count": config.num_hidden_layers,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    for name, value in expected.items():
        if value is not None and fields.get(name) != value:
            raise ExportError(f"the file's {name} is {_short(fields.get(name))}; expected {_short(value)}")
    tokens = fields["tokenizer.ggml.tokens"]
    ours = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if len(tokens) != reference.model.get_input_embeddings().weight.shape[0]:
        raise ExportError(f"the file has {len(tokens)} tokens; the model has another number of embeddings")
    for id_, (theirs, own) in enumerate(zip(tokens, ours, strict=False)):
        if own is not None and theirs != own:
            raise ExportError(f"token {id_} is {theirs!a} in the file; the tokenizer has {own!a}")


def check_served(
    file: Path, reference: Reference, type_: GgufType, tools: Tools, *, lora: Path | None = None
) -> Agreement:
    """Load the file with llama.cpp and compare. Raises ExportError with the first thing that differs."""
    with serving(file, tools, max_tokens=reference.positions, lora=lora) as server:
        num_texts, num_composed = _check_texts(server, reference)
        num_chats = _check_chats(server, reference)
        _check_stops(server, reference)
        compared = [_compare(server, reference, prompt) for prompt in reference.prompts()]
    errors, gaps, same = zip(*compared, strict=True)
    agreement = Agreement(num_texts, num_composed, num_chats, len(same), sum(same), float(np.mean(errors)))
    limit, gap, share = LIMITS[type_]
    if not agreement.error <= limit:
        raise ExportError(
            f"log-probabilities differ by {agreement.error:.3g} nats on average; {type_} stays within {limit}"
        )
    # Rounding decides between tokens that are as likely; it decides nothing else.
    if max(gaps) > gap or agreement.num_same < share * len(same):
        raise ExportError(
            f"{agreement.num_same} of {len(same)} greedy answers equal, and llama.cpp chose a token that "
            f"transformers has {max(gaps):.3g} nats below its own choice; {type_} allows {gap}, "
            f"and at least {share:.0%} equal"
        )
    return agreement


def _check_texts(server: Server, reference: Reference) -> tuple[int, int]:
    """Raw texts, among them some that read like a control token: (their number, how many llama.cpp reads as
    the tokenizer does only when their accents are composed: it does not normalise, as Qwen's tokenizer
    does)."""
    num_composed = 0
    control = [f"a{name}b" for name in reference.preparer.encoder.control_ids][:40]
    raw = [text for text in [*texts(), *control, *reference.own_texts] if "\0" not in text]
    for text, ours in zip(raw, reference.encode(raw), strict=True):
        theirs = server.tokenize(text, has_control=False)
        if theirs != ours:
            composed = unicodedata.normalize("NFC", text)
            if composed != text and server.tokenize(composed, has_control=False) == ours:
                num_composed += 1
                continue
            raise ExportError(
                f"the text {text[:80]!a} has other token ids in llama.cpp: {_first(theirs, ours)}"
            )
    if not reference.tokenizer.chat_template:
        before, _ = text_frame(reference.tokenizer)
        theirs, ours = server.tokenize("a text", has_control=True), before + reference.encode(["a text"])[0]
        if theirs != ours:
            raise ExportError(f"a prompt begins otherwise in llama.cpp: {_first(theirs, ours)}")
    return len(raw), num_composed


def _check_chats(server: Server, reference: Reference) -> int:
    chats = reference.chats()
    for messages, ours in chats:
        theirs = server.tokenize(server.render(messages), has_control=True)
        if theirs != ours:
            raise ExportError(
                f"a conversation that ends with {messages[-1]['content'][:60]!a} has another prompt in "
                f"llama-server than in training: {_first(theirs, ours)}"
            )
    return len(chats)


def _check_stops(server: Server, reference: Reference) -> None:
    prompt = reference.prompts()[0]
    for stop in reference.stop_ids:
        answer = server.complete(prompt, 3, logit_bias=[[stop, 1000.0]])
        if answer["stop_type"] != "eos":
            name = reference.tokenizer.convert_ids_to_tokens(stop)
            raise ExportError(
                f"llama.cpp would not stop at {name} (id {stop}), which ends the model's answers. It stops "
                "at the tokenizer's eos_token and at names it knows: make it the eos_token of the tokenizer."
            )


def _compare(server: Server, reference: Reference, prompt: list[int]) -> tuple[float, float, bool]:
    """(mean difference of log-probabilities, by how much a choice was below the best, whether all choices
    were the best), along llama.cpp's greedy answer to a prompt."""
    given = server.complete(prompt, _ANSWER)
    answer = given["tokens"]
    logps = reference.logps(prompt, answer)
    best = logps.argmax(-1).tolist()
    errors = []
    for i in range(0, len(answer), _STRIDE):
        theirs = server.likeliest([*prompt, *answer[:i]], _LIKELIEST, reference.plain_id)
        errors += [abs(logp - float(logps[i, id_])) for id_, logp in theirs if logps[i, id_] > _UNLIKELY]
    gaps = [float(logps[i, best[i]] - logps[i, id_]) for i, id_ in enumerate(answer)]
    is_same = answer == best[: len(answer)]
    if given["stop_type"] == "eos" and not {*answer[-1:], best[len(answer)]} & set(reference.stop_ids):
        is_same = False  # it stopped where transformers goes on
    return float(np.mean(errors)), max(gaps, default=0.0), is_same


def _first(theirs: list[int], ours: list[int]) -> str:
    """Where two lists of ids part."""
    at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(theirs), len(ours)) if at is None else at
    return f"from token {at} on {theirs[at : at + 6]}, trained {ours[at : at + 6]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def reference_model(folder: Path, adapter: Path | None = None) -> Any:
    """The model of a plain folder, with an adapter on it if one is given, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.to(default_device()).eval()

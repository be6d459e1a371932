"""How near one model's predictions are to another's on the same rows, with one of them in memory at a
time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.artifacts.found import Found, Say, first_line
from tunesmith.config import load_config
from tunesmith.data.loading import open_source
from tunesmith.data.prepare import Preparer
from tunesmith.errors import UserError

_ROWS, _ROW_TOKENS = 16, 256
_LOGIT_BYTES = 2**27  # of logits that wait for the other model: 220 positions of Qwen2.5, 680 of SmolLM2
_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain in two sentences how a bicycle stays upright.",
    "List three uses of a paper clip.",
)


@dataclass(frozen=True)
class Agreement:
    """Of two models, over `num_positions` predictions of `rows`; of reward models (`unit` pair), over as many
    pairs of rows, which of the two is better being what is predicted.

    max_logit_difference: of any logit. kl: mean Kullback-Leibler divergence from the first to the second, in
    nats a token. top1: share of positions with the same most likely token. effect_kl: the same mean from the
    first to it without its adapter, which tells what a kl is small against; None if it has none."""

    max_logit_difference: float
    kl: float
    top1: float
    num_positions: int
    effect_kl: float | None
    rows: str
    unit: Literal["token", "pair"] = "token"

    def line(self) -> str:
        if self.unit == "pair":
            return (
                f"KL {self.kl:.2g} nats a pair, largest difference of a margin "
                f"{self.max_logit_difference:.2g}, same preference in {100 * self.top1:.2f} % of "
                f"{self.num_positions} pairs of rows of {self.rows}"
            )
        effect = "" if self.effect_kl is None else f" (of the adapter's own effect: {self.effect_kl:.2g})"
        return (
            f"KL {self.kl:.2g} nats a token{effect}, largest difference of a logit "
            f"{self.max_logit_difference:.2g}, same first choice at {100 * self.top1:.2f} % of "
            f"{self.num_positions} positions of {self.rows}"
        )


def compare(
    load_first: Callable[[], Any],
    load_second: Callable[[], Any],
    rows: Sequence[list[int]],
    name: str,
    *,
    with_effect: bool,
) -> Agreement:
    """Both models' logits at evenly spread positions of the rows, called `name`. The first is freed before
    the second is loaded; `with_effect` it is also asked without its adapter."""
    model = load_first()
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    each = max(1, _LOGIT_BYTES // (4 * vocabulary * len(rows)))
    first = [_logits(model, row, each) for row in rows]
    effect = None
    if with_effect:
        with model.disable_adapter():
            effect = _mean(
                [_kl(known, _logits(model, row, each)) for known, row in zip(first, rows, strict=True)]
            )
    del model
    gc.collect()
    model = load_second()
    second = [_logits(model, row, each) for row in rows]
    pairs = list(zip(first, second, strict=True))
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return Agreement(
        max_logit_difference=max(float((a - b).abs().max()) for a, b in pairs),
        kl=_mean([_kl(a, b) for a, b in pairs]),
        top1=float(same.float().mean()),
        num_positions=len(same),
        effect_kl=effect,
        rows=name,
    )


def compare_scores(
    load_first: Callable[[], Any], load_second: Callable[[], Any], rows: Sequence[list[int]], name: str
) -> Agreement:
    """Both reward models' scores of the rows, called `name`, pair by pair: the first's is the probability
    sigmoid(a - b) that row a is better than row b. The first is freed before the second is loaded."""
    first = _scores(load_first(), rows)
    gc.collect()
    second = _scores(load_second(), rows)
    pairs = torch.combinations(torch.arange(len(rows)))
    a, b = first[pairs], second[pairs]
    return Agreement(
        max_logit_difference=float(((a[:, 0] - a[:, 1]) - (b[:, 0] - b[:, 1])).abs().max()),
        kl=float(_kl(a, b).mean()),
        top1=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        num_positions=len(pairs),
        effect_kl=None,
        rows=name,
        unit="pair",
    )


@torch.no_grad()
def _scores(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """[rows] float32."""
    found = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False) for row in rows]
    return torch.cat([output.logits[:, 0].float().cpu() for output in found])


@torch.no_grad()
def _logits(model: Any, row: list[int], number: int) -> Tensor:
    """[P, V] float32 of at most `number` positions of a row."""
    ids = torch.tensor([row], device=model.device)
    positions = torch.linspace(0, len(row) - 1, min(number, len(row)), device=model.device).long()
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
    return logits.float().cpu()


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """[P] of KL(p || q)."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.cat(list(values)).mean())


def real_rows(found: Found, tokenizer: Any, data: str | None, say: Say) -> tuple[list[list[int]], str]:
    """Token ids of the first rows of `data`, or else of what the run evaluated on, or trained on; or else of
    a few prompts. And what to call them."""
    config = found.run
    if data is not None:
        recipe = found.run.run.recipe if found.run is not None else None
        config = load_config({"model": {"path": found.base}, "data": {"train": data}}, recipe=recipe)
    if config is not None:
        valid = config.data.valid
        source = (valid if isinstance(valid, list) else config.data.train)[0]
        try:
            rows, options, _ = open_source(source, config, lambda _: None)
            prepared = Preparer(tokenizer, options).prepare(list(islice(rows(), _ROWS)))
        except UserError as error:
            if data is not None:
                raise
            say(f"the run's rows cannot be read any more: {first_line(error)}")
        else:
            ids = [example.input_ids[:_ROW_TOKENS].tolist() for row in prepared for example in row.examples]
            if ids:
                return ids[:_ROWS], source.path
    return [_prompt_ids(tokenizer, text) for text in _PROMPTS], "prompts of our own"


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)

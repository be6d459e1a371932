"""A model that gives answers scores: a stock sequence classifier with one label, asked about several
positions of a pass where transformers looks at the last token alone.

    backbone(pack) -> hidden [1, T, H] -> `score` at A positions -> [A]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.models.fuse import inward

# The ending of the names that transformers gives such classes.
_CLASS = "ForSequenceClassification"


@dataclass
class ScoreHead:
    """The head of a model while it is asked about positions of a pass."""

    positions: Tensor | None = None

    def __call__(self, model: Any, positions: Tensor, **inputs: Any) -> Tensor:
        """[A] float32 scores at the positions, by a call of the model, however it is wrapped."""
        self.positions = positions
        try:
            scores: Tensor = model(**inputs).logits[0].float()
            return scores
        finally:
            self.positions = None


def score_head(model: Any) -> ScoreHead:
    """The head of a model that `ask_positions` has changed, however often it is wrapped."""
    found: ScoreHead = vars(list(inward(model))[-1])["_tunesmith_score_head"]
    return found


def ask_positions(model: Any) -> None:
    """Let the model's head be asked about positions. Raises ModelError where it has no `score`."""
    base = list(inward(model))[-1]
    module = getattr(base, "score", None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{type(base).__name__} has no head called `score`, as most sequence classifiers made of a "
            "causal LM have; it cannot become a reward model here. Take a model of another architecture."
        )
    head = ScoreHead()
    module.forward = partial(_forward, module.forward, head)
    base._tunesmith_score_head = head


def _forward(stock: Callable[[Tensor], Tensor], head: ScoreHead, hidden: Tensor) -> Tensor:
    """[1, T, A] the scores of all positions at each token: whichever of them the model takes for the last
    one, it passes the scores on."""
    if head.positions is None:
        return stock(hidden)
    scores = stock(hidden[:, head.positions]).transpose(1, 2)
    return scores.expand(-1, hidden.shape[1], -1).clone()  # FSDP2 wants no view


def gives_scores(model: Any) -> bool:
    """Whether it is a sequence classifier, however often it is wrapped."""
    return _CLASS in type(list(inward(model))[-1]).__name__


def auto_class(gives_scores: bool) -> Any:
    """The auto class of transformers that loads it: a sequence classifier, or else a causal LM."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if gives_scores else AutoModelForCausalLM


def is_classifier(architectures: Collection[str] | None) -> bool:
    """Whether what a config.json calls so is a sequence classifier."""
    return any(name.endswith(_CLASS) for name in architectures or ())


def as_scorer(model_config: Any, path: str) -> None:
    """Have the config ask for one label. Raises ModelError for a classifier that has others."""
    if is_classifier(model_config.architectures) and model_config.num_labels != 1:
        raise ModelError(
            f"model.path={path}: it tells {model_config.num_labels} labels apart, and a reward model gives "
            "one score. Take the causal LM that it was made of."
        )
    model_config.num_labels = 1


def name_padding(model: Any, tokenizer: Any, ends: Collection[int]) -> str:
    """Have model and tokenizer pad with a token that no answer ends in, and return it: transformers takes the
    last token that is no padding for the end of a row. `ends`: the ids that answers end in.

    Raises ModelError if every control token of the tokenizer may be the end of one."""
    special = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in tokenizer.all_special_ids}
    own, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    # The tokenizer's own where that will do; else one meant for it, and one that begins rows comes last.
    order = sorted(special, key=lambda i: (i != own, i == bos, "pad" not in special[i].lower(), i))
    fit = [i for i in order if i not in ends and i < rows and (i == own or i != tokenizer.eos_token_id)]
    if not fit:
        raise ModelError(
            "answers end in every control token that the tokenizer has "
            f"({', '.join(sorted(special.values()))}), and a reward model needs one for padding, since stock "
            "transformers takes the last token that is none for the end of a row. Add one to the tokenizer, "
            "or name another with model.tokenizer."
        )
    tokenizer.pad_token = special[fit[0]]
    base = list(inward(model))[-1]
    for part in (base.config, base.config.get_text_config()):
        part.pad_token_id = fit[0]
    return special[fit[0]]

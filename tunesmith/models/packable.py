"""What may lie in one forward pass of a model, asked of the model itself.

Stock attention keeps documents apart by restarting positions; recurrent layers, convolutions and some remote
code do not. Only attention that takes a pack's `layout` knows of branches. A table of architectures would
be wrong for the next one, so the model is asked: lay rows into one pass, and see whether they have the logits
that they have alone, and whether exchanging one moves another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.models.fuse import inward
from tunesmith.models.layout import PackLayout, Segment
from tunesmith.models.score import gives_scores

Packing = Literal["tree", "flat", "none"]

_LENGTH = 12  # tokens of a segment
_WINDOW = 16  # longer than a segment, shorter than two: all windows are as short as this while we ask
_WINDOW_NAMES = ("sliding_window", "attention_chunk_size")

# Segments 0 to 5 of the tree that is tried:  0 - 1 - 2     and 5
#                                              \   `- 3
#                                               `- 4
_LAYOUT = PackLayout(
    tuple(
        Segment(_LENGTH * i, _LENGTH * (i + 1), _LENGTH * subtree_end, _LENGTH * depth)
        for i, (subtree_end, depth) in enumerate([(5, 0), (4, 1), (3, 2), (4, 2), (5, 1), (6, 0)])
    )
)
_ROWS = ((0, 1, 2), (0, 1, 3), (0, 4))
# Exchanging a segment must leave alone what does not come after it on a path.
_STRANGERS = {0: (5,), 2: (3, 4, 5), 4: (2, 3, 5)}


def possible_packing(model: Any) -> Packing:
    """`tree`: rows may lie in one pass and share their prefixes. `flat`: they may lie in one pass. `none`."""
    with _asking(model):
        if _rows_of_a_tree_are_as_alone(model):
            return "tree"
        return "flat" if _documents_stay_apart(model) else "none"


def attends_like(model: Any, stock: str) -> bool:
    """Whether the attention that the model has now gives a row the logits that transformers' `stock` gives
    it: not where a model asks for what ours does not know, such as attention in chunks, sinks, or a bias."""
    ours = model.config._attn_implementation
    with _asking(model):
        row = _tokens(model, 3)
        given = _run(model, row)[-1]
        model.set_attn_implementation(stock)
        try:
            expected, without = _run(model, row)[-1], _without_prefix(model, row)
        finally:
            model.set_attn_implementation(ours)
        return _is_same(model, given, expected, without)


def _rows_of_a_tree_are_as_alone(model: Any) -> bool:
    segments = _tokens(model, 6)
    (new,) = _tokens(model, 1, seed=1)
    try:
        together = _run(model, segments, layout=_LAYOUT)
    except TypeError:
        return False  # the model takes no such keyword
    for exchanged, strangers in _STRANGERS.items():
        changed = [new if i == exchanged else segment for i, segment in enumerate(segments)]
        after = _run(model, changed, layout=_LAYOUT)
        if not all(_is_unmoved(together[i], after[i]) for i in strangers):
            return False
    for row in _ROWS:
        tokens = [segments[i] for i in row]
        alone, without = _run(model, tokens)[-1], _without_prefix(model, tokens)
        if not _is_same(model, together[row[-1]], alone, without):
            return False
    return _is_near(together[5], _run(model, segments[5:])[0])


def _documents_stay_apart(model: Any) -> bool:
    """Whether a document's logits depend neither on what lies before it in the pack nor on where it lies."""
    first, other, second = _tokens(model, 3)
    flat = PackLayout.of_lengths([_LENGTH, _LENGTH])
    after_first, after_other = (
        _run(model, [before, second], position_ids=flat.position_ids)[1] for before in (first, other)
    )
    return _is_unmoved(after_first, after_other) and _is_near(after_first, _run(model, [second])[0])


def _is_unmoved(before: Tensor, after: Tensor) -> bool:
    """Shapes are the same and masked terms exactly zero: any difference is a leak."""
    return bool((before - after).abs().max() <= 1e-3 * before.std())


def _is_near(together: Tensor, alone: Tensor) -> bool:
    """Alone the shapes differ, and bfloat16 rounds otherwise (measured on SmolLM2-135M: 0.03 of the logits'
    spread, root mean square); a document with the wrong positions is off by the logits' own size."""
    return _distance(together, alone) <= 0.2 * float(alone.std())


def _is_same(model: Any, given: Tensor, expected: Tensor, without: Tensor) -> bool:
    """A row that misses a part of its prefix is off by about what the prefix does to it, which may be little
    beside the logits' size; bfloat16 has to be let off more than float32."""
    is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return _distance(given, expected) <= (0.02 if is_float32 else 0.25) * _distance(without, expected)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _without_prefix(model: Any, row: Sequence[Tensor]) -> Tensor:
    """Logits of the last segment of a row, at its positions, if there were none before it."""
    first = _LENGTH * (len(row) - 1)
    return _run(model, row[-1:], position_ids=torch.arange(first, first + _LENGTH))[0]


def _run(
    model: Any, segments: Sequence[Tensor], *, position_ids: Tensor | None = None, **layout: PackLayout
) -> Tensor:
    """[segments, _LENGTH, V] float32 logits (or hidden states) of segments in one pass: those of `layout`, or
    one document."""
    if "layout" in layout:
        position_ids = layout["layout"].position_ids
    if position_ids is None:
        position_ids = torch.arange(_LENGTH * len(segments))
    device = model.get_input_embeddings().weight.device
    # What gives one score for a row is asked for the hidden states that it is made of.
    is_scorer = gives_scores(model)
    asked = list(inward(model))[-1].base_model if is_scorer else model
    output = asked(
        input_ids=torch.cat(list(segments))[None].to(device),
        position_ids=position_ids[None].to(device),
        use_cache=False,
        **layout,
    )
    found: Any = (output.last_hidden_state if is_scorer else output.logits)[0]
    return found.float().unflatten(0, (-1, _LENGTH))


def _tokens(model: Any, count: int, seed: int = 0) -> list[Tensor]:
    """Segments of tokens that mean nothing."""
    vocabulary = min(model.get_input_embeddings().weight.shape[0], 1000)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (_LENGTH,), generator=generator) for _ in range(count)]


@contextlib.contextmanager
def _asking(model: Any) -> Iterator[None]:
    """Without dropout and gradients, and with every attention window so short that a few tokens go beyond it:
    models read its length from where it is set here, and a row longer than the real one would take long."""
    was_training = model.training
    windows = [
        (holder, name, value)
        for holder in {id(h): h for m in model.modules() for h in (m, getattr(m, "config", None))}.values()
        for name in _WINDOW_NAMES
        if type(value := getattr(holder, name, None)) is int
    ]
    model.eval()
    try:
        for holder, name, _ in windows:
            setattr(holder, name, _WINDOW)
        with torch.no_grad():
            yield
    finally:
        for holder, name, value in windows:
            setattr(holder, name, value)
        model.train(was_training)

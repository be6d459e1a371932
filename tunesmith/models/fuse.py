"""Puts the fused functions under a model that is loaded and adapted. Modules, names and files stay as they
are; only `forward` of single modules is replaced, and only where the stand-in was asked to give the same
numbers and did.

    attention   packs by segment (attention.py)
    head        loss and gradient at predictions, chunk by chunk (head.py)
    lora        linear layers with LoRA; query, key and value as one (fused/linear.py)
    block       RMSNorm, rotary embedding, gated feed-forward (fused/)

What is out of the ordinary (DoRA, several active adapters, quantised weights, an unknown feed-forward) keeps
its own forward.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.fused.linear import LinearParts, linears
from tunesmith.models.fused.mlp import ACTIVATIONS, Activation, gated_mlp
from tunesmith.models.fused.norm import rms_norm
from tunesmith.models.fused.rotary import apply_rotary
from tunesmith.models.head import LogitChange, prediction_losses
from tunesmith.models.held import EVERYWHERE, Held

PIECES = ("head", "lora", "block")


def fuse(model: Any, pieces: Collection[str] = PIECES, held: Held = EVERYWHERE) -> None:
    """Replace what can be replaced in `model` (a transformers model, or PEFT's around one): the same on every
    rank."""
    if "block" in pieces:
        _fuse_norms(model, held)
        _fuse_rotary(model)
        _fuse_feed_forward(model, held)
    if "lora" in pieces:
        _fuse_linears(model)
    if "head" in pieces:
        _fuse_head(model, held)


# --- linear layers and LoRA


def linear_parts(module: Any) -> LinearParts | None:
    """What a linear layer, with PEFT's LoRA in or around it or without, computes at this moment; None if that
    is more than `LinearParts` can say."""
    if _is_plain_linear(module):
        # Empty where an engine has not put it together: it is another module's forward that needs it.
        return LinearParts(module.weight, module.bias) if module.weight.numel() else None
    if type(module).__name__ == "ModulesToSaveWrapper":
        names = [] if module.disable_adapters else list(module.active_adapters)
        trained = bool(names) and names[0] in module.modules_to_save
        return linear_parts(module.modules_to_save[names[0]] if trained else module.original_module)
    from peft.tuners.lora.layer import Linear as LoraLinear

    if type(module) is not LoraLinear or not _is_plain_linear(module.base_layer) or module.fan_in_fan_out:
        return None
    base = module.base_layer
    if not base.weight.numel():
        return None
    active_names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active_names:
        if module.disable_adapters and module.merged:
            return None  # PEFT unmerges first
        return LinearParts(base.weight, base.bias)
    name = active_names[0]
    lora_a, lora_b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if len(active_names) > 1 or name in module.lora_variant or lora_b.bias is not None:
        return None
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LinearParts(base.weight, base.bias, lora_a.weight, lora_b.weight, float(module.scaling[name]), p)


def _is_plain_linear(module: Any) -> bool:
    """Also where FSDP has put a class of its own before."""
    kind = type(module)
    return kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.__bases__[-1] is nn.Linear)


def _fuse_linears(model: nn.Module) -> None:
    done: set[nn.Module] = set()
    for module in model.modules():
        group: list[Any] = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(isinstance(member, nn.Module) and linear_parts(member) for member in group):
            _SharedInput(group)
            done.update(group)
    for module in model.modules():
        if module not in done and type(module) is not nn.Linear and _is_lora(module) and linear_parts(module):
            module.forward = partial(_linear_forward, module, module.forward)


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _linear_forward(
    module: nn.Module, stock: Callable[..., Tensor], x: Tensor, *args: Any, **kw: Any
) -> Tensor:
    parts = None if args or kw else linear_parts(module)  # PEFT's `adapter_names` is its own business
    return stock(x, *args, **kw) if parts is None else linears(x, [parts])[0]


def _parts_of_all(modules: Sequence[nn.Module]) -> list[LinearParts] | None:
    """What the layers compute, if all of it can be computed in one place."""
    parts = [linear_parts(module) for module in modules]
    known = [part for part in parts if part is not None]
    return known if len(known) == len(parts) else None


class _SharedInput:
    """Query, key and value projections of one attention layer: the first that is called computes all three
    (one pass over the input, and one gradient of it), the others find theirs ready if they are given the same
    tensor."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._stock = [module.forward for module in modules]
        self._x: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        for i, module in enumerate(modules):
            module.forward = partial(self._forward, i)

    def _forward(self, i: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if i and self._x is x and self._outputs[i] is not None:
            output = self._outputs[i]
            self._outputs[i] = None
            if i == len(self._modules) - 1:
                self._x = None
            assert output is not None
            return output
        known = None if i or args or kwargs else _parts_of_all(self._modules)
        if known is None:
            return _linear_forward(self._modules[i], self._stock[i], x, *args, **kwargs)
        first, *rest = linears(x, known)
        self._x, self._outputs = x, [None, *rest]
        return first


# --- feed-forward


def _fuse_feed_forward(model: nn.Module, held: Held) -> None:
    for module in model.modules():
        layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(layer, nn.Module) and linear_parts(layer) for layer in layers):
            continue
        activation = _activation(getattr(module, "act_fn", None))
        if activation is None:
            continue
        fused = partial(_mlp_forward, module, module.forward, layers, activation)
        with _training(module, but=layers):
            agrees = _agree(module.forward, fused, layers[0].in_features, layers[0].weight, held)
        if agrees:
            module.forward = fused


@contextmanager
def _training(module: nn.Module, but: Collection[nn.Module]) -> Iterator[None]:
    """`module` in training mode, so that a dropout of its own shows (Seed-OSS has one), but for the layers in
    it, whose dropout is LoRA's and drawn anew each time."""
    before = {part: part.training for part in module.modules()}
    module.train()
    for layer in but:
        layer.eval()
    try:
        yield
    finally:
        for part, was_training in before.items():
            part.training = was_training


def _mlp_forward(
    module: nn.Module, stock: Callable[[Tensor], Tensor], layers: Any, activation: Activation, x: Tensor
) -> Tensor:
    known = _parts_of_all(layers)
    return stock(x) if known is None else gated_mlp(x, known, activation)


def _activation(function: Any) -> Activation | None:
    if not callable(function):
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        y = function(x)
    except Exception:  # an activation of remote code may want anything
        return None
    for activation in ACTIVATIONS:
        if isinstance(y, Tensor) and torch.allclose(y, activation.forward(x), atol=1e-6):
            return activation
    return None


# --- norms and rotary embedding


def _fuse_norms(model: nn.Module, held: Held) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float):
            continue
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            continue
        for offset in (0.0, 1.0):
            fused = partial(_norm_forward, module, eps, offset)
            if _agree(module.forward, fused, weight.shape[0], weight, held):
                module.forward = fused
                break


def _norm_forward(module: Any, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps, offset)


def _fuse_rotary(model: nn.Module) -> None:
    """Attention layers look `apply_rotary_pos_emb` up among the globals of their file: they get a copy of
    their forward with other globals, and the file stays as it is."""
    name = "apply_rotary_pos_emb"
    for module in model.modules():
        forward = type(module).forward
        if (
            inspect.unwrap(forward) is not forward
            or name not in getattr(forward, "__code__", _NO_CODE).co_names
        ):
            continue
        stock = forward.__globals__.get(name)
        if "forward" in vars(module) or not callable(stock) or not _is_plain_rotary(stock):
            continue
        swapped = types.FunctionType(
            forward.__code__,
            forward.__globals__ | {name: apply_rotary},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        swapped.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(swapped, module)


_NO_CODE = (lambda: None).__code__


def _is_plain_rotary(stock: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    try:
        theirs = stock(q, k, cos, sin)
    except Exception:  # another signature
        return False
    return all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, apply_rotary(q, k, cos, sin), strict=True)
    )


def _agree(
    stock: Callable[[Tensor], Any], fused: Callable[[Tensor], Any], size: int, like: Tensor, held: Held
) -> bool:
    """Whether both give the same for random input, within what bfloat16 rounds."""
    return held.ask(lambda: _agree_here(stock, fused, size, like))


@torch.no_grad()
def _agree_here(
    stock: Callable[[Tensor], Any], fused: Callable[[Tensor], Any], size: int, like: Tensor
) -> bool:
    if like.device.type == "meta" or like.numel() == 0:
        return False
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)[None]
    theirs, ours = stock(x), fused(x)
    return isinstance(theirs, Tensor) and bool((ours - theirs).float().norm() <= 0.02 * theirs.float().norm())


# --- output head


@dataclass
class LossHead:
    """The head of a model while it is asked for losses instead of logits."""

    targets: Tensor | None = None
    weights: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    losses: Tensor | None = None

    def __call__(
        self,
        model: Any,
        targets: Tensor,
        weights: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **inputs: Any,
    ) -> Tensor:
        """weight * loss of each prediction [P], by a call of the model that asks for these positions
        (`logits_to_keep`)."""
        self.targets, self.weights = targets, weights
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        try:
            losses: Tensor = model(labels=targets, **inputs).loss
            return losses
        finally:
            self.targets = self.weights = self.losses = None


def loss_head(model: Any) -> LossHead | None:
    """The fused head of a model, however often it is wrapped; None if it has none."""
    for module in inward(model):
        head = vars(module).get("_tunesmith_loss_head")
        if head is not None:
            return head
    return None


def inward(model: Any) -> Iterator[Any]:
    """A model and what it wraps: PEFT's base model, the module of DDP and its kin."""
    inner: Any = model
    while inner is not None:
        yield inner
        is_adapted = hasattr(inner, "get_base_model")
        inner = inner.get_base_model() if is_adapted else vars(inner)["_modules"].get("module")


def _fuse_head(model: Any, held: Held) -> None:
    base: Any = list(inward(model))[-1]
    module = base.get_output_embeddings()
    if not isinstance(module, nn.Module) or linear_parts(module) is None:
        return
    change = _logit_change(base.config.get_text_config())
    head = LossHead()
    stock_head, stock_loss = module.forward, base.loss_function
    module.forward = partial(_head_forward, module, module.forward, head, change)
    base.loss_function = partial(_head_loss, head, stock_loss)
    base._tunesmith_loss_head = head
    if not held.ask(lambda: _head_agrees(base, head)):
        del base._tunesmith_loss_head
        module.forward, base.loss_function = stock_head, stock_loss


def _logit_change(config: Any) -> LogitChange:
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    return LogitChange(
        (1 / divisor if divisor else 1.0) * (factor or 1.0), getattr(config, "final_logit_softcapping", None)
    )


def _head_forward(
    module: nn.Module, stock: Callable[[Tensor], Tensor], head: LossHead, change: LogitChange, hidden: Tensor
) -> Tensor:
    if head.targets is None or head.weights is None:
        return stock(hidden)
    parts = linear_parts(module)
    if parts is None or parts.dropout:  # what PEFT has been told since, or dropout: all logits at once
        logits = stock(hidden).flatten(0, -2).float() * change.factor
        if change.softcap is not None:
            logits = change.softcap * torch.tanh(logits / change.softcap)
        nll = torch.nn.functional.cross_entropy(
            logits, head.targets, reduction="none", label_smoothing=head.label_smoothing
        )
        if head.z_loss:
            nll = nll + head.z_loss * logits.logsumexp(-1).square()
        head.losses = nll * head.weights
        return _no_logits(head.losses, hidden, logits.shape[-1])
    head.losses = prediction_losses(
        hidden.reshape(-1, hidden.shape[-1]),
        parts,
        head.targets,
        head.weights,
        change=change,
        label_smoothing=head.label_smoothing,
        z_loss=head.z_loss,
    )
    return _no_logits(head.losses, hidden, parts.weight.shape[0])


def _no_logits(losses: Tensor, hidden: Tensor, vocabulary: int) -> Tensor:
    """What the model goes on to work on: [..., 0, V], made of the losses."""
    nothing = losses[:0, None].to(hidden.dtype).expand(0, vocabulary)
    return nothing.reshape(*hidden.shape[:-2], 0, vocabulary).clone()  # FSDP2 wants no view


def _head_loss(head: LossHead, stock: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if head.losses is None:
        return stock(*args, **kwargs)
    # The sum of nothing is 0, and makes the loss depend on what the head gave: engines that share weights out
    # put the head's together for the backward pass when it comes by its output.
    return head.losses + (args[0] if args else kwargs["logits"]).sum()


@torch.no_grad()
def _head_agrees(model: Any, head: LossHead) -> bool:
    """Whether the model, with whatever it does to its logits, gives the fused head's loss."""
    embedding = model.get_input_embeddings().weight
    if embedding.device.type == "meta":
        return False
    ids = torch.arange(min(9, embedding.shape[0]), device=embedding.device)[None]
    targets = ids[0].flip(0)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        ones = torch.ones(len(targets), device=ids.device)
        ours = head(
            model,
            targets,
            ones,
            input_ids=ids,
            use_cache=False,
            logits_to_keep=torch.arange(len(targets), device=ids.device),
        )
    except (TypeError, AttributeError):  # no logits_to_keep, no loss
        return False
    finally:
        model.train(was_training)
    theirs = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 0.02 * theirs.abs().max())

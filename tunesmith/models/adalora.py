"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): a budget of ranks that layers share out while training.

PEFT has the layers and the allocator. What is here: when the allocator runs, its loss term on our way to a
loss, and its state, without which a run that goes on would judge importance afresh.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def has_budget(model: Any) -> bool:
    """Whether the model is PEFT's AdaLoRA."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


def use_own_loss(model: Any) -> None:
    """PEFT adds its term to the loss of every pass, evaluation included, and takes that for a mean: it is
    `orthogonality` here, once a step."""
    model.base_model.forward = partial(_forward, model.base_model)


def _forward(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    return tuner.model(*args, **kwargs)


def plan_budget(model: Any, steps: int) -> None:
    """Tell the allocator how long the run is: the first tenth of the steps keeps all ranks and the last half
    those that are left, as in most runs of the paper (tables 8 to 12); ranks are shared out a thousand times
    at most."""
    config = model.peft_config["default"]
    config.total_step = steps
    config.tfinal = min(steps // 2, max(steps - 2, 0))
    config.tinit = min(steps // 10, max(steps - config.tfinal - 2, 0))
    config.deltaT = max(1, steps // 1000)


def allocate(model: Any, step: int) -> None:
    """After optimiser step number `step` (from 1), while its gradients are there: judge what each rank is
    worth and set the least to zero. A step without gradients (a bad one that is left out) judges nothing."""
    tuner = model.base_model
    trained = (p for name, p in tuner.model.named_parameters() if "lora_" in name and p.requires_grad)
    if tuner.peft_config["default"].total_step >= 2 and all(p.grad is not None for p in trained):
        tuner.update_and_allocate(step)


def orthogonality(model: Any) -> Tensor:
    """gamma times the mean over the matrices P and Q of |P P^T - I| (equations 4 and 5)."""
    tuner = model.base_model
    terms = []
    for name, matrix in tuner.model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            terms.append((product - torch.eye(product.shape[0], device=product.device)).norm())
    return torch.stack(terms).mean() * float(tuner.peft_config["default"].orth_reg_weight)


def budget_state(model: Any) -> dict[str, Tensor]:
    """What the allocator knows: averages of importance, and which ranks it has left."""
    allocator, config = model.base_model.rankallocator, model.peft_config["default"]
    state = {f"{kind}.{name}": t for kind in _AVERAGES for name, t in getattr(allocator, kind).items()}
    return state | {f"left.{name}": torch.tensor(left) for name, left in (config.rank_pattern or {}).items()}


def set_budget_state(model: Any, state: dict[str, Tensor]) -> None:
    """Set what `budget_state` gave."""
    allocator, config = model.base_model.rankallocator, model.peft_config["default"]
    device = next(model.parameters()).device
    for kind in _AVERAGES:
        found = {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
        setattr(allocator, kind, {name: t.to(device) for name, t in found.items()})
    left = {name.removeprefix("left."): t.tolist() for name, t in state.items() if name.startswith("left.")}
    config.rank_pattern = left or None

"""A combination of adapters as one adapter that stock PEFT loads, and as a model to compare a merge with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.artifacts.combine import Combination, add_sum, updates_of
from tunesmith.artifacts.found import Found
from tunesmith.artifacts.merged_weights import changed_modules
from tunesmith.errors import ModelError
from tunesmith.models.save import write_base_settings


@torch.no_grad()
def write_combined(
    folder: Path, adapted: Any, names: Sequence[str], founds: Sequence[Found], combination: Combination
) -> float:
    """Write the adapter. `adapted` is a hollow model with all of them on it. Returns how much of the
    combined updates' norm is in it: 1 for a sum, whose matrices are laid side by side; for TIES and DARE,
    whose updates have full rank, what the largest singular directions hold, as many as a sum would have."""
    modules = changed_modules(adapted)
    rank = sum(int(adapted.peft_config[name].r) for name in names)
    tensors: dict[str, Tensor] = {}
    whole = kept = 0.0
    for path, layer in modules.items():
        if not all(name in layer.lora_A for name in names if name in layer.scaling):
            raise ModelError(f"{path}: an embedding's adapter cannot be kept as one; merge it instead.")
        if combination.how == "linear":
            a, b = _side_by_side(layer, names, combination.weights)
        else:
            update = combination.of(updates_of(layer, names), path)
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
            a, b = s[:rank, None].sqrt() * vh[:rank], u[:, :rank] * s[:rank].sqrt()
            whole, kept = whole + float(s.square().sum()), kept + float(s[:rank].square().sum())
        missing = rank - a.shape[0]  # of a module that not all of them adapt
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    settings = adapted.peft_config[names[0]]
    settings.r = settings.lora_alpha = rank
    settings.use_rslora, settings.init_lora_weights, settings.inference_mode = False, True, True
    settings.rank_pattern, settings.alpha_pattern = {}, {}
    settings.target_modules = set(modules)
    settings.base_model_name_or_path = founds[0].base
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_base_settings(folder, founds[0].base_settings)
    return (kept / whole) ** 0.5 if whole else 1.0


def _side_by_side(layer: Any, names: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A and B of sum of w s B A: the rows of all As, scaled, and the columns of all Bs."""
    known = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.lora_A]
    a = [weight * layer.scaling[name] * layer.lora_A[name].weight for name, weight in known]
    b = [layer.lora_B[name].weight for name, _ in known]
    return torch.cat(a).float(), torch.cat(b, dim=1).float()


@torch.no_grad()
def combine_in_place(model: Any, names: Sequence[str], combination: Combination) -> Any:
    """A model, loaded with all adapters, that computes as their combination does: a sum by PEFT, anything
    else by adding x dW to what each layer of the base gives."""
    if combination.how == "linear":
        add_sum(model, "combined", dict(zip(names, combination.weights, strict=True)))
        return model
    for path, layer in changed_modules(model).items():
        update = combination.of(updates_of(layer, names), path)
        layer.register_forward_hook(lambda _, given, output, dw=update: output + _times(given[0], dw, output))
    model.base_model.disable_adapter_layers()
    return model


def _times(x: Tensor, update: Tensor, like: Tensor) -> Tensor:
    if not x.is_floating_point():  # an embedding's ids
        return torch.nn.functional.embedding(x, update).to(like.dtype)
    return torch.nn.functional.linear(x.float(), update.to(x.device)).to(like.dtype)

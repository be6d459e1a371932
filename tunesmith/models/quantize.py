"""Base weights held in 4 or 8 bits: loaded, prepared for training once, and read as what they stand for.

    nf4           4 bits a weight and a scale for 64 of them (bitsandbytes); products in `model.dtype`
    int8          8 bits a weight and a scale a row (bitsandbytes); inputs are rounded to 8 bits as well
    torchao_int8  8 bits a weight and a scale a row (torchao); inputs are not rounded

Only linear layers are quantised, and the output head is not. The rest (norms, embeddings, head) stays in the
compute format, as under LoRA without quantisation; norms compute in float32 whatever they are held in. PEFT's
`prepare_model_for_kbit_training` would hold all of it in float32: half as much memory again for SmolLM2-135M,
with a head and a residual stream in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.config import ModelConfig
from tunesmith.errors import MissingExtraError, ModelError

Say = Callable[[str], None]
_BLOCK = 64  # weights that share a scale: bitsandbytes' default, and the paper's (section 3)


def quantization_config(model: ModelConfig, dtype: torch.dtype) -> Any:
    """What `from_pretrained` needs to quantise the weights as `model.quantization` says; `dtype` is that of
    the products. Raises MissingExtraError without the package that does it."""
    from transformers import BitsAndBytesConfig, TorchAoConfig
    from transformers.utils import is_bitsandbytes_available, is_torchao_available

    kind = model.quantization
    if kind == "torchao_int8":
        if not is_torchao_available():
            raise MissingExtraError(f"model.quantization={kind}", "torchao", "torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if not is_bitsandbytes_available():
        raise MissingExtraError(f"model.quantization={kind}", "bitsandbytes", "quant")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def stored_quantization(model_config: Any) -> str | None:
    """By what the weights of a checkpoint are quantised as they lie there (gptq, awq, bitsandbytes, ...);
    None if they are not."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return str(values.get("quant_method", "unknown"))


def check_stored_quantization(path: str, stored: str, model: ModelConfig, *, is_adapted: bool) -> None:
    """Raise ModelError unless an adapter is to be trained on weights that bitsandbytes quantised before."""
    fix = "Name the model that it was made of, with model.quantization nf4 for about the same memory"
    place = f"model.path={path}: its weights are quantised already ({stored} in config.json)"
    if stored != "bitsandbytes":
        raise ModelError(
            f"{place}, and tunesmith trains on weights that bitsandbytes quantised only: {stored} needs "
            f"kernels of its own package, and its weights cannot be merged with an adapter. {fix}."
        )
    if not is_adapted:
        raise ModelError(f"{place} and cannot be trained in full. Set adapter.method to lora. Or: {fix}.")
    if model.quantization != "none":
        raise ModelError(f"{place}; model.quantization={model.quantization} would do so again. Remove it.")


def prepare_quantized(model: Any) -> Any:
    """A model that was just loaded in 4 or 8 bits, ready to be adapted: frozen, and safe to evaluate between
    training steps.

    bitsandbytes 0.50 repacks 4-bit weights in an eval-mode forward on CPUs with AVX512-BF16, and the packed
    kernel has no gradient: training after an evaluation would be silently wrong. Delete when fixed there."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def is_quantized(weight: Tensor) -> bool:
    """Whether a tensor is one of bitsandbytes' or torchao's, whose numbers stand for others."""
    kind = type(weight)
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def memory_line(model: Any) -> str:
    """In which formats the weights of a quantised model are held, and what they take, for the log."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        kind = "quantised" if is_quantized(parameter) else str(parameter.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + _held_bytes(parameter)
    quantised = sizes.pop("quantised", 0)
    rest = ", ".join(f"{size / 2**20:.3f} MiB in {kind}" for kind, size in sizes.items())
    return f"quantised base: {quantised / 2**20:.3f} MiB; norms, embeddings and head: {rest}"


def _held_bytes(weight: Tensor) -> int:
    """With the scales."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        parts = [weight, state.absmax]
        if state.nested:
            parts.append(state.state2.absmax)
        return sum(part.nbytes for part in parts)
    if type(weight).__module__.startswith("torchao."):
        names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(getattr(weight, name).nbytes for name in names)
    scales = getattr(weight, "SCB", None)
    return weight.nbytes + (0 if scales is None else scales.nbytes)


# --- what the weights stand for


def quantized_names(skeleton: Any, model: ModelConfig, dtype: torch.dtype) -> set[str]:
    """Names of the weights that loading this model would quantise. `skeleton` is the model on the meta
    device; its layers are replaced."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(quantization_config(model, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=skeleton, dtype=dtype, device_map=None)
    names = [name for name, _ in skeleton.named_parameters()]
    return {name for name in names if quantizer.param_needs_quantization(skeleton, name)}


def as_quantized(weight: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """The numbers [out, in] that a weight has once it is loaded in `dtype` and quantised: what an adapter
    trains on. The same as those of the loaded model, bit for bit."""
    weight = weight.to(dtype)
    if model.quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight.dequantize()
    import bitsandbytes.functional as bnb

    if model.quantization == "int8":
        values, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return bnb.int8_vectorwise_dequant(values, scales)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=_BLOCK, compress_statistics=model.double_quantization, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state)

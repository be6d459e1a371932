"""`tunesmith merge`: an adapter worked into its base, as a model that any library loads; proven against the
adapter before it is kept.

    adapter + base --stream--> .OUT.tmp --compare with the adapter--> OUT, or nothing

Of a quantised base the default is what the adapter was trained on, the dequantised weights: quantising the
sum again would round away part of what was learnt, and the weights from before quantisation are others.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.artifacts.agreement import Agreement, compare, compare_scores, real_rows
from tunesmith.artifacts.combine import Combination, check_combination
from tunesmith.artifacts.combined import combine_in_place, write_combined
from tunesmith.artifacts.found import Found, Say, find_model, first_line
from tunesmith.artifacts.merged_weights import (
    MergedTensors,
    NeedsWholeModel,
    Source,
    hollow_model,
    put_adapters,
    with_score_head,
    write_shards,
)
from tunesmith.artifacts.stored import model_folder, stored_tensors
from tunesmith.artifacts.tuned import (
    base_config,
    load_base,
    load_own_model,
    load_own_tokenizer,
    source_options,
)
from tunesmith.config import ModelConfig
from tunesmith.config.methods import METHODS
from tunesmith.errors import MergeError, ModelError
from tunesmith.models.bottleneck import KIND as BOTTLENECK
from tunesmith.models.devices import compute_dtype, default_device, free_memory_bytes
from tunesmith.models.quantize import as_quantized, quantized_names, stored_quantization
from tunesmith.models.score import auto_class
from tunesmith.training import durable_files

Base = Literal["dequantized", "original"]
_SHARD_BYTES = 5 * 10**9
# Mean KL in nats a token up to which a merge is kept: about ten times what rounding to the format was
# measured to make, and more in float32 (docs/artifacts.md).
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
_INT8_TOLERANCE = 1e-2  # LLM.int8() rounds the inputs of layers too; the merged model does not
_NO_MERGE = {
    "PREFIX_TUNING": METHODS["prefix"].no_merge,
    "PROMPT_TUNING": METHODS["prompt"].no_merge,
    "MULTITASK_PROMPT_TUNING": METHODS["prompt"].no_merge,
    "CPT": METHODS["prompt"].no_merge,
    "P_TUNING": METHODS["p_tuning"].no_merge,
    BOTTLENECK: METHODS["bottleneck"].no_merge,
}


@dataclass(frozen=True)
class Merged:
    """What was written: `dtype` of the weights, and how near the model is to its adapter. Both are None for
    adapters that were combined into one and not merged."""

    folder: Path
    dtype: str | None = None
    agreement: Agreement | None = None


def merge(
    models: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: Base = "dequantized",
    dtype: str | None = None,
    combination: Combination | None = None,
    as_adapter: bool = False,
    tolerance: float | None = None,
    data: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    say: Say = print,
) -> Merged:
    """Merge the adapter of a run (or an adapter folder), or several as `combination` says, and write the
    model to the new folder `out`; with `as_adapter`, the combination as an adapter.

    `base` is what a quantised base becomes: what the adapter was trained on, or the weights from before.
    `dtype` is that of the weights written (default: each as the base stores it); sums are made in float32.
    `tolerance`: mean KL, in nats a token, between merged model and adapter up to which the result is kept;
    they are compared on rows of `data` or of the run. Raises ModelError for what cannot be merged, MergeError
    beyond the tolerance; nothing is left at `out` then."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelError(f"--out {out}: something is there already. Name a new folder.")
    names = [str(models)] if isinstance(models, (str, Path)) else [str(model) for model in models]
    founds = [find_model(name, say, may_score=True) for name in names]
    for name, found in zip(names, founds, strict=True):
        _check_mergeable(name, found)
    if len(founds) > 1:
        combination = combination or Combination((1 / len(founds),) * len(founds))
        check_combination(founds, combination)
    elif combination is not None or as_adapter:
        raise ModelError("--weights, --combine and --as-adapter are for several adapters; one is given.")
    work = _Work(founds, combination, base, None if dtype is None else getattr(torch, dtype), say)
    building = durable_files.temporary(out)
    durable_files.remove(building)
    durable_files.make_folder(building)
    try:
        if as_adapter:
            merged = work.write_adapter(building, out)
        else:
            merged = work.write_model(building, out, shard_bytes, tolerance, data)
        for file in building.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            durable_files.sync(file)
    except BaseException:
        durable_files.remove(building)
        raise
    durable_files.publish(out)
    say(f"{out} is written")
    return merged


def _check_mergeable(name: str, found: Found) -> None:
    if found.adapter is None:
        raise ModelError(f"{name} is a whole model already: there is nothing to merge. Use it as it is.")
    settings = json.loads((found.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    why = _NO_MERGE.get(settings.get("peft_type"))
    if why is not None:
        raise ModelError(
            f"{name}: an adapter of kind {settings['peft_type']} cannot be merged: {why}. Use it as it is, "
            "base model and adapter, as `tunesmith chat` does."
        )


class _Work:
    """One merge: its adapters, what it knows of their base, and the steps."""

    def __init__(
        self,
        founds: Sequence[Found],
        combination: Combination | None,
        base: Base,
        dtype: torch.dtype | None,
        say: Say,
    ) -> None:
        self._founds, self._found, self._combination = founds, founds[0], combination
        self._dtype, self._say = dtype, say
        self._tokenizer = load_own_tokenizer(self._found)
        self._trained_as = self._found.base_settings
        self._held = self._trained_as  # what is merged into
        if base == "original":
            self._held = self._trained_as.model_copy(update={"quantization": "none"})
        self._trained_dtype, _ = compute_dtype(self._trained_as)
        try:
            self._settings = base_config(self._found, say)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._found.base}: no model there: {first_line(error)}") from error
        if base == "original" and stored_quantization(self._settings) is not None:
            raise ModelError(
                f"--base original: {self._found.base} is quantised as it is stored; there are no others."
            )
        text = self._settings.get_text_config()
        text.vocab_size = max(text.vocab_size, len(self._tokenizer))
        if self._found.gives_scores:
            self._settings.pad_token_id = text.pad_token_id = self._tokenizer.pad_token_id

    # --- writing

    def write_adapter(self, building: Path, out: Path) -> Merged:
        """The combination, as an adapter."""
        assert self._combination is not None
        hollow = self._hollow_model()
        adapted, names = put_adapters(hollow, self._founds)
        share = write_combined(building, adapted, names, self._founds, self._combination)
        if share < 1:
            self._say(
                f"warning: {self._combination.how} updates have full rank; this adapter holds "
                f"{100 * share:.0f} % of their norm. Without --as-adapter all of it is merged."
            )
        self._tokenizer.save_pretrained(building)
        self._generation_config().save_pretrained(building)
        return Merged(out)

    def write_model(
        self, building: Path, out: Path, shard_bytes: int, tolerance: float | None, data: str | None
    ) -> Merged:
        """The merged model, if it predicts what the adapter does."""
        try:
            dtype, unties = self._stream(building, shard_bytes)
        except NeedsWholeModel as why:
            if self._combination is not None:
                raise ModelError(f"{self._found.base}: adapters cannot be combined here: {why}.") from why
            self._say(f"the base is loaded whole, and not tensor by tensor: {why}")
            dtype, unties = self._in_memory(building, shard_bytes)
        self._write_rest(building, dtype, unties)
        gc.collect()
        label = str(dtype).removeprefix("torch.")
        agreement = self._verify(building, dtype, tolerance, data)
        facts = {
            "adapters": [str(found.adapter) for found in self._founds],
            "base": self._found.base,
            "base_held_in": self._held.quantization,
            "combination": None if self._combination is None else asdict(self._combination),
            "dtype": label,
            "agreement_with_adapter": asdict(agreement),
        }
        (building / "merge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (building / "README.md").write_text(_readme(out, facts, agreement), encoding="utf-8")
        return Merged(out, label, agreement)

    @property
    def _trusts(self) -> bool:
        return bool(source_options(self._found).get("trust_remote_code", False))

    def _hollow_model(self) -> Any:
        return hollow_model(self._settings, self._trusts, gives_scores=self._found.gives_scores)

    def _stream(self, building: Path, shard_bytes: int) -> tuple[torch.dtype, bool]:
        """Write the weights; returns their format and whether head and embedding are two tensors from now
        on."""
        if stored_quantization(self._settings) is not None:
            raise NeedsWholeModel("its weights are quantised as they are stored")
        hollow = self._hollow_model()
        names = {id(module): name for name, module in hollow.named_modules()}
        ends = (hollow.get_input_embeddings(), hollow.get_output_embeddings())
        embeddings = frozenset(f"{names[id(module)]}.weight" for module in ends if module is not None)
        stored = stored_tensors(model_folder(self._found))
        if self._found.gives_scores:
            assert self._found.adapter is not None
            stored = with_score_head(stored, hollow, self._found.adapter)
        adapted, adapters = put_adapters(hollow, self._founds)
        is_quantised = self._held.quantization != "none"
        source = Source(
            stored,
            self._quantized_names() if is_quantised else set(),
            partial(as_quantized, model=self._held, dtype=self._trained_dtype),
            self._trained_dtype if is_quantised else None,
            embeddings,
            len(self._tokenizer),
        )
        tensors = MergedTensors(source, adapted, adapters, self._combination, self._dtype)
        needed = sum(like.nbytes for like in tensors.like.values())
        durable_files.refuse_full_disk(building, needed)
        write_shards(building, tensors, shard_bytes)
        largest = max(tensors.like.values(), key=lambda like: like.numel())
        return largest.dtype, tensors.unties

    def _quantized_names(self) -> set[str]:
        hollow = self._hollow_model()
        if any(type(module).__name__ == "Conv1D" for module in hollow.modules()):
            raise NeedsWholeModel("its matrices are stored transposed")
        return quantized_names(hollow, self._held, self._trained_dtype)

    def _in_memory(self, building: Path, shard_bytes: int) -> tuple[torch.dtype, bool]:
        """The same by PEFT, with the whole base in float32."""
        from peft import PeftModel

        is_quantised = self._held.quantization != "none" or stored_quantization(self._settings) is not None
        loaded = self._trained_dtype if is_quantised else torch.float32
        stored_dtype = self._settings.dtype or self._trained_dtype
        model = load_base(self._found, len(self._tokenizer), loaded, self._say, self._held)
        if is_quantised:
            model = model.dequantize(dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(self._found.adapter)).merge_and_unload(safe_merge=True)
        dtype = self._dtype or stored_dtype
        # Those that read a quantised weight cannot be turned round.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any("Deserialize" in type(op).__name__ for op in getattr(conversion, "operations", []))
        ]
        model.to(dtype).save_pretrained(building, max_shard_size=shard_bytes)
        return dtype, not model.config.tie_word_embeddings

    def _write_rest(self, building: Path, dtype: torch.dtype, unties: bool) -> None:
        settings = copy.deepcopy(self._settings)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        settings.use_cache = True
        if self._found.gives_scores:
            settings.architectures = [type(self._hollow_model()).__name__]
        settings.dtype = dtype
        if unties:
            settings.tie_word_embeddings = False
        settings.save_pretrained(building)
        self._tokenizer.save_pretrained(building)
        if not self._found.gives_scores:
            self._generation_config().save_pretrained(building)
        if self._trusts:
            for file in model_folder(self._found).glob("*.py"):
                shutil.copy(file, building)

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        for folder in (self._found.adapter, model_folder(self._found)):
            if folder is not None and (folder / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(str(folder))
        return GenerationConfig.from_model_config(self._settings)

    # --- verifying

    def _verify(
        self, building: Path, dtype: torch.dtype, tolerance: float | None, data: str | None
    ) -> Agreement:
        from peft import PeftConfig

        rows, name = real_rows(self._found, self._tokenizer, data, self._say)
        computes = self._verifying_dtype(building)
        load_merged = partial(self._load_merged, building, computes)
        # Biases that were trained stay when PEFT disables an adapter, and so does what it did not combine.
        is_plain = (
            PeftConfig.from_pretrained(str(self._found.adapter)).to_dict().get("bias", "none") == "none"
        )
        is_known = self._combination is None or self._combination.how == "linear"
        measure = partial(compare, rows=rows, name=name, with_effect=is_plain and is_known)
        if self._found.gives_scores:
            measure = partial(compare_scores, rows=rows, name=name)
        agreement = measure(partial(self._reference, self._held, computes), load_merged)
        self._say(f"against the adapter on its base: {agreement.line()}")
        if self._held.quantization != self._trained_as.quantization:
            other = measure(partial(self._reference, self._trained_as, computes), load_merged)
            self._say(f"against the adapter on the base as it was trained: {other.line()}")
        limit = tolerance
        if limit is None:
            limit = max(_TOLERANCE[dtype], _TOLERANCE[computes])  # what compares them rounds, too
            limit = _INT8_TOLERANCE if self._held.quantization == "int8" else limit
        if not agreement.kl <= limit:
            raise MergeError(
                f"the merged model does not predict what the adapter does, and was not kept: "
                f"{agreement.line()}; the tolerance is {limit:g} nats a token (--tolerance)."
            )
        if agreement.effect_kl is not None and agreement.kl > 0.1 * agreement.effect_kl:
            self._say(
                "warning: what rounding changes is not small against what the adapter changes. "
                "--dtype float32 keeps all of it."
            )
        return agreement

    def _verifying_dtype(self, building: Path) -> torch.dtype:
        """float32, in which rounding hides nothing, where it fits and the base can compute in it."""
        numbers = sum((t.end - t.start) // t.dtype.itemsize for t in stored_tensors(building).values())
        fits = 4 * numbers < 0.8 * free_memory_bytes()
        return torch.float32 if fits and self._held.quantization in ("none", "nf4") else self._trained_dtype

    def _reference(self, held: ModelConfig, computes: torch.dtype) -> Any:
        is_quantised = held.quantization != "none" or stored_quantization(self._settings) is not None
        loaded = self._trained_dtype if is_quantised else computes
        model = load_own_model(self._found, self._tokenizer, loaded, lambda _: None, held=held)
        if loaded != computes:
            _compute_in(model, computes)
        if self._combination is None:
            return model
        names = ["default"]
        for i, found in enumerate(self._founds[1:], 1):
            names.append(f"adapter_{i}")
            model.load_adapter(str(found.adapter), adapter_name=names[-1])
        return combine_in_place(model, names, self._combination).eval()

    def _load_merged(self, building: Path, computes: torch.dtype) -> Any:
        model = auto_class(self._found.gives_scores).from_pretrained(
            building, dtype=computes, use_safetensors=True, trust_remote_code=self._trusts
        )
        return model.to(default_device()).eval()


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let a model whose weights were quantised from another format compute in this one."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if getattr(module, "compute_dtype", None) is not None:
            module.compute_dtype = dtype


def _readme(out: Path, facts: dict[str, Any], agreement: Agreement) -> str:
    adapters = ", ".join(f"`{name}`" for name in facts["adapters"])
    held = "" if facts["base_held_in"] == "none" else f" dequantised from {facts['base_held_in']},"
    return (
        f"---\nbase_model: {facts['base']}\nlibrary_name: transformers\npipeline_tag: "
        f"text-{'classification' if agreement.unit == 'pair' else 'generation'}\n"
        f"tags: [tunesmith, merged]\n---\n\n# {out.name}\n\n`{facts['base']}`,{held} with {adapters} merged "
        f"into it by tunesmith; weights in {facts['dtype']}.\n\nAgainst the adapter on its base: "
        f"{agreement.line()}.\n"
    )

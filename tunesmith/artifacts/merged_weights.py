"""The weights of a base with an adapter worked in, written as safetensors one tensor at a time.

    base tensor --as it was trained: quantised and back--> PEFT's own layer.merge --> shard

The model is built hollow: its tensors have their shapes and no memory. Each adapted layer gets its base
weight when its turn comes and gives it back, so that no more than a layer is in memory beside the adapter.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.artifacts.combine import Combination, updates_of
from tunesmith.artifacts.found import Found
from tunesmith.artifacts.stored import StoredTensor, tensors_of
from tunesmith.errors import ModelError
from tunesmith.models.devices import frugal_memory, steady_memory
from tunesmith.models.save import ADAPTER, WHOLE_MODEL, split_name
from tunesmith.models.score import auto_class
from tunesmith.training import durable_files
from tunesmith.training.state_files import TensorFile

_PIECE = 2**20  # numbers
Read = Callable[[str], Tensor]


class NeedsWholeModel(Exception):
    """The base must be loaded whole; the message says why."""


@dataclass(frozen=True)
class Source:
    """The base's weights, as the adapter was trained on them.

    `quantized` names those that were quantised; `as_trained` gives what one of them stood for, and `others`
    is the format that the rest was loaded in then (None: as stored). `rows` is how many an embedding or head
    (`embeddings`) must have: for tokens that the run added there are more than stored, of which those that
    were not trained get the mean."""

    stored: dict[str, StoredTensor]
    quantized: set[str]
    as_trained: Callable[[Tensor], Tensor]
    others: torch.dtype | None
    embeddings: frozenset[str]
    rows: int

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.stored[name].shape
        return (max(self.rows, shape[0]), *shape[1:]) if name in self.embeddings else shape

    def read(self, name: str) -> Tensor:
        value = self.stored[name].read()
        if name in self.quantized:
            value = self.as_trained(value)
        elif self.others is not None and value.is_floating_point():
            value = value.to(self.others)
        missing = self.shape(name)[0] - value.shape[0] if value.ndim else 0
        if missing:
            mean = value.float().mean(0, keepdim=True).to(value.dtype)
            value = torch.cat([value, mean.expand(missing, -1)])
        return value


def hollow_model(settings: Any, trust_remote_code: bool, *, gives_scores: bool = False) -> Any:
    """The architecture with tensors that have a shape but share one number."""
    with torch.device("meta"):
        model = auto_class(gives_scores).from_config(
            settings, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(_hollow(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _hollow(buffer))
    model.tie_weights()
    return model


def _hollow(like: Tensor) -> Tensor:
    # On the CPU, and not on meta: PEFT puts an adapter where its base layer is.
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def with_score_head(stored: dict[str, StoredTensor], model: Any, adapter: Path) -> dict[str, StoredTensor]:
    """The tensors of a reward model: its base's without the head for next tokens, and the adapter's head.
    Raises NeedsWholeModel where the model has other names for them."""
    names = model.state_dict().keys()
    left = {name: tensor for name, tensor in stored.items() if not name.startswith("lm_head.")}
    unknown = sorted(left.keys() - names)
    if unknown:
        raise NeedsWholeModel(f"{unknown[0]} has another name in a sequence classifier")
    own = dict(tensors_of(adapter / ADAPTER))
    return left | {name: own[f"base_model.model.{name}"] for name in names if name.startswith("score.")}


def put_adapters(model: Any, founds: Sequence[Found]) -> tuple[Any, list[str]]:
    """PEFT's model around a hollow one, and the names of its adapters. Raises NeedsWholeModel where their
    method looks at the base's weights when it is loaded."""
    from peft import PeftModel

    names = ["default", *(f"adapter_{i}" for i in range(1, len(founds)))]
    try:
        # Or PEFT would fill what it is about to load first.
        adapted = PeftModel.from_pretrained(model, str(founds[0].adapter), low_cpu_mem_usage=True)
        for name, found in list(zip(names, founds, strict=True))[1:]:
            adapted.load_adapter(str(found.adapter), adapter_name=name, low_cpu_mem_usage=True)
    except (RuntimeError, NotImplementedError) as error:
        raise NeedsWholeModel(f"the adapter cannot be loaded without it: {error}") from error
    if any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values()):
        raise NeedsWholeModel("biases of the base were trained, too")
    for name, module in changed_modules(adapted).items():
        left = [own for own, tensor in module.named_parameters() if tensor.is_meta]
        left += [own for own, tensor in module.named_buffers() if tensor.is_meta and "original" not in own]
        if left:
            raise NeedsWholeModel(f"{name}.{left[0]} is made from the base's weights")
    return adapted, names


def changed_modules(adapted: Any) -> dict[str, Any]:
    """By the names that their base has in a model folder: the modules that adapters change."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = module
    return found


def follows(module: Any) -> bool:
    """Whether it changes nothing by itself: the head that is tied to an embedding with trained tokens."""
    return bool(getattr(getattr(module, "token_adapter", module), "tied_adapter", None))


def own_names(path: str, module: Any) -> list[str]:
    """Names, in a model folder, of the tensors that a changed module may change."""
    if type(module).__name__ == "ModulesToSaveWrapper":
        kept = module.modules_to_save[module.active_adapters[0]]
    else:
        kept = _layer(module).get_base_layer()
    return [f"{path}.{name}" for name, _ in kept.named_parameters()]


def _layer(module: Any) -> Any:
    layer = getattr(module, "token_adapter", module)
    if hasattr(getattr(layer, "base_layer", None), "base_layer"):
        raise NeedsWholeModel("an adapter's layer is wrapped in another's")
    return layer


@torch.no_grad()
def merged(
    path: str, module: Any, read: Read, adapters: Sequence[str], combination: Combination | None
) -> dict[str, Tensor]:
    """The float32 tensors of one changed module, by their names in a model folder."""
    if type(module).__name__ == "ModulesToSaveWrapper":
        kept = module.modules_to_save[module.active_adapters[0]]
        return {f"{path}.{name}": tensor.detach() for name, tensor in kept.named_parameters()}
    layer = _layer(module)
    before = layer.get_base_layer()
    for name, parameter in before.named_parameters():
        parameter.data = read(f"{path}.{name}").float()
    if combination is None:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:  # what is not finite
            raise ModelError(f"{path}: {error}") from error
    else:
        before.weight.data += combination.of(updates_of(layer, adapters), path)
    values = {f"{path}.{name}": p.data for name, p in layer.get_base_layer().named_parameters()}
    for parameter in (*before.parameters(), *layer.get_base_layer().parameters()):
        parameter.data = _hollow(parameter)
    return values


class MergedTensors:
    """All tensors of the merged model: their names and shapes beforehand, each one's values when asked for.

    `unties`: a head and an embedding that were one tensor are two now."""

    def __init__(
        self,
        source: Source,
        adapted: Any,
        adapters: Sequence[str],
        combination: Combination | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._source, self._adapters, self._combination, self._dtype = source, adapters, combination, dtype
        self._modules = changed_modules(adapted)
        self._ready: dict[str, Tensor] = {}
        self._of: dict[str, str] = {}  # changed tensor -> its module
        for path, module in self._modules.items():
            if not follows(module):
                self._of |= dict.fromkeys(own_names(path, module), path)
        self._tied = dict(getattr(adapted.get_base_model(), "all_tied_weights_keys", None) or {})
        self.unties = False
        names = set(source.stored)
        for head, embedding in self._tied.items():
            module = self._modules.get(head.rpartition(".")[0])
            if module is not None and follows(module):
                names.discard(head)
            elif {head, embedding} & self._of.keys():
                self.unties = True
                names |= {head, embedding}
        unknown = sorted(self._of.keys() - names)
        if unknown:
            raise NeedsWholeModel(f"{unknown[0]} has another name in the model's folder")
        self.like = {
            name: torch.empty(self._shape(name), dtype=self._kind(name), device="meta") for name in names
        }

    def read(self, name: str) -> Tensor:
        """In the format it is written in."""
        path = self._of.get(name)
        if path is None:
            return self._source.read(self._stored_name(name)).to(self._kind(name))
        if name not in self._ready:
            read = lambda own: self._source.read(self._stored_name(own))  # noqa: E731
            values = merged(path, self._modules[path], read, self._adapters, self._combination)
            self._ready |= values
        value, kind = self._ready.pop(name), self._kind(name)
        stored = self._stored_name(name)
        is_on_grid = self._source.stored[stored].dtype == kind and stored not in self._source.quantized
        return round_by_chance(value, kind, name) if is_on_grid else value.to(kind)

    def _stored_name(self, name: str) -> str:
        return name if name in self._source.stored else self._tied.get(name, name)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored_name(name))

    def _kind(self, name: str) -> torch.dtype:
        kind = self._source.stored[self._stored_name(name)].dtype
        return self._dtype if self._dtype is not None and kind.is_floating_point else kind


def round_by_chance(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A float32 tensor in a narrower format, each number up or down by chance such that it is right on
    average (stochastic rounding, Gupta et al. 2015, arXiv:1502.02551); the same each time for a `name`.

    A base weight lies on the grid of its format, and most updates are below half its spacing: rounded to the
    nearest, they are gone. SmolLM2-135M after 12 steps: KL to the adapter 5.3e-3 so, 9.6e-5 by chance. A
    dequantised weight lies anywhere, and the nearest is best (1.2e-4 against 2.2e-4)."""
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rounded = torch.empty(value.shape, dtype=dtype)
    # A piece at a time: the steps between take several times the memory.
    pieces = zip(torch.split(value.reshape(-1), _PIECE), torch.split(rounded.view(-1), _PIECE), strict=True)
    for part, out in pieces:
        near = part.to(dtype)
        rest = part - near.float()
        other = torch.nextafter(near, torch.full_like(near, torch.inf).copysign(rest.to(dtype)))
        chance = torch.rand(part.shape, generator=generator) * (other.float() - near.float()).abs()
        out.copy_(torch.where(chance < rest.abs(), other, near))
    return rounded


def write_shards(folder: Path, tensors: MergedTensors, shard_bytes: int) -> None:
    """Write them as transformers names them: one file, or several of at most `shard_bytes` (or one tensor)
    with an index."""
    frugal_memory()
    shards = list(_shards(tensors.like, shard_bytes))
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = split_name(WHOLE_MODEL, i, len(shards))
        where |= dict.fromkeys(names, file)
        content = TensorFile({name: tensors.like[name] for name in names}, {"format": "pt"})
        durable_files.write(folder / file, content.chunks(tensors.read))
    steady_memory()  # for whatever comes next
    if len(shards) > 1:
        total = sum(like.nbytes for like in tensors.like.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        text = json.dumps(index, indent=2) + "\n"
        durable_files.write(folder / f"{WHOLE_MODEL}.index.json", [text.encode()])


def _shards(like: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """By name, so that the tensors of a layer are neighbours."""
    names: list[str] = []
    size = 0
    for name in sorted(like):
        if names and size + like[name].nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += like[name].nbytes
    yield names

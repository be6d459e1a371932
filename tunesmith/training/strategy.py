"""What each of several ranks holds of one model, and how a whole is put together and taken apart again.

    ddp            everything on every rank                                  `Whole`
    fsdp           rows of each parameter and of its moments, as DTensors    `Fsdp`
    zero2, zero3   a range of the flattened parameters and moments           `Zero`

All three say the same few things, so that checkpoints and artefacts do not depend on the strategy or on the
number of ranks: what one saved, any other goes on with. Wholes are put together one tensor at a time, and
where there are several shards each rank keeps and writes its share of them, by tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from tunesmith.config import Config
from tunesmith.config.schema import DistributedConfig
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.models.held import Held

State = dict[str, Any]
# Whether this rank keeps tensor number i of all.
Keeps = Callable[[int], bool]
# The setting of FSDP by which the first rank hands out the weights.
_FROM_FIRST = "cpu_ram_efficient_loading"


class Strategy(Protocol):
    """How a rank gets at what all of them hold together. Every rank must call, with the same tensors."""

    num_shards: int
    """Files that weights and moments of a checkpoint are split into."""
    is_shared_out: bool
    """Whether a rank has a part only, once training has been prepared: then every rank must take part in
    each pass."""

    def num_held(self, tensor: Tensor) -> int:
        """Numbers of a parameter that this rank holds between passes. (Not collective.)"""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a parameter or buffer, in the precision it is trained in."""
        ...

    def set_whole(self, tensor: Tensor, value: Tensor) -> None:
        """Set all of a parameter or buffer."""
        ...

    def optimizer_state(self, optimizer: Any, keeps: Keeps) -> State:
        """`state_dict` of the optimiser, as if there were one rank, with the moments of those parameters,
        counted through all groups, that this rank keeps."""
        ...

    def load_optimizer_state(self, optimizer: Any, parts: Iterable[State]) -> None:
        """Set the state of the optimiser, given by parts that `optimizer_state` returned."""
        ...


class Whole:
    """Every rank has everything."""

    num_shards = 1
    is_shared_out = False

    def num_held(self, tensor: Tensor) -> int:
        return tensor.numel()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def set_whole(self, tensor: Tensor, value: Tensor) -> None:
        tensor.detach().copy_(value)

    def optimizer_state(self, optimizer: Any, keeps: Keeps) -> State:
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Any, parts: Iterable[State]) -> None:
        optimizer.load_state_dict(_joined(parts))


class Fsdp:
    """FSDP2: a parameter is a DTensor, and so are its moments."""

    is_shared_out = True

    def __init__(self, num_ranks: int) -> None:
        self.num_shards = num_ranks

    def num_held(self, tensor: Tensor) -> int:
        from torch.distributed.tensor import DTensor

        return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def set_whole(self, tensor: Tensor, value: Tensor) -> None:
        tensor.detach().copy_(_like(value, tensor))

    def optimizer_state(self, optimizer: Any, keeps: Keeps) -> State:
        state = dict(optimizer.state_dict())
        kept = {}
        for i, moments in state["state"].items():
            whole = {
                key: self.whole(value).cpu() if isinstance(value, Tensor) else value
                for key, value in moments.items()
            }
            if keeps(i):
                kept[i] = whole
        return state | {"state": kept}

    def load_optimizer_state(self, optimizer: Any, parts: Iterable[State]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def shared_out(i: int, moments: State) -> State:
            shape = parameters[i].shape
            return {
                key: _like(value, parameters[i]) if _is_moment(value, shape) else value
                for key, value in moments.items()
            }

        optimizer.load_state_dict(
            _joined(
                part | {"state": {i: shared_out(i, of) for i, of in part["state"].items()}} for part in parts
            )
        )


class Zero:
    """DeepSpeed ZeRO: a rank has a range of all parameters laid end to end, in float32, with its moments.

    `parameters`: of each group of the optimiser as it was before DeepSpeed took it."""

    is_shared_out = True

    def __init__(self, stage: int, num_ranks: int, parameters: Callable[[], list[list[Tensor]]]) -> None:
        self.stage = stage
        self.num_shards = num_ranks
        self._parameters = parameters

    def num_held(self, tensor: Tensor) -> int:
        return int(tensor.ds_tensor.numel()) if hasattr(tensor, "ds_tensor") else tensor.numel()

    def whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(tensor) if _is_prepared(tensor) else None
        if whole is not None:
            return whole
        with _gathered(tensor):
            return tensor.detach().clone()

    def set_whole(self, tensor: Tensor, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        with _gathered(tensor, modifier_rank=0):
            tensor.detach().copy_(value)
        if _is_prepared(tensor):  # what is trained is a float32 copy
            safe_set_full_fp32_param(tensor, value.to(tensor.device, torch.float32))

    def optimizer_state(self, optimizer: Any, keeps: Keeps) -> State:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero, base, groups = optimizer.optimizer, optimizer.optimizer.optimizer, self._parameters()
        _link_moments(zero)
        flat = _flats(zero)[0]
        keys = [name for name, value in base.state[flat].items() if _is_moment(value, flat.shape)]
        others = {name: value for name, value in base.state[flat].items() if name not in keys}
        kept = {}
        for i, parameter in enumerate(itertools.chain(*groups)):
            moments = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in keys}
            if keeps(i):
                kept[i] = others | moments
        described, numbers = [], itertools.count()
        for group, parameters in zip(base.param_groups, groups, strict=True):
            described.append(group | {"params": [next(numbers) for _ in parameters]})
        return {"state": kept, "param_groups": described}

    def load_optimizer_state(self, optimizer: Any, parts: Iterable[State]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        zero, base = optimizer.optimizer, optimizer.optimizer.optimizer
        parameters = list(itertools.chain(*self._parameters()))
        for part in parts:
            for group, saved in zip(base.param_groups, part["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key != "params"})
            for i, state in part["state"].items():
                shape = getattr(parameters[i], "ds_shape", parameters[i].shape)
                moments = {key: value for key, value in state.items() if _is_moment(value, shape)}
                for flat in _flats(zero):  # DeepSpeed makes them in the first step only
                    own = base.state[flat]
                    own.update({key: torch.zeros_like(flat) for key in moments if key not in own})
                    own.update({key: _copy(value) for key, value in state.items() if key not in moments})
                _link_moments(zero)
                for key, value in moments.items():
                    safe_set_full_optimizer_state(parameters[i], value.to(parameters[i].device), key)


def strategy_arguments(config: DistributedConfig) -> dict[str, Any]:
    """The fields of TrainingArguments that set an engine up.

    Raises ConfigError for settings of the engine that cannot be read or are of another strategy,
    MissingExtraError without DeepSpeed."""
    if "WORLD_SIZE" not in os.environ and config.strategy != "ddp":
        raise ConfigError(
            f"distributed.strategy={config.strategy} shares a model out over several processes, and this is "
            "a single one. Start it with tunesmith launch --nproc N, or leave the strategy out."
        )
    settings = _engine_settings(config)
    if config.strategy == "ddp":
        return {"ddp_timeout": config.timeout_s}
    if config.strategy == "fsdp":
        if config.offload == "all" and not torch.accelerator.is_available():
            raise ConfigError(
                "distributed.offload=all has fsdp keep weights off the accelerator, and there is none here. "
                "Set it to none."
            )
        ours = {"version": 2, "cpu_offload": config.offload == "all", _FROM_FIRST: True}
        return {"ddp_timeout": config.timeout_s, "fsdp": True, "fsdp_config": ours | settings}
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(f"distributed.strategy={config.strategy}", "deepspeed", "deepspeed")
    # It compiles with ninja, which lies beside the interpreter where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    stage = 3 if config.strategy == "zero3" else 2
    asked = settings.get("zero_optimization", {}).get("stage", stage)
    if asked != stage:
        other = f"the strategy to zero{asked}, or " if asked in (2, 3) else ""
        raise ConfigError(
            f"distributed.config has zero_optimization.stage {asked}, and distributed.strategy is "
            f"{config.strategy}. Set {other}the stage to {stage}."
        )
    engine = settings or _deepspeed_config(stage, config.offload)
    return {"ddp_timeout": config.timeout_s, "deepspeed": engine}


def who_holds(config: Config) -> Held:
    """Which ranks are to hold the weights until the engine shares them out: the first one, where it can."""
    by_all = (
        config.distributed.strategy not in ("fsdp", "zero3")
        or config.model.quantization != "none"
        or not _engine_settings(config.distributed).get(_FROM_FIRST, True)
    )
    return Held(by_all, by_all or PartialState().is_main_process)


def _engine_settings(config: DistributedConfig) -> dict[str, Any]:
    if not isinstance(config.config, str):
        return dict(config.config or {})
    file = Path(config.config)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"distributed.config={file}: expected a JSON file: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"distributed.config={file}: expected a JSON object, found {type(read).__name__}")
    return read


def _deepspeed_config(stage: int, offload: str) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload != "none":
        zero["offload_optimizer"] = pinned
    if offload == "all":
        zero["offload_param"] = pinned
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "communication_data_type": "fp32",  # in which gradients are summed, as with the other strategies
        # Ours knows which parameters decay, and runs where the memory is.
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(automatic, "auto"),
    }


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let accelerate shard on CPUs: of version 1.15 it takes FSDP's settings there, and runs DDP."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def sum_gradients_in_float32(plugin: Any) -> None:
    """As DDP sums those of float32 weights; of accelerate 1.15 FSDP does it in the format of the products."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)


def partition(model: Any, engine: dict[str, Any], *, here: bool) -> None:
    """Share a model's parameters out as ZeRO-3 has them, one at a time, from the first rank, which has the
    weights (`here`). DeepSpeed itself would first put the whole model on each rank's device.

    `engine`: DeepSpeed's settings."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            key: value for key, value in engine["zero_optimization"].items() if value != "auto"
        },
    }
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((formats[key] for key in formats if engine.get(key, {}).get("enabled") is True), None)
    first = None
    for parameter in dict.fromkeys(model.parameters()):
        if dtype is not None and parameter.is_floating_point():
            # Memory that is not written to is not taken.
            parameter.data = parameter.data.to(dtype) if here else torch.empty_like(parameter, dtype=dtype)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=torch.nn.ParameterList([first]), config_dict_or_path=settings)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])  # DeepSpeed gave it the method


@contextlib.contextmanager
def buffers_kept(model: Any) -> Iterator[None]:
    """Keep buffers that are saved with a model (a router's biases, say) out of what accelerate 1.15 shares
    out with FSDP: it takes each for a parameter."""
    saved = [
        (module, set(module._buffers) - module._non_persistent_buffers_set) for module in model.modules()
    ]
    for module, names in saved:
        module._non_persistent_buffers_set |= names
    try:
        yield
    finally:
        for module, names in saved:
            module._non_persistent_buffers_set -= names


def keep_layers_whole(model: Any) -> None:
    """Have ZeRO-3 put a decoder layer together as one, and not module by module: what is fused in a layer
    reads weights of several modules."""
    from deepspeed.utils import set_z3_leaf_modules

    names = set(getattr(model, "_no_split_modules", None) or ())
    kinds = {type(module) for module in model.modules() if type(module).__name__ in names}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))
        # A layer's gradients are taken away when that of its input is there: too early if it has none.
        model.enable_input_require_grads()


def _joined(parts: Iterable[State]) -> State:
    """One state of several that differ in whose moments they hold."""
    whole: State = {}
    for part in parts:
        whole = part | {"state": whole.get("state", {}) | part["state"]}
    return whole


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a value, as `tensor` is shared out; no rank is asked for it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor):
        return value
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _is_prepared(tensor: Tensor) -> bool:
    """Whether DeepSpeed trains it."""
    return hasattr(tensor, "_hp_mapping") or (hasattr(tensor, "_z3_optimizer") and tensor.requires_grad)


def _gathered(tensor: Tensor, **options: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id"), **options)


def _flats(zero: Any) -> list[Tensor]:
    """This rank's ranges of parameters in float32, as torch's optimiser knows them."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return list(zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups)


def _link_moments(zero: Any) -> None:
    """Of version 0.19 stages 1 and 2 do so once, when the first group of several has its moments, and the
    others have none yet."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _is_moment(value: Any, shape: Any) -> bool:
    """Whether it has a number for each of a parameter's, as the count of steps has not."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == shape


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

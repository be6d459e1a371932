"""How much disk a run will take, said before it starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tunesmith.config import Config
from tunesmith.errors import ConfigError
from tunesmith.models.save import checkpoint_weights, method_state_bytes
from tunesmith.training.durable_files import folder_bytes, free_bytes, in_words
from tunesmith.training.state_files import weights_file

_REST = 1 << 16  # random states, counters and names: tens of KiB
_SMALL = 4096  # numbers up to which bitsandbytes keeps a tensor's state in 32 bits


def weights_bytes(model: Any) -> int:
    """The weights of a checkpoint, which are also those of best/ and final/, or half as large there."""
    return len(weights_file(checkpoint_weights(model)[1]))


def checkpoint_bytes(model: Any, optimizer: str) -> int:
    """A checkpoint of a model that is trained by this `train.optimizer`, as predicted."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = math.ceil(sum(_state_bytes(p, optimizer) for p in trained))
    return weights_bytes(model) + moments + method_state_bytes(model) + _REST


def _state_bytes(parameter: Any, optimizer: str) -> float:
    size = parameter.numel()
    if optimizer == "sgd":
        return 0  # transformers' has no momentum
    if optimizer == "adafactor":  # a sum a row and a column of a matrix (Shazeer & Stern 2018, section 3)
        return 4.0 * (size if parameter.ndim < 2 else size / parameter.shape[-1] + size / parameter.shape[-2])
    moments = 1 if optimizer == "lion_8bit" else 2
    is_8bit = optimizer.endswith("8bit") and size > _SMALL
    return float(moments * size * (1 if is_8bit else 4))


def refuse_small_disk(
    config: Config, folder: Path, *, weights: int, checkpoint: int, num_saves: int, evaluates: bool
) -> None:
    """Raise ConfigError unless the most that the run folder will ever hold fits beside what it holds now:
    the checkpoints kept, the one being written, the one of the best step, best/ and final/ (each while it is
    replaced, too)."""
    kept = min(config.checkpoint.keep, num_saves) + 1 + evaluates
    needed = kept * checkpoint + (1 + 2 * evaluates) * weights
    held = sum(folder_bytes(folder / name) for name in ("checkpoints", "best", "final"))
    free = free_bytes(folder)
    if needed - held > free:
        raise ConfigError(
            f"{folder}: the run will need {in_words(needed)} of disk ({kept} checkpoints of "
            f"{in_words(checkpoint)}, and what it makes), of which {in_words(held)} are there, and "
            f"{in_words(free)} are free. Make room, choose another run.output_dir, or lower checkpoint.keep "
            f"from {config.checkpoint.keep}."
        )

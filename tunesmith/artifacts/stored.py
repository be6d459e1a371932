"""The tensors of a model folder, read one at a time: what was read is not kept, not even by the system as a
mapped file, as it is by the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.artifacts.found import Found
from tunesmith.errors import ModelError
from tunesmith.models.save import WHOLE_MODEL
from tunesmith.training.state_files import DTYPES

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_FILES = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, end) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        raw = np.fromfile(self.file, dtype=np.uint8, count=self.end - self.start, offset=self.start)
        if raw.nbytes != self.end - self.start:
            raise ModelError(f"{self.file}: it ends too early; is it whole?")
        return torch.from_numpy(raw).view(self.dtype).reshape(self.shape)


def model_folder(found: Found) -> Path:
    """The folder of a base model; one on the hub is fetched. Raises ModelError if there is none."""
    if Path(found.base).is_dir():
        return Path(found.base)
    from huggingface_hub import snapshot_download

    revision = found.run.model.revision if found.run is not None else None
    try:
        return Path(snapshot_download(found.base, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{found.base}: the base model is no folder and cannot be fetched: {error}"
        ) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name. Raises ModelError without safetensors."""
    index = folder / f"{WHOLE_MODEL}.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [WHOLE_MODEL]
    found: dict[str, StoredTensor] = {}
    for name in files:
        try:
            found |= {item: tensor for item, tensor in tensors_of(folder / name)}
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder / name}: cannot be read as safetensors: {error}") from error
    return found


def tensors_of(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file with their names."""
    # https://huggingface.co/docs/safetensors, "Format"
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + at for at in entry["data_offsets"])
            yield name, StoredTensor(file, _BY_NAME[entry["dtype"]], tuple(entry["shape"]), start, end)

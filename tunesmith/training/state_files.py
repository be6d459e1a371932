"""State of training as files without pickles: tensors as safetensors, plain values as JSON.

A tree of dicts, lists, tuples, tensors, numbers, strings and None (the state of an optimiser, a schedule, the
random generators) is one safetensors file: its tensors by number, and what holds them, as JSON, in the
metadata of the header. Reading one makes nothing but such a tree, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.errors import CheckpointError

# https://huggingface.co/docs/safetensors, "Format"
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file will hold. The tensors are read when it is written, each for itself, so that a
    model on an accelerator is never in memory twice."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def copied(self) -> TensorFile:
        """With tensors that training does not change any more, in this process's memory."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return TensorFile(copies, self.metadata)

    def chunks(self, read: Callable[[str], Tensor] | None = None) -> Iterator[bytes | memoryview]:
        """The bytes of the file. With `read`, `tensors` only say of which format and shape the values are
        that it gives, each when its turn has come."""
        header, order = self._header()
        yield header
        for name in order:
            tensor = self.tensors[name] if read is None else read(name)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                yield flat.view(torch.uint8).numpy().data

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._header()[0]) + sum(tensor.nbytes for tensor in self.tensors.values())

    def _header(self) -> tuple[bytes, list[str]]:
        """The header with its length, and the order of the tensors: wide numbers first, so that each lies
        where its kind may lie."""
        order = sorted(self.tensors, key=lambda name: (-self.tensors[name].element_size(), name))
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        at = 0
        for name in order:
            tensor = self.tensors[name]
            end = at + tensor.nbytes
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, order


# What a checkpoint holds, by name.
Files = dict[str, bytes | TensorFile]


def weights_file(tensors: Mapping[str, Tensor]) -> TensorFile:
    """Weights as transformers and PEFT write them."""
    return TensorFile(tensors, {"format": "pt"})


def state_file(tree: Any) -> TensorFile:
    """A tree as a file. Raises TypeError for a value of another kind."""
    tensors: dict[str, Tensor] = {}
    plain = _encode(tree, tensors)
    return TensorFile(tensors, {"format": "pt", "tree": json.dumps(plain)})


def read_state(file: Path) -> Any:
    """The inverse of `state_file`. Raises CheckpointError if the file is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return _decode(json.loads(opened.metadata()["tree"]), opened)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be written to a checkpoint")


def _decode(value: Any, opened: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, opened) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return opened.get_tensor(content)
    items = [_decode(item, opened) for item in content]
    return dict(items) if kind == "dict" else tuple(items)

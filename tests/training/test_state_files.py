"""State without pickles: what is written is read back, by stock safetensors too, and nothing else is run."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.errors import CheckpointError
from tunesmith.training import durable_files
from tunesmith.training.random_state import random_state, restore_random_state
from tunesmith.training.state_files import DTYPES, read_state, state_file, weights_file


def write(file, content):
    size, digest = durable_files.write(file, content.chunks())
    assert size == len(content) == file.stat().st_size
    assert digest == durable_files.sha256(file)


def test_stock_safetensors_reads_every_kind_of_tensor(tmp_path):
    tensors = {str(dtype): torch.tensor([[0.0], [1.0], [1.0]]).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.5), "turned": torch.rand(3, 4).t()}
    write(tmp_path / "w", weights_file(tensors))
    loaded = load_file(tmp_path / "w")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert loaded[name].tolist() == tensor.tolist()


def test_a_tree_of_plain_values_and_tensors_is_read_back(tmp_path):
    tree = {
        0: {"step": torch.tensor(3.0), "moment": torch.rand(2, 3)},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": True, "none": None, "params": [0, 1]}],
        "odd": {"tuple": ["a"], "dict": [1]},
        "empty": [{}, [], ()],
    }
    write(tmp_path / "s", state_file(tree))
    read = read_state(tmp_path / "s")
    assert torch.equal(read[0].pop("moment"), tree[0].pop("moment"))
    assert read == tree


def test_a_value_of_another_kind_is_refused_when_it_is_saved():
    with pytest.raises(TypeError, match="a set cannot be written to a checkpoint"):
        state_file({"a": {1, 2}})


def test_random_generators_go_on_as_they_would_have(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    write(tmp_path / "r", state_file(random_state()))
    first = draw()
    assert draw() != first
    restore_random_state(read_state(tmp_path / "r"))
    assert draw() == first


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_in_place_of_state_is_not_run(tmp_path, kind):
    proof = tmp_path / "proof"
    file = tmp_path / "optimizer.safetensors"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Hostile(proof)))
    else:
        torch.save({"state": Hostile(proof)}, file)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: cannot be read"):
        read_state(file)
    assert not proof.exists()
    # It would have been:
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if kind == "torch.save" else pickle.load(content)
    assert proof.exists()

"""Several processes on one run: the same loss, the same gradient, the same weights as one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file
from tiny import conversations, write_rows

import tunesmith
from tunesmith.training.run_folder import read_metrics


def test_two_ranks_of_four_rows_are_one_rank_of_eight(run_config, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(7, seed=31))
    config = run_config(rows=21, data={"valid": str(valid)}, train={"batch_size": 8}, run={"name": "one"})
    one = tunesmith.sft(config)
    config["run"]["name"] = "two"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "127.0.0.1:0",
            "-m",
            "tunesmith",
            "sft",
            str(file),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = one.run.parent / "two"
    first, second = read_metrics(one.run / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for key in ("step", "rows", "tokens", "target_tokens"):
            assert a.get(key) == b.get(key)
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (key in a) == (key in b)
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-5), key
    weights, other = (
        load_file(one.final / "adapter_model.safetensors"),
        load_file(two / "final" / "adapter_model.safetensors"),
    )
    for name, value in weights.items():
        assert (value - other[name]).abs().max() <= 1e-2 * value.abs().max(), name
    # One speaker.
    assert done.stdout.count("trained parameters") == 1

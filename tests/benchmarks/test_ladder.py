"""The ladder on a tiny model in float32: every rung of it trains the same rows to the same losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed

from benchmarks.ladder.__main__ import main
from benchmarks.ladder.rungs import choose


@pytest.fixture
def data(tmp_path):
    """Data sets of the names that workloads read, a dozen short rows each."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": f"say {n}", "input": "", "output": f"{n} it is"} for n in range(12)]
    (folder / "alpaca_en_demo.json").write_text(json.dumps(rows), encoding="utf-8")
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"say {n}"}],
            "chosen": {"from": "gpt", "value": f"it is {n}"},
            "rejected": {"from": "gpt", "value": "it is not"},
        }
        for n in range(12)
    ]
    (folder / "dpo_en_demo.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path):
    """With room for the workloads' rows, or tunesmith would scale its rotary positions and the plain loop
    not."""
    folder = make_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("workload", "rungs"),
    [("a", ["plain_fp32", "tunesmith"]), ("c", ["plain_fp32", "tree_cached", "tunesmith"])],
)
def test_the_first_and_the_last_rung_have_the_same_losses(workload, rungs, data, model, tmp_path):
    out = tmp_path / "ladder.json"
    main(
        f"--workload {workload} --rungs {' '.join(rungs)} --rows 8 --rows-per-step 4 --threads 1 "
        f"--dtype float32 --data {data} --model {model} --out {out}".split()
    )
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [run.get("error") for run in runs] == [None] * len(rungs)
    losses = [[step["loss"] for step in run["steps"]] for run in runs]
    for other in losses[1:]:
        # float32 summed in another order.
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_a_rung_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match="no rung plane; there are plain_fp32"):
        choose(["plane"], "a")


def test_rungs_that_a_workload_does_not_have_are_left_out():
    assert [rung.name for rung in choose(["tree", "flat", "plain_fp32"], "c")] == ["plain_fp32", "tree"]
    assert [rung.name for rung in choose(["tree", "tree_cached"], "a")] == ["tree"]

"""The stop watch of start-up, and what `tunesmith sft --profile-startup` says with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import conversations, write_rows

from tunesmith.training import startup as module
from tunesmith.training.startup import Startup, process_age


def test_stages_add_up_to_the_time_since_the_process_began(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "process_age", lambda: 2.5)
    watch = Startup()
    for stage, seconds in [("a", 1.0), ("evaluation before training", 4.0), ("b", 0.5), ("a", 0.25)]:
        now[0] += seconds
        watch.mark(stage)
    assert watch.stages == {"Python": 2.5, "a": 1.25, "evaluation before training": 4.0, "b": 0.5}
    assert (watch.total, watch.alone) == (8.25, 4.25)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process began")
def test_the_age_of_a_process_is_the_time_since_it_was_started():
    code = "import time; time.sleep(0.5); from tunesmith.training.startup import process_age as a; print(a())"
    began = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    # The kernel keeps hundredths of a second; the rest of the gap is the end of the process.
    assert 0.5 <= age <= time.perf_counter() - began + 0.02


def test_an_age_that_the_system_does_not_say_is_none(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "read_text", missing)
    assert process_age() is None
    assert not Startup().sees_process


def test_profile_startup_prints_stages_that_add_up_and_keeps_them(run_config, tmp_path):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(6, seed=21))
    config = run_config(data={"valid": str(valid)}, eval={"answer_rows": 2, "max_new_tokens": 4})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    tunesmith = str(Path(sys.executable).with_name("tunesmith"))

    def run(name: str) -> tuple[str, dict]:
        arguments = ["sft", "c.yaml", "--profile-startup", f"run.name={name}", "train.max_steps=1"]
        done = subprocess.run(
            [tunesmith, *arguments, "train.epochs=null"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, json.loads((tmp_path / "runs" / name / "startup.json").read_text())

    said, figures = run("first")
    stages = figures["stages_s"]
    assert sum(stages.values()) == pytest.approx(figures["total_s"], abs=0.001 * len(stages))  # rounded
    before = stages["evaluation before training"] + stages["answers before training"]
    assert figures["startup_s"] == pytest.approx(figures["total_s"] - before, abs=0.002)
    assert all(stage in said for stage in [*stages, "total", "without evaluation and answers"])
    assert "data (prepared)" in stages
    assert "data (from the cache)" in run("second")[1]["stages_s"]

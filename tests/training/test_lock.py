"""One process on a run folder at a time, and none locked out by one that is no more."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

import tunesmith
from tunesmith.errors import ConfigError
from tunesmith.training.lock import Lock
from tunesmith.training.run_folder import read_metrics


def write_lock(folder, **holder):
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started_at_s": psutil.Process().create_time()}
    (folder / "lock.json").write_text(json.dumps(me | holder))
    return Lock(folder / "lock.json")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_of_a_living_process_is_refused_with_who_holds_it(tmp_path):
    lock = write_lock(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on {socket.gethostname()} is at work"):
        lock.acquire()
    lock.release()
    assert (tmp_path / "lock.json").exists()  # it was not ours


def test_a_lock_on_another_host_may_be_held_and_is_refused_with_what_to_remove(tmp_path):
    lock = write_lock(tmp_path, host="elsewhere", pid=dead_pid())
    with pytest.raises(ConfigError, match=r"on elsewhere .* If it is no more, remove .*lock.json"):
        lock.acquire()


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    lock = write_lock(tmp_path, pid=dead_pid())
    lock.acquire()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_process_number_went_to_another_process_is_taken_over(tmp_path):
    """This process has the number, but it began later than the lock says."""
    lock = write_lock(tmp_path, started_at_s=psutil.Process().create_time() - 3600)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_a_crash_left_without_content_is_taken_over(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    Lock(tmp_path / "lock.json").acquire()


def test_of_processes_that_start_at_once_one_gets_the_lock(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tunesmith.errors import ConfigError\n"
        "from tunesmith.training.lock import Lock\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: Lock(Path(sys.argv[1])).acquire()\n"
        "except ConfigError: print('refused', flush=True)\n"
        "else: print('held', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    write_lock(tmp_path, pid=dead_pid())  # a stale one, which all of them may take over
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "lock.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate("\n")
    assert said == ["held", "refused", "refused", "refused"]


def test_a_second_process_on_a_run_is_refused_and_one_after_a_kill_is_not(run_config, tmp_path):
    config = run_config(checkpoint={"every_steps": 1}, train={"epochs": 40})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = tmp_path / "runs" / "r"
    first = subprocess.Popen([sys.executable, "-m", "tunesmith", "sft", str(file)], stdout=subprocess.DEVNULL)
    while not read_metrics(run / "metrics.jsonl"):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # a process that does nothing is still there
    try:
        with pytest.raises(ConfigError, match=f"process {first.pid} on"):
            tunesmith.sft(config)
        assert (run / "lock.json").is_file()
    finally:
        first.kill()
        first.wait()
    assert tunesmith.sft(config, ["train.epochs=1"]).final.is_dir()
    assert not (run / "lock.json").exists()


def test_a_run_that_fails_at_once_leaves_no_folder(run_config, tmp_path):
    with pytest.raises(tunesmith.errors.DataError):
        tunesmith.sft(run_config(data={"train": "/nowhere.jsonl"}))
    assert not (tmp_path / "runs").exists()

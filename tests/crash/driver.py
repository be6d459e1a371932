"""Trains in processes that are killed. torch is imported once; every run is a fork of this process, with a
number of its own, and the signal that ends it is a real SIGKILL.

    stdin    one JSON object a line:
             {"arguments", "log", "operations", "kill_at", "is_midway", "kill_after_s"}
    stdout   for each, when the run has ended: {"status", "seconds"}; a status below 0 is a signal's number

`arguments` are those of the command line, `log` takes what it prints. The file operations of the run are
listed in `operations`, a JSON array [name, path] a line. `kill_at: 7` kills before the seventh of them; with
`is_midway`, in its midst: half of a file is written, half of a folder's files are gone. `kill_after_s` kills
at that time.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import tunesmith.recipes.sft  # noqa: F401  so that no fork has to
from tunesmith import cli
from tunesmith.training import durable_files

OPERATIONS = ("make_folder", "write", "sync", "rename", "remove")


def main() -> None:
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would wait for them for ever
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started_at = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _train(order)
        status = _wait(pid, started_at, order.get("kill_after_s"))
        seconds = time.monotonic() - started_at
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True)


def _wait(pid: int, started_at: float, kill_after_s: float | None) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if kill_after_s is not None and time.monotonic() - started_at >= kill_after_s:
            os.kill(pid, signal.SIGKILL)
            kill_after_s = None
        time.sleep(0.002)


def _train(order: dict[str, Any]) -> None:
    """Run the command line in this process, and leave."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        _count_operations(Path(order["operations"]), order.get("kill_at"), order.get("is_midway", False))
        code = cli.main(order["arguments"])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _count_operations(listed: Path, kill_at: int | None, is_midway: bool) -> None:
    numbers, one_at_a_time = itertools.count(1), threading.Lock()
    descriptor = os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def counted(name: str) -> Any:
        original = getattr(durable_files, name)

        def operation(path: Path, *rest: Any) -> Any:
            with one_at_a_time:  # so that those before the last one of the list have been done
                result_at = rest[0] if name == "rename" else path
                os.write(descriptor, (json.dumps([name, str(result_at)]) + "\n").encode())
                if next(numbers) == kill_at:
                    if is_midway:
                        _do_half(name, path, *rest)
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(path, *rest)

        return operation

    for name in OPERATIONS:
        setattr(durable_files, name, counted(name))


def _do_half(name: str, path: Path, *rest: Any) -> None:
    """Half of a write or of the removal of a folder; nothing of the others, which are done in one instant."""
    if name == "write":
        content = b"".join(rest[0])
        path.write_bytes(content[: len(content) // 2])
    elif name == "remove" and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files[: (len(files) + 1) // 2]:
            file.unlink()


if __name__ == "__main__":
    main()

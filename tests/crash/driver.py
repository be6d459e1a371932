"""Trains in processes that are killed. torch is imported once; every run is a fork of this process, or one
for each of its ranks, with numbers of their own, and the signal that ends it is a real SIGKILL.

    stdin    one JSON object a line: {"arguments", "log", "places", "ranks",
             "kill_at", "is_midway", "kill_after_s", "rank", "is_alone"}
    stdout   for each, when all of the run has ended: {"statuses", "is_hung", "seconds"}; a status a rank,
             below 0 it is a signal's number

`arguments` are those of the command line, `log` takes what it prints. The places that the run comes to are
listed, as a JSON array [name, what] a line, in `places`; those of rank 1 in the same with `.1` at its end:

    make_folder, write, sync, rename, remove   before a file operation of durable_files
    append                                     before a line of metrics.jsonl is written
    rows, pass, update     before the rows of a step are fetched, before a forward pass of it, before its
                           gradients reach the weights
    evaluation             before a forward pass of an evaluation

`kill_at: 7` kills before the seventh of them, `kill_at: ["rows", "step 7"]` at the first of that name; with
`is_midway`, in its midst: half of a file is written, half of a folder's files are gone. `kill_after_s` kills
at that time. All ranks are killed, or only `rank` if it `is_alone`: the others are left to end by themselves.
Where they do not, they are killed too, and the run `is_hung`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tunesmith.recipes.train  # noqa: F401  so that no fork has to
from tunesmith import cli
from tunesmith.training import durable_files
from tunesmith.training.callbacks import MetricsFile
from tunesmith.training.trainer import PackTrainer

OPERATIONS = ("make_folder", "write", "sync", "rename", "remove")
# Methods of the trainer, and what is about to happen when they are called.
_TRAINING = {"get_batch_samples": "rows", "compute_loss": "pass", "_get_grad_norm": "update"}
# A run takes some 5 s, half a minute more where DeepSpeed compiles for the first time, and no rank outlives
# the others by one: these are for what hangs.
_LONGEST_S, _LONGEST_ALONE_S = 400.0, 20.0


def main() -> None:
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would wait for them for ever
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started_at = time.monotonic()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        pids = []
        for rank in range(order["ranks"]):
            pid = os.fork()
            if pid == 0:
                if order["ranks"] > 1:  # what torchrun sets
                    os.environ.update(
                        address,
                        RANK=str(rank),
                        LOCAL_RANK=str(rank),
                        WORLD_SIZE=str(order["ranks"]),
                        LOCAL_WORLD_SIZE=str(order["ranks"]),
                    )
                _train(order, rank)
            pids.append(pid)
        statuses, is_hung = _wait(pids, order, started_at)
        seconds = time.monotonic() - started_at
        print(json.dumps({"statuses": statuses, "is_hung": is_hung, "seconds": seconds}), flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(pids: list[int], order: dict[str, Any], started_at: float) -> tuple[list[int], bool]:
    """Exit status of each, and whether any had to be killed that should have ended."""
    statuses: dict[int, int] = {}
    kill_after_s, is_hung, first_ended_at = order.get("kill_after_s"), False, None
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    first_ended_at = first_ended_at or time.monotonic()
        now = time.monotonic()
        left = [pid for pid in pids if pid not in statuses]
        is_late = kill_after_s is not None and now - started_at >= kill_after_s
        if is_late or (-signal.SIGKILL in statuses.values() and not order["is_alone"]):
            kill_after_s, doomed = None, left
        elif now - started_at > _LONGEST_S or now - (first_ended_at or now) > _LONGEST_ALONE_S:
            doomed, is_hung = left, is_hung or bool(left)
        else:
            doomed = []
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids], is_hung


def _train(order: dict[str, Any], rank: int) -> None:
    """Run the command line in this process, and leave."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        kill_at = order.get("kill_at") if rank == order["rank"] else None
        listed = Path(order["places"] + (f".{rank}" if rank else ""))
        _count_places(listed, kill_at, order.get("is_midway", False))
        code = cli.main(order["arguments"])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _count_places(listed: Path, kill_at: int | list[str] | None, is_midway: bool) -> None:
    numbers = itertools.count(1)
    # An operation holds it until it is done, so that those before the last place of the list have been.
    one_at_a_time = threading.RLock()
    descriptor = os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def come_to(place: list[str], do_half: Callable[[], None]) -> None:
        os.write(descriptor, (json.dumps(place) + "\n").encode())
        if kill_at in (next(numbers), place):
            if is_midway:
                do_half()
            os.kill(os.getpid(), signal.SIGKILL)

    def operation(name: str) -> Any:
        original = getattr(durable_files, name)

        def counted(path: Path, *rest: Any) -> Any:
            with one_at_a_time:
                result_at = rest[0] if name == "rename" else path
                come_to([name, str(result_at)], lambda: _do_half(name, path, *rest))
                return original(path, *rest)

        return counted

    def of_training(method: str, name: str) -> Any:
        original = getattr(PackTrainer, method)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step + (name != "evaluation")
            is_last = step and step % self.plan.steps_per_epoch == 0
            with one_at_a_time:
                come_to([name, f"step {step}" + (", the last of its epoch" if is_last else "")], lambda: None)
            return original(self, *args, **kwargs)

        return counted

    append = MetricsFile._append

    def counted_append(self: Any) -> None:
        with one_at_a_time:
            half = self._unwritten[: len(self._unwritten) // 2]
            come_to(["append", str(self.file)], lambda: self.file.open("ab", buffering=0).write(half))
            append(self)

    for name in OPERATIONS:
        setattr(durable_files, name, operation(name))
    for method, name in _TRAINING.items():
        setattr(PackTrainer, method, of_training(method, name))
    # Entered for each pass of an evaluation, and once for all answers at the end.
    PackTrainer.autocast = of_training("autocast", "evaluation")  # type: ignore[method-assign]
    MetricsFile._append = counted_append  # type: ignore[method-assign]


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

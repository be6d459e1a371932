"""One process on a run folder at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tunesmith.errors import ConfigError
from tunesmith.training import durable_files

LOCK = "lock.json"


class Lock:
    """A file that names the process that holds it. One whose process is no more is taken over: there is no
    such process on this host, or the number has gone to one that began later."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._is_held = False

    def acquire(self) -> None:
        """Raises ConfigError if another process holds it."""
        with _alone(self.file.parent):
            if (holder := self.holder()) is not None:
                raise ConfigError(
                    f"{self.file.parent}: process {holder['pid']} on {holder['host']} is at work in this run "
                    "folder. Wait for it, end it, or choose another run.name."
                    + ("" if _is_here(holder) else f" If it is no more, remove {self.file}.")
                )
            durable_files.replace_file(self.file, json.dumps(_this_process()).encode())
            self._is_held = True

    def release(self) -> None:
        """Remove the file if it is ours."""
        if self._is_held:
            self._is_held = False
            self.file.unlink(missing_ok=True)

    def holder(self) -> dict[str, Any] | None:
        """Host and pid of the process that holds it, or None if that is no more."""
        try:
            holder = json.loads(self.file.read_text(encoding="utf-8"))
            return holder if _may_be_alive(holder) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started_at_s": psutil.Process(pid).create_time()}


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(holder["host"] == socket.gethostname())


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """Of a process on another host nothing is known, so it may."""
    if not _is_here(holder):
        return True
    try:
        process = psutil.Process(holder["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # To a second: the clock that start times are told by may be set while a process runs.
        return bool(abs(process.create_time() - holder["started_at_s"]) < 1)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of two processes that start at once, one after the other looks at the lock and takes it. Where folders
    cannot be locked (Windows, some network disks) they may meet."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

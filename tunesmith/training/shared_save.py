"""A checkpoint that several ranks write together, on a disk that all of them see.

    rank 0   makes .step-000100.tmp, and all wait for that     writes its files, waits for the notes,
    rank 1   writes its files there, then a note of them       takes them away, writes the manifest, renames

The notes are files, and no messages between processes: a save may go on beside training, whose messages must
not be mixed with others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from dataclasses import dataclass
from pathlib import Path

from tunesmith.training import durable_files
from tunesmith.training.checkpoints import write_files
from tunesmith.training.state_files import Files

_LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Shares:
    """What the other ranks write. Waits no longer than `timeout_s` for it."""

    num_ranks: int
    timeout_s: float

    def collect(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file of the others. Raises OSError if one failed, or is late."""
        until = time.monotonic() + self.timeout_s
        written: dict[str, tuple[int, str]] = {}
        for rank in range(1, self.num_ranks):
            note = _note(folder, rank)
            while not note.exists():
                if time.monotonic() > until:
                    why = f"rank {rank} has not written its share in {self.timeout_s:g} s"
                    raise OSError(errno.ETIMEDOUT, why, str(folder))
                time.sleep(_LOOK_EVERY_S)
            told = json.loads(note.read_text(encoding="utf-8"))
            if "error" in told:
                raise OSError(told["errno"], f"rank {rank}: {told['error']}", str(folder))
            written |= {name: (size, sha256) for name, (size, sha256) in told["files"].items()}
            durable_files.remove(note)
        return written


def write_share(folder: Path, rank: int, files: Files) -> None:
    """Write this rank's files, and a note of them or of what went wrong."""
    try:
        told: dict[str, object] = {"files": write_files(folder, files)}
    except OSError as error:
        told = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}
    with contextlib.suppress(OSError):  # the first rank has given up, and taken the folder away
        durable_files.replace_file(_note(folder, rank), json.dumps(told).encode())


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"

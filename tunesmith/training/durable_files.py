"""File operations that survive a crash: every file that a run must not lose goes through these few.

    .NAME.tmp     being written: never looked at
    NAME          complete, since it was renamed into place when everything in it was on disk
    .NAME.old     the one before, while NAME is being replaced
    .NAME.gone    being deleted

`clean` removes what a kill left of them, and puts `.NAME.old` back where it left no NAME.

The operations of a save are calls of `make_folder`, `write`, `sync`, `rename` and `remove`, by these names
of this module: a test that wants to stop between any two of them replaces these.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | memoryview

_BLOCK = 1 << 20


# --- operations


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def write(file: Path, chunks: Iterable[Buffer]) -> tuple[int, str]:
    """Write a file and force it to disk; returns its size in bytes and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return size, digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk. Folders cannot be opened on Windows; there the rename alone must do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """In one instant; a file that has the new name is replaced, a folder is not."""
    os.replace(old, new)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- made of these


def temporary(path: Path) -> Path:
    """Where `path` is written before it is complete."""
    return _hidden(path, "tmp")


def replace_file(file: Path, content: bytes) -> None:
    """Write a file such that it holds the old content or the new one, whenever the process or machine
    stops."""
    write(temporary(file), [content])
    rename(temporary(file), file)
    sync(file.parent)


def publish(final: Path) -> None:
    """Put the folder `temporary(final)`, whose files are on disk, in the place of `final`. At every instant
    the new one or the one before is there, the latter maybe as `.NAME.old`, from where `clean` brings it
    back."""
    before = _hidden(final, "old")
    sync(temporary(final))
    if final.exists():
        remove(before)
        rename(final, before)
    rename(temporary(final), final)
    sync(final.parent)
    remove(before)


def discard(folder: Path) -> None:
    """Delete a folder, which is not there from the first instant on, and never there in part."""
    gone = _hidden(folder, "gone")
    remove(gone)
    rename(folder, gone)
    remove(gone)


def clean(folder: Path) -> None:
    """Remove what a kill left behind in `folder`, and undo a replacement that it cut short."""
    for before in sorted(folder.glob(".*.old")):
        name = folder / before.name[1 : -len(".old")]
        if name.exists():
            remove(before)
        else:
            rename(before, name)
    for ending in ("tmp", "gone"):
        for left in sorted(folder.glob(f".*.{ending}")):
            remove(left)


def sha256(file: Path) -> str:
    """The hash of a file as it is on the disk, not as it may still stand in memory (on Linux)."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        if sys.platform == "linux":
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder; what is taken away meanwhile does not count."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or will."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk if fewer than so many bytes are free."""
    if (free := free_bytes(folder)) < needed:
        raise OSError(
            errno.ENOSPC, f"{in_words(needed)} are needed and {in_words(free)} are free", str(folder)
        )


def in_words(num_bytes: int) -> str:
    """Bytes for a reader: 1.2 GiB."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")

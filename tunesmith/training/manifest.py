"""The manifest of a folder: written last, it makes the folder complete, and tells later whether it still is
what was saved.

    files    name -> bytes and SHA-256 of every file but the manifest itself
    sha256   of the manifest's other entries
    ...      what else whoever wrote the folder wants to know of it, such as the step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.training import durable_files

MANIFEST = "manifest.json"


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> None:
    """Complete a folder of files that are on disk. `files`: size in bytes and SHA-256 by name."""
    content = {**facts, "files": {name: {"bytes": n, "sha256": hash_} for name, (n, hash_) in files.items()}}
    text = json.dumps({**content, "sha256": _sha256(content)}, indent=2, ensure_ascii=False)
    durable_files.write(folder / MANIFEST, [text.encode()])


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Complete a folder that a library has written into: its files to disk, then the manifest of them."""
    files = {}
    for name in sorted(_names(folder)):
        durable_files.sync(folder / name)
        files[name] = ((folder / name).stat().st_size, durable_files.sha256(folder / name))
    write_manifest(folder, facts, files)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if there is none, or it is not as it was written."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("sha256", None) != _sha256(content):
        raise ValueError("it differs from what was saved")
    return content


def find_damage_by_size(folder: Path) -> str | None:
    """What can be seen of it without reading the files: a manifest that is none, a file that is missing or
    not as long as it was."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({error})"
    found = _names(folder)
    for name, expected in files.items():
        if name not in found:
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, expected {expected['bytes']}"
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder, or None: every file of the manifest is there, as long and as it was, and
    no other. Reads all of it."""
    if (problem := find_damage_by_size(folder)) is not None:
        return problem
    files = read_manifest(folder)["files"]
    for name, expected in files.items():
        try:
            if durable_files.sha256(folder / name) != expected["sha256"]:
                return f"{name} differs from what was saved (SHA-256)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    if more := sorted(_names(folder) - files.keys()):
        return f"{more[0]} was not saved with it"
    return None


def _names(folder: Path) -> set[str]:
    """The files below a folder but its manifest, with `/` between folders."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return found - {MANIFEST}


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

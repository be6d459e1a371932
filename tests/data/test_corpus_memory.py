"""Preparing a corpus takes the same memory whatever its size.

`TUNESMITH_CORPUS_MB=2000 make test-long` tries it at 2 GB; 200 MB take about a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.demo_model]
REPOSITORY = Path(__file__).parents[2]
MEGABYTES = int(os.environ.get("TUNESMITH_CORPUS_MB", "200"))


def prepared(tokenizer: Path, megabytes: int) -> dict[str, Any]:
    """What benchmarks/pretrain_data.py says of a corpus of this size, prepared by two workers."""
    command = [sys.executable, "-m", "benchmarks.pretrain_data", str(tokenizer), "--only", "ours"]
    command += ["--gigabytes", str(megabytes / 1000), "--workers", "2"]
    said = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return json.loads(said)


@pytest.mark.skipif(sys.platform != "linux", reason="shared pages are counted once from /proc")
def test_a_corpus_four_times_as_large_takes_no_more_memory(demo_model: Path) -> None:
    """Of all processes together, with pages that they share counted once."""
    part, whole = (prepared(demo_model, megabytes) for megabytes in (MEGABYTES // 4, MEGABYTES))
    for corpus in (part, whole):
        assert corpus["ours"]["documents"] == corpus["documents"]
        assert corpus["ours"]["tokens"] > corpus["bytes"] / 8
    assert whole["ours"]["tokens"] > 3.8 * part["ours"]["tokens"]
    peaks = [corpus["ours"]["peak_gib"]["together, shared pages once"] for corpus in (part, whole)]
    assert peaks[1] < 1.5
    # To hold the text, or the tokens with their four bytes each, would take all of what it grew by.
    assert peaks[1] - peaks[0] < 0.5 * (whole["bytes"] - part["bytes"]) / 2**30, peaks

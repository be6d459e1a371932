"""The tables of docs/scaling.md are what the script prints, and what its formulas give by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed

from benchmarks.scaling_estimate import MODELS, sent_bytes, state_bytes, tables


def test_the_tables_of_the_docs_are_what_the_script_prints():
    assert tables() in (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")


def test_sizes_are_those_of_the_published_models():
    """Parameters as transformers counts them; LoRA r=16 on all linear layers as PEFT does for 7B."""
    assert [model.parameters for model in MODELS] == [
        494_032_768,
        1_543_714_304,
        7_615_616_512,
        32_763_876_352,
        72_706_203_648,
    ]
    assert MODELS[2].adapter == 40_370_176


def test_cells_computed_by_hand():
    seven = MODELS[2]
    # 22 bytes * 7,615,616,512
    assert state_bytes(seven, "ddp", 8, is_lora=False) == 167_543_563_264
    assert "| 7B | in full | 128 | 156 |" in tables()  # 167,543,563,264 / 2**30 = 156.04
    # 2 bytes * 7,615,616,512 + 2 bytes * 40,370,176 + 14 bytes * 40,370,176 / 64
    assert state_bytes(seven, "zero2", 64, is_lora=True) == pytest.approx(15_320_804_352)
    # 8 bytes * 7,615,616,512 * 7 / 8
    assert sent_bytes(seven, "ddp", 8, is_lora=False) == pytest.approx(53_309_315_584)
    # (4 bytes * 7,615,616,512 + 8 bytes * 40,370,176) * 7 / 8
    assert sent_bytes(seven, "fsdp", 8, is_lora=True) == pytest.approx(26_937_249_024)

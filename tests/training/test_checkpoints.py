"""Which checkpoints there are, which are kept, and what one must hold."""

from __future__ import annotations

import errno
import shutil

import pytest
from training.test_durable_files import checkpoint_files, write

from tunesmith.errors import CheckpointError
from tunesmith.training import durable_files
from tunesmith.training.checkpoints import Checkpoints


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.complete()]


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_the_newest_and_the_best_are_kept(checkpoints):
    for step in range(1, 6):
        write(checkpoints, step, 0.0, best=min(step, 2))
    assert steps(checkpoints) == [2, 4, 5]


def test_a_run_taken_back_gives_up_later_steps_when_the_next_one_is_safe(checkpoints):
    """Else the two newest by number would be kept, and what was just saved deleted."""
    for step in (4, 8):
        write(checkpoints, step, 0.0)
    write(checkpoints, 5, 1.0)
    assert steps(checkpoints) == [4, 5]


def test_nothing_old_is_deleted_when_the_new_one_does_not_read_back(checkpoints, monkeypatch):
    for step in (1, 2):
        write(checkpoints, step, 0.0)
    original = durable_files.write

    def flip_a_bit(file, chunks):
        written = original(file, chunks)
        if file.name == "optimizer.safetensors":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        return written

    monkeypatch.setattr(durable_files, "write", flip_a_bit)
    with pytest.raises(OSError, match=r"does not read back: optimizer.safetensors differs") as error:
        write(checkpoints, 3, 0.0)
    assert error.value.errno == errno.EIO
    assert steps(checkpoints) == [1, 2]
    assert sorted(item.name for item in checkpoints.folder.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("name", sorted(checkpoint_files(0)))
def test_a_checkpoint_saved_without_a_part_is_none(checkpoints, name):
    write(checkpoints, 1, 0.0)
    files = checkpoint_files(0.0)
    del files[name]
    checkpoints.write(2, files, {"ranks": 1}, best=None)
    newest, problems = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    part = "weights" if name == "adapter_model.safetensors" else name
    assert problems == [f"{checkpoints.folder / 'step-000002'}: it was saved without {part}"]


def test_every_rank_must_have_its_random_state(checkpoints):
    checkpoints.write(1, checkpoint_files(0.0), {"ranks": 2}, best=None)
    with pytest.raises(CheckpointError, match=r"it was saved without rng-1.safetensors"):
        checkpoints.at(1)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoints):
    write(checkpoints, 3, 0.0)
    shutil.copytree(checkpoints.folder / "step-000003", checkpoints.folder / "step-000009")
    newest, problems = checkpoints.newest()
    assert newest is not None
    assert newest.step == 3
    assert problems == [f"{checkpoints.folder / 'step-000009'}: it is of step 3, not 9"]


def test_a_folder_without_a_manifest_is_damaged_and_not_complete(checkpoints):
    write(checkpoints, 1, 0.0)
    (checkpoints.folder / "step-000002").mkdir()
    newest, (problem,) = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert "its manifest cannot be read" in problem
    assert steps(checkpoints) == [1]


def test_a_full_disk_is_seen_before_anything_is_written(checkpoints, monkeypatch):
    write(checkpoints, 1, 0.0)
    size = sum(map(len, checkpoint_files(0.0).values()))
    monkeypatch.setattr(durable_files, "free_bytes", lambda _: size - 1)
    with pytest.raises(OSError, match=r"are needed and .* are free") as error:
        write(checkpoints, 2, 0.0)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setattr(durable_files, "free_bytes", lambda _: size)
    write(checkpoints, 2, 0.0)
    assert steps(checkpoints) == [1, 2]

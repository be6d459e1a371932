"""A process that dies between any two file operations leaves the folder as it was or as it was to be."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from tunesmith.training import durable_files
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.manifest import find_damage, seal
from tunesmith.training.state_files import state_file, weights_file

OPERATIONS = ("make_folder", "write", "sync", "rename", "remove")


class Killed(BaseException):
    """No `except Exception`, no `except OSError` runs when a process is killed."""


@contextlib.contextmanager
def killed_before(monkeypatch, number: int):
    """Die before operation `number`; yields the list of operations that ran."""
    ran: list[str] = []

    def counted(name):
        original = getattr(durable_files, name)

        def operation(*args):
            if len(ran) == number:
                raise Killed
            ran.append(name)
            return original(*args)

        return operation

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(durable_files, name, counted(name))
        with contextlib.suppress(Killed):
            yield ran


def checkpoint_files(value: float) -> dict:
    """The least that a checkpoint must hold."""
    return {
        "adapter_model.safetensors": weights_file({"w": torch.full((4,), value)}),
        "optimizer.safetensors": state_file({"lr": value}),
        "scheduler.safetensors": state_file({}),
        "rng-0.safetensors": state_file({}),
        "trainer_state.json": b"{}",
        "progress.json": b"{}",
    }


def write(checkpoints: Checkpoints, step: int, value: float, best: int | None = None) -> None:
    checkpoints.write(step, checkpoint_files(value), {"ranks": 1, "value": value}, best=best)


def number_of_operations(monkeypatch, action) -> int:
    with killed_before(monkeypatch, 10**9) as ran:
        action()
    return len(ran)


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_save_killed_before_any_operation_leaves_a_good_checkpoint(monkeypatch, tmp_path, again):
    step = 1 if again else 2
    counted = Checkpoints(tmp_path / "counted", keep=1)
    write(counted, 1, 1.0)
    total = number_of_operations(monkeypatch, lambda: write(counted, step, 2.0))
    assert total > len(checkpoint_files(0)) + 3
    seen = set()
    for number in range(total):
        checkpoints = Checkpoints(tmp_path / f"{number}", keep=1)
        write(checkpoints, 1, 1.0)
        with killed_before(monkeypatch, number):
            write(checkpoints, step, 2.0)
        checkpoints.clean()
        newest, damaged = checkpoints.newest()
        assert newest is not None
        assert damaged == []
        assert (newest.step, newest.facts()["value"]) in {(1, 1.0), (step, 2.0)}
        seen.add(newest.facts()["value"])
        assert not [item for item in checkpoints.folder.iterdir() if item.name.startswith(".")]
    assert seen == {1.0, 2.0}


def test_an_artifact_replaced_and_killed_before_any_operation_is_the_old_one_or_the_new(
    monkeypatch, tmp_path
):
    def replace(folder: Path, text: str) -> None:
        building = durable_files.temporary(folder)
        durable_files.remove(building)
        durable_files.make_folder(building)
        (building / "README.md").write_text(text)
        seal(building, {"text": text})
        durable_files.publish(folder)

    (tmp_path / "counted").mkdir()
    replace(tmp_path / "counted" / "best", "old")
    total = number_of_operations(monkeypatch, lambda: replace(tmp_path / "counted" / "best", "new"))
    for number in range(total):
        best = tmp_path / f"{number}" / "best"
        best.parent.mkdir()
        replace(best, "old")
        with killed_before(monkeypatch, number):
            replace(best, "new")
        # Someone who looks before the next start finds one of the two, whole, under one of two names.
        whole = [folder for folder in best.parent.iterdir() if find_damage(folder) is None]
        assert any(folder.name in ("best", ".best.old") for folder in whole)
        durable_files.clean(best.parent)
        assert [folder.name for folder in best.parent.iterdir()] == ["best"]
        assert find_damage(best) is None
        assert (best / "README.md").read_text() in ("old", "new")


def test_a_file_replaced_and_killed_before_any_operation_holds_the_old_or_the_new(monkeypatch, tmp_path):
    file = tmp_path / "config.yaml"
    for number in range(3):
        file.write_text("old")
        with killed_before(monkeypatch, number) as ran:
            durable_files.replace_file(file, b"new")
        assert len(ran) == number
        assert file.read_text() == ("new" if number == 2 else "old")


def test_a_folder_is_deleted_from_one_instant_to_the_next(monkeypatch, tmp_path):
    """Half of a checkpoint would look like a damaged one."""
    for number in range(3):
        folder = tmp_path / f"{number}" / "step-000001"
        folder.mkdir(parents=True)
        (folder / "a").write_text("a")
        seal(folder, {})
        with killed_before(monkeypatch, number):
            durable_files.discard(folder)
        assert not folder.exists() or find_damage(folder) is None


def test_a_manifest_tells_every_kind_of_damage(tmp_path):
    def sealed() -> Path:
        folder = tmp_path / "folder"
        durable_files.remove(folder)
        (folder / "sub").mkdir(parents=True)
        (folder / "a.bin").write_bytes(bytes(range(256)))
        (folder / "sub" / "b.bin").write_bytes(b"b")
        seal(folder, {"step": 7})
        assert find_damage(folder) is None
        return folder

    folder = sealed()
    content = bytearray((folder / "a.bin").read_bytes())
    content[100] ^= 4
    (folder / "a.bin").write_bytes(content)
    assert find_damage(folder) == "a.bin differs from what was saved (SHA-256)"
    folder = sealed()
    (folder / "a.bin").write_bytes(bytes(200))
    assert find_damage(folder) == "a.bin has 200 bytes, expected 256"
    folder = sealed()
    (folder / "sub" / "b.bin").unlink()
    assert find_damage(folder) == "sub/b.bin is missing"
    folder = sealed()
    (folder / "more.bin").write_bytes(b"")
    assert find_damage(folder) == "more.bin was not saved with it"
    folder = sealed()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 7', '"step": 6'))
    assert find_damage(folder) == "its manifest cannot be read (it differs from what was saved)"
    folder = sealed()
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert "its manifest cannot be read" in str(find_damage(folder))
    for text in ("[]", "{}", json.dumps({"sha256": None})):
        manifest.write_text(text)
        assert "its manifest cannot be read" in str(find_damage(folder))
    manifest.unlink()
    assert "its manifest cannot be read" in str(find_damage(folder))

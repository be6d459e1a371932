"""When a checkpoint is written, in which thread, and what is done when it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import CheckpointError
from tunesmith.training import durable_files, shared_save
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.state_files import Files


class Saver:
    """Writes checkpoints for a trainer.

    With `asynchronous` the tensors are copied, and a thread writes them while training goes on; one save at a
    time. What goes wrong there is met at the next call. `on_error`: `warn` says so and goes on, `stop` raises
    CheckpointError; the last good checkpoint is left as it was either way. `lines` is a file that training
    appends to, which must be on disk as far as the checkpoint goes."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        lines: Path,
        *,
        asynchronous: bool,
        on_error: Literal["warn", "stop"],
        say: Callable[[str], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.last_step: int | None = None
        """The last step that was saved whole, by this process."""
        self._lines = lines
        self._asynchronous = asynchronous
        self._on_error = on_error
        self._say = say
        self._writer: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None

    def begin(self, step: int) -> None:
        """Make the folder that several ranks will write a step into."""
        self.finish()
        try:
            self.checkpoints.begin(step)
        except OSError as error:  # met again, and told, when this rank writes
            self._say(f"warning: {error}")

    def save(
        self,
        step: int,
        files: Files,
        facts: Mapping[str, Any],
        *,
        best: int | None,
        shares: shared_save.Shares | None = None,
    ) -> None:
        """Write a checkpoint, or begin to. `best` is the step of the lowest eval loss so far; `shares` are
        what other ranks write of it."""
        self.finish()
        self._write(partial(self._save, step, facts=facts, best=best, shares=shares), step, files)

    def save_share(self, step: int, files: Files, rank: int) -> None:
        """Write what this rank has of a checkpoint that the first one completes."""
        self.finish()
        folder = durable_files.temporary(self.checkpoints.folder_of(step))
        self._write(partial(shared_save.write_share, folder, rank), step, files)

    def _write(self, write: Callable[[Files], None], step: int, files: Files) -> None:
        """Now, or in a thread of its own."""
        if not self._asynchronous:
            self._try(write, step, files)
            self._tell()
            return
        copied: Files = {
            name: content if isinstance(content, bytes) else content.copied()
            for name, content in files.items()
        }
        # A daemon: a second signal leaves at once, and what is half written is no checkpoint.
        self._writer = threading.Thread(
            target=self._try, args=(write, step, copied), name=f"save-step-{step}", daemon=True
        )
        self._writer.start()

    def finish(self) -> None:
        """Wait until what was begun is complete or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._tell()

    def poll(self) -> None:
        """Meet an error of the save under way as soon as there is one, without waiting."""
        if self._writer is not None and not self._writer.is_alive():
            self.finish()

    def tolerate(self, what: str, error: OSError) -> None:
        """Do what `on_error` says about something that could not be saved."""
        complete = [checkpoint.step for checkpoint in self.checkpoints.complete()]
        left = f"the last complete checkpoint is step {complete[-1]}" if complete else "there is none yet"
        message = f"{what} could not be saved ({_why(error)}); {left}"
        if self._on_error == "stop":
            raise CheckpointError(f"{message}. checkpoint.on_save_error=warn would have gone on.")
        self._say(f"warning: {message}. Going on to the next save (checkpoint.on_save_error is warn).")

    def _save(
        self,
        step: int,
        files: Files,
        *,
        facts: Mapping[str, Any],
        best: int | None,
        shares: shared_save.Shares | None,
    ) -> None:
        if self._lines.exists():
            durable_files.sync(self._lines)
        others = None if shares is None else shares.collect
        self.checkpoints.write(step, files, facts, best=best, others=others)
        self.last_step = step

    def _try(self, write: Callable[[Files], None], step: int, files: Files) -> None:
        try:
            write(files)
        except Exception as error:  # met in the thread of training, by `_tell`
            self._failed = step, error

    def _tell(self) -> None:
        if self._failed is None:
            return
        (step, error), self._failed = self._failed, None
        if not isinstance(error, OSError):
            raise error
        self.tolerate(f"step {step}", error)


def _why(error: OSError) -> str:
    """ENOSPC's own words, and ours where we were the first to see it."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"

"""Experiment trackers by name, fenced in: one that fails is reported once and the run goes on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunesmith.config import Config
from tunesmith.errors import MissingExtraError


class Fenced(TrainerCallback):
    """Passes every event on to a tracker's callback until it fails once."""

    def __init__(self, name: str, tracker: Any, say: Callable[[str], None]) -> None:
        self._name = name
        self._tracker: Any = tracker
        self._say = say

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, event)(*args, **kwargs)
        except Exception as error:  # a tracker's code may raise anything
            self._tracker = None
            self._say(f"warning: {self._name} failed in {event} and is off for the rest of the run: {error}")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_begin", *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_log", *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_end", *args, **kwargs)
        if self._name == "swanlab" and self._tracker is not None:
            import swanlab

            swanlab.finish()


def trackers(config: Config, folder: Path, say: Callable[[str], None]) -> list[Fenced]:
    """The trackers of `tracking.report_to`. Raises MissingExtraError for one that is not installed."""
    made = []
    for name in config.tracking.report_to:
        module = {"tensorboard": "tensorboard"}.get(name, name)
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f"tracking.report_to={name}", module, name)
        try:
            made.append(Fenced(name, _BUILDERS[name](config, folder), say))
        except Exception as error:  # a tracker's code may raise anything
            say(f"warning: {name} failed to start and is off for this run: {error}")
    return made


def _tensorboard(config: Config, folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))


def _wandb(config: Config, folder: Path) -> Any:
    from transformers.integrations import WandbCallback

    os.environ.setdefault(
        "WANDB_PROJECT", config.tracking.project
    )  # the callback has no other way to be told
    os.environ.setdefault("WANDB_DIR", str(folder))
    return WandbCallback()


def _swanlab(config: Config, folder: Path) -> Any:
    import swanlab
    from swanlab.integration.transformers import SwanLabCallback

    # transformers' own callback asks for a run that is already there and fails with swanlab 0.10.
    swanlab.init(
        project=config.tracking.project,
        experiment_name=config.run.name,
        mode=config.tracking.swanlab_mode,
        logdir=str(folder / "swanlab"),
    )
    return SwanLabCallback()


def _trackio(config: Config, folder: Path) -> Any:
    from transformers.integrations import TrackioCallback

    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    return TrackioCallback()


_BUILDERS: dict[str, Callable[[Config, Path], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
}

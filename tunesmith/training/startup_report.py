"""`tunesmith sft --profile-startup`: the stages of start-up as a table and as startup.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from tunesmith.config import Config
from tunesmith.data.cache import default_cache_dir
from tunesmith.training.run_folder import write_json
from tunesmith.training.startup import BEFORE_TRAINING, Startup


class StartupReport(TrainerCallback):
    """Ends the watch after the first optimiser step, prints the stages and writes them to `file`."""

    def __init__(self, startup: Startup, console: Console, file: Path) -> None:
        self._startup = startup
        self._console = console
        self._file = file
        self._is_done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._startup.mark("trainer set-up")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_done:
            return
        self._is_done = True
        self._startup.mark("first step")
        self._console.print(startup_table(self._startup), highlight=False)
        if not self._startup.sees_process:
            self._console.print(
                "[dim]This system does not say when the process began: what Python took to start is not in "
                "it.[/dim]",
                soft_wrap=True,
            )
        if state.is_world_process_zero:
            write_json(self._file, startup_figures(self._startup))


def startup_table(startup: Startup) -> Table:
    """A row for each stage, seconds and share of the total."""
    table = Table(box=None, pad_edge=False, title="from command to first step", title_justify="left")
    table.add_column("stage")
    table.add_column("s", justify="right")
    table.add_column("%", justify="right")
    for stage, seconds in startup.stages.items():
        table.add_row(stage, f"{seconds:.2f}", f"{100 * seconds / startup.total:.0f}")
    table.add_section()
    table.add_row("total", f"{startup.total:.2f}", "100", style="bold")
    if any(stage in startup.stages for stage in BEFORE_TRAINING):
        share = f"{100 * startup.alone / startup.total:.0f}"
        table.add_row("without evaluation and answers", f"{startup.alone:.2f}", share)
    return table


def startup_figures(startup: Startup) -> dict[str, Any]:
    """The content of startup.json."""
    return {
        "stages_s": {stage: round(seconds, 3) for stage, seconds in startup.stages.items()},
        "total_s": round(startup.total, 3),
        "startup_s": round(startup.alone, 3),
        "sees_process": startup.sees_process,
    }


def cached_names(config: Config) -> set[str]:
    """What lies in the folder of prepared data."""
    folder = Path(config.data.cache_dir or default_cache_dir())
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def data_stage(config: Config, names_before: set[str]) -> str:
    """Name of the stage in which data was loaded: whether there was anything to prepare."""
    if cached_names(config) - names_before:
        return "data (prepared)"
    return "data (opened)" if config.data.loading == "streaming" else "data (from the cache)"

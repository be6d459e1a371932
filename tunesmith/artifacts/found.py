"""Where a tuned model lies: in the folder of a run, of an adapter or of a model, or on the hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from tunesmith.config import Config, ModelConfig, load_config
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.adapter_folder import read_adapter_config
from tunesmith.models.save import BASE_SETTINGS
from tunesmith.models.score import is_classifier

Say = Callable[[str], None]
_PARTS = ("best", "final")


@dataclass(frozen=True)
class Found:
    """What a name led to: the `base` model's folder or hub id, the folder of an adapter on it, if any, and
    the config of the `run` that made it, if a run did."""

    base: str
    adapter: Path | None = None
    run: Config | None = None

    @property
    def home(self) -> str:
        """Where its tokenizer and generation settings are, if it has its own."""
        return str(self.adapter) if self.adapter else self.base

    @property
    def gives_scores(self) -> bool:
        """Whether it is a reward model (or another sequence classifier), which writes nothing."""
        if self.adapter is not None:
            return read_adapter_config(self.adapter).get("task_type") == "SEQ_CLS"
        file = Path(self.base) / "config.json"
        return file.is_file() and is_classifier(
            json.loads(file.read_text(encoding="utf-8")).get("architectures")
        )

    @property
    def base_settings(self) -> ModelConfig:
        """How the base was held while the adapter was trained: by its run's config, or by what lies beside an
        adapter that has left its run. Raises ModelError if that cannot be read."""
        if self.adapter is None:
            return ModelConfig(path=self.base)
        if self.run is not None:
            return self.run.model
        file = self.adapter / BASE_SETTINGS
        if not file.is_file():
            return ModelConfig(path=self.base)
        try:
            return ModelConfig(path=self.base, **json.loads(file.read_text(encoding="utf-8"))["base"])
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{file} cannot be read: {first_line(error)}") from error


def find_model(name: str, say: Say, *, may_score: bool = False) -> Found:
    """Where the model lies: of a run `best/` if it has one, else `final/`; of an adapter or model its folder.
    What is no folder, nor looks like one, is a hub id.

    Raises ModelError, with what is there, if the folder holds no model; and for a reward model unless it
    `may_score`."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{name} is a file; expected the folder of a run, an adapter or a model.")
    if not path.is_dir():
        is_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if is_local or ("/" in name and path.parent.is_dir()):
            raise ModelError(f"{name}: there is no such folder.{_near(path)}")
        return Found(name)
    folder = next((path / part for part in _PARTS if (path / part).is_dir()), path)
    found = replace(_model_in(folder), run=_run_config(path, say))
    if found.gives_scores and not may_score:
        raise ModelError(
            f"{name} is a reward model: it gives answers scores and writes none. docs/preference.md says how "
            "transformers loads it; an adapter becomes a model of its own with `tunesmith merge`."
        )
    return found


def run_folder(path: Path) -> Path | None:
    """The run that a run folder, its best/ or its final/ belongs to; None for any other model."""
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and any((folder / part).is_dir() for part in _PARTS):
            return folder
    return None


def _run_config(path: Path, say: Say) -> Config | None:
    """The run's config. One that no longer loads (its template file is gone, say) is passed over with a
    word."""
    folder = run_folder(path)
    if folder is None:
        return None
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as error:
        say(f"without the run's own settings: {first_line(error)}")
        return None


def _near(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    return f" Near names in {path.parent}: {', '.join(near)}." if near else ""


def _model_in(folder: Path) -> Found:
    if (folder / "adapter_config.json").is_file():
        try:
            base = read_adapter_config(folder).get("base_model_name_or_path")
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}/adapter_config.json cannot be read: {first_line(error)}") from error
        if not base:
            raise ModelError(f"{folder}/adapter_config.json names no base model (base_model_name_or_path).")
        return Found(str(base), folder)
    if (folder / "config.json").is_file():
        return Found(str(folder))
    content = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    listing = ", ".join(content[:12]) + (f" and {len(content) - 12} more" if len(content) > 12 else "")
    hint = ""
    if (folder / "config.yaml").is_file():
        hint = " It is a run that has saved nothing yet: best/ and final/ are missing."
    raise ModelError(
        f"{folder} holds no model: expected adapter_config.json or config.json, or a run's best/ or final/; "
        f"found {listing or 'nothing'}.{hint}"
    )


def first_line(error: BaseException) -> str:
    """What a library says went wrong, without what it says around it."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

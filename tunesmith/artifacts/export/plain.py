"""What was found, as the plain transformers folder that everything is exported from."""

from __future__ import annotations

from pathlib import Path

from tunesmith.artifacts.found import Found, Say
from tunesmith.artifacts.merge import merge
from tunesmith.artifacts.tuned import load_own_model, load_own_tokenizer
from tunesmith.config import ModelConfig
from tunesmith.models.devices import compute_dtype

# Of a folder, what a model is; not the model card, nor what other tools put there.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def plain_folder(found: Found, work: Path, say: Say) -> Path:
    """A folder that stock transformers loads whole: the model's own, or for an adapter and for a model of the
    hub `work`/plain, which is written.

    Raises ModelError where the model cannot be loaded."""
    base = Path(found.base)
    if found.adapter is None and base.is_dir():
        return base
    folder = work / "plain"
    if found.adapter is not None:
        return merge(str(found.adapter), folder, say=say).folder
    tokenizer = load_own_tokenizer(found)
    model = load_own_model(found, tokenizer, compute_dtype(ModelConfig(path=found.base))[0], say)
    for part in (model, tokenizer, model.generation_config):
        part.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    return folder


def model_files(folder: Path) -> list[Path]:
    """The files of a plain folder that make the model."""
    return sorted(file for pattern in _FILES for file in folder.glob(pattern))

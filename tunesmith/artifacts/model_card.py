"""The README of what a run made: what it is, what it was trained on, what it reached, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tunesmith.config import Config, dump_config
from tunesmith.data.loading import Data
from tunesmith.models.adapt import count_parameters


def model_card(config: Config, data: Data, model: Any, step: int, metrics: dict[str, Any]) -> str:
    """A model card in Markdown, with the front matter that the hub reads."""
    trained, total = count_parameters(model)
    rope = getattr(model.config, "rope_parameters", None) or {}
    source = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        .from_string(source)
        .render(
            config=config,
            config_yaml=dump_config(config).rstrip(),
            data=data,
            step=step,
            metrics=metrics,
            trained=trained,
            total=total,
            rope=rope if rope.get("rope_type", "default") != "default" else None,
            max_positions=getattr(model.config, "max_position_embeddings", None),
            is_adapter=config.adapter.method != "none",
            gives_scores=config.has_scalar_head,
            is_ours=config.adapter.method == "bottleneck",
        )
    )

"""`tunesmith prepare`: what a run does with its data before it trains, done earlier, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from tunesmith.config import Config, SourceConfig
from tunesmith.data.loading import Data, cache_dir, load_data, local_engine
from tunesmith.data.ray_engine import ray_cluster, ray_engine
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ConfigError

Say = Callable[[str], None]


def prepare_ahead(
    config: Config, *, engine: Literal["local", "ray"], ray_address: str | None = None, say: Say = print
) -> Data:
    """Prepare what is not in the cache yet, and tell the account of it all. A run with this config finds it
    there. Raises what `load_data` and `ray_cluster` raise, and ConfigError for settings that leave nothing
    to prepare."""
    if config.data.loading != "cached":
        raise ConfigError(
            f"data.loading={config.data.loading}: rows are tokenised while training, so there is nothing to "
            "prepare. Use data.loading=cached."
        )
    if ray_address is not None and engine != "ray":
        raise ConfigError("--ray-address is for --engine ray.")
    prepared: list[str] = []
    chosen, cluster = (
        (ray_engine, ray_cluster(ray_address, config.data.workers))
        if engine == "ray"
        else (local_engine, nullcontext())
    )

    def noting(source: SourceConfig, *rest: Any) -> None:
        chosen(source, *rest)
        prepared.append(source.path)

    with cluster:
        data = load_data(config, load_tokenizer(config), say, noting)
    _tell(data, config, prepared, say)
    return data


def _tell(data: Data, config: Config, prepared: list[str], say: Say) -> None:
    train, valid = data.train, data.valid
    for rows in (train, valid) if valid else (train,):
        for line in rows.lines():
            say(line)
    say(f"{train.num_rows:,} training {train.unit}, {valid.num_rows if valid else 0:,} validation rows")
    reports = [*train.reports, *(valid.reports if valid else [])]
    say(
        f"{len(prepared)} of {len(reports)} sources prepared now, {len(reports) - len(prepared)} found; "
        f"`tunesmith {config.run.recipe}` finds them in {cache_dir(config)}"
    )

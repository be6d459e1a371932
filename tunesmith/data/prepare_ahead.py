"""`tunesmith prepare`: what a run does with its data before it trains, done earlier, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

from tunesmith.config import Config, SourceConfig
from tunesmith.data.cache import Progress
from tunesmith.data.loading import Data, Engine, cache_dir, load_data, local_engine
from tunesmith.data.prepare import Preparer
from tunesmith.data.ray_engine import ray_cluster, ray_engine
from tunesmith.data.report import SourceReport
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
    with cluster:
        data = load_data(config, load_tokenizer(config), say, partial(_noting, chosen, prepared))
    _tell(data, config, prepared, say)
    return data


def _noting(
    engine: Engine,
    prepared: list[str],
    source: SourceConfig,
    config: Config,
    make_preparer: Callable[[], Preparer],
    report: SourceReport,
    progress: Progress,
    folder: Path,
) -> None:
    """`engine`, with the source's path put down in `prepared` when it is done."""
    engine(source, config, make_preparer, report, progress, folder)
    prepared.append(source.path)


def _tell(data: Data, config: Config, prepared: list[str], say: Say) -> None:
    reports = [*data.train.reports, *(data.valid.reports if data.valid else [])]
    for report in reports:
        for line in report.lines():
            say(line)
    train, num_valid = data.train, data.valid.num_rows if data.valid else 0
    if train.fill is not None:
        say(f"{train.num_rows:,} blocks of {train.block_size:,} tokens, {100 * train.fill:.1f} % full")
    unit = "rows" if train.block_size is None else "blocks"
    say(f"{train.num_rows:,} training {unit}, {num_valid:,} validation rows")
    say(
        f"{len(prepared)} of {len(reports)} sources prepared now, {len(reports) - len(prepared)} found; "
        f"`tunesmith {config.run.recipe}` finds them in {cache_dir(config)}"
    )

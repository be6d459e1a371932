"""What the ranks of one run do together beside training."""

from __future__ import annotations

import functools
import os
import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from tunesmith.errors import RankError


def meet(timeout_s: float) -> None:
    """Connect the ranks of this run, if it has several, and wait until all are there. Whatever they wait for
    later ends after `timeout_s` seconds, too."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun sets it
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout_s))
        wait_for_all("the start of the run", timeout_s)


def wait_for_all(what: str, timeout_s: float) -> None:
    """Wait until every rank has come here; at once for a run of one. `what` names the place in messages
    ("the save of step 40").

    Raises RankError after `timeout_s` seconds. On rank 0, which gathers the others, it names who is late;
    the others know only that rank 0 did not let them go. To be called by all ranks, in the same order."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    limit = timedelta(seconds=timeout_s)
    try:
        # Any backend of accelerators would wait without an end, and say nothing.
        group = None if dist.get_backend() == "gloo" else _gloo_group(limit)
        dist.monitored_barrier(group, limit, wait_all_ranks=True)
    except RuntimeError as error:
        raise RankError(f"{_who_is_late(str(error))} {what} within {timeout_s:g} s") from error


@functools.cache
def _gloo_group(limit: timedelta) -> Any:
    """Made once, by all ranks. Its limit is that of the first call; each later wait has its own."""
    return dist.new_group(backend="gloo", timeout=limit)


def _who_is_late(message: str) -> str:
    """From the words of torch's monitored barrier."""
    if found := re.search(r"Ranks ([\d, ]+) failed to pass", message):
        late = re.findall(r"\d+", found[1])
        return (
            f"rank {late[0]} did not come to"
            if len(late) == 1
            else f"ranks {', '.join(late)} did not come to"
        )
    if dist.get_rank() > 0:
        return "rank 0 (which says who else is late) did not come to, or did not let go of,"
    return "not every rank came to"

"""`tunesmith launch`: the processes of one run, on this machine or on several, by torchrun's elastic agent.

What the agent starts is `python -m tunesmith VERB CONFIG ...`, as under torchrun. Ours are the streams (rank
0 has the terminal, each other rank a log file in the run folder), the time a save is given after a signal,
and the words and the exit code at the end.

Nothing of torch is imported before options and config have been checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tunesmith.config import Config
from tunesmith.errors import ConfigError, RankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import LogsSpecs

LOGS = "logs"

# After a signal the ranks finish their step and save; then the agent kills what is left. A full checkpoint of
# 72B parameters is 0.9 TB: 3 GB/s write it in this time. Slurm is asked for a signal 20 s earlier than that.
SAVE_S = 280
_RENDEZVOUS_S = 600  # a person may start one machine after the other
_LINES = 12  # of a rank's log that are shown
# The shell sends what ranks but the first one say to a file, as the agent opens one file a stream, and anew.
_ENTRY = 'if [ "$RANK" -gt 0 ]; then exec "$@" >>"$0/rank-$RANK.log" 2>&1; fi; exec "$@"'


def run_path(config: Config) -> Path:
    """The run folder of a config."""
    return Path(config.run.output_dir) / (config.run.name or "run")


@dataclass(frozen=True)
class Place:
    """Where the processes of a run are: `nproc` (None: one an accelerator) on each of `nnodes` machines, of
    which this is number `node_rank`; they meet at `rendezvous`, HOST:PORT on the first one."""

    nproc: int | None = None
    nnodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None

    def check_counts(self) -> None:
        """Raises ConfigError for numbers of processes or machines that are none."""
        for name, value in (("--nproc", self.nproc), ("--nnodes", self.nnodes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: expected a whole number of at least 1.")

    def check(self) -> None:
        """Raises ConfigError if the four do not fit together."""
        self.check_counts()
        if self.nnodes == 1:
            if self.rendezvous is not None or self.node_rank:
                given = "--rendezvous" if self.rendezvous is not None else f"--node-rank {self.node_rank}"
                raise ConfigError(f"{given} is for several machines. Say how many: --nnodes M.")
            return
        if self.node_rank is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --node-rank: the number of this machine, "
                f"0 to {self.nnodes - 1}; the run is seen on machine 0."
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank {self.node_rank}: with --nnodes {self.nnodes} machines are 0 to "
                f"{self.nnodes - 1}."
            )
        if self.rendezvous is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --rendezvous HOST:PORT: machine 0 as the others reach it, and "
                "a port that is free on it, e.g. --rendezvous node-a:29500. The same on every machine."
            )
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"--rendezvous {self.rendezvous}: expected HOST:PORT, the port from 1 to 65535, e.g. "
                "node-a:29500."
            )


def launch(command: Sequence[str], config: Config, place: Place, say: Callable[[str], None]) -> int:
    """Run `python -m tunesmith` with these arguments on every rank of this machine, and wait for their end.

    Returns the exit code of the run: 0, or that of the first rank that failed where rank 0 has said why, or
    128 + the signal that this process was sent and passed on. Raises ConfigError for options that do not fit,
    RankError where there is something to say: which rank failed how, or that the machines did not meet."""
    place.check()
    nproc = _num_processes(place, say)
    logs = run_path(config) / LOGS
    _introduce(place, nproc, logs, say)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet_agent()
    said = _Said(logs)
    where: dict[str, Any]
    if place.nnodes == 1:
        where = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    else:
        # Not c10d, which numbers machines as it likes: rank 0 has to be on machine 0.
        where = {
            "rdzv_backend": "static",
            "rdzv_endpoint": place.rendezvous,
            "rdzv_configs": {"rank": place.node_rank, "timeout": _RENDEZVOUS_S},
        }
    agent = elastic_launch(
        LaunchConfig(
            min_nodes=place.nnodes,
            max_nodes=place.nnodes,
            nproc_per_node=nproc,
            run_id="tunesmith",
            max_restarts=0,
            logs_specs=_logs_specs(said, threads=max(1, (os.cpu_count() or 1) // nproc)),
            shutdown_timeout=SAVE_S,
            signals_to_handle=_signals(),
            **where,
        ),
        "/bin/sh",
    )
    arguments = ["-c", _ENTRY, str(logs), sys.executable, "-u", "-m", "tunesmith", *command]
    before = psutil.Process().children()
    try:
        agent(*(argument.replace("$", "$$") for argument in arguments))  # the agent substitutes ${local_rank}
    except ChildFailedError as error:
        return _end(error.failures, said)
    except SignalException as error:
        return 128 + error.sigval
    except (DistError, RendezvousError, TimeoutError) as error:
        raise RankError(
            f"machine {place.node_rank or 0} did not meet the others at {place.rendezvous}: "
            f"{str(error).splitlines()[0]}\nStart the same command on all {place.nnodes} machines within "
            f"{_RENDEZVOUS_S} s of each other; the port must be free on machine 0 and open to the others."
        ) from error
    finally:
        # None is left, but where signal came upon signal.
        for child in set(psutil.Process().children()) - set(before):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    return 0


def _num_processes(place: Place, say: Callable[[str], None]) -> int:
    """Raises ConfigError for more processes than accelerators."""
    import torch

    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if place.nproc is None and not accelerators:
        say("this machine has no accelerator: one process (--nproc N starts more)")
    nproc = place.nproc or accelerators or 1
    if 0 < accelerators < nproc:
        raise ConfigError(f"--nproc {nproc}: this machine has {accelerators} accelerators, one a process.")
    return nproc


def _introduce(place: Place, nproc: int, logs: Path, say: Callable[[str], None]) -> None:
    num_ranks = nproc * place.nnodes
    if num_ranks == 1:
        return
    if place.nnodes == 1:
        say(f"{nproc} processes; what those after the first say is in {logs}")
        return
    first = nproc * (place.node_rank or 0)
    ranks = f"rank {first}" if nproc == 1 else f"ranks {first} to {first + nproc - 1}"
    say(
        f"machine {place.node_rank} of {place.nnodes}, {ranks} of {num_ranks}; waiting for the others at "
        f"{place.rendezvous}. "
        + (
            f"What ranks but 0 say is in {logs} of their machine"
            if place.node_rank == 0
            else f"The run is seen on machine 0, what these ranks say is in {logs}"
        )
    )


def _signals() -> str:
    """Those that the agent passes on; not a hang-up that `nohup` has had ignored."""
    names = ["SIGINT", "SIGTERM", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return ",".join(names)


def _quiet_agent() -> None:
    """What it logs (every signal, a table of failures) we say in words of ours."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@dataclass
class _Said:
    """The log files of this machine's ranks, and how long they were before this launch."""

    folder: Path
    sizes: dict[int, int] = field(default_factory=dict)

    def begin(self, ranks: Sequence[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            file = self.file(rank)
            self.sizes[rank] = file.stat().st_size if file.exists() else 0

    def file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def last_lines(self, rank: int) -> list[str]:
        try:
            with self.file(rank).open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(self.sizes[rank], end - 2**16))
                text = stream.read().decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-_LINES:]


def _logs_specs(said: _Said, threads: int) -> LogsSpecs:
    """Tells the agent to leave the streams alone; in passing, takes note of its ranks, and gives each its
    share of the processor's cores unless OMP_NUM_THREADS is set."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Streams(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for env in envs.values():
                env.setdefault("OMP_NUM_THREADS", str(threads))
            said.begin([int(env["RANK"]) for env in envs.values()])
            inherited = dict.fromkeys(envs, "")
            return LogsDest(stdouts=inherited, stderrs=inherited, error_files=inherited)

        @property
        def root_log_dir(self) -> str:
            return str(said.folder)

    return Streams()


def _end(failures: Mapping[int, Any], said: _Said) -> int:
    """The exit code where rank 0 has told the reason. Raises RankError where it has not."""
    rank = _first(failures)
    code = failures[rank].exitcode
    if code > 0 and 0 in failures and failures[0].exitcode == code:
        return int(code)
    ended = f"ended with exit code {code}" if code > 0 else f"was killed by {failures[rank].signal_name()}"
    if code == -signal.SIGKILL:
        ended += " (as systems do where memory is full)"
    message = f"rank {rank} on {socket.gethostname()} {ended}."
    if rank > 0:
        lines = said.last_lines(rank)
        message += f" It said nothing in {said.file(rank)}" if not lines else f" In {said.file(rank)}:"
        message += "".join(f"\n    {line}" for line in lines)
    raise RankError(message, exit_code=max(code, 1))


def _first(failures: Mapping[int, Any]) -> int:
    """The rank that failed before the agent ended the others. Of several within a second (times are whole
    ones) one that was killed, since then those that talked with it fail too, else the one met first."""
    earliest = min(failure.timestamp for failure in failures.values())
    ended_by_agent = (-signal.SIGTERM, 128 + signal.SIGTERM)
    at_once = [rank for rank, failure in failures.items() if failure.timestamp <= earliest + 1]
    return min(
        at_once, key=lambda rank: (failures[rank].exitcode in ended_by_agent, failures[rank].exitcode > 0)
    )

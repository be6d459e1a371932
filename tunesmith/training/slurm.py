"""`tunesmith launch --slurm FILE`: a job for `sbatch` that starts one launcher on each machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from tunesmith.config import Config
from tunesmith.errors import ConfigError
from tunesmith.training.launch import SAVE_S, Place

_HEADER = "#!/bin/bash\n# Written by `tunesmith launch --slurm`."
_JOB = Template("""$header
# Add here what your cluster asks for: account, cores, memory.
$directives

first=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
port=$$((29500 + SLURM_JOB_ID % 1000))  # jobs that share a machine do not meet

# A machine that ends does not end the others, which may still be saving.
srun --kill-on-bad-exit=0 --wait=$signal_s bash -c 'exec "$$@"$node_rank' launch \\
    $words
code=$$?

# Stopped and saved since its time was nearly over, and not cancelled: it goes on later.
left=$$(($${SLURM_JOB_END_TIME:-0} - $$(date +%s)))
if [ "$$code" -eq 143 ] && [ "$$left" -lt $nearly_s ]; then
    scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")


def write_sbatch(
    file: Path,
    command: Sequence[str],
    config: Config,
    place: Place,
    *,
    time: str | None,
    partition: str | None,
) -> None:
    """Write a job for `sbatch`: one launcher a machine. It is told 300 s before its time is over, saves, and
    goes back into the queue. `command` is as for `launch`, the config's file its second part.

    Raises ConfigError for options that do not fit, or if the file is there and is no such job."""
    if place.node_rank is not None or place.rendezvous is not None:
        raise ConfigError(
            "--node-rank and --rendezvous are what the job finds out. Leave them out with --slurm."
        )
    if place.nproc is None:
        raise ConfigError("--slurm needs --nproc N: the accelerators of one machine.")
    place.check_counts()
    if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(_HEADER):
        raise ConfigError(f"--slurm {file}: is there, and no job that tunesmith wrote. Choose another name.")
    name, output_dir = config.run.name or "run", Path(config.run.output_dir).absolute()
    output_dir.mkdir(parents=True, exist_ok=True)  # Slurm writes no log into a folder that is not there
    signal_s = SAVE_S + 20  # the step under way comes first
    options = {
        "job-name": name,
        "nodes": place.nnodes,
        "ntasks-per-node": 1,
        "gpus-per-node": place.nproc,
        "time": time,
        "partition": partition,
        "chdir": f'"{Path.cwd()}"',
        "output": f'"{output_dir / f"{name}-slurm-%j.log"}"',
        "open-mode": "append",
        "signal": f"TERM@{signal_s}",
    }
    directives = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    verb, config_file, *rest = command
    words = [sys.executable, "-m", "tunesmith", "launch", "--nproc", str(place.nproc)]
    words = [shlex.quote(word) for word in words]
    if place.nnodes > 1:
        words += ["--nnodes", str(place.nnodes), "--rendezvous", '"$first:$port"']
    words += [shlex.quote(word) for word in (verb, str(Path(config_file).absolute()), *rest)]
    job = _JOB.substitute(
        header=_HEADER,
        directives="\n".join([*directives, "#SBATCH --requeue"]),
        signal_s=signal_s,
        node_rank=' --node-rank "$SLURM_NODEID"' if place.nnodes > 1 else "",
        words=" ".join(words),
        nearly_s=2 * signal_s,
    )
    file.write_text(job, encoding="utf-8")

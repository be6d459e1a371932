"""`tunesmith launch`: streams, ends and exit codes of several processes, and the job for Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from tiny import conversations, write_rows
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import tunesmith
from tunesmith.cli import main
from tunesmith.config import load_config
from tunesmith.errors import ConfigError, RankError
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.launch import Place, _end, _Said
from tunesmith.training.run_folder import RunFolder, read_metrics
from tunesmith.training.slurm import write_sbatch

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SECONDS = 240  # for a launch on a busy machine; an idle one takes ten


def begin(*arguments, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def wait_until(is_so, process) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def stand_in(tmp_path):
    """Makes a launch whose ranks run this code instead of tunesmith: quick, as it imports no torch."""
    (tmp_path / "tunesmith").mkdir()
    (tmp_path / "tunesmith" / "__init__.py").touch()
    (tmp_path / "c.yaml").write_text("{model: {path: m}, data: {train: a.jsonl}, train: {epochs: 1}}")
    script = (
        tmp_path / "script" / "launch.py"
    )  # run as a script, Python does not look into the folder it is in
    script.parent.mkdir()
    script.write_text("import sys\nfrom tunesmith.cli import main\nsys.exit(main(sys.argv[1:]))\n")

    def make(code, *overrides):
        (tmp_path / "tunesmith" / "__main__.py").write_text(code)
        return begin(script, "launch", "--nproc", 2, "sft", "c.yaml", *overrides, cwd=tmp_path)

    return make


# --- ends, with ranks that are stand-ins


def test_a_rank_that_fails_ends_all_with_its_exit_code_and_its_last_words(stand_in, tmp_path):
    process = stand_in(
        "import os, sys, time\n"
        "print(sys.argv[1:], flush=True)\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(10**6)\n"
        "print('out')\n"
        "print('error: a.jsonl is not there', file=sys.stderr)\n"
        "sys.exit(3)\n",
        "data.train=$$a",  # torch's agent would make $a of it
    )
    out, errors = process.communicate(timeout=SECONDS)
    words = "['sft', 'c.yaml', 'data.train=$$a']"
    assert process.returncode == 3
    assert out.splitlines()[-1] == words  # rank 0's; it has the launcher's own streams
    log = tmp_path / "runs" / "c" / "logs" / "rank-1.log"
    assert sorted(log.read_text().splitlines()) == sorted([words, "out", "error: a.jsonl is not there"])
    assert errors.splitlines()[0] == (
        f"failed: rank 1 on {socket.gethostname()} ended with exit code 3. In runs/c/logs/rank-1.log:"
    )
    assert "    error: a.jsonl is not there" in errors.splitlines()
    assert len(errors.splitlines()) == 4
    assert [path.name for path in log.parent.iterdir()] == ["rank-1.log"]


def test_a_signal_reaches_every_rank_which_may_take_its_time(stand_in, tmp_path):
    process = stand_in(
        "import os, signal, sys, time\n"
        "def save(number, frame):\n"
        "    time.sleep(2 * (os.environ['RANK'] == '0'))\n"  # rank 1 has left before rank 0 has saved
        "    open('saved-' + os.environ['RANK'], 'w').close()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "open('ready-' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(10**6)\n"
    )
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (130, "")
    assert len(list(tmp_path.glob("saved-*"))) == 2


def failures(**codes: int) -> dict[int, ProcessFailure]:
    """rank0=..., as torch's agent reports them, all within the same second."""
    made = {int(name[4:]): ProcessFailure(int(name[4:]), 1, code, "") for name, code in codes.items()}
    for failure in made.values():
        failure.timestamp = 1000
    return made


def test_of_ranks_that_fail_at_once_the_killed_one_was_the_first(tmp_path):
    """Rank 0 loses the connection to rank 2, and rank 1 is ended by the agent."""
    with pytest.raises(RankError, match=r"^rank 2 on .* was killed by SIGKILL \(as systems do") as caught:
        _end(failures(rank0=1, rank1=-signal.SIGTERM, rank2=-signal.SIGKILL), _Said(tmp_path))
    assert caught.value.exit_code == 1
    with pytest.raises(RankError, match=r"^rank 0 on .* was killed by SIGSEGV.$"):
        _end(failures(rank0=-signal.SIGSEGV, rank1=1), _Said(tmp_path))


def test_a_rank_that_hangs_until_the_agent_kills_it_was_not_the_first(tmp_path):
    late = failures(rank1=1, rank0=-signal.SIGKILL)
    late[0].timestamp += 30
    with pytest.raises(
        RankError, match=r"^rank 1 on .* ended with exit code 1. It said nothing in .*rank-1.log"
    ):
        _end(late, _Said(tmp_path))


def test_what_rank_0_has_said_is_not_said_again(tmp_path):
    assert _end(failures(rank1=2, rank0=2), _Said(tmp_path)) == 2
    assert _end(failures(rank1=143, rank0=143), _Said(tmp_path)) == 143


# --- options


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place(nproc=0), "--nproc 0: expected a whole number of at least 1"),
        (Place(nnodes=0), "--nnodes 0: expected"),
        (Place(nnodes=2, rendezvous="a:1"), "--nnodes 2 needs --node-rank: .* 0 to 1"),
        (
            Place(nnodes=2, node_rank=2, rendezvous="a:1"),
            "--node-rank 2: with --nnodes 2 machines are 0 to 1",
        ),
        (Place(nnodes=2, node_rank=0), "--nnodes 2 needs --rendezvous HOST:PORT"),
        (Place(nnodes=2, node_rank=0, rendezvous="a"), "--rendezvous a: expected HOST:PORT"),
        (Place(nnodes=2, node_rank=0, rendezvous="a:99999"), "--rendezvous a:99999: .* from 1 to 65535"),
        (Place(node_rank=1), "--node-rank 1 is for several machines. Say how many: --nnodes M"),
        (Place(rendezvous="a:1"), "--rendezvous is for several machines"),
    ],
)
def test_options_that_do_not_fit_are_named(place, message):
    with pytest.raises(ConfigError, match=message):
        place.check()


def test_mistakes_are_said_before_anything_starts(run_config, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(run_config()))
    assert main(["launch", "--nproc", "2", "sft", str(file), "train.epoch=1"]) == 2
    assert "train.epochs" in capsys.readouterr().err
    assert main(["launch", "--nnodes", "2", "sft", str(file)]) == 2
    assert main(["launch", "--time", "1:00:00", "sft", str(file)]) == 2
    assert "--time is for a job: --slurm FILE." in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_logs_alone_is_no_other_persons(run_config, tmp_path):
    config = load_config(run_config(run={"resume": "never"}))
    (tmp_path / "runs" / "r" / "logs").mkdir(parents=True)
    with RunFolder(config) as run:
        assert run.find_start(config, print) is None


# --- whole runs


@pytest.fixture
def long_run(run_config, tmp_path):
    """A launch of two ranks that has trained some of its 1,000 steps."""
    file = tmp_path / "c.yaml"
    config = run_config(rows=400, train={"epochs": 10}, checkpoint={"asynchronous": True})
    file.write_text(yaml.safe_dump(config))
    process = begin("-m", "tunesmith", "launch", "--nproc", 2, "sft", file)
    wait_until(lambda: len(read_metrics(tmp_path / "runs" / "r" / "metrics.jsonl")) > 2, process)
    yield process
    for child in psutil.Process(process.pid).children() if process.poll() is None else []:
        child.kill()
    process.kill()
    process.communicate()


def test_a_run_that_is_told_to_stop_saves_and_says_so_once(long_run, tmp_path):
    long_run.send_signal(signal.SIGTERM)
    _, errors = long_run.communicate(timeout=SECONDS)
    run = tmp_path / "runs" / "r"
    newest, damaged = Checkpoints(run / "checkpoints", keep=2).newest()
    assert damaged == []
    assert long_run.returncode == 143
    assert errors.splitlines()[-1].startswith(f"stopped at step {newest.step} of 1000, saved in")
    assert errors.count("stopped") == 1
    assert "elastic" not in errors  # nothing of what torch's agent would say
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == newest.step


def test_a_rank_that_is_killed_is_named_within_seconds(long_run):
    (victim,) = [
        child for child in psutil.Process(long_run.pid).children() if child.environ().get("RANK") == "1"
    ]
    begun = time.monotonic()
    victim.kill()
    _, errors = long_run.communicate(timeout=SECONDS)
    # gloo notices at once; 30 s is when torch's agent kills what does not end.
    assert time.monotonic() - begun < 25
    assert long_run.returncode == 1
    assert f"failed: rank 1 on {socket.gethostname()} was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert "elastic" not in errors
    assert "failed: another rank has gone" in errors  # rank 0's own words


# --- Slurm


@pytest.fixture
def slurm(tmp_path):
    """Runs a job with stand-ins: `srun` runs the command once a node, all on this machine, or is what is
    given; `scontrol` knows two nodes of one address and writes down what else it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(
        '#!/bin/bash\nif [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.1\n'
        f'else echo "$@" >>{tmp_path}/asked; fi\n'
    )
    both = (
        "#!/bin/bash\n"
        'while [[ "$1" == --* ]]; do shift; done\n'
        'SLURM_NODEID=1 "$@" & other=$!\n'
        'SLURM_NODEID=0 "$@"; code=$?\n'
        'wait "$other"; more=$?\n'
        "exit $((code > more ? code : more))\n"
    )

    def run(job, srun=both, **environment):
        (folder / "srun").write_text(srun)
        for file in folder.iterdir():
            file.chmod(0o755)
        subprocess.run(["bash", "-n", str(job)], check=True)
        path = f"{folder}:{os.environ['PATH']}"
        env = ENVIRONMENT | {"PATH": path, "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "1"} | environment
        return subprocess.run(
            ["bash", str(job)], capture_output=True, text=True, env=env, timeout=SECONDS, cwd=tmp_path
        )

    return run


def free_job_id() -> str:
    """One whose port nobody listens at."""
    for number in range(os.getpid() % 900, 1000):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", 29500 + number)):
                return str(7000 + number)
    raise AssertionError("no free port")


def test_a_slurm_job_of_two_machines_trains_what_one_process_does(run_config, slurm, tmp_path, capsys):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(7, seed=31))
    config = run_config(rows=21, data={"valid": str(valid)}, train={"batch_size": 8}, run={"name": "one"})
    one = tunesmith.sft(config)
    file = tmp_path / "it's a config.yaml"
    file.write_text(yaml.safe_dump(config))
    job = tmp_path / "job.sh"
    options = [
        "--slurm",
        str(job),
        "--nnodes",
        "2",
        "--nproc",
        "1",
        "--time",
        "1:00:00",
        "--partition",
        "long",
    ]
    assert main(["launch", *options, "sft", str(file), "run.name=two"]) == 0
    assert f"sbatch {job}" in capsys.readouterr().out
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in job.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert asked["output"] == f'"{tmp_path}/runs/two-slurm-%j.log"'
    assert {key: value for key, value in asked.items() if key not in ("chdir", "output")} == {
        "job-name": "two",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "1",
        "time": "1:00:00",
        "partition": "long",
        "open-mode": "append",
        "signal": "TERM@300",
        "requeue": "",
    }
    done = slurm(job, SLURM_JOB_ID=free_job_id())
    assert done.returncode == 0, done.stderr[-3000:]
    two = one.run.parent / "two"
    first, second = read_metrics(one.run / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    for a, b in zip(first, second, strict=True):
        assert (a["step"], a.get("rows"), a.get("tokens")) == (b["step"], b.get("rows"), b.get("tokens"))
        for key in {"loss", "grad_norm", "eval_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert done.stdout.count("trained parameters") == 1  # rank 0, on machine 0
    assert "machine 1 of 2, rank 1 of 2" in done.stdout
    assert (two / "logs" / "rank-1.log").is_file()


@pytest.mark.parametrize(
    ("code", "seconds_left", "is_requeued"), [(143, 100, True), (143, 3600, False), (1, 100, False)]
)
def test_a_job_goes_back_into_the_queue_if_its_time_was_over_and_it_saved(
    run_config, slurm, tmp_path, code, seconds_left, is_requeued
):
    job = tmp_path / "job.sh"
    write_sbatch(job, ["sft", "c.yaml"], load_config(run_config()), Place(8), time=None, partition=None)
    assert "--time" not in job.read_text()
    done = slurm(job, f"#!/bin/bash\nexit {code}\n", SLURM_JOB_END_TIME=str(int(time.time()) + seconds_left))
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 1\n" if is_requeued else "")


def test_a_job_does_not_overwrite_another_file(run_config, tmp_path):
    config = load_config(run_config())
    file = tmp_path / "c.yaml"
    file.write_text("model: {}")
    for place, message in (
        (Place(8), "c.yaml: is there, and no job that tunesmith wrote"),
        (Place(), "--slurm needs --nproc N"),
        (Place(8, 2, node_rank=0), "--node-rank and --rendezvous are what the job finds out"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_sbatch(file, ["sft", "c.yaml"], config, place, time=None, partition=None)
    assert file.read_text() == "model: {}"


# --- waiting for each other


def test_a_rank_that_is_late_is_named(tmp_path):
    """Both come to the first place, and rank 1 late to the second."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import sys, time\n"
        "import torch.distributed as dist\n"
        "from tunesmith.errors import RankError\n"
        "from tunesmith.training.ranks import wait_for_all\n"
        "rank = int(sys.argv[1])\n"
        "wait_for_all('a run of one', 0.001)\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=rank, world_size=2)\n"
        "wait_for_all('the save of step 20', 60)\n"
        "if rank == 1:\n"
        "    time.sleep(8)\n"
        "try:\n"
        "    wait_for_all('the save of step 40', 2)\n"
        "except RankError as error:\n"
        "    print(error)\n"
    )
    both = [begin(script, rank) for rank in range(2)]
    said = [process.communicate(timeout=SECONDS) for process in both]
    assert said[0][0] == "rank 1 did not come to the save of step 40 within 2 s\n", said
    assert said[1][0] == (
        "rank 0 (which says who else is late) did not come to, or did not let go of, the save of step 40 "
        "within 2 s\n"
    ), said


@pytest.mark.long
def test_the_deepspeed_launcher_starts_the_same_program(run_config, tmp_path):
    """By another port for each process of a test run, since machines may run several."""
    pytest.importorskip("deepspeed")
    config = run_config(distributed={"strategy": "zero2"}, train={"max_steps": 3, "epochs": None})
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config | {"run": config["run"] | {"name": "launched"}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    process = begin(*command, "--module", "tunesmith", "sft", file)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    alone = tunesmith.sft(config | {"distributed": {"strategy": "ddp"}})
    launched = read_metrics(alone.run.with_name("launched") / "metrics.jsonl")
    expected = read_metrics(alone.run / "metrics.jsonl")
    assert [line["loss"] for line in launched] == pytest.approx([line["loss"] for line in expected], rel=1e-5)

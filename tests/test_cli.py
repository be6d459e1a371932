"""The command line as a shell sees it: exit codes, streams, and one block of plain words for a mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tiny import conversations, make_tiny_model, write_rows

import tunesmith
from tunesmith import cli
from tunesmith.config.reference import schema_json

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))
VERBS = [
    "sft",
    "pretrain",
    "prefer",
    "launch",
    "prepare",
    "preview",
    "chat",
    "serve",
    "generate",
    "eval",
    "merge",
    "export",
    "checkpoints",
    "verify-resume",
    "tokenizer",
    "demo-model",
    "schema",
]


def environment(**more: str) -> dict[str, str]:
    """This process's, on one thread, without a hub and without what the caller said about colours."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"} | more


def run(
    *arguments: str | Path, folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TUNESMITH, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**env or {}),
        timeout=120,
    )


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """tiny.yaml in a folder of its own: 20 rows, 5 steps of 4 rows."""
    write_rows(tmp_path / "train.jsonl", conversations(20))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"run: {{output_dir: {tmp_path / 'runs'}}}\n"
        f"model: {{path: {model}, dtype: float32}}\n"
        "adapter: {r: 4, alpha: 8}\n"
        f"data: {{train: train.jsonl, max_length: 256, cache_dir: {tmp_path / 'cache'}}}\n"
        "train:\n"
        "  epochs: 1\n"
        "  batch_size: 4\n"
        "  learning_rate: 0.01\n"
    )
    return file


# --- help, version, schema


def test_the_rank_that_the_deepspeed_launcher_adds_is_passed_over(capsys):
    assert cli.main(["--local_rank=1", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "tunesmith config"


def test_help_answers_in_less_than_three_tenths_of_a_second() -> None:
    pairs = [(seconds([sys.executable, "-c", ""]), seconds([TUNESMITH, "--help"])) for _ in range(5)]
    bare, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    if bare > 0.1:  # an empty Python takes 0.02 s on an idle machine
        pytest.skip(f"this machine is busy: an empty Python took {bare:.2f} s")
    assert whole < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_answers_in_less_than_a_second(verb: str) -> None:
    # 0.05 s on an idle machine, of which 0.02 s are Python's; torch alone would take more than the bound.
    assert min(seconds([TUNESMITH, verb, "--help"]) for _ in range(3)) < 1.0


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_and_version_import_nothing_slow(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    imported = set(re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, re.MULTILINE))
    assert "tunesmith.cli" in imported
    roots = {name.partition(".")[0] for name in imported}
    assert not roots & {"torch", "transformers", "datasets", "numpy", "pyarrow", "pydantic", "yaml", "rich"}


def test_help_names_every_verb_and_every_exit_code(tmp_path: Path) -> None:
    said = run("--help", folder=tmp_path).stdout
    assert re.findall(r"^    ([a-z-]+)(?:\s|$)", said, re.MULTILINE) == VERBS
    assert " ".join(said.split()).endswith(
        "exit codes: 0 done, 1 the run failed, 2 your input is wrong, 130/143 stopped by SIGINT/SIGTERM, "
        "141 the reader of the output went away"
    )


def test_version_is_the_packages(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path).stdout == f"tunesmith {tunesmith.__version__}\n"


def test_schema_prints_the_json_schema(tmp_path: Path) -> None:
    done = run("schema", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(schema_json())


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen([TUNESMITH, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before a word is read
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()


# --- mistakes


def assert_is_mistake(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2, and on stderr one block that begins with `error: `, is no traceback and has no escape
    code."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\n\n" not in done.stderr
    for text in expected:
        assert text in done.stderr


def test_all_mistakes_of_a_config_are_one_block(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {train: a.jsonl}\ntrain: {lr: 1, epochs: no}\n")
    done = run("sft", "c.yaml", "adapter.rank=8", folder=tmp_path)
    assert_is_mistake(done)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: c.yaml: 3 mistakes",
        "c.yaml:3: unknown key train.lr. Here that is train.learning_rate.",
        "c.yaml:3: train.epochs is 'no'; expected a number above 0.",
        "override 'adapter.rank=8': unknown key adapter.rank. Here that is adapter.r.",
    ]


@pytest.mark.parametrize("arguments", [["--debug", "sft", "c.yaml"], ["sft", "c.yaml", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\n")
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith(
        "tunesmith.errors.ConfigError: c.yaml:1: data.train is missing"
    )


def test_a_config_that_is_not_there_is_named_with_a_near_one(config: Path) -> None:
    done = run("sft", "tiny.yml", folder=config.parent)
    assert_is_mistake(done)
    assert (
        done.stderr == "error: tiny.yml: cannot be read: No such file or directory. Did you mean tiny.yaml?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stf", "a.yaml"], "there is no verb 'stf'. Did you mean sft? Verbs: " + ", ".join(VERBS)),
        (
            ["a.yaml"],
            "there is no verb 'a.yaml'. Did you mean tunesmith sft a.yaml? Verbs: " + ", ".join(VERBS),
        ),
        ([], "the following arguments are required: VERB"),
        (["sft"], "the following arguments are required: config"),
        (["sft", "a.yaml", "--rows", "3"], "unrecognized arguments: --rows 3 (tunesmith sft --help)"),
        (["schema", "run.seed=1"], "unrecognized arguments: run.seed=1 (tunesmith schema --help)"),
    ],
)
def test_arguments_that_are_none_are_said_with_what_there_is(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = run(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].partition("error: ")[2] == message


def test_overrides_may_stand_anywhere_and_have_no_dashes(config: Path) -> None:
    arguments = ["preview", config, "run.seed=1", "--rows", "0", "data.max_length=7"]
    done = run(*arguments, folder=config.parent)
    assert_is_mistake(done, "data.max_length is 7; expected a whole number of at least 8")
    done = run("preview", config, "--data.max_length=8", folder=config.parent)
    assert_is_mistake(done, "Write it as data.max_length=8.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "donn\u00e9es.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
            '{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}\n'
            "{not json\n",
            "error: donn\\xe9es.jsonl:2: unknown_role: messages[1].role is 'asistant'; expected system, "
            "user, assistant or tool. Did you mean 'assistant'?\n"
            "donn\\xe9es.jsonl:3: not_json: column 2: Expecting property name enclosed in double quotes, "
            "near '{not json'\n"
            "2 of 3 rows of donn\\xe9es.jsonl cannot be used (unknown_role 1, not_json 1). Mend them, or set "
            "data.on_bad_row=skip to leave them out and count them.\n",
        ),
        (
            "trian.jsonl",
            None,
            "error: trian.jsonl: no such file or folder. Near names in .: train.jsonl.\n",
        ),
    ],
    ids=["bad rows", "no such file"],
)
def test_data_mistakes_name_the_file_and_the_line(
    config: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (config.parent / name).write_text(content, encoding="utf-8")
    # On streams that lack its letters a name is escaped; it does not end the program.
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = run("sft", config, f"data.train={name}", folder=config.parent, env=ascii_only)
    assert_is_mistake(done)
    assert done.stderr == message
    assert not (config.parent / "runs").exists()


# --- colours


def stderr_of_terminal(arguments: list[str], folder: Path, **env: str) -> bytes:
    """What is written to stderr where that is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [TUNESMITH, *arguments], stdout=theirs, stderr=theirs, cwd=folder, env=environment(**env)
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: all has been read and the other end is closed
        while chunk := os.read(ours, 4096):
            said += chunk
    os.close(ours)
    assert process.wait() == 2
    return said


def test_a_terminal_has_colours_unless_no_color_is_set(tmp_path: Path) -> None:
    arguments = ["sft", "nowhere.yaml"]
    assert b"\x1b[1;31merror: \x1b[0mnowhere.yaml: cannot be read" in stderr_of_terminal(arguments, tmp_path)
    assert stderr_of_terminal(arguments, tmp_path, NO_COLOR="1").startswith(b"error: nowhere.yaml: cannot be")
    assert b"\x1b" not in stderr_of_terminal(arguments, tmp_path, NO_COLOR="1")


# --- runs


def test_a_run_from_a_config_to_its_summary(config: Path) -> None:
    done = run("sft", config, "run.name=first", folder=config.parent)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    folder = config.parent / "runs" / "first"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["rows"]) == (5, 20)
    assert (folder / "final" / "adapter_model.safetensors").is_file()
    lines = done.stdout.splitlines()
    assert lines[0] == "train.jsonl: format messages, found from its first rows"
    assert lines[-2:] == [f"adapter: {folder}/final", f"chat with it: tunesmith chat {folder}"]


def test_a_run_that_fails_exits_with_1(config: Path) -> None:
    # The first step makes the weights so large that the second one's loss is not a number.
    done = run("sft", config, "train.learning_rate=1e30", "run.name=fails", folder=config.parent)
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("failed: ") :]
    assert message.startswith(
        "failed: step 2: the loss is nan; nothing was changed by this step. Its rows: train.jsonl:"
    )
    assert "Traceback" not in done.stderr


def test_signals_save_and_exit_with_their_number_and_the_same_command_goes_on(config: Path) -> None:
    folder = config.parent / "runs" / "stopped"
    command = [TUNESMITH, "sft", str(config), "run.name=stopped", "train.epochs=20000"]

    def stop_by(number: signal.Signals, after: int) -> tuple[int, str]:
        metrics = folder / "metrics.jsonl"
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=config.parent,
            env=environment(),
            text=True,
        )
        end = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < end:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") > after:
                break
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=100), process.communicate()[1]

    def saved() -> int:
        return max(int(item.name[5:]) for item in (folder / "checkpoints").glob("step-*"))

    code, said = stop_by(signal.SIGINT, after=3)
    first = saved()
    assert code == 130
    assert (
        f"stopped at step {first} of 100000, saved in {folder}/checkpoints. The same command goes on" in said
    )
    code, said = stop_by(signal.SIGTERM, after=first + 3)
    assert code == 143, said
    assert saved() > first
    assert f"stopped at step {saved()} of 100000" in said
    assert "Traceback" not in said


# --- ends that are hard to bring about


@contextlib.contextmanager
def ending_in(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def verb(_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_schema", verb)
        yield


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped at once\n"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            1,
            "failed: the accelerator's memory is full. Lower train.micro_batch_tokens, or set "
            "train.gradient_checkpointing=true.\nCUDA out of memory.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"),
            1,
            "failed: the disk is full: runs/a/metrics.jsonl\n",
        ),
        (
            KeyError("x"),
            1,
            "failed: KeyError: 'x'\n"
            "This is a fault of tunesmith or a library. --debug shows the traceback.\n",
        ),
    ],
    ids=["ctrl-c", "memory", "disk", "fault"],
)
def test_every_end_has_a_code_and_plain_words(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ending_in(error, monkeypatch):
        assert cli.main(["schema"]) == code
    assert capsys.readouterr().err == message

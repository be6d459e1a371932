"""What the docs list is what the code has: reasons, keys of reports and metrics, settings, former names."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from tiny import conversations, make_tiny_model, write_rows

import tunesmith
from tunesmith.config import Config, all_keys, load_config
from tunesmith.config.keys import FORMER_NAMES, suggest_key
from tunesmith.config.methods import METHODS
from tunesmith.config.schema import Format, ModelConfig, TrackingConfig, TrainConfig
from tunesmith.data import formats
from tunesmith.data.decode import parse_json
from tunesmith.data.formats import PREFERENCE_FORMATS, detect_format, read_record
from tunesmith.data.preferences import PAIR_REASONS, read_answers
from tunesmith.data.report import SourceReport
from tunesmith.data.sources import ENDINGS
from tunesmith.data.templates import TrainOn, turn_weights
from tunesmith.models.cost import OPTIMAL_TOKENS_PER_PARAMETER
from tunesmith.training.run_folder import FREE_TO_CHANGE, read_metrics

REPOSITORY = Path(__file__).parents[2]
DATA_ROOM = sorted((REPOSITORY / "tunesmith/data").glob("*.py"))


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def tables(name: str, heading: str) -> list[list[list[str]]]:
    """The rows of each table below a heading, without the table's own heading, as lists of cells."""
    (section,) = re.findall(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", read(name), re.MULTILINE | re.DOTALL
    )
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section, re.MULTILINE):
        lines = [re.split(r" (?<!\\)\| ?", line[2:])[:-1] for line in block.splitlines()]
        found.append(lines[2:])
    return found


def first_cells(table: list[list[str]]) -> list[str]:
    """The names in backticks of the first column."""
    return [name for row in table for name in re.findall(r"`([^`]+)`", row[0])]


# --- docs/data.md


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
            yield node


def raised_reasons() -> set[str]:
    """The first argument of every `BadRow(...)` in the data room: a constant, or what it is handed as."""
    reasons: set[str] = set()
    for file in DATA_ROOM:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            parameters = [argument.arg for argument in function.args.args]
            for call in calls(function, "BadRow"):
                reason = call.args[0]
                if isinstance(reason, ast.Constant):
                    reasons.add(str(reason.value))
                elif isinstance(reason, ast.Name) and reason.id in parameters:
                    at = parameters.index(reason.id)
                    handed = [other.args[at] for other in calls(tree, function.name)]
                    reasons |= {str(a.value) for a in handed if isinstance(a, ast.Constant) and a.value}
                elif function.name == "_expect":  # made of the noun of the kind it expects
                    reasons |= {f"not_{noun.replace(' ', '_')}" for noun in formats._NOUNS.values()}
                else:  # read back from the raw rows of `loading: lazy`
                    assert function.name == "unpack_raw", f"{file.name}:{call.lineno}"
    return reasons


def raised_notes() -> set[str]:
    """Every `notes.add("...")`, and every string put into a tuple beside `*notes`."""
    notes: set[str] = set()
    for file in DATA_ROOM:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "add"
            ):
                if ast.unparse(node.func.value).endswith("notes"):
                    notes |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
            elif isinstance(node, ast.Tuple) and "*notes" in map(ast.unparse, node.elts):
                notes |= {str(a.value) for a in node.elts if isinstance(a, ast.Constant)}
    return notes


def test_the_table_of_bad_rows_has_every_reason_and_no_other() -> None:
    (table,) = tables("docs/data.md", "Bad rows")
    assert set(first_cells(table)) == raised_reasons()
    assert len(table) == len(raised_reasons())
    assert all(len(row) == 3 and all(row) for row in table)


def test_the_table_of_notes_has_every_note_and_no_other() -> None:
    *_, table = tables("docs/data.md", "data_report.json")
    assert set(first_cells(table)) == raised_notes()


@pytest.mark.parametrize("name", [name for name in get_args(Format) if name != "auto"])
def test_each_format_has_a_row_that_is_found_to_be_of_it_and_is_read(name: str) -> None:
    (row,) = re.findall(
        rf"^### {name}\n.*?```json\n(.*?)\n```", read("docs/data.md"), re.MULTILINE | re.DOTALL
    )
    assert "\n" not in row
    values = parse_json(row)
    is_preference = name in PREFERENCE_FORMATS
    assert detect_format([values], "docs/data.md", of_preferences=is_preference) == name
    if is_preference:
        records, notes = read_answers(values, name, {})
        assert [record.weights for record in records] == [(0, 1)] * len(records)
        assert {"pairs": 2, "labelled": 1, "ranked": 6}[name] == len(records)
        assert notes == ()
        return
    record, notes = read_record(values, name, {})
    if record.is_chat:
        assert turn_weights(record, "assistant")[-1] == 1
    assert set(notes) <= {"tools_wrapped"}


def test_the_table_of_pairs_that_are_left_out_has_every_reason() -> None:
    (table,) = tables("docs/data.md", "Pairs that are left out")
    assert first_cells(table) == list(PAIR_REASONS)


def test_the_table_of_sources_has_every_ending() -> None:
    (table, *_) = tables("docs/data.md", "Sources")
    assert set(ENDINGS) <= set(first_cells(table))


def test_the_keys_of_the_data_report_are_those_of_the_code() -> None:
    whole, source, _ = tables("docs/data.md", "data_report.json")
    assert first_cells(source) == [*(field.name for field in dataclasses.fields(SourceReport)), "not_listed"]
    assert first_cells(source) == list(SourceReport("a", "text").as_dict())
    assert set(first_cells(whole)) == {
        "train",
        "valid",
        "train_rows",
        "valid_rows",
        "valid_examples_also_in_train",
        "train_examples_seen_before",
        "block_size",
        "block_fill",
        "drawn",
    }


# --- docs/masks.md


def test_the_drawing_of_a_turn_marks_the_answer_and_what_closes_it() -> None:
    (drawing,) = re.findall(r"```\n(full .*?)```", read("docs/masks.md"), re.DOTALL)
    full, prompt, closed, turn = (line[8:] for line in drawing.splitlines())
    length = {name: len(line.split()[0]) for name, line in (("prompt", prompt), ("closed", closed))}
    marked = [i for i, character in enumerate(turn) if character == "="]
    assert marked == list(range(length["prompt"], length["closed"]))
    assert full[length["prompt"] : length["closed"]] == r"4<|im_end|>\n"
    assert full[: length["prompt"]].endswith(r"<|im_start|>assistant\n")


def test_every_value_of_train_on_and_the_example_of_weights() -> None:
    (table,) = tables("docs/masks.md", "Choosing what is trained")
    assert tuple(first_cells(table)) == get_args(TrainOn)
    (row,) = re.findall(r"```json\n(.*?)\n```", read("docs/masks.md"))
    record, _ = read_record(json.loads(row), "messages", {})
    assert turn_weights(record, "assistant") == [0, 0, 0, 0.5]
    assert turn_weights(record, "all") == [1, 0, 1, 0.5]


# --- docs/runs.md


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tunesmith.RunResult:
    """A tiny run that evaluates, answers rows and saves checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    config: dict[str, Any] = {
        "run": {"name": "r", "output_dir": str(folder / "runs")},
        "model": {"path": str(make_tiny_model(folder / "model")), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", conversations(8))),
            "valid": str(write_rows(folder / "valid.jsonl", conversations(3, seed=5))),
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "eval": {"answer_rows": 2, "max_new_tokens": 4},
    }
    return tunesmith.sft(config)


def test_a_run_writes_the_files_that_the_table_has(run: tunesmith.RunResult) -> None:
    (table,) = tables("docs/runs.md", "The run folder")
    written = {item.name + "/" * item.is_dir() for item in run.run.iterdir()}
    assert set(first_cells([[row[0]] for row in table])) == written | {
        "bad_step.json",
        "startup.json",
        "logs/",
    }


def test_the_metric_keys_are_those_a_run_writes(run: tunesmith.RunResult) -> None:
    steps, evals = tables("docs/runs.md", "metrics.jsonl")
    lines = read_metrics(run.run / "metrics.jsonl")
    assert {tuple(line) for line in lines if "loss" in line} == {tuple(first_cells(steps))}
    assert {tuple(line) for line in lines if "loss" not in line} == {tuple(first_cells(evals))}


def test_the_summary_keys_are_those_a_run_writes(run: tunesmith.RunResult) -> None:
    (table,) = tables("docs/runs.md", "summary.json")
    assert first_cells(table) == list(json.loads((run.run / "summary.json").read_text()))


def test_what_may_change_is_what_resume_allows() -> None:
    _, table = tables("docs/runs.md", "Going on")
    assert tuple(first_cells(table)) == FREE_TO_CHANGE


def test_the_trackers_are_those_of_the_config() -> None:
    (table,) = tables("docs/runs.md", "Trackers")
    (names,) = get_args(TrackingConfig.model_fields["report_to"].annotation)
    assert set(first_cells([[row[0]] for row in table])) == set(get_args(names))


def test_the_lines_that_load_a_result_do(run: tunesmith.RunResult) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", read("docs/runs.md"), re.DOTALL)
    assert code.count("runs/NAME") == 2
    names: dict[str, Any] = {}
    exec(code.replace("runs/NAME", str(run.run)), names)
    assert names["model"].peft_config["default"].r == 4
    asked = names["tokenizer"].apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


# --- docs/migrating.md

# Options of QwenLM's finetune.py: its three own argument classes, and what its TrainingArguments add.
QWEN = """
    model_name_or_path data_path eval_data_path lazy_preprocess cache_dir optim model_max_length use_lora
    lora_r lora_alpha lora_dropout lora_target_modules lora_weight_path lora_bias q_lora
"""
# What its shell scripts hand on to transformers and torchrun.
QWEN_SHELL = """
    bf16 fp16 output_dir num_train_epochs per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps evaluation_strategy save_strategy save_steps save_total_limit learning_rate
    weight_decay adam_beta2 warmup_ratio lr_scheduler_type logging_steps report_to gradient_checkpointing
    deepspeed nproc_per_node nnodes node_rank master_addr master_port
"""
# The chapter's argument classes, its pretrain.sh and its LoraConfig.
CHAPTER = """
    model_name_or_path config_name tokenizer_name torch_dtype train_files block_size preprocessing_num_workers
    per_device_train_batch_size gradient_accumulation_steps do_train output_dir evaluation_strategy
    learning_rate num_train_epochs warmup_steps logging_dir logging_strategy logging_steps save_strategy
    save_steps save_total_limit seed bf16 gradient_checkpointing deepspeed report_to resume_from_checkpoint
    task_type inference_mode r lora_alpha lora_dropout target_modules
"""


def migrations() -> dict[str, set[str]]:
    """Option -> what the second column says of it, over all tables."""
    found: dict[str, set[str]] = {}
    for option, ours in re.findall(
        r"^\| `([^`]+)`[^|]*\| ([^|]+?) \|", read("docs/migrating.md"), re.MULTILINE
    ):
        found.setdefault(option, set()).add(ours)
    return found


@pytest.mark.parametrize("options", [QWEN, QWEN_SHELL, CHAPTER], ids=["qwen", "qwen-shell", "chapter"])
def test_every_option_of_the_scripts_is_in_the_map_once(options: str) -> None:
    found = migrations()
    assert set(options.split()) <= set(found)
    assert {option: ours for option, ours in found.items() if len(ours) > 1} == {}


DOCS = ("data", "masks", "runs", "migrating", "pretraining")


@pytest.mark.parametrize("name", [f"docs/{name}.md" for name in DOCS])
def test_every_key_that_the_docs_name_exists(name: str) -> None:
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)(?![\w/(])", read(name)))
    files = {key for key in named if key.endswith((".jsonl", ".json", ".py", ".md", ".safetensors"))}
    assert named
    assert named - files <= set(all_keys())


def test_names_of_other_tools_in_a_config_are_answered_as_in_the_map() -> None:
    found = migrations()
    for former, ours in FORMER_NAMES.items():
        assert found[former] == {"not yet" if "not supported yet" in ours else f"`{ours}`"}, former


def test_options_that_a_config_is_asked_for_lead_to_the_keys_of_the_map() -> None:
    """A hint may be missing; one that is given must be the map's."""
    for option, cells in migrations().items():
        hint, right = suggest_key((option,))
        if hint.startswith("Here that is ") and right:
            assert {".".join(map(str, key)) for key in right} == set(re.findall(r"`([^`]+)`", *cells)), option


# --- docs/pretraining.md


def test_the_config_of_a_model_from_scratch_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", read("docs/pretraining.md"), re.DOTALL)
    config = load_config(yaml.safe_load(text.replace("6e-5", "0.00006").replace("1e-4", "0.0001")))
    assert (config.model.is_from_scratch, config.train.learning_rate) == (True, 6e-4)


def test_the_tables_of_schedules_and_initialisations_have_every_value() -> None:
    (schedules,) = tables("docs/pretraining.md", "Schedules")
    assert set(first_cells(schedules)) == set(get_args(TrainConfig.model_fields["schedule"].annotation))
    (initialisations,) = tables("docs/pretraining.md", "Weights")
    assert set(first_cells(initialisations)) == set(
        get_args(ModelConfig.model_fields["initialisation"].annotation)
    )


def test_the_table_of_tokens_is_twenty_a_parameter() -> None:
    (table,) = tables("docs/pretraining.md", "Size and tokens")
    unit = {"M": 1e6, "B": 1e9}
    for row in table:
        parameters, tokens = (float(cell[:-1]) * unit[cell[-1]] for cell in row)
        assert tokens == pytest.approx(OPTIMAL_TOKENS_PER_PARAMETER * parameters)


# --- CONTRIBUTING.md


def test_contributing_names_files_names_and_targets_that_exist() -> None:
    text = read("CONTRIBUTING.md")
    for path in re.findall(r"`((?:tunesmith|tests|docs)/[\w/.]+)`", text):
        assert (REPOSITORY / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    (table,) = tables("CONTRIBUTING.md", "Set up")
    assert {name.removeprefix("make ") for name in first_cells(table)} == targets
    for name, file in re.findall(r"`([A-Za-z_.]+)` in\s+`(tunesmith/[\w/.]+)`", text):
        assert name.rpartition(".")[2] in read(file), name


def test_contributing_says_the_layers_that_are_checked() -> None:
    (order,) = re.findall(r"`(errors <- .*?)`", read("CONTRIBUTING.md"), re.DOTALL)
    (layers,) = re.findall(r"^layers = \[\n(.*?)^\]", read("pyproject.toml"), re.MULTILINE | re.DOTALL)
    checked = [line.strip(' ",').replace("tunesmith.", "") for line in layers.splitlines()]
    assert [layer.strip() for layer in " ".join(order.split()).split("<-")] == checked[::-1]


# --- docs/adapters.md


def test_the_page_of_adapters_has_every_method_with_its_paper_and_what_it_goes_with() -> None:
    (papers,) = tables("docs/adapters.md", "The methods")
    assert first_cells(papers) == list(METHODS)
    for (name, text, paper), (key, method) in zip(papers, METHODS.items(), strict=True):
        assert name == f"`{key}`"
        assert text
        assert paper == method.paper.split(";")[0]
    (table,) = tables("docs/adapters.md", "What goes with what")
    assert len(table) == len(METHODS)
    for row, (name, method) in zip(table, METHODS.items(), strict=True):
        defaults = {key: value for key, value in method.defaults.items() if key != "target_modules"}
        merges = "no" if method.no_merge else "-" if name == "none" else "yes"
        # What schema.py does not offer yet is not told.
        offered = [
            kind
            for kind in method.quantizations
            if kind in get_args(ModelConfig.model_fields["quantization"].annotation)
        ]
        assert row == [
            f"`{name}`",
            ", ".join(method.keys) or "-",
            ", ".join(f"{key} {value:g}" for key, value in defaults.items()) or "-",
            f"{method.learning_rate:g}",
            merges,
            "yes" if method.packs else "no",
            ", ".join(offered) or "no",
            ", ".join(method.strategies),
        ]

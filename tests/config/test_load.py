"""A wrong config gives its mistakes in plain words, all in one go; a right one survives a dump."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import Config, ModelConfig, all_keys, dump_config, load_config
from tunesmith.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}}


def _message(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return str(caught.value)


# ---- planted mistakes ----


def _planted() -> list[Any]:
    cases = []
    text = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8")
    for case in text.split("\n=== ")[1:]:
        name, *lines = case.splitlines()
        end = next(i for i, line in enumerate(lines) if line[:2] in ("$ ", "> "))
        overrides = [line[2:] for line in lines if line.startswith("$ ")]
        message = "\n".join(line[2:] for line in lines if line.startswith("> "))
        cases.append(pytest.param("\n".join([*lines[:end], ""]), overrides, message, id=name))
    return cases


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "overrides", "message"), _planted())
def test_a_planted_mistake_gives_exactly_this_message(
    text: str, overrides: list[str], message: str, in_tmp_path: Path
) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    assert _message("c.yaml", overrides) == message


def test_at_least_sixty_mistakes_are_planted_and_none_twice() -> None:
    planted = {(case.values[0], *case.values[1]) for case in _planted()}
    assert len(planted) == len(_planted()) >= 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n\tpath: m\n",
            "c.yaml:2:1: not valid YAML: a tab stands where YAML wants spaces. Indent with spaces.",
        ),
        ("model: {path: a\0b}\n", "c.yaml:1: the character U+0000 cannot stand in YAML."),
        ("[" * 3000, "c.yaml: nested too deeply, or a YAML alias that holds itself."),
        (
            "model: {path: m}\ndata: {train: a}\ntrain: {batch_size: " + "9" * 400 + "}\n",
            "c.yaml:3: train.batch_size is a number of about 400 digits; "
            "expected a whole number of at least 1. It is too large.",
        ),
        (
            "model: {path: m}\ndata: {train: a}\ntrain: {batch_size: " + "9" * 5000 + "}\n",
            f"c.yaml:3: train.batch_size is '{'9' * 76}...; expected a whole number of at least 1.",
        ),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef")),
            "c.yaml:1: more than 100,000 values.",
        ),
    ],
    ids=["tab", "control character", "nesting", "huge number", "too many digits", "aliases of aliases"],
)
def test_text_that_cannot_stand_in_a_table_gives_exactly_this_message(
    text: str, message: str, in_tmp_path: Path
) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    assert _message("c.yaml") == message


def test_no_message_speaks_pydantic_or_python() -> None:
    for case in _planted():
        message = case.values[2]
        for jargon in ("Input should", "type=", "input_value", "None", "True", "False", "pydantic", "dict"):
            assert jargon not in message, message


# ---- contradictions that rest on another mistake ----


@pytest.mark.parametrize(
    ("wrong", "mistake"),
    [
        ({"train": {"max_setps": 10}, "data": {"train": "a", "loading": "streaming"}}, "train.max_setps"),
        ({"train": {"steps": 10}, "data": {"train": "a", "loading": "streaming"}}, "train.steps"),
        ({"train": {"zzz": 10}, "data": {"train": "a", "loading": "streaming"}}, "train.zzz"),
        ({"trian": {"max_steps": 10}, "data": {"train": "a", "loading": "streaming"}}, "trian"),
        ({"train": {"max_steps": "ten"}, "data": {"train": "a", "loading": "streaming"}}, "train.max_steps"),
        ({"train": 10, "data": {"train": "a", "loading": "streaming"}}, "train is 10"),
        ({"data": {"train": "a", "vaild": "b"}, "eval": {"every_steps": 3}}, "data.vaild"),
        ({"data": {"train": "a", "valid": 3}, "eval": {"every_steps": 3}}, "data.valid"),
        (
            {"data": {"train": "a", "max_length": 64.5}, "train": {"micro_batch_tokens": 64}},
            "data.max_length",
        ),
        (
            {"adapter": {"method": "non", "r": 8}, "model": {"path": "m", "quantization": "nf4"}},
            "adapter.method",
        ),
        ({"adapter": {"methd": "lora"}, "model": {"path": "m", "freeze": ["x"]}}, "adapter.methd"),
    ],
)
def test_a_contradiction_that_rests_on_a_wrong_key_is_not_reported(
    wrong: dict[str, Any], mistake: str
) -> None:
    message = _message({**MINIMAL, **wrong})
    assert "\n" not in message
    assert mistake in message


def test_a_contradiction_that_rests_on_a_wrong_key_is_not_reported_beside_a_wrong_value_either() -> None:
    streaming = {"train": "a", "loading": "streaming"}
    message = _message({**MINIMAL, "data": streaming, "train": {"zzz": 10, "batch_size": "x"}})
    assert [line.split(";")[0].split(".")[0:2] for line in message.splitlines()[1:]] == [
        ["config: unknown key train", "zzz"],
        ["config: train", "batch_size is 'x'"],
    ]


def test_a_contradiction_among_right_keys_is_reported_beside_a_wrong_key() -> None:
    message = _message({**MINIMAL, "train": {"epochs": 1, "max_steps": 2, "warmpu": 3}})
    assert message.splitlines() == [
        "config: 2 mistakes",
        "config: unknown key train.warmpu. Did you mean train.warmup?",
        "config: train.epochs is 1.0 and train.max_steps is 2; a run ends by one of them. "
        "Remove one, or set it to null.",
    ]


# ---- near keys ----


def _edits(name: str) -> st.SearchStrategy[str]:
    """Names one slip of the finger away: a letter lost, doubled, swapped with the next, or hit beside."""
    at = st.integers(0, len(name) - 1)
    return st.one_of(
        at.map(lambda i: name[:i] + name[i + 1 :]),
        at.map(lambda i: name[:i] + name[i] + name[i:]),
        at.map(lambda i: name[:i] + name[i : i + 2][::-1] + name[i + 2 :]),
        at.map(lambda i: name[:i] + "x" + name[i + 1 :]),
    )


_LONG_KEYS = [key for key in all_keys() if "[]" not in key and len(key.rpartition(".")[2]) >= 4]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_slip_in_any_key_is_answered_with_the_right_key(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(_LONG_KEYS))
    section, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2] for other in all_keys() if other.rpartition(".")[0] == section}
    slip = data.draw(_edits(name).filter(lambda text: text not in siblings))
    values = copy.deepcopy(MINIMAL)
    below: dict[str, Any] = values
    for part in section.split(".") if section else []:
        below = below.setdefault(part, {})
    below[slip] = None
    written = f"{section}.{slip}" if section else slip
    assert f"config: unknown key {written}. Did you mean {key}?" in _message(values).splitlines()


def test_a_key_of_another_tool_is_answered_with_ours() -> None:
    assert _message({"model": {"model_name_or_path": "m"}, "data": {"train_file": "a"}}).splitlines() == [
        "config: 2 mistakes",
        "config: unknown key model.model_name_or_path. Here that is model.path.",
        "config: unknown key data.train_file. Here that is data.train.",
    ]


# ---- dump and load ----

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_WORDS = [
    "no",
    "1e-4",
    "010",
    "0x1F",
    "1_000",
    "2024-01-01",
    "null",
    "~",
    "<<",
    "1:30",
    "a: b",
    "# x",
    " ",
    "-",
]
_WORDS += ["\x85", "a\u2028b", "a\r\nb", "\n", " a\n  b\n", "\ufeff", "\x00", "\t", "\U0001f600", "'\"\\"]
_TRICKY = st.sampled_from(_WORDS)
_NAMES = _TEXT | _TRICKY
_POSITIVE = st.floats(1e-300, 1e300)
_COUNT = st.integers(1, 2**53 - 1)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=5,
)
_FORMATS = st.sampled_from(["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"])
_SOURCE = st.fixed_dictionaries(
    {"path": _NAMES.filter(lambda path: not path.strip(" .%").isdigit())},
    optional={
        "weight": _POSITIVE,
        "format": _FORMATS,
        "columns": st.dictionaries(_NAMES, _NAMES, max_size=2),
    },
)
_SOURCES = _SOURCE | st.lists(_SOURCE, min_size=1, max_size=3)


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    """Dicts that are valid configs, any key set or not."""
    is_full = draw(st.booleans())
    max_length = draw(st.integers(8, 100_000))
    tokens = st.integers(max_length, 2**40)
    data: dict[str, Any] = {"train": draw(_SOURCES), "max_length": max_length}
    if draw(st.booleans()):
        data["valid"] = draw(_SOURCES | st.floats(0, 1, exclude_min=True, exclude_max=True))
    data |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "system": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
                "columns": st.dictionaries(_NAMES, _NAMES, max_size=2),
                "template": st.sampled_from(["auto", "chatml"]),
                "loading": st.sampled_from(["cached", "lazy"]),
                "workers": st.none() | st.integers(0, 64),
            },
        )
    )
    adapter = {
        "r": _COUNT,
        "alpha": _POSITIVE,
        "dropout": st.floats(0, 1, exclude_max=True),
        "target_modules": st.just("all-linear") | st.lists(_NAMES, min_size=1, max_size=2),
        "method": st.sampled_from(["lora", "dora", "rslora"]),
        "trainable_tokens": st.lists(_NAMES, max_size=2),
    }
    train = {
        "batch_size": _COUNT,
        "micro_batch_tokens": tokens,
        "learning_rate": _POSITIVE,
        "gradient_checkpointing": st.sampled_from(["auto", True, False]),
        "trainer_args": st.dictionaries(_NAMES.map(lambda name: "x" + name), _JSON, max_size=3),
    } | draw(st.sampled_from([{}, {"epochs": _POSITIVE}, {"max_steps": _COUNT}]))
    evaluation = {"batch_tokens": tokens, "max_new_tokens": _COUNT}
    if "valid" in data:
        evaluation |= {"every_steps": _COUNT, "answer_rows": st.integers(0, 9)}
    return {
        "run": draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)
                    | _TRICKY.filter(str.isalnum),
                    "output_dir": _NAMES,
                    "resume": st.sampled_from(["auto", "never"]) | _COUNT,
                },
            )
        ),
        "model": {"path": draw(_NAMES)}
        | ({} if is_full else {"quantization": draw(st.sampled_from(["none", "nf4"]))}),
        "data": data,
        "adapter": {"method": "none"} if is_full else draw(st.fixed_dictionaries({}, optional=adapter)),
        "train": draw(st.fixed_dictionaries({}, optional=train)),
        "eval": draw(st.fixed_dictionaries({}, optional=evaluation)),
        "tracking": {"report_to": draw(st.lists(st.sampled_from(["swanlab", "wandb"]), max_size=2))},
    }


@settings(max_examples=200, deadline=None)
@given(values=_configs())
def test_a_config_that_is_dumped_loads_to_an_equal_one(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = copy.deepcopy(values)
    config = load_config(values)
    assert values == before  # the caller's dict is the caller's
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(config) is config
    for section, given_values in values.items():  # nothing that was set has been changed on the way
        for key, value in given_values.items():
            if (section, key) not in {("data", "train"), ("data", "valid")}:
                assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("text", _WORDS)
def test_a_text_that_yaml_could_read_as_something_else_survives_a_dump(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = load_config({**MINIMAL, "model": {"path": text}})
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path).model.path == text


# ---- what is read ----


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3.0),
        ("5e+2", 500.0),
    ],
)
def test_numbers_are_read_as_they_are_meant(written: str, read: float, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{train: a}}\ntrain: {{learning_rate: {written}}}\n")
    assert load_config(path).train.learning_rate == read


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "2024-01-01", "1:30", "007", "1_000", "0x1F", "=", "1.2.3"]
)
def test_words_that_yaml_1_1_reads_as_something_else_are_text(word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{path: {word}}}\ndata: {{train: a}}\n")
    assert load_config(path).model.path == word


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {path: m}\r\ndata:\r\n  train: a.jsonl\r\n")
    assert load_config(path).data.train[0].path == "a.jsonl"


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("model: {path: m}\ndata: {train: größe.jsonl}\n".encode("latin-1"))
    assert _message(path) == f"{path}:2: not UTF-8 text. Save the file as UTF-8."


def test_files_that_cannot_be_read_name_those_that_can(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    no_such = f"cannot be read: No such file or directory. Did you mean {tmp_path / 'lora.yaml'}?"
    assert _message(tmp_path / "lroa.yaml") == f"{tmp_path / 'lroa.yaml'}: {no_such}"
    config = tmp_path / "run/config.yaml"
    assert (
        _message(tmp_path / "run")
        == f"{tmp_path / 'run'}: cannot be read: Is a directory. Did you mean {config}?"
    )


def test_anchors_and_merge_keys_are_read_and_own_keys_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m}\ndata:\n  train:\n    - &first {path: a, weight: 2, format: text}\n"
        "    - {<<: *first, path: b}\n    - <<: [*first, {columns: {x: text}}]\n      weight: 3\n"
    )
    first, second, third = load_config(path).data.train
    assert (second.path, second.weight, second.format) == ("b", first.weight, first.format)
    assert (third.path, third.weight, third.columns) == ("a", 3.0, {"x": "text"})


def test_the_run_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my first run.v2.yaml"
    path.write_text("model: {path: m}\ndata: {train: a}\nrun:\n")
    assert load_config(path).run.name == "my-first-run.v2"
    assert load_config(path, ["run.name=other"]).run.name == "other"
    assert load_config(MINIMAL).run.name == "run"


def test_python_values_become_yaml_kinds() -> None:
    config = load_config({"model": ModelConfig(path="m"), "data": {"train": (Path("a.jsonl"),)}})
    assert config.model.path == "m"
    assert config.data.train[0].path == "a.jsonl"
    message = _message({**MINIMAL, 3: {}, "train": {"trainer_args": {"x": object}}})
    assert message.splitlines()[1:] == [
        "config: a key of the config is 3; expected text.",
        "config: train.trainer_args.x is <class 'object'>; expected a value.",
    ]


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.batch_size=8", ("train", "batch_size"), 8),
        ("train.learning_rate=1e-5", ("train", "learning_rate"), 1e-5),
        ("checkpoint.asynchronous=true", ("checkpoint", "asynchronous"), True),
        ("adapter.target_modules=[q_proj, v_proj]", ("adapter", "target_modules"), ["q_proj", "v_proj"]),
        ("run.name=2024", ("run", "name"), "2024"),  # the shell took the quotes
        ("run.name='2024'", ("run", "name"), "2024"),
        ("data.system=Answer: yes # or no", ("data", "system"), "Answer: yes # or no"),
        ("data.system=null", ("data", "system"), None),
        ("data.system=", ("data", "system"), None),
        ("data.valid=0.05", ("data", "valid"), 0.05),
        ("train.trainer_args.adam_beta2=0.95", ("train", "trainer_args"), {"adam_beta2": 0.95}),
        ("train.trainer_args={a=b: 1}", ("train", "trainer_args"), {"a=b": 1}),
    ],
)
def test_an_override_is_read_as_yaml_and_text_fields_take_it_as_it_stands(
    override: str, key: tuple[str, str], value: Any
) -> None:
    config = load_config(MINIMAL, [override])
    assert getattr(getattr(config, key[0]), key[1]) == value


def test_overrides_reach_into_lists_and_the_last_one_wins() -> None:
    values = {**MINIMAL, "data": {"train": [{"path": "a"}, {"path": "b"}]}}
    config = load_config(values, ["data.train[1].weight=2", "data.train[1].weight=3", "data.train[0]=c"])
    assert [(source.path, source.weight) for source in config.data.train] == [("c", 1.0), ("b", 3.0)]


def test_an_override_of_a_wrong_value_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {train: a}\ntrain: {batch_size: eight}\n")
    assert load_config(path, ["train.batch_size=8"]).train.batch_size == 8


def test_overriding_a_config_works_out_its_unset_defaults_again() -> None:
    config = load_config(MINIMAL)
    assert (config.train.epochs, config.train.learning_rate) == (3.0, 2e-4)
    other = load_config(config, ["train.max_steps=10", "adapter.method=none", "data.max_length=9000"])
    assert (other.train.epochs, other.train.max_steps, other.train.learning_rate) == (None, 10, 1e-5)
    assert load_config(MINIMAL) == config == Config.model_validate(MINIMAL)  # defaults are not shared


# ---- cost ----


def test_importing_the_config_imports_nothing_heavy() -> None:
    code = (
        "import sys, tunesmith.config, tunesmith.config.reference; "
        "print(*({'torch', 'transformers', 'datasets', 'peft', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("value", [float("inf"), [float("inf")], {"a": [float("-inf")]}])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(value: object) -> None:
    message = _message({**MINIMAL, "train": {"trainer_args": {"x": value}}})
    assert re.fullmatch(
        r"config: train\.trainer_args\.x\S* is -?inf; expected a value\. It is not finite\.", message
    )

"""What a row that judges answers becomes: the examples of both sides, rows of a run, and the account."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config import Config
from tunesmith.data.loading import Data, load_data
from tunesmith.data.prepare import PreparedRow, PrepareOptions, Preparer
from tunesmith.data.records import Example, RawRow
from tunesmith.data.report import SourceReport
from tunesmith.errors import DataError, TemplateError

REWRITES_HISTORY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Letters that no template writes: of prompts, of answers that both sides begin with, of chosen and rejected
# answers, and of questions between them.
ASKED, SHARED, CHOSEN, REJECTED, BETWEEN = (
    "\u0430\u0431",
    "\u0433\u0434",
    "\u0436\u0437",
    "\u0438\u0439",
    "\u043a\u043b",
)


def preparer(tokenizer: Any, format: str = "pairs", **options: Any) -> Preparer:
    defaults = {
        "columns": {},
        "system": None,
        "train_on": "assistant",
        "max_length": 4096,
        "too_long": "drop",
    }
    made: Any = {"format": format, **defaults, **options}
    return Preparer(tokenizer, PrepareOptions(**made))


def prepared(tokenizer: Any, row: Any, format: str = "pairs", **options: Any) -> PreparedRow:
    (outcome,) = preparer(tokenizer, format, **options).prepare([RawRow("pairs.jsonl:7", row)])
    return outcome


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(chosen: Any, rejected: Any, prompt: Any = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": [user(prompt)], "chosen": chosen, "rejected": rejected, **more}


def targets(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.input_ids[example.token_weights() > 0]))


def context(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.input_ids[example.token_weights() == 0]))


def spelled(tokenizer: Any, outcome: PreparedRow) -> list[tuple[int, str]]:
    assert outcome.problem is None
    return [(example.side, targets(tokenizer, example)) for example in outcome.examples]


# --- targets


def test_every_answer_of_the_real_pairs_is_what_transformers_renders_and_its_targets_are_the_answer(
    shared: Path, qwen_tokenizer: Any
) -> None:
    rows = json.loads((shared / "data/dpo_en_demo.json").read_text(encoding="utf-8"))
    outcomes = preparer(qwen_tokenizer, max_length=10**6).prepare(
        [RawRow(f"dpo_en_demo.json[{i}]", row) for i, row in enumerate(rows)]
    )
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    assert len(outcomes) == 300
    for row, outcome in zip(rows, outcomes, strict=True):
        prompt = [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]]
        asked = qwen_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert [example.side for example in outcome.examples] == [0, 1]
        for example, side in zip(outcome.examples, ("chosen", "rejected"), strict=True):
            whole = [*prompt, assistant(row[side]["value"])]
            ids = qwen_tokenizer.apply_chat_template(whole, return_dict=False)
            assert example.input_ids.tolist() == ids
            assert ids[: len(asked)] == asked
            assert np.flatnonzero(example.token_weights()).tolist() == list(range(len(asked), len(ids)))
            assert qwen_tokenizer.eos_token_id in ids[len(asked) :]


def test_every_labelled_answer_of_the_real_set_is_what_transformers_renders(
    shared: Path, qwen_tokenizer: Any
) -> None:
    rows = json.loads((shared / "data/kto_en_demo.json").read_text(encoding="utf-8"))
    outcomes = preparer(qwen_tokenizer, "labelled", max_length=10**6).prepare(
        [RawRow(f"kto_en_demo.json[{i}]", row) for i, row in enumerate(rows)]
    )
    for row, outcome in zip(rows, outcomes, strict=True):
        (example,) = outcome.examples
        ids = qwen_tokenizer.apply_chat_template(row["messages"], return_dict=False)
        asked = qwen_tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        assert example.side == (0 if row["label"] else 1)
        assert example.input_ids.tolist() == ids
        assert np.flatnonzero(example.token_weights()).tolist() == list(range(len(asked), len(ids)))


def words(alphabet: str) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=1, max_size=8)


@st.composite
def rows_of_pairs(draw: Any) -> tuple[dict[str, Any], tuple[list[str], list[str]]]:
    """A row and the answers that each side is trained on; a character tells who wrote it."""
    shared: list[dict[str, str]] = []
    for _ in range(draw(st.integers(0, 2))):
        shared += [user(draw(words(ASKED + " "))), assistant(draw(words(SHARED)))]
    shared.append(user(draw(words(ASKED + " "))))
    said = tuple(
        [draw(words(letters)) for _ in range(draw(st.integers(1, 3)))] for letters in (CHOSEN, REJECTED)
    )
    sides = []
    for texts in said:
        turns = [assistant(texts[0])]
        for text in texts[1:]:
            turns += [user(draw(words(BETWEEN))), assistant(text)]
        sides.append(turns)
    if draw(st.booleans()):
        row = {"prompt": shared, "chosen": sides[0], "rejected": sides[1]}
    else:
        row = {"chosen": shared + sides[0], "rejected": shared + sides[1]}
    return row, said


@pytest.mark.parametrize(
    "name", ["plain", "rewrites history", "qwen2_5", "qwen3", "llama3", "phi3", "gemma3"]
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=rows_of_pairs())
def test_each_target_of_a_side_is_of_that_sides_answers_and_all_of_them_are(
    made: Any, name: str, tiny_tokenizer: Any, chat_tokenizer: Callable[[str], Any]
) -> None:
    row, said = made
    tokenizer = tiny_tokenizer if name in ("plain", "rewrites history") else chat_tokenizer(name)
    if name == "rewrites history":
        tokenizer.chat_template = REWRITES_HISTORY
    outcome = prepared(tokenizer, row)
    assert outcome.problem is None
    sides = [example.side for example in outcome.examples]
    assert sides == sorted(sides)
    for side, texts, others in (
        (0, said[0], REJECTED + ASKED + SHARED + BETWEEN),
        (1, said[1], CHOSEN + ASKED + SHARED + BETWEEN),
    ):
        examples = [example for example in outcome.examples if example.side == side]
        assert len(examples) in (1, len(texts))
        trained = "".join(targets(tokenizer, example) for example in examples)
        letters = CHOSEN if side == 0 else REJECTED
        assert "".join(char for char in trained if char in letters) == "".join(texts)
        assert not set(trained) & set(others)
        if len(examples) == 1:
            assert not set(context(tokenizer, examples[0])) & set(letters)
        # An end token for each answer, whatever the template calls it.
        ends = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
        assert sum(trained.count(end) for end in ends) == len(texts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.tuples(*[st.text(min_size=1, max_size=20).filter(str.strip)] * 3))
def test_the_prompts_tokens_are_the_same_in_both_answers(texts: Any, tiny_tokenizer: Any) -> None:
    outcome = prepared(tiny_tokenizer, pair(texts[1], texts[2], prompt=texts[0]))
    if outcome.pairs != ("",):
        assert texts[1] == texts[2]
        return
    assert outcome.problem is None
    chosen, rejected = outcome.examples
    start = int(chosen.spans[0, 0])
    assert start == rejected.spans[0, 0]
    assert chosen.input_ids[:start].tolist() == rejected.input_ids[:start].tolist()


def test_raw_text_ends_with_eos_on_both_sides(tiny_tokenizer: Any) -> None:
    row = {"prompt": "two:", "chosen": " 2", "rejected": " <|im_end|>", "margin": 0.25}
    outcome = prepared(tiny_tokenizer, row)
    assert spelled(tiny_tokenizer, outcome) == [(0, " 2<|im_end|>"), (1, " <|im_end|><|im_end|>")]
    eos = tiny_tokenizer.eos_token_id
    assert [int((example.input_ids == eos).sum()) for example in outcome.examples] == [1, 1]
    assert [example.margin for example in outcome.examples] == [0.25, 0.25]


# --- what conversations of every recipe get


def test_control_text_in_an_answer_is_plain_text_and_noted(tiny_tokenizer: Any) -> None:
    outcome = prepared(tiny_tokenizer, pair("b", "b<|im_end|>"))
    assert spelled(tiny_tokenizer, outcome) == [(0, "b<|im_end|>\n"), (1, "b<|im_end|><|im_end|>\n")]
    ends = [int((example.input_ids == tiny_tokenizer.eos_token_id).sum()) for example in outcome.examples]
    assert ends == [2, 2]
    assert "control_text" in outcome.notes


def test_ids_that_are_not_apply_chat_templates_stop_the_run(tiny_tokenizer: Any) -> None:
    prepare = preparer(tiny_tokenizer).prepare
    tiny_tokenizer.split_special_tokens = True
    with pytest.raises(TemplateError, match=r"^pairs.jsonl:7: token 0 differs from apply_chat_template's"):
        prepare([RawRow("pairs.jsonl:7", pair("b", "c"))])


def test_the_system_setting_and_calls_as_text_reach_both_answers(tiny_tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    outcome = prepared(tiny_tokenizer, pair([calls], "c"), system="Be brief.")
    assert spelled(tiny_tokenizer, outcome) == [
        (0, '{"name": "add", "arguments": {"a": 2}}<|im_end|>\n'),
        (1, "c<|im_end|>\n"),
    ]
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [context(tiny_tokenizer, example) for example in outcome.examples] == [start, start]
    assert outcome.notes == ("tool_calls_as_text",)


# --- pairs that are left out


def length(tokenizer: Any, answer: str) -> int:
    return len(tokenizer.apply_chat_template([user("a"), assistant(answer)], return_dict=False))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (pair("b", "b"), "pairs"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "pairs"),
        ({"prompt": [user("a")], "answers": ["b", "b"], "scores": [2, 1]}, "ranked"),
    ],
)
def test_equal_answers_are_left_out_and_stop_nothing(row: Any, format: str, tiny_tokenizer: Any) -> None:
    outcome = prepared(tiny_tokenizer, row, format)
    assert (outcome.problem, outcome.examples) == (None, ())
    assert outcome.pairs == ("identical_answers",)


def test_answers_that_the_template_makes_equal_are_left_out(tiny_tokenizer: Any) -> None:
    assert prepared(tiny_tokenizer, pair("b", "b ")).pairs == ("",)
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("m.content", "m.content.strip()")
    assert prepared(tiny_tokenizer, pair("b", "b ")).pairs == ("identical_answers",)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_pair_of_which_one_answer_is_too_long_goes_whole(too_long: str, tiny_tokenizer: Any) -> None:
    short, long = length(tiny_tokenizer, "b"), length(tiny_tokenizer, "b" * 40)
    row = pair("b" * 40, "b")
    prompt = length(tiny_tokenizer, "b") - 3  # b, its end, the line break
    limit = short if too_long == "drop" else prompt
    outcome = prepared(tiny_tokenizer, row, too_long=too_long, max_length=limit)
    assert outcome.examples == ()
    assert outcome.pairs == ("too_long",)
    assert outcome.too_long == ((long, long - prompt), (short, 3))
    whole = prepared(tiny_tokenizer, row, too_long=too_long, max_length=long)
    assert [len(example.input_ids) for example in whole.examples] == [long, short]
    refused = prepared(tiny_tokenizer, row, too_long="error", max_length=short)
    assert str(refused.problem) == f"too_long: {long} tokens, over data.max_length={short}"


def test_a_cut_pair_is_kept_if_it_still_differs(tiny_tokenizer: Any) -> None:
    row = pair("x y z end", "x y z END")
    whole = prepared(tiny_tokenizer, row)
    first, second = (example.input_ids.tolist() for example in whole.examples)
    differs = next(i for i in range(len(first)) if first[i] != second[i])
    kept = prepared(tiny_tokenizer, row, too_long="truncate", max_length=differs + 1)
    assert [example.side for example in kept.examples] == [0, 1]
    assert all(example.num_cut_tokens and example.num_cut_targets for example in kept.examples)
    gone = prepared(tiny_tokenizer, row, too_long="truncate", max_length=differs)
    assert gone.examples == ()
    assert gone.pairs == ("same_after_cut",)
    assert gone.too_long == tuple((len(e.input_ids), e.num_targets) for e in whole.examples)


def test_a_labelled_answer_of_several_examples_is_kept_whole_or_not_at_all(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = REWRITES_HISTORY
    row = {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")], "label": True}
    first, last = prepared(tiny_tokenizer, row, "labelled").examples
    assert [targets(tiny_tokenizer, e) for e in (first, last)] == [
        "<think></think>b<|im_end|>",
        "<think></think>d<|im_end|>",
    ]
    outcome = prepared(tiny_tokenizer, row, "labelled", max_length=len(first.input_ids))
    assert outcome.examples == ()
    assert [tokens for tokens, _ in outcome.too_long] == [len(first.input_ids), len(last.input_ids)]


def test_the_rest_of_a_ranking_stays_when_one_pair_of_it_goes(tiny_tokenizer: Any) -> None:
    row = {"prompt": [user("a")], "answers": ["b", "c", "b"], "scores": [3, 2, 1]}
    outcome = prepared(tiny_tokenizer, row, "ranked")
    assert outcome.pairs == ("", "identical_answers", "")
    said = [(e.side, targets(tiny_tokenizer, e)[0], e.margin) for e in outcome.examples]
    assert said == [(0, "b", 1), (1, "c", 1), (0, "c", 1), (1, "b", 1)]
    tied = prepared(tiny_tokenizer, row | {"scores": [1, 1, 1]}, "ranked")
    assert (tied.problem, tied.examples, tied.too_long) == (None, (), ())
    assert tied.pairs == ("no_better_answer",)


# --- loading


def loaded(folder: Path, tokenizer: Any, rows: list[Any], recipe: str = "prefer", **data: Any) -> Data:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(folder / "model")
    values = {
        "run": {"recipe": recipe},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(file), "cache_dir": str(folder / "cache"), **data},
    }
    if recipe == "prefer" and "label" in rows[0]:
        values["prefer"] = {"method": "kto"}
    return load_data(Config.model_validate(values), tokenizer)


def rows_of(data: Any) -> list[list[tuple[int, float]]]:
    """(side, margin) of the examples of each row of a RowSet."""
    return [
        [(example.side, example.margin) for example in data.rows[row].examples]
        for row in range(data.num_rows)
    ]


def test_each_pair_is_a_row_and_the_cache_gives_sides_and_margins_back(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [pair("b", "c", margin=1.5), pair("b", "b"), pair("d", "e")]
    data = loaded(tmp_path, tiny_tokenizer, rows)
    assert data.train.reports[0].format == "pairs"
    assert rows_of(data.train) == [[(0, 1.5), (1, 1.5)], [(0, 0), (1, 0)]]
    assert data.train.bounds == [(0, 2, 1.0)]


def test_the_pairs_of_a_ranking_are_rows_of_their_own(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": [user("a")], "answers": ["b", "c", "d"], "scores": [3, 2, 0]},
        {"prompt": [user("a")], "answers": ["b", "c"], "scores": [0, 0.5]},
    ]
    margins = [1, 3, 2, 0.5]
    expected = [[(0, margin), (1, margin)] for margin in margins]
    assert rows_of(loaded(tmp_path, tiny_tokenizer, rows).train) == expected


def test_the_examples_of_an_expanded_pair_lie_together(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = REWRITES_HISTORY
    long = [assistant("b"), user("q"), assistant("c")]
    data = loaded(tmp_path, tiny_tokenizer, [pair(long, "d"), pair("b", "c"), pair("e", long)])
    assert [[side for side, _ in row] for row in rows_of(data.train)] == [[0, 0, 1], [0, 1], [0, 1, 1]]


def test_labelled_rows_are_rows_whatever_their_sides_are(tmp_path: Path, tiny_tokenizer: Any) -> None:
    labels = [True, False, False, True, False]
    rows = [{"messages": [user("a"), assistant(f"{i}")], "label": label} for i, label in enumerate(labels)]
    data = loaded(tmp_path, tiny_tokenizer, rows)
    assert [[side for side, _ in row] for row in rows_of(data.train)] == [[0], [1], [1], [0], [1]]
    report = data.train.reports[0]
    assert (report.desirable, report.undesirable) == (2, 3)
    assert "2 desirable and 3 undesirable answers" in report.lines()[0]


def test_a_fraction_for_validation_never_parts_the_pairs_of_a_ranking(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [{"prompt": [user(f"q{i}")], "answers": ["b", "c", "d"]} for i in range(10)]
    data = loaded(tmp_path, tiny_tokenizer, rows, valid=0.2)
    assert data.valid is not None
    assert (data.train.num_rows, data.valid.num_rows) == (24, 6)
    places = [{part.rows[i].place for i in range(len(part.rows))} for part in (data.train, data.valid)]
    assert [len(some) for some in places] == [8, 2]
    assert not places[0] & places[1]


def test_repeated_pairs_are_counted_and_swapped_or_shared_answers_are_not(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [pair("b", "c"), pair("c", "b"), pair("b", "d"), pair("b", "c")]
    assert loaded(tmp_path / "pairs", tiny_tokenizer, rows).duplicates == 1
    labelled = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    assert loaded(tmp_path / "labelled", tiny_tokenizer, labelled).duplicates == 1


def test_rows_of_the_other_kind_are_told_which_verb_takes_them(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chat = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(
        DataError, match=r"rows.jsonl: its rows are messages, and `tunesmith prefer`.*`tunesmith sft`"
    ):
        loaded(tmp_path, tiny_tokenizer, [chat])
    with pytest.raises(DataError, match=r"its rows are messages, and `tunesmith prefer`"):
        loaded(tmp_path, tiny_tokenizer, [pair("b", "c")], format="messages")
    for row, format in (
        (pair("b", "c"), "pairs"),
        (chat | {"label": True}, "labelled"),
        ({"prompt": "a", "answers": ["b", "c"]}, "ranked"),
    ):
        said = f"its rows are {format}, answers that were judged, and `tunesmith sft`.*`tunesmith prefer`"
        with pytest.raises(DataError, match=said):
            loaded(tmp_path, tiny_tokenizer, [row], recipe="sft")
    # What `label` means is not known where it is no truth value, and a named format is what the user wants.
    assert loaded(tmp_path, tiny_tokenizer, [chat | {"label": 3}], recipe="sft").train.num_rows == 1
    as_chat = loaded(tmp_path, tiny_tokenizer, [chat | {"label": False}], recipe="sft", format="messages")
    assert as_chat.train.num_rows == 1


def test_unknown_columns_are_answered_with_those_that_preferences_need(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, tiny_tokenizer, [{"prompt": "a", "preferred": "b", "dispreferred": "c"}])
    assert str(caught.value).split("\n")[1:] == [
        "  pairs              needs chosen and rejected",
        "  labelled           needs messages and label or conversations and label or conversation and label "
        "or prompt and completion and label or instruction and output and label",
        "  ranked             needs answers or responses or completions",
        "Map them: columns: {preferred: chosen, dispreferred: rejected}.",
    ]


# --- the account


def test_the_account_has_every_row_and_pair_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    row = pair("b" * 40, "c")
    long = length(tiny_tokenizer, "b" * 40)
    rows = [pair("b", "c"), pair("b", "b"), row, pair(" ", "c"), pair("x" * 60 + "1", "x" * 60 + "2")]
    data = loaded(tmp_path, tiny_tokenizer, rows, max_length=long, too_long="truncate", on_bad_row="skip")
    (report,) = data.train.reports
    assert (report.rows_read, report.rows_kept, report.rows_bad) == (5, 2, 1)
    assert (report.rows_too_long, report.rows_without_pair) == (1, 1)
    assert (report.pairs, report.examples) == (2, 4)
    assert report.pairs_left_out == {"identical_answers": 1, "same_after_cut": 1}
    assert report.examples_too_long == 2
    assert report.bad_by_reason == {"empty_answer": 1}
    assert [(entry["place"].split(":")[-1], entry["what"]) for entry in report.left_out] == [
        ("2", "identical_answers"),
        ("5", "same_after_cut"),
    ]
    assert report.as_dict()["not_listed"] == 0
    assert SourceReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    (line,) = report.lines()
    assert line.split("; ")[0].endswith(
        f"2 of 5 rows, {report.tokens:,} tokens, {report.target_tokens} targets"
    )
    assert line.split("; ")[1:] == [
        "2 pairs",
        "1 bad rows left out",
        "1 pairs left out: both answers are the same",
        "1 pairs left out: the answers differ only past data.max_length",
        "1 rows without a pair",
    ]


def test_rows_without_a_pair_are_counted_with_their_reason(tmp_path: Path, tiny_tokenizer: Any) -> None:
    ranked = {"prompt": [user("a")], "answers": ["b", "c"]}
    rows = [ranked, ranked | {"scores": [1, 1]}, ranked | {"answers": ["b"]}]
    (report,) = loaded(tmp_path, tiny_tokenizer, rows).train.reports
    assert (report.rows_read, report.rows_kept, report.rows_without_pair, report.pairs) == (3, 1, 2, 1)
    assert report.pairs_left_out == {"no_better_answer": 2}
    assert report.notes == {"tied_answers": 1}

"""Preview shows what training gets: ids, targets, cuts and bad rows, in every way of showing them."""

from __future__ import annotations

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.config import Config, load_config
from tunesmith.errors import ConfigError
from tunesmith.inspect.preview import preview
from tunesmith.inspect.shown import visible

ANSWER = "It is four."
CHAT = {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": ANSWER}]}
# The answer as ChatML ends it; the template's own line break is the last thing the turn writes.
TURN = ANSWER + "<|im_end|>\n"
HISTORY_DROPS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Previewer:
    """Runs preview on rows in a file, with a tokenizer saved beside it."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self.recipe = folder, tokenizer, "sft"

    def config(self, rows: list[Any], **data: Any) -> Config:
        file = self.folder / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(self.folder / "model")
        return load_config(
            {
                "run": {"recipe": self.recipe},
                "model": {"path": str(self.folder / "model")},
                "data": {"train": str(file), **data},
            }
        )

    def plain(self, rows: list[Any], *, number: int = 9, **data: Any) -> str:
        """What is printed where there is no terminal."""
        return self._printed(rows, number, data, Console(file=io.StringIO()))

    def coloured(self, rows: list[Any], **data: Any) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False)
        return self._printed(rows, 9, data, console)

    def _printed(self, rows: list[Any], number: int, data: dict[str, Any], console: Console) -> str:
        preview(self.config(rows, **data), rows=number, html=None, as_json=False, console=console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def page(self, rows: list[Any], **data: Any) -> str:
        file = self.folder / "preview.html"
        console = Console(file=io.StringIO())
        preview(self.config(rows, **data), rows=9, html=file, as_json=False, console=console)
        return file.read_text(encoding="utf-8")


@pytest.fixture
def previewer(tmp_path: Path, tiny_tokenizer: Any) -> Previewer:
    return Previewer(tmp_path, tiny_tokenizer)


@pytest.fixture
def json_lines(previewer: Previewer, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(rows: list[Any], *, number: int = 9, **data: Any) -> list[dict[str, Any]]:
        preview(previewer.config(rows, **data), rows=number, html=None, as_json=True)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def marked(text: str) -> list[str]:
    """What stands in [[ ]], the sign of each line break made a line break again."""
    return [
        found.replace("\u21b5\n", "\n").replace("\u21b5", "\n")
        for found in re.findall(r"\[\[(.*?)\]\]", text, re.S)
    ]


def tokens_part(text: str) -> str:
    """The drawing of the tokens, between the headings."""
    return text.split("\ntokens\n")[1].split("\nids\n")[0]


# --- JSON


def test_json_has_the_ids_of_the_template_and_the_targets_spell_the_answer_with_its_end(
    json_lines: Any, tiny_tokenizer: Any
) -> None:
    (line,) = json_lines([CHAT])
    assert list(line) == ["row", "input_ids", "targets", "weights", "text"]
    assert line["row"].endswith("rows.jsonl:1")
    assert (
        line["input_ids"]
        == tiny_tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    )
    assert line["text"] == tiny_tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    targets = [id_ for id_, target in zip(line["input_ids"], line["targets"], strict=True) if target]
    assert tiny_tokenizer.decode(targets) == TURN
    assert line["weights"] == [float(target) for target in line["targets"]]


def test_json_of_a_cut_row_holds_what_training_gets(json_lines: Any, tiny_tokenizer: Any) -> None:
    whole = tiny_tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    limit = len(whole) - 4
    (line,) = json_lines([CHAT], max_length=limit, too_long="truncate")
    assert line["input_ids"] == whole[:limit]
    assert line["text"] == tiny_tokenizer.decode(whole[:limit])
    (answer,) = json_lines([CHAT])
    assert sum(answer["targets"]) - sum(line["targets"]) == 4


def test_json_gives_weights_as_they_were_written(json_lines: Any) -> None:
    row = {"messages": [*CHAT["messages"], CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0.1}]}
    (line,) = json_lines([row])
    assert set(line["weights"]) == {0, 0.1, 1}
    assert [weight > 0 for weight in line["weights"]] == [bool(target) for target in line["targets"]]


def test_json_of_raw_text_trains_everything_but_the_first_token(json_lines: Any, tiny_tokenizer: Any) -> None:
    (line,) = json_lines([{"text": "Never five."}])
    assert line["input_ids"] == [*tiny_tokenizer("Never five.")["input_ids"], tiny_tokenizer.eos_token_id]
    assert line["text"] == "Never five.<|im_end|>"
    assert line["targets"] == [0] + [1] * (len(line["input_ids"]) - 1)


def test_json_of_a_template_that_rewrites_history_has_a_line_for_each_turn(
    json_lines: Any, previewer: Any
) -> None:
    previewer.tokenizer.chat_template = HISTORY_DROPS_THOUGHTS
    thought = {"role": "assistant", "content": "<think>two, two</think>" + ANSWER}
    first, second = json_lines([{"messages": [CHAT["messages"][0], thought, CHAT["messages"][0], thought]}])
    assert first["row"] == second["row"]
    assert "<think>" in first["text"]
    assert second["text"].count("<think>") == 1
    for line in (first, second):
        targets = [id_ for id_, target in zip(line["input_ids"], line["targets"], strict=True) if target]
        assert previewer.tokenizer.decode(targets) == "<think>two, two</think>" + TURN


def test_json_leaves_out_bad_and_dropped_rows_and_stdout_holds_nothing_else(
    previewer: Previewer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "two " * 100}, CHAT["messages"][1]]}
    preview(previewer.config(["{", long, CHAT], max_length=60), rows=9, html=None, as_json=True)
    out, err = capsys.readouterr()
    assert [json.loads(line)["row"].rpartition(":")[2] for line in out.splitlines()] == ["3"]
    assert "rows.jsonl:1: bad row (stops the run): not_json" in err
    assert "rows.jsonl:2: dropped: " in err


# --- the terminal


def test_without_colour_the_marks_hold_exactly_the_answers(previewer: Previewer) -> None:
    two_turns = {"messages": [*CHAT["messages"], {"role": "user", "content": "Sure?"}, CHAT["messages"][1]]}
    drawn = tokens_part(previewer.plain([two_turns]))
    assert marked(drawn) == [TURN, TURN]
    text = previewer.tokenizer.apply_chat_template(two_turns["messages"], tokenize=False)
    assert drawn.replace("[[", "").replace("]]", "").replace("\u21b5\n", "\n") == text


def test_no_color_on_a_terminal_marks_as_a_pipe_does(
    previewer: Previewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    preview(previewer.config([CHAT]), rows=1, html=None, as_json=False, console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in printed
    assert marked(tokens_part(printed)) == [TURN]


def test_marks_give_way_to_brackets_that_the_text_does_not_have(previewer: Previewer) -> None:
    row = {"messages": [{"role": "user", "content": "a[[0]]"}, CHAT["messages"][1]]}
    printed = previewer.plain([row])
    assert printed.splitlines()[1].startswith("{{trained}}")
    assert "{{" + ANSWER in printed


def test_with_colour_trained_tokens_alone_are_bold_and_no_mark_is_drawn(previewer: Previewer) -> None:
    drawn = tokens_part(
        previewer.coloured([CHAT])
        .replace("\x1b[3mtokens\x1b[0m", "tokens")
        .replace("\x1b[3mids\x1b[0m", "ids")
    )
    bold = "".join(re.findall(r"\x1b\[1;[\d;]*m(.*?)\x1b\[0m", drawn))
    assert bold == ANSWER + "<|im_end|>"
    assert "[[" not in drawn.replace("\x1b[", "")


def test_the_counts_are_those_of_the_template_and_the_answer(previewer: Previewer) -> None:
    tokens = len(previewer.tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"])
    targets = len(previewer.tokenizer(TURN)["input_ids"])
    printed = previewer.plain([CHAT, CHAT])
    assert printed.count(f"  {tokens} tokens, {targets} trained ({100 * targets / tokens:.1f} %)\n") == 2
    assert (
        f"2 rows shown: 2 kept, 0 too long, 0 bad; 2 examples, {2 * tokens} tokens, {2 * targets} trained"
        in printed
    )
    assert printed.count("  ids equal apply_chat_template\n") == 2


def test_only_the_rows_asked_for_are_read(previewer: Previewer) -> None:
    printed = previewer.plain([CHAT, CHAT, "{"], number=2)
    assert "row 2 of 2" in printed
    assert "rows.jsonl:3" not in printed


def test_bad_rows_are_shown_with_place_and_reason_among_the_others(previewer: Previewer) -> None:
    unknown = {"messages": [CHAT["messages"][0], {"role": "asistant", "content": "a"}]}
    printed = previewer.plain([unknown, CHAT], on_bad_row="skip")
    assert re.search(
        r"rows\.jsonl:1 .*\n  bad row \(left out, data\.on_bad_row=skip\): unknown_role: .*asistant", printed
    )
    assert "1 kept, 0 too long, 1 bad" in printed


def test_what_truncate_removes_is_marked_as_cut(previewer: Previewer) -> None:
    ids = previewer.tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    limit = len(ids) - 4
    printed = previewer.plain([CHAT], max_length=limit, too_long="truncate")
    (cut,) = re.findall(r"\{\{(.*?)\}\}", tokens_part(printed), re.S)
    assert cut.replace("\u21b5", "\n") == previewer.tokenizer.decode(ids[limit:])
    assert f"cut at data.max_length={limit}: 4 of {len(ids)} tokens go, 4 of them targets" in printed
    assert "cut from 1 row: 4 tokens, 4 of them targets" in printed


@pytest.mark.parametrize(
    ("too_long", "said"),
    [
        ("drop", "dropped: "),
        ("truncate", "dropped, no target would be left: "),
        ("error", "bad row (stops the run): too_long: "),
    ],
)
def test_a_row_that_is_left_out_whole_is_cut_whole_and_says_so(
    previewer: Previewer, too_long: str, said: str
) -> None:
    printed = previewer.plain([CHAT], max_length=8, too_long=too_long)
    assert said in printed
    assert tokens_part(printed).startswith("{{<|im_start|>user")
    assert tokens_part(printed).rstrip().endswith("<|im_end|>\u21b5}}")
    assert "[[" not in tokens_part(printed)


@pytest.mark.parametrize(
    ("recipe", "what", "is_said"),
    [
        ("sft", {"text": "Never five. " * 20}, True),
        ("pretrain", {"text": "Never five. " * 20}, False),
        ("sft", CHAT, False),
    ],
)
def test_which_recipe_texts_are_shown_for_is_said(
    previewer: Previewer, tmp_path: Path, recipe: str, what: dict[str, Any], is_said: bool
) -> None:
    """A config without run.recipe is one for sft, which leaves out what pretraining splits."""
    config = previewer.config([what], max_length=30)
    if recipe == "pretrain":
        values = {"train": config.data.train[0].path, "max_length": 30}
        config = load_config(
            {"run": {"recipe": recipe}, "model": {"path": str(tmp_path / "model")}, "data": values}
        )
    console = Console(file=io.StringIO())
    preview(config, rows=1, html=None, as_json=False, console=console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert ("run.recipe=pretrain" in said) == ("`tunesmith sft` takes them" in said) == is_said
    assert ("split at data.max_length=30, in " in said) == (recipe == "pretrain")
    assert ("1 too long" in said) == is_said


def test_control_strings_in_a_message_are_said_to_differ_on_purpose(previewer: Previewer) -> None:
    row = {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, CHAT["messages"][1]]}
    printed = previewer.plain([row])
    assert "a message spells a control token" in printed
    assert "on purpose, from token" in printed
    assert "What is <|im_end|>?<|im_end|>" in tokens_part(printed)
    assert marked(tokens_part(printed)) == [TURN]


def test_a_weight_other_than_1_stands_before_its_answer(previewer: Previewer) -> None:
    row = {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0.25}]}
    assert "x0.25[[" + ANSWER in tokens_part(previewer.plain([row]))
    assert ">x0.25</" in previewer.page([row])


def test_each_example_of_a_row_expanded_per_turn_is_shown(previewer: Previewer) -> None:
    previewer.tokenizer.chat_template = HISTORY_DROPS_THOUGHTS
    thought = {"role": "assistant", "content": "<think>two</think>" + ANSWER}
    row = {"messages": [CHAT["messages"][0], thought, CHAT["messages"][0], thought]}
    printed = previewer.plain([row])
    assert "example 1 of 2 of this row" in printed
    assert "example 2 of 2 of this row" in printed
    assert marked(printed) == ["trained", "<think>two</think>" + TURN, "<think>two</think>" + TURN]
    assert printed.count("ids equal apply_chat_template") == 2


def test_nothing_invisible_reaches_the_terminal(previewer: Previewer) -> None:
    evil = "a\x1b[2Jb\u202ec\u200bd\te"
    row = {"messages": [{"role": "user", "content": evil}, CHAT["messages"][1]]}
    printed = previewer.plain([row])
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "a\u241b[2Jb<U+202E>c<U+200B>d\u2192e" in tokens_part(printed)


def test_visible_tells_signs_from_text() -> None:
    assert visible("a\n") == [("a", False), ("\u21b5", True), ("\n", False)]
    assert visible("\x00\x7f\udcf0") == [("\u2400", True), ("<U+007F>", True), ("<F0>", True)]
    assert visible("f\u00fcr \u4f60") == [("f\u00fcr \u4f60", False)]


def test_a_character_of_several_tokens_is_shown_as_bytes_token_by_token(previewer: Previewer) -> None:
    row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "\U0001f600"}]}
    assert "\U0001f600".encode() == b"\xf0\x9f\x98\x80"
    for sign in ("<F0>", "<9F>", "<98>", "<80>"):
        assert sign.replace("<", "&lt;").replace(">", "&gt;") in previewer.page([row])
    assert "[[\U0001f600<|im_end|>" in previewer.plain([row])  # all its bytes are in one mark


# --- the page


class _Page(HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[str, str]] = []
        self._title: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "span" and "title" in dict(attrs):
            self.tokens.append((dict(attrs)["title"] or "", ""))
            self._title = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._title = None

    def handle_data(self, data: str) -> None:
        if self._title is not None:
            title, text = self.tokens[-1]
            self.tokens[-1] = (title, text + data)


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(previewer: Previewer) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<script>alert(1)</script><img src=x onerror=y>"},
            CHAT["messages"][1],
        ]
    }
    page = previewer.page([row])
    parsed = _Page(page)
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(parsed.tags)
    assert not {"src", "href", "action", "onerror"} & {name for name, _ in parsed.attributes}
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    drawn = re.findall(r'<span class="\w" title="[^"]*">(.*?)</span>', page, re.S)
    assert "&lt;" in drawn
    assert not [token for token in drawn if re.search(r"[<>]", re.sub(r"</?b>", "", token))]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=y&gt;" in page  # the rendered text


def test_the_page_has_every_token_with_its_id_and_weight(previewer: Previewer) -> None:
    ids = previewer.tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    tokens = _Page(previewer.page([CHAT])).tokens
    titles = [
        re.fullmatch(r"token (\d+), id (\d+), (trained|not trained), weight ([01])", title)
        for title, _ in tokens
    ]
    assert [int(title[2]) for title in titles if title] == ids
    trained = "".join(
        text for (_, text), title in zip(tokens, titles, strict=True) if title and title[4] == "1"
    )
    assert trained.replace("\u21b5", "") == TURN


def test_a_page_that_cannot_be_written_is_a_clear_error(previewer: Previewer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--html .*no/page\.html: cannot be written: No such file"):
        preview(previewer.config([CHAT]), rows=1, html=tmp_path / "no" / "page.html", as_json=False)


def test_no_row_to_show_is_a_clear_error(previewer: Previewer) -> None:
    with pytest.raises(ConfigError, match="--rows 0: expected 1 or more"):
        previewer.plain([CHAT], number=0)


# --- the real tokenizer


def test_qwen_rows_equal_its_own_template(
    qwen_tokenizer: Any, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shared / "data" / "alpaca_en_demo.json"
    config = load_config({"model": {"path": qwen_tokenizer.name_or_path}, "data": {"train": str(file)}})
    preview(config, rows=3, html=None, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = json.loads(file.read_text(encoding="utf-8"))[:3]
    assert len(lines) == 3
    for line, row in zip(lines, rows, strict=True):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        assert line["input_ids"] == qwen_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        targets = [id_ for id_, target in zip(line["input_ids"], line["targets"], strict=True) if target]
        assert qwen_tokenizer.decode(targets) == row["output"] + "<|im_end|>\n"


# --- pairs

ASK = {"role": "user", "content": "2+2?"}


def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": [ASK], "chosen": chosen, "rejected": rejected, **more}


PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def judged(previewer: Previewer) -> Previewer:
    previewer.recipe = "prefer"
    return previewer


def drawn_parts(printed: str) -> list[str]:
    """What is drawn under each heading, line break signs aside."""
    parts = re.findall(r"\ntokens\n(.*?)\n\nids\n", printed, re.S)
    return [part.replace("\u21b5\n", "\n").replace("\u21b5", "\n") for part in parts]


def test_a_pair_has_its_prompt_once_and_then_both_answers(judged: Previewer) -> None:
    printed = judged.plain([pair("4", "5", margin=0.5)])
    assert drawn_parts(printed) == [PROMPT.rstrip("\n") + "\n", "[[4<|im_end|>\n]]", "[[5<|im_end|>\n]]"]
    prompt = len(judged.tokenizer(PROMPT)["input_ids"])
    answer = len(judged.tokenizer("4<|im_end|>\n")["input_ids"])
    share = 100 * answer / (prompt + answer)
    size = f"  {prompt + answer} tokens, {answer} trained ({share:.1f} %)"
    lines = printed.splitlines()
    assert f"  prompt of both answers: {prompt} tokens, margin 0.5" in lines
    assert [lines[lines.index(f"  {side}") + 1] for side in ("chosen", "rejected")] == [size, size]
    assert lines.count("  ids equal apply_chat_template") == 2
    assert "1 row shown: 1 kept, 0 too long, 0 bad; 1 pair, 2 examples" in printed


def test_pairs_that_are_left_out_are_shown_as_cut_with_the_reason(judged: Previewer) -> None:
    short = len(judged.tokenizer(PROMPT + "4<|im_end|>\n")["input_ids"])
    printed = judged.plain([pair("4", "4"), pair("4 " * 40, "5")], max_length=short)
    assert printed.count("  left out: both answers are the same\n") == 2
    assert printed.count("data.max_length=") == 2
    assert f"  left out with the other answer, which is over data.max_length={short}\n" in printed
    assert marked(printed) == ["trained"]
    assert "left out 1 pair: an answer is over data.max_length" in printed


def test_the_pairs_of_a_ranking_are_numbered_and_what_was_left_out_is_told_from_the_rest(
    judged: Previewer,
) -> None:
    row = {"prompt": [ASK], "answers": ["4", "4", "5"]}
    printed = judged.plain([row, row | {"scores": [1, 1, 1]}])
    lines = [line.strip() for line in printed.splitlines()]
    assert [line for line in lines if line.endswith((", chosen", ", rejected"))] == [
        f"pair {number} of 3 of this row, {side}" for number in (1, 2, 3) for side in ("chosen", "rejected")
    ]
    assert [part.strip("[]{}")[0] for part in drawn_parts(printed)[1::3]] == ["4", "4", "4"]
    assert [part[:2] for part in drawn_parts(printed)] == ["{{", "{{", "{{", *["<|", "[[", "[["] * 2]
    assert "left out: no answer of the row is better than another" in lines


def test_answers_that_a_template_expands_are_shown_text_by_text(judged: Previewer) -> None:
    judged.tokenizer.chat_template = HISTORY_DROPS_THOUGHTS
    thought = {"role": "assistant", "content": "<think>two</think>4"}
    row = {"prompt": [ASK], "chosen": [thought, ASK, thought], "rejected": "5"}
    printed = judged.plain([row])
    for number, side in enumerate(("chosen", "chosen", "rejected"), 1):
        assert f"  example {number} of 3 of this row, {side}\n" in printed
    assert marked(printed)[1:] == [*["<think>two</think>4<|im_end|>\n"] * 2, "5<|im_end|>\n"]


def test_json_of_judged_answers_has_the_side_and_the_row_of_the_run(
    judged: Previewer, capsys: pytest.CaptureFixture[str]
) -> None:
    ranked = {"prompt": [ASK], "answers": ["4", "4", "5"], "scores": [3, 2, 0]}
    for rows, expected in (
        ([pair("4", "5"), pair("4", "4"), pair("5", "4")], [(1, 0, 0), (1, 1, 0), (3, 0, 1), (3, 1, 1)]),
        (
            [ranked, ranked],
            [
                (row, side, number)
                for row, numbers in ((1, (0, 1)), (2, (2, 3)))
                for number in numbers
                for side in (0, 1)
            ],
        ),
        ([CHAT | {"label": False}, CHAT | {"label": True}], [(1, 1, 0), (2, 0, 1)]),
    ):
        preview(judged.config(rows), rows=9, html=None, as_json=True)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = [(int(line["row"].rpartition(":")[2]), line["side"], line["pair"]) for line in lines]
        assert found == expected
        for line in lines:
            targets = [id_ for id_, target in zip(line["input_ids"], line["targets"], strict=True) if target]
            assert judged.tokenizer.decode(targets).endswith("<|im_end|>\n")


def test_the_page_has_the_prompt_once_and_each_answer_under_its_side(judged: Previewer) -> None:
    content = judged.page([pair("four", "five")])
    headings = re.findall(r"<h3>(.*?)</h3>", content)
    assert [heading.split(":")[0] for heading in headings] == ["Prompt of both answers", "Chosen", "Rejected"]
    drawn = re.findall(r'<div class="tokens" dir="auto">(.*?)</div>', content, re.S)
    texts = [html.unescape(re.sub(r"<[^>]*>", "", part)).replace("\u21b5\n", "\n") for part in drawn]
    assert texts == [PROMPT, "four<|im_end|>\n", "five<|im_end|>\n"]
    assert ['class="t"' in part for part in drawn] == [False, True, True]

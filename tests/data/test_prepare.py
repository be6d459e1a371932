"""What a row becomes: targets, weights, cuts, raw text, and the audit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from tunesmith.config import Config
from tunesmith.data.prepare import PreparedRow, PrepareOptions, Preparer
from tunesmith.data.records import Example, RawRow
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ModelError, TemplateError

TWO = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def prepared(tokenizer: Any, row: Any, **options: Any) -> PreparedRow:
    format = "messages" if "messages" in row else "text" if "text" in row else "prompt_completion"
    defaults = {
        "columns": {},
        "system": None,
        "train_on": "assistant",
        "max_length": 4096,
        "too_long": "drop",
    }
    made: Any = {"format": format, **defaults, **options}
    (outcome,) = Preparer(tokenizer, PrepareOptions(**made)).prepare([RawRow("chat.jsonl:7", row)])
    return outcome


def example(tokenizer: Any, row: Any, **options: Any) -> Example:
    outcome = prepared(tokenizer, row, **options)
    assert outcome.problem is None
    (only,) = outcome.examples
    return only


def targets(tokenizer: Any, example: Example) -> list[tuple[str, float]]:
    spans = zip(example.spans, example.span_weights, strict=True)
    return [(tokenizer.decode(example.input_ids[start:end]), float(weight)) for (start, end), weight in spans]


# --- targets


def test_the_end_of_every_turn_is_a_target_though_pad_is_eos(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    chat = example(tiny_tokenizer, {"messages": TWO})
    assert targets(tiny_tokenizer, chat) == [("b<|im_end|>\n", 1), ("d<|im_end|>\n", 1)]
    ends = np.flatnonzero(chat.input_ids == tiny_tokenizer.eos_token_id)
    assert chat.token_weights()[ends].tolist() == [0, 1, 0, 1]


def test_train_false_and_weights_of_messages(tiny_tokenizer: Any) -> None:
    messages = [TWO[0], TWO[1] | {"train": False}, TWO[2] | {"weight": 0.25}, TWO[3] | {"weight": 2}]
    assert targets(tiny_tokenizer, example(tiny_tokenizer, {"messages": messages})) == [
        ("<|im_start|>user\nc<|im_end|>\n", 0.25),
        ("d<|im_end|>\n", 2),
    ]


def test_tool_calls_a_template_would_drop_are_trained_as_their_json(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 2."},
        ]
    }
    assert targets(tokenizer, example(tokenizer, row)) == [
        ('{"name": "add", "arguments": {"a": 1}}<|im_end|>\n', 1.0),
        ("It is 2.<|im_end|>\n", 1.0),
    ]
    assert "tool_calls_as_text" in prepared(tokenizer, row).notes


def test_train_on_last_and_all(tiny_tokenizer: Any) -> None:
    last = example(tiny_tokenizer, {"messages": TWO}, train_on="last")
    assert targets(tiny_tokenizer, last) == [("d<|im_end|>\n", 1)]
    whole = example(tiny_tokenizer, {"messages": TWO}, train_on="all")
    # Nothing precedes the first.
    assert whole.token_weights().tolist() == [0] + [1] * (len(whole.input_ids) - 1)


def test_the_system_setting_replaces_the_rows_own(tiny_tokenizer: Any) -> None:
    own = [{"role": "system", "content": "own", "weight": 0.5}, *TWO]
    for messages, weighed in ((TWO, []), (own, [("<|im_start|>system\nset<|im_end|>\n", 0.5)])):
        chat = example(tiny_tokenizer, {"messages": messages}, system="set")
        text = tiny_tokenizer.decode(chat.input_ids)
        assert text.startswith("<|im_start|>system\nset<|im_end|>\n<|im_start|>user\na")
        assert "own" not in text
        assert targets(tiny_tokenizer, chat)[:-2] == weighed


def test_a_weight_too_small_for_float32_leaves_no_target(tiny_tokenizer: Any) -> None:
    outcome = prepared(tiny_tokenizer, {"messages": [TWO[0], TWO[1] | {"weight": 1e-60}]})
    assert str(outcome.problem) == "no_target: no token of the answers has a weight"


# --- base models and template files


def config(folder: Path, **data: Any) -> Config:
    return Config.model_validate({"model": {"path": str(folder)}, "data": {"train": "train.jsonl", **data}})


@pytest.fixture
def base(make_tokenizer: Any, tmp_path: Path) -> Path:
    """A base model's tokenizer: one control token, no template."""
    make_tokenizer(("<|endoftext|>",), eos="<|endoftext|>").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_chatml_makes_a_base_model_able_to_stop(base: Path) -> None:
    before = load_tokenizer(config(base))
    tokenizer = load_tokenizer(config(base, template="chatml"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.encode("<|im_start|><|im_end|>") == [len(before), len(before) + 1]
    assert targets(tokenizer, example(tokenizer, {"messages": TWO})) == [
        ("b<|im_end|>\n", 1),
        ("d<|im_end|>\n", 1),
    ]


def test_chatml_on_a_model_that_has_its_tokens_adds_none(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(config(tmp_path, template="chatml"))) == len(tiny_tokenizer)


def test_conversations_without_a_template_are_refused_with_the_fix(base: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"^chat.jsonl:7: .*has no chat template.*Set data.template to chatml"
    ):
        prepared(load_tokenizer(config(base)), {"messages": TWO})


def test_a_template_file_is_used(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}", encoding="utf-8"
    )
    tokenizer = load_tokenizer(config(base, template=str(file)))
    assert targets(tokenizer, example(tokenizer, {"messages": TWO[:2]})) == [("assistant: b<|endoftext|>", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}\n{{ m.role", "cannot render one question and one answer: line 2: "),
        (b"{{ raise_exception('no') }}", "cannot render one question and one answer: no"),
        (
            b"{{ messages[0].content + 1 }}",
            "cannot render one question and one answer: can only concatenate str",
        ),
        (b"\xff\xfe", "byte 0 is not UTF-8; expected a Jinja file"),
    ],
)
def test_a_template_file_that_cannot_work_is_refused(
    base: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "bad.jinja").write_bytes(content)
    with pytest.raises(TemplateError, match=message):
        load_tokenizer(config(base, template=str(tmp_path / "bad.jinja")))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model.path=.*: no tokenizer can be loaded from it: "):
        load_tokenizer(config(tmp_path))


def test_the_demo_models_ids_are_those_it_is_served(demo_model: Path) -> None:
    tokenizer = load_tokenizer(config(demo_model))
    chat = example(tokenizer, {"messages": TWO})  # audited
    assert targets(tokenizer, chat) == [("b<|im_end|>\n", 1), ("d<|im_end|>\n", 1)]


# --- too long


def test_truncation_invents_no_end_and_counts_what_it_takes(tiny_tokenizer: Any) -> None:
    whole = example(tiny_tokenizer, {"messages": TWO})
    weights = whole.token_weights()
    for limit in range(1, len(whole.input_ids)):
        outcome = prepared(tiny_tokenizer, {"messages": TWO}, max_length=limit, too_long="truncate")
        assert outcome.problem is None
        if not weights[:limit].any():
            assert outcome.examples == ()
            assert outcome.too_long == ((len(whole.input_ids), 6),)
            continue
        (cut,) = outcome.examples
        assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert cut.token_weights().tolist() == weights[:limit].tolist()
        assert cut.num_cut_tokens == len(whole.input_ids) - limit
        assert cut.num_cut_targets == np.count_nonzero(weights[limit:])


def test_raw_text_is_truncated_without_an_end(tiny_tokenizer: Any) -> None:
    text = example(tiny_tokenizer, {"text": "x y z x y z"}, max_length=8, too_long="truncate")
    assert tiny_tokenizer.eos_token_id not in text.input_ids
    assert text.num_targets == 7


def test_dropped_and_refused_rows_say_their_length(tiny_tokenizer: Any) -> None:
    num_tokens = len(example(tiny_tokenizer, {"messages": TWO}).input_ids)
    dropped = prepared(tiny_tokenizer, {"messages": TWO}, max_length=num_tokens - 1)
    assert (dropped.examples, dropped.too_long) == ((), ((num_tokens, 6),))
    refused = prepared(tiny_tokenizer, {"messages": TWO}, max_length=num_tokens - 1, too_long="error")
    assert str(refused.problem) == f"too_long: {num_tokens} tokens, over data.max_length={num_tokens - 1}"
    assert (
        example(tiny_tokenizer, {"messages": TWO}, max_length=num_tokens, too_long="error").num_cut_tokens
        == 0
    )


def test_only_the_long_turns_of_an_expanded_row_are_dropped(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    first, last = prepared(tiny_tokenizer, {"messages": TWO}).examples
    limit = len(first.input_ids)
    outcome = prepared(tiny_tokenizer, {"messages": TWO}, max_length=limit)
    assert [len(example.input_ids) for example in outcome.examples] == [limit]
    assert outcome.too_long == ((len(last.input_ids), last.num_targets),)
    assert outcome.notes == ("expanded_per_turn", "expanded_per_turn")


# --- raw text


def test_raw_text_ends_with_eos_as_a_target_and_its_control_strings_are_plain(tiny_tokenizer: Any) -> None:
    raw = example(tiny_tokenizer, {"prompt": "two: <|im_end|>", "completion": " 2<|im_end|>"})
    assert tiny_tokenizer.decode(raw.input_ids) == "two: <|im_end|> 2<|im_end|><|im_end|>"
    assert raw.input_ids.tolist().count(tiny_tokenizer.eos_token_id) == 1
    assert targets(tiny_tokenizer, raw) == [(" 2<|im_end|><|im_end|>", 1)]


@pytest.mark.parametrize(
    ("around", "before", "after"),
    [
        ("<s> $A", ["<s>"], ["</s>"]),
        ("$A </s>", [], ["</s>"]),
        ("<s> $A </s>", ["<s>"], ["</s>"]),
        ("$A", [], ["</s>"]),
        ("<s> $A <x>", ["<s>"], ["<x>", "</s>"]),
    ],
)
def test_raw_text_stands_in_what_the_tokenizer_puts_around_text(
    around: str, before: list[str], after: list[str], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(("<s>", "</s>", "<x>"), bos="<s>", eos="</s>")
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "<x>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    text = example(tokenizer, {"text": "two"})
    assert tokenizer.decode(text.input_ids) == "".join([*before, "two", *after])
    assert text.num_targets == len(text.input_ids) - 1
    pair = example(tokenizer, {"prompt": "two", "completion": " is"})
    assert targets(tokenizer, pair) == [("".join([" is", *after]), 1)]


def test_a_tokenizer_without_eos_adds_none(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(("<s>",))
    assert tokenizer.decode(example(tokenizer, {"text": "two is"}).input_ids) == "two is"
    outcome = prepared(tokenizer, {"text": "a"})
    assert str(outcome.problem) == "no_target: the text is a single token: nothing precedes it"


# --- audit


def test_a_doubled_bos_is_refused(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(TemplateError, match=r"^chat.jsonl:7: the text begins with two BOS tokens \(<s>\)"):
        prepared(tokenizer, {"messages": TWO})


def test_a_template_without_an_end_token_is_refused_with_the_place(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(
        TemplateError, match=r"^chat.jsonl:7: messages\[1\]: the chat template writes no end token"
    ):
        prepared(tiny_tokenizer, {"messages": TWO})


def test_ids_that_are_not_apply_chat_templates_stop_the_run(tiny_tokenizer: Any) -> None:
    preparer = Preparer(tiny_tokenizer, PrepareOptions("messages", {}, None, "assistant", 4096, "drop"))
    tiny_tokenizer.split_special_tokens = True  # serves <|im_start|> as thirteen characters
    with pytest.raises(TemplateError, match=r"^chat.jsonl:7: token 0 differs from apply_chat_template's"):
        preparer.prepare([RawRow("chat.jsonl:7", {"messages": TWO})])


def test_what_the_template_says_is_the_reason(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('Only two turns.') }}"
    problem = prepared(tiny_tokenizer, {"messages": TWO}).problem
    assert str(problem) == "template_refuses: the chat template says: Only two turns."


def test_outcomes_keep_the_order_of_rows(tiny_tokenizer: Any) -> None:
    good = [{"messages": [{"role": "user", "content": "a" * n}, TWO[1]]} for n in range(4)]
    rows = [
        RawRow(str(i), row)
        for i, row in enumerate([good[0], {"messages": 3}, good[1], b"{", good[2], good[3]])
    ]
    options = PrepareOptions("messages", {}, None, "assistant", 4096, "drop")
    outcomes = Preparer(tiny_tokenizer, options).prepare(rows)
    assert [outcome.place for outcome in outcomes] == ["0", "1", "2", "3", "4", "5"]
    texts = ["".join(tiny_tokenizer.decode(e.input_ids) for e in outcome.examples) for outcome in outcomes]
    assert [text[17 : text.find("<|im_end|>")] for text in texts] == ["", "", "a", "", "aa", "aaa"]


def test_a_trace_holds_the_text_of_every_token(tiny_tokenizer: Any) -> None:
    text = "two <|im_end|>"
    preparer = Preparer(tiny_tokenizer, PrepareOptions("messages", {}, None, "assistant", 9, "drop"))
    messages = [TWO[0], {"role": "assistant", "content": text}]
    (trace,) = preparer.trace(RawRow("row", {"messages": messages}))
    assert trace.text == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    spelled = [trace.text[start:end] for start, end in trace.offsets]
    assert spelled == [tiny_tokenizer.decode([id_]) for id_ in trace.example.input_ids]
    assert trace.has_control_text
    assert trace.served_ids != trace.example.input_ids.tolist()

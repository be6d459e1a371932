"""Spans of trained turns, against templates written here whose answers are known, and a naive second
implementation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from tunesmith.data.prepare import PrepareOptions, Preparer
from tunesmith.data.records import BadRow, RawRow, Record
from tunesmith.data.templates import CHATML, Rendered, render_record, turn_weights
from tunesmith.errors import TemplateError

CONTROL = re.compile(r"<s>|</s>|<\|[a-z_]+\|>|\[/?[A-Z_]+\]")
TrainOn = Literal["assistant", "last", "all"]


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
TOOL_CHAT = [
    user("2+2?"),
    answer("", tool_calls=[CALL]),
    {"role": "tool", "content": "4"},
    answer("It is 4."),
]


def record(
    *messages: dict[str, Any], weights: Sequence[float | None] | None = None, tools: Any = ()
) -> Record:
    return Record(messages=messages, weights=tuple(weights or [None] * len(messages)), tools=tuple(tools))


def renderer(template: str) -> Any:
    """Renders as apply_chat_template does, without a vocabulary."""

    def render(messages: Any, tools: Any, add_generation_prompt: bool) -> str:
        if not messages:
            raise ValueError("apply_chat_template takes no empty conversation")
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
        return str(text)

    return render


def trained(
    template: str, *messages: dict[str, Any], train_on: TrainOn = "assistant", **kwargs: Any
) -> list[str]:
    """The trained texts, those of one rendered text after the other."""
    texts = render_record(record(*messages, **kwargs), renderer(template), CONTROL, train_on)
    return [text.text[start:end] for text in texts for start, end, _ in text.spans]


def notes(template: str, *messages: dict[str, Any], **kwargs: Any) -> set[str]:
    (text, *_) = render_record(record(*messages, **kwargs), renderer(template), CONTROL, "assistant")
    return set(text.notes)


# --- weights

FOUR = record(user("a"), answer("b"), user("c"), answer("d"))


@pytest.mark.parametrize(
    ("train_on", "weights", "expected"),
    [
        ("assistant", [None, None, None, None], [0, 1, 0, 1]),
        ("last", [None, None, None, None], [0, 0, 0, 1]),
        ("all", [None, None, None, None], [1, 1, 1, 1]),
        ("assistant", [None, 0.0, None, None], [0, 0, 0, 1]),
        ("assistant", [0.5, None, None, 2.0], [0.5, 1, 0, 2]),
        ("last", [None, 1.0, None, None], [0, 1, 0, 1]),
        ("all", [None, 0.0, None, None], [1, 0, 1, 1]),
    ],
)
def test_a_row_may_ask_for_other_weights_than_train_on(
    train_on: TrainOn, weights: Any, expected: Any
) -> None:
    assert turn_weights(record(*FOUR.messages, weights=weights), train_on) == expected


def test_all_with_a_weight_of_its_own_trains_every_character_once() -> None:
    weighed = record(*FOUR.messages, weights=[None, 0.5, 0.0, None])
    (text,) = render_record(weighed, renderer(CHATML), CONTROL, "all")
    assert [(text.text[a:b], w) for a, b, w in text.spans] == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", 1.0),
        ("b<|im_end|>\n", 0.5),
        ("<|im_start|>assistant\nd<|im_end|>\n", 1.0),
    ]


def test_a_row_of_which_nothing_is_trained_is_bad() -> None:
    with pytest.raises(BadRow, match="no_trainable_turn"):
        trained(CHATML, user("a"), answer("b"), weights=[None, 0.0])


def test_an_answer_that_nothing_precedes_is_left_untrained_and_noted() -> None:
    chat = (answer("Hello!"), user("a"), answer("b"))
    assert trained(CHATML, *chat) == ["b<|im_end|>\n"]
    assert notes(CHATML, *chat) == {"leading_answer_untrained"}
    with pytest.raises(BadRow, match="answer_without_prompt"):
        trained(CHATML, *chat, weights=[1.0, None, None])


# --- a naive second implementation

_WORDS = st.sampled_from(["a", "b c", "<", "|", "\n", " ", "x<|y", "", "user", "end"])
_CONTENT = st.lists(_WORDS, min_size=1, max_size=4).map("".join).map(lambda text: text + ".")


@st.composite
def _stable_template(draw: Any) -> dict[str, str]:
    """Pieces of a template that never changes what it wrote."""
    control = st.sampled_from(["<|user|>", "<|assistant|>", "<|sep|>", "[INST]", "<s>"])
    return {
        "begin": draw(st.sampled_from(["", "<s>", "Chat:\n"])),
        "user": draw(control) + draw(st.sampled_from(["", "\n", " "])),
        "user_end": draw(st.sampled_from(["", "\n", "[/INST]", "</s>"])),
        "prompt": draw(st.sampled_from(["", "<|assistant|>", "<|assistant|>\n", "Answer: "])),
        "end": draw(st.sampled_from(["</s>", "<|end|>\n", "</s> \n"])),
        "finish": draw(st.sampled_from(["", "<|eof|>"])),
    }


def _jinja(pieces: dict[str, str]) -> str:
    p = {key: repr(value) for key, value in pieces.items()}
    return (
        f"{{{{ {p['begin']} }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}"
        f"{{{{ {p['user']} + m.content + {p['user_end']} }}}}{{% else %}}"
        f"{{{{ {p['prompt']} + m.content + {p['end']} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {p['prompt']} }}}}{{% else %}}"
        f"{{{{ {p['finish']} }}}}{{% endif %}}"
    )


def _naive(
    pieces: dict[str, str], messages: Sequence[dict[str, Any]]
) -> tuple[str, list[tuple[int, int, float]]]:
    """Text and spans, by writing the conversation down piece by piece."""
    text, spans = pieces["begin"], []
    for i, message in enumerate(messages):
        if message["role"] == "user":
            text += pieces["user"] + message["content"] + pieces["user_end"]
            continue
        text += pieces["prompt"]
        start = len(text)
        text += message["content"] + pieces["end"]
        if i == len(messages) - 1:
            text += pieces["finish"]
        spans.append((start, len(text), 1.0))
    return text + (pieces["finish"] if messages[-1]["role"] == "user" else ""), spans


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pieces=_stable_template(), contents=st.lists(_CONTENT, min_size=2, max_size=7))
def test_spans_equal_those_of_writing_the_conversation_down(
    pieces: dict[str, str], contents: list[str]
) -> None:
    messages = [user(text) if i % 2 == 0 else answer(text) for i, text in enumerate(contents)]
    (text,) = render_record(record(*messages), renderer(_jinja(pieces)), CONTROL, "assistant")
    assert (text.text, list(text.spans)) == _naive(pieces, messages)


# --- templates in the manner of well-known families

MISTRAL = r"""{{ bos_token }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS]' + m.tool_calls | map(attribute='function') | list | tojson + eos_token }}
    {%- else %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = r"""
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
VICUNA = r"""A chat.
{%- for m in messages %}
    {{- (' USER: ' + m.content) if m.role == 'user' else (' ASSISTANT: ' + m.content + eos_token) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
DEEPSEEK_R1 = r"""{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|user|>' + m.content }}
    {%- else %}
        {{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""
LLAMA_3_1 = r"""{{ bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<|start|>system<|stop|>\n\nToday Date: 26 Jul 2024\n\n' + system + '<|eot|>' }}
{%- for m in messages if m.role != 'system' %}
    {%- if m.tool_calls %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start|>assistant<|stop|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>ipython<|stop|>\n\n' + m.content | tojson + '<|eot|>' }}
    {%- elif tools and loop.first %}
        {{- '<|start|>user<|stop|>\n\nGiven these functions:\n' + tools | tojson(indent=4) }}
        {{- '\n\n' + m.content + '<|eot|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"""
GRANITE = r"""
{%- for m in messages %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
COMMAND_R = r"""{{ bos_token }}
{%- for m in messages %}{{ '<|start|><|' + m.role + '|>' + m.content.strip() + '<|stop|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|><|assistant|>' }}{% endif %}"""
CHATGLM = r"""{{ '[G_MASK]<s>' }}
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
EOS_AT_THE_END = r"""
{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ eos_token }}{% endif %}"""
MERGES = r"""
{%- set ns = namespace(role='') %}
{%- for m in messages %}
    {%- if m.role == ns.role %}
        {{- '\n\n' + m.content }}
    {%- else %}
        {{- ('<|end|>\n' if ns.role else '') + '<|' + m.role + '|>\n' + m.content }}
    {%- endif %}
    {%- set ns.role = m.role %}
{%- endfor %}
{{- '<|end|>\n' }}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
MARKED = r"""
{%- for m in messages %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- m.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
QWEN3 = r"""
{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.reasoning_content and loop.index0 > ns.last %}
        {{- '<think>' + m.reasoning_content + '</think>' }}
    {%- endif %}
    {{- m.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
NO_PROMPT = r"""
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"""

TWO = (user("a"), answer("b"), user("c"), answer("d"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MISTRAL, [" b</s>", " d</s>"]),
        (ZEPHYR, ["b</s>\n", "d</s>\n"]),
        (VICUNA, [" b</s>", " d</s>"]),
        (DEEPSEEK_R1, ["b</s>", "d</s>"]),
        (LLAMA_3_1, ["b<|eot|>", "d<|eot|>"]),
        (GRANITE, ["b<|end_of_text|>\n", "d<|end_of_text|>\n"]),
        (COMMAND_R, ["b<|stop|>", "d<|stop|>"]),
        (MERGES, ["b<|end|>\n", "d<|end|>\n"]),
        (MARKED, ["b</s>", "d</s>"]),
        (QWEN3, ["b<|end|>", "d<|end|>"]),
        # A template without a generation prompt leaves the header to the model, which is thus trained on it.
        (NO_PROMPT, ["<|assistant|>b<|end|>\n", "<|assistant|>d<|end|>\n"]),
        (CHATML, ["b<|im_end|>\n", "d<|im_end|>\n"]),
    ],
)
def test_two_turns_in_the_manner_of(template: str, expected: list[str]) -> None:
    assert trained(template, *TWO) == expected
    assert trained(template, *TWO, train_on="last") == expected[-1:]
    assert trained(template, *TWO, user("e")) == expected


@pytest.mark.parametrize("template", [LLAMA_3_1, GRANITE, COMMAND_R, ZEPHYR, MERGES])
def test_a_system_prompt_is_not_trained(template: str) -> None:
    assert trained(template, SYSTEM, *TWO) == trained(template, *TWO)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MISTRAL, ['[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}]</s>', " It is 4.</s>"]),
        (LLAMA_3_1, ['{"name": "add", "parameters": {"a": 2}}<|eot|>', "It is 4.<|eot|>"]),
        (
            CHATML,
            [
                '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n',
                "It is 4.<|im_end|>\n",
            ],
        ),
    ],
)
def test_tool_calls_in_the_manner_of(template: str, expected: list[str]) -> None:
    assert trained(template, *TOOL_CHAT, tools=[TOOL]) == expected
    assert notes(template, *TOOL_CHAT, tools=[TOOL]) == set()


def test_tools_that_move_to_the_last_question_are_trained_where_they_are_served() -> None:
    texts = render_record(record(*TWO, tools=[TOOL]), renderer(MISTRAL), CONTROL, "assistant")
    assert [re.sub(r"S\].*\[/AVAIL", "S]...[/AVAIL", text.text) for text in texts] == [
        "<s>[AVAILABLE_TOOLS]...[/AVAILABLE_TOOLS][INST] a[/INST] b</s>",
        "<s>[INST] a[/INST] b</s>[AVAILABLE_TOOLS]...[/AVAILABLE_TOOLS][INST] c[/INST] d</s>",
    ]
    assert [[text.text[start:end] for start, end, _ in text.spans] for text in texts] == [
        [" b</s>"],
        [" d</s>"],
    ]
    assert [text.num_messages for text in texts] == [2, 4]
    assert all(text.notes == ("expanded_per_turn",) for text in texts)


def test_thinking_that_history_drops_is_trained_turn_by_turn() -> None:
    chat = (user("a"), answer("b", reasoning_content="B"), user("c"), answer("d", reasoning_content="D"))
    assert trained(QWEN3, *chat) == ["<think>B</think>b<|end|>", "<think>D</think>d<|end|>"]
    assert trained(QWEN3, *chat, train_on="last") == ["<think>D</think>d<|end|>"]
    first, last = render_record(record(*chat), renderer(QWEN3), CONTROL, "assistant")
    assert first == Rendered(
        "<|user|>a<|end|><|assistant|><think>B</think>b<|end|>", ((29, 53, 1.0),), 2, ("expanded_per_turn",)
    )
    assert last.text == (
        "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|><think>D</think>d<|end|>"
    )


@pytest.mark.parametrize("text", ["b", "<b>bold", "<thin", "think"])
def test_a_generation_prompt_that_opens_thinking_ends_where_the_answer_parts_from_it(text: str) -> None:
    chat = (user("a"), answer(text), user("c"), answer("<think>no</think>d"))
    assert trained(DEEPSEEK_R1, *chat) == [f"{text}</s>", "d</s>"]
    assert notes(DEEPSEEK_R1, *chat) == {"generation_prompt_differs"}


def test_an_answer_that_continues_the_opened_thinking_begins_behind_it() -> None:
    template = DEEPSEEK_R1.replace(".split('</think>')[-1]", "")
    assert trained(template, user("a"), answer("<think>\nno</think>d")) == ["no</think>d</s>"]
    assert notes(template, user("a"), answer("<think>\nno</think>d")) == set()


def test_what_closes_a_conversation_belongs_to_its_last_answer_only() -> None:
    template = NO_PROMPT + "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    assert trained(template, *TWO) == ["b<|end|>\n", "d<|end|>\n</s>"]


def test_merged_answers_are_refused_since_no_server_sends_half_of_one() -> None:
    with pytest.raises(BadRow, match=r"answers_merged: messages\[1\]"):
        trained(MERGES, user("a"), answer("b"), answer("c"))
    assert trained(MERGES, user("a"), user("b"), answer("c")) == ["c<|end|>\n"]


@pytest.mark.parametrize(("template", "turn"), [(CHATGLM, 1), (EOS_AT_THE_END, 1)])
def test_a_template_without_an_end_token_is_refused(template: str, turn: int) -> None:
    with pytest.raises(TemplateError, match=rf"messages\[{turn}\]: the chat template writes no end token"):
        trained(template, *TWO)


def test_an_end_token_at_the_end_of_the_conversation_serves_train_on_last() -> None:
    assert trained(EOS_AT_THE_END, *TWO, train_on="last") == [" d\n</s>"]
    with pytest.raises(TemplateError, match="no end token"):
        trained(CHATGLM, *TWO, train_on="last")


def test_a_template_that_reorders_what_it_wrote_is_refused() -> None:
    newest_first = (
        "{% for m in messages | reverse %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    )
    with pytest.raises(BadRow, match="template_rewrites_history"):
        trained(newest_first, *TWO)


def test_what_a_template_leaves_out_is_noted() -> None:
    chat = (*TOOL_CHAT[:1], answer("", tool_calls=[CALL], reasoning_content="Hm."), *TOOL_CHAT[2:])
    assert notes(ZEPHYR, *chat, tools=[TOOL]) == {
        "tools_not_rendered",
        "tool_calls_not_rendered",
        "reasoning_not_rendered",
    }


def test_a_system_prompt_that_moves_into_the_question_has_no_weight_of_its_own() -> None:
    gemma = (
        "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>' }}"
        "{% if loop.index0 == 1 %}{{ messages[0].content + ' ' }}{% endif %}{{ m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert trained(gemma, SYSTEM, user("a"), answer("b")) == ["b<|end|>"]
    with pytest.raises(BadRow, match=r"turn_not_rendered: messages\[0\]"):
        trained(gemma, SYSTEM, user("a"), answer("b"), weights=[0.0, None, None], train_on="all")


# --- the same through a tokenizer

OPTIONS = PrepareOptions("messages", {}, None, "assistant", 4096, "error")


@pytest.mark.parametrize(
    "template",
    [MISTRAL, ZEPHYR, VICUNA, DEEPSEEK_R1, LLAMA_3_1, GRANITE, COMMAND_R, MERGES, MARKED, QWEN3, CHATML],
)
def test_ids_and_targets_of_each_family_are_those_of_its_texts(template: str, make_tokenizer: Any) -> None:
    tokens = set(CONTROL.findall(template)) | {"<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer = make_tokenizer(tuple(sorted(tokens)), bos="<s>", eos="</s>")
    tokenizer.chat_template = template
    row = RawRow("row", {"messages": list(TWO)})
    (outcome,) = Preparer(tokenizer, OPTIONS).prepare([row])
    (example,) = outcome.examples
    targets = [tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans]
    assert targets == trained(template, *TWO)

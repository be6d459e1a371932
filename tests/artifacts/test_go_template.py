"""Chat templates in Ollama's language say what the Jinja templates say, if those are rows of turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.artifacts.export.go_template import go_template, render_go, turn_shape
from tunesmith.errors import TemplateError

S = {"role": "system", "content": "Be  brief."}
U = {"role": "user", "content": 'What is "2"?\n{{ .System }} {"a": 1}'}
A = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3", "gemma3", "qwen3"])
@pytest.mark.parametrize("messages", [[U], [S, U], [U, A, U], [S, U, A, U, A, U]], ids=len)
def test_a_shared_template_is_rendered_alike(
    chat_tokenizer: Callable[[str], Any], name: str, messages: list[dict[str, str]]
) -> None:
    tokenizer = chat_tokenizer(name)
    shape = turn_shape(tokenizer)
    if shape.system is None and S in messages:
        pytest.skip("a template without a place for a system prompt")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render_go(go_template(shape, ""), messages) == expected


def test_a_conversation_that_ends_with_an_answer_lets_the_model_go_on(tiny_tokenizer: Any) -> None:
    text = render_go(go_template(turn_shape(tiny_tokenizer), ""), [U, A])
    assert text.endswith("<|im_start|>assistant\n4")


def test_bos_that_the_server_adds_is_left_out(chat_tokenizer: Callable[[str], Any]) -> None:
    shape = turn_shape(chat_tokenizer("llama3"))
    assert render_go(go_template(shape, ""), [S, U]).startswith("<|begin_of_text|><|start_header_id|>")
    assert render_go(go_template(shape, "<|begin_of_text|>"), [S, U]).startswith("<|start_header_id|>system")
    assert render_go(go_template(shape, "<|begin_of_text|>"), [U]).startswith("<|start_header_id|>user")


def test_text_that_go_would_read_as_an_action_is_quoted(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' {{ \"x\" }}: ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant {{ \"x\" }}: ' }}{% endif %}"
    )
    template = go_template(turn_shape(tiny_tokenizer), "")
    assert '{{ "user {{ \\"x\\" }}: " }}' in template
    expected = tiny_tokenizer.apply_chat_template([U, A, U], add_generation_prompt=True, tokenize=False)
    assert render_go(template, [U, A, U]) == expected


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes turns differently",
        ),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write each message once"),
    ],
)
def test_a_template_that_is_more_than_turns_is_refused(tiny_tokenizer: Any, template: str, what: str) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=what):
        turn_shape(tiny_tokenizer)

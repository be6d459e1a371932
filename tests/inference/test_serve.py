"""The server answers OpenAI's own client as greedy decoding does, with the prompts of training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml
from inference.conftest import user
from inference.serving import Running
from transformers import AutoTokenizer, GenerationConfig

from tunesmith import cli
from tunesmith.artifacts import tuned as tuned_module
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.inference import serve as serve_module
from tunesmith.inference.serve import check_address, serve


@pytest.fixture(scope="module")
def running(adapter_folder: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned_module, "compute_dtype", lambda _: (torch.float32, "for the test"))
        server = Running(adapter_folder)
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as made:
        yield made


def asked(client: openai.OpenAI, running: Running, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=running.name, messages=messages, **options)


# --- answers


def test_an_answer_is_the_greedy_one_and_its_tokens_are_counted(
    client: openai.OpenAI, running: Running, tuned: Any, greedy: Any, model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    history = [{"role": "system", "content": "red"}, user("one two?")]
    history += [{"role": "assistant", "content": "blue"}, user("three?")]
    for messages in ([user("one two?")], history):
        done = asked(client, running, messages)
        ids = greedy(tuned, messages, ids=True)
        assert done.choices[0].message.content == greedy(tuned, messages)
        assert done.choices[0].message.role == "assistant"
        assert done.choices[0].finish_reason == ("stop" if ids[-1] == 1 else "length")
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert done.usage.prompt_tokens == len(prompt["input_ids"])
        assert done.usage.completion_tokens == len(ids)
        assert done.usage.total_tokens == done.usage.prompt_tokens + len(ids)
        assert done.model == running.name == "adapter"


def test_a_streams_pieces_are_the_same_text(
    client: openai.OpenAI, running: Running, tuned: Any, greedy: Any
) -> None:
    for text in ("one two?", "three", "moon sun"):
        whole = asked(client, running, [user(text)], max_tokens=40)
        chunks = list(
            asked(
                client,
                running,
                [user(text)],
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert len(pieces) > 5
        assert "".join(pieces) == whole.choices[0].message.content == greedy(tuned, [user(text)], 40)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == (
            whole.choices[0].finish_reason
        )
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage


def test_what_a_user_types_is_never_a_control_token(
    client: openai.OpenAI, running: Running, model_folder: Path
) -> None:
    messages = [user("a<|im_end|>b")]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    naive = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    trained = running.served.tuned.prompt_ids(messages)
    assert tokenizer.decode(trained) == tokenizer.decode(naive)
    assert (trained.count(1), naive.count(1)) == (1, 2)
    # Bytes are tokens here: `<|im_end|>` as text is ten, as a control token one.
    assert asked(client, running, messages).usage.prompt_tokens == len(trained) == len(naive) + 9


def test_parts_tools_and_calls_are_rendered_as_rows_of_data_are(
    client: openai.OpenAI, running: Running, model_folder: Path
) -> None:
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    body = {"messages": messages, "tools": [schema]}
    read = serve_module._prompt_ids(body, running.served, is_chat=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    plain = [
        user("one two"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3"},
    ]
    ids = tokenizer.apply_chat_template(plain, tools=[schema], add_generation_prompt=True, return_dict=True)
    assert read == ids["input_ids"]
    # It is longer than the model's positions; the calls alone are not.
    done = asked(client, running, messages)
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert done.usage.prompt_tokens == len(ids)


def test_an_end_token_ends_the_answer_and_is_counted(
    adapter_folder: Path, tuned: Any, greedy: Any, tmp_path: Path, model_folder: Path
) -> None:
    ids = greedy(tuned, [user("one two?")], 20, ids=True)
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "stops"))
    GenerationConfig(eos_token_id=[1, ids[5]], pad_token_id=1).save_pretrained(folder)
    first = ids.index(ids[5])
    server = Running(folder, max_new_tokens=first + 1)  # the end is the last token there is room for
    try:
        with server.client() as client:
            done = asked(client, server, [user("one two?")])
    finally:
        server.stop()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert done.choices[0].message.content == tokenizer.decode(ids[:first], skip_special_tokens=True)
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == first + 1


def test_an_answer_ends_before_a_text_to_stop_at_and_none_of_it_is_streamed(
    client: openai.OpenAI, running: Running, tuned: Any, greedy: Any
) -> None:
    whole = greedy(tuned, [user("three")], 40)
    stop = whole[6:9]
    expected = whole[: whole.index(stop)]
    done = asked(client, running, [user("three")], max_tokens=40, stop=["never there", stop])
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (expected, "stop")
    assert done.usage.completion_tokens < 40
    chunks = asked(client, running, [user("three")], max_tokens=40, stop=stop, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected


def test_drawn_answers_follow_the_seed(client: openai.OpenAI, running: Running) -> None:
    def draw(seed: int) -> str:
        done = asked(client, running, [user("one")], temperature=2, top_p=0.9, seed=seed)
        return str(done.choices[0].message.content)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) > 1
    assert draw(1) != asked(client, running, [user("one")], temperature=0).choices[0].message.content


def test_raw_text_is_gone_on_with(client: openai.OpenAI, running: Running, tuned: Any, greedy: Any) -> None:
    done = client.completions.create(model=running.name, prompt="one two", max_tokens=12)
    assert done.choices[0].text == greedy(tuned, "one two", 12)
    assert done.usage.prompt_tokens == len("one two")
    chunks = client.completions.create(model=running.name, prompt="one two", max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text


def test_the_model_is_listed_under_its_name(client: openai.OpenAI, running: Running) -> None:
    assert [model.id for model in client.models.list()] == [running.name]
    assert client.models.retrieve(running.name).owned_by == "tunesmith"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_several_clients_at_once_each_get_their_own_answer(running: Running, tuned: Any, greedy: Any) -> None:
    texts = ["one", "two", "three", "sun", "moon"]
    got: dict[str, str] = {}

    def ask(text: str) -> None:
        with running.client() as client:
            got[text] = asked(client, running, [user(text)], max_tokens=20).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {text: greedy(tuned, [user(text)], 20) for text in texts}


def test_a_client_that_leaves_calls_its_answer_off(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[Any] = []
    original = serve_module.speak

    def speak(*arguments: Any, **options: Any) -> Any:
        hear = options["hear"]

        def slowly(text: str) -> None:
            time.sleep(0.02)
            hear(text)

        spoken.append(original(*arguments, **options | {"hear": slowly}))
        return spoken[-1]

    monkeypatch.setattr(serve_module, "speak", speak)
    stream = asked(client, running, [user("one")], max_tokens=400, stream=True)
    next(iter(stream))
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while not spoken and time.monotonic() < until:
        time.sleep(0.05)
    assert spoken[0].num_tokens < 200
    assert asked(client, running, [user("one")]).choices[0].message.content  # and the next one is served


# --- what is refused


def test_a_request_that_cannot_be_honoured_is_told_so(client: openai.OpenAI, running: Running) -> None:
    for options, said in (
        ({"n": 2}, "n is 2, which this server cannot honour"),
        ({"logprobs": True}, "logprobs is True"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"temperature": 3}, "temperature is 3; expected a number from 0 to 2"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number above 0"),
        ({"stop": [""]}, "stop must be a text"),
        ({"extra_body": {"top_n": 3}}, "top_n is 3"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(said)):
            asked(client, running, [user("a")], **options)
    for messages, said in (
        ([], "messages must be a list of turns"),
        ([{"role": "usr", "content": "a"}], "Did you mean 'user'?"),
        ([user("x" * 600)], "no position for an answer"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(said)):
            asked(client, running, messages)
    assert asked(client, running, [user("a")], n=1, presence_penalty=0, user="u").choices
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'gpt-4' here, but 'adapter'"):
        client.chat.completions.create(model="gpt-4", messages=[user("a")])


def http(
    port: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_web_page_can_neither_ask_nor_lead_its_own_name_here(running: Running) -> None:
    status, content = http(running.port, "/v1/models", {"Host": f"evil.example:{running.port}"})
    assert (status, "answers to" in content["error"]["message"]) == (403, True)
    assert http(running.port, "/v1/models", {"Host": f"localhost:{running.port}"})[0] == 200
    body = json.dumps({"model": running.name, "messages": [user("a")]}).encode()
    status, _ = http(running.port, "/v1/chat/completions", {"Content-Type": "text/plain"}, body)
    assert status == 415
    status, _ = http(running.port, "/v1/chat/completions", {"Content-Type": "application/json"}, b"{")
    assert status == 400


def test_without_the_right_key_nothing_is_said(adapter_folder: Path) -> None:
    server = Running(adapter_folder, api_key="s3cret")
    try:
        for key in ("wrong", "s3cre", "s3cret2", "S3CRET"):
            with (
                server.client(key) as client,
                pytest.raises(openai.AuthenticationError, match="missing or wrong"),
            ):
                client.models.list()
        for path in ("/health", "/v1/models", "/nowhere", "/v1/chat/completions"):
            for headers in ({}, {"Authorization": "s3cret"}, {"Authorization": "Basic s3cret"}):
                assert http(server.port, path, headers)[0] == 401
        with server.client("s3cret") as client:
            assert asked(client, server, [user("one")]).choices[0].message.content
    finally:
        server.stop()


def test_an_address_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ConfigError, match=r"Give a key: --api-key KEY"):
            check_address(host, None)
        check_address(host, "key")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, None)
    with pytest.raises(ConfigError, match="--api-key: is empty"):
        check_address("127.0.0.1", " ")


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot be listened on"):
            serve("no-model", host="127.0.0.1", port=port, api_key=None, max_new_tokens=8, say=print)


def test_without_its_packages_the_line_that_installs_them_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tunesmith.inference.serve")
    with pytest.raises(MissingExtraError, match=r"pip install 'tunesmith\[serve\]'"):
        __import__("tunesmith.inference.serve")


def test_the_system_prompt_of_the_run_stands_in_for_one_that_is_not_given(
    model_folder: Path, tmp_path: Path, base: Any, greedy: Any
) -> None:
    run = tmp_path / "bookings"
    shutil.copytree(model_folder, run / "final")
    values = {
        "model": {"path": str(model_folder)},
        "data": {"train": "t", "system": "red", "max_length": 512},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    server = Running(run / "final")
    try:
        assert server.name == "bookings"
        with server.client() as client:
            for own in ("red", "blue"):
                messages = [{"role": "system", "content": own}, user("one")]
                given = messages[1:] if own == "red" else messages
                said = asked(client, server, given).choices[0].message.content
                assert said == greedy(base, messages)
    finally:
        server.stop()


def test_the_verb_listens_on_this_machine_alone_and_a_signal_ends_it(adapter_folder: Path) -> None:
    main = "import sys; from tunesmith.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "serve", str(adapter_folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    assert cli.main(["serve", str(adapter_folder), "--host", "0.0.0.0"]) == 2
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        line = next(line for line in process.stderr if " at http://" in line)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)[1])
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            done = client.chat.completions.create(model="adapter", messages=[user("one")], max_tokens=4)
            assert done.usage.completion_tokens <= 4
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130

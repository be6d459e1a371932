"""`tunesmith serve`: a model behind the chat API that OpenAI's clients speak, on this machine alone unless
asked otherwise.

    GET  /v1/models              the one model
    POST /v1/chat/completions    messages -> answer, whole or as it is written (server-sent events)
    POST /v1/completions         raw text -> what follows
    GET  /health                 whether it is up

Why not the server of transformers: it serves no adapters, encodes what a user types as control tokens where
it spells one, drops the text beside a tool call from the history, reports `length` for an answer that ends in
its last token, and loads any model that a request names. Here prompts are those of training, id for id.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.artifacts.found import Found, Say, find_model, run_folder
from tunesmith.artifacts.tuned import Tuned, load_tuned
from tunesmith.data.records import BadRow, Record
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.inference.asked import question
from tunesmith.inference.generate import system_of
from tunesmith.inference.speak import Drawing, Spoken, speak
from tunesmith.training.answers import room

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError("serve", str(error.name), "serve") from error

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
# Settings of a request that change nothing here, and those that would if they were not at these values.
_IGNORED = {"model", "messages", "prompt", "stream", "stream_options", "tools", "user", "metadata", "store"}
_IGNORED |= {"temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed"}
_IGNORED |= {"parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class _Refused(Exception):
    """A request that cannot be honoured: HTTP status, what is said, and the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> Response:
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        content = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse({"error": content}, self.status, headers)


@dataclass(frozen=True)
class Served:
    """The model, its name, and what holds for all requests. One answer is written at a time, by the one
    thread of `writer`; requests wait in the order they came."""

    name: str
    tuned: Tuned
    system: str | None
    max_new_tokens: int
    writer: ThreadPoolExecutor
    started_at: int


@dataclass(frozen=True)
class _Ask:
    """A request, read."""

    ids: list[int]
    max_new_tokens: int
    drawing: Drawing
    stop: tuple[str, ...]


def serve(model: str, *, host: str, port: int, api_key: str | None, max_new_tokens: int, say: Say) -> None:
    """Serve the model until a signal comes. Raises ConfigError for an address other machines reach without a
    key, or one that is taken; ModelError for what cannot be loaded."""
    check_address(host, api_key)
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: expected 1 or more.")
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on: {error}.") from error
    with listening:
        app = build_app(load_served(model, max_new_tokens, say), host, api_key)
        shown = f"[{host}]" if ":" in host else host
        name = app.state.served.name
        say(f"{name} at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C ends it)")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=3)
        )
        server.run(sockets=[listening])


def check_address(host: str, api_key: str | None) -> None:
    """Raise ConfigError where other machines could ask without a key, or a key is empty."""
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key: is empty.")
    if api_key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: whoever reaches this machine could use the model. Give a key: --api-key KEY."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_served(model: str, max_new_tokens: int, say: Say) -> Served:
    """Load what is to be served, under the name of its run."""
    found = find_model(model, say)
    tuned = load_tuned(found, say, needs_template=False)
    if not tuned.tokenizer.chat_template:
        say("it has no chat template: only /v1/completions answers")
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
    name = _name(model, found)
    return Served(name, tuned, system_of(tuned, say), max_new_tokens, writer, int(time.time()))


def _name(model: str, found: Found) -> str:
    run = run_folder(Path(model).expanduser())
    if run is not None:
        return run.resolve().name
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else found.base


def build_app(served: Served, host: str, api_key: str | None) -> Starlette:
    """The application, behind its gate."""
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/v1/chat/completions", partial(_answer, is_chat=True), methods=["POST"]),
            Route("/v1/completions", partial(_answer, is_chat=False), methods=["POST"]),
        ],
        middleware=[Middleware(_Gate, api_key=api_key, is_loopback=_is_loopback(host))],
    )
    app.state.served = served
    return app


class _Gate:
    """Comes before everything else: no key, no word. On loopback it also wants a name of this machine in the
    Host header, or a web page could have its own name lead here (DNS rebinding)."""

    def __init__(self, app: Any, api_key: str | None, is_loopback: bool) -> None:
        self._app, self._is_loopback = app, is_loopback
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refusal(
            headers.get(b"authorization", b""), headers.get(b"host", b"").decode("latin-1")
        )
        await (self._app if refused is None else refused.response())(scope, receive, send)

    def _refusal(self, authorization: bytes, host: str) -> _Refused | None:
        scheme, _, given = authorization.partition(b" ")
        if self._key is not None and not (
            hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"
        ):
            return _Refused(401, "The API key is missing or wrong.", code="invalid_api_key")
        name, _, port = host.rpartition(":")
        if self._is_loopback and (name if port.isdigit() else host).lower() not in _LOOPBACK_NAMES:
            return _Refused(403, f"This server answers to {', '.join(sorted(_LOOPBACK_NAMES))} only.")
        return None


# --- what is asked


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.started_at,
        "owned_by": "tunesmith",
    }


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(request.app.state.served)]})


async def _model(request: Request) -> Response:
    served: Served = request.app.state.served
    if request.path_params["name"] != served.name:
        return _unknown_model(request.path_params["name"], served).response()
    return JSONResponse(_card(served))


def _unknown_model(name: Any, served: Served) -> _Refused:
    return _Refused(404, f"There is no model {name!r} here, but {served.name!r}.", "model", "model_not_found")


async def _answer(request: Request, *, is_chat: bool) -> Response:
    served: Served = request.app.state.served
    try:
        body = await _body(request)
        ask = await asyncio.to_thread(_read, body, served, is_chat)
    except _Refused as refused:
        return refused.response()
    paper = _Paper(served.name, is_chat, len(ask.ids))
    if body.get("stream"):
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return StreamingResponse(_events(served, ask, paper, with_usage), media_type="text/event-stream")
    async with aclosing(_pieces(served, ask)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Spoken):
                return JSONResponse(paper.whole(piece))
            if await request.is_disconnected():
                break
    return Response(status_code=499)  # nobody is there to read it


async def _body(request: Request) -> dict[str, Any]:
    # What a web page can send elsewhere unasked is never of this type.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(415, "The content type must be application/json.")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"The body is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise _Refused(400, "The body must be an object.")
    return {key: value for key, value in body.items() if value is not None}


def _read(body: dict[str, Any], served: Served, is_chat: bool) -> _Ask:
    if body.get("model") != served.name:
        raise _unknown_model(body.get("model"), served)
    for key, value in body.items():
        if key not in _IGNORED and value not in _NEUTRAL.get(key, ()):
            raise _Refused(400, f"{key} is {value!r}, which this server cannot honour.", key)
    ids = _prompt_ids(body, served, is_chat)
    if not (left := room(served.tuned.model, len(ids))):
        raise _Refused(
            400,
            f"The prompt has {len(ids)} tokens, and the model no position for an answer.",
            "messages" if is_chat else "prompt",
            "context_length_exceeded",
        )
    limit = body.get("max_completion_tokens", body.get("max_tokens", served.max_new_tokens))
    temperature = _number(body, "temperature", 0, 2)
    top_p = _number(body, "top_p", 0, 1)
    if top_p == 0:
        temperature, top_p = 0.0, None  # of the likeliest token alone
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise _Refused(400, "stop must be a text or a list of texts, none of them empty.", "stop")
    seed = body.get("seed")
    for key, value in (("max_tokens", limit), ("seed", seed)):
        if value is not None and (type(value) is not int or not (key == "max_tokens") <= value < 2**63):
            raise _Refused(400, f"{key} is {value!r}; expected a whole number above 0.", key)
    return _Ask(ids, min(limit, left), Drawing(temperature, top_p, seed), tuple(stop))


def _number(body: dict[str, Any], key: str, least: float, most: float) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _Refused(400, f"{key} is {value!r}; expected a number from {least} to {most}.", key)
    return float(value)


def _prompt_ids(body: dict[str, Any], served: Served, is_chat: bool) -> list[int]:
    """As in training. The system prompt of the run stands in for one that the request does not give."""
    field = "messages" if is_chat else "prompt"
    if is_chat and not served.tuned.tokenizer.chat_template:
        raise _Refused(400, "The model has no chat template: ask /v1/completions.", "messages")
    try:
        if is_chat:
            record = question(body.get("messages"), body.get("tools"))
            if served.system is not None and record.messages[0]["role"] != "system":
                system = {"role": "system", "content": served.system}
                record = Record(messages=(system, *record.messages), tools=record.tools)
        else:
            prompt = body.get("prompt")
            prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            if not isinstance(prompt, str) or not prompt:
                raise _Refused(400, "prompt must be one text, and not empty.", field)
            record = Record(prompt=prompt)
        return [int(id_) for id_ in served.tuned.preparer.prompt_ids(record)]
    except BadRow as problem:
        raise _Refused(400, f"{problem.detail}.", field, problem.reason) from problem


# --- what is answered


async def _pieces(served: Served, ask: _Ask) -> AsyncGenerator[str | Spoken, None]:
    """The answer piece by piece as it is written, and then as a whole. To leave off calls it off."""
    loop, called_off = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[str | None] = asyncio.Queue()

    def hear(text: str) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, text)

    def write() -> Spoken:
        return speak(
            served.tuned,
            served.tuned.model,
            ask.ids,
            max_new_tokens=ask.max_new_tokens,
            drawing=ask.drawing,
            stop=ask.stop,
            hear=hear,
            is_called_off=called_off.is_set,
        )

    writing = loop.run_in_executor(served.writer, write)
    writing.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (piece := await queue.get()) is not None:
            yield piece
        yield await writing
    finally:
        called_off.set()
        writing.cancel()


async def _events(served: Served, ask: _Ask, paper: _Paper, with_usage: bool) -> AsyncIterator[str]:
    """The same as server-sent events."""
    yield _event(paper.first())
    async with aclosing(_pieces(served, ask)) as pieces:
        async for piece in pieces:
            if isinstance(piece, str):
                yield _event(paper.piece(piece))
                continue
            yield _event(paper.last(piece))
            if with_usage:
                yield _event(paper.usage_alone(piece))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Paper:
    """The objects of OpenAI's API for one answer."""

    def __init__(self, model: str, is_chat: bool, prompt_tokens: int) -> None:
        self._is_chat, self._prompt_tokens = is_chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, spoken: Spoken) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": spoken.text}} if self._is_chat else {}
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._choice(said or {"text": spoken.text}, spoken.finish)],
            "usage": self._usage(spoken),
        }

    def first(self) -> dict[str, Any]:
        said = {"delta": {"role": "assistant", "content": ""}} if self._is_chat else {"text": ""}
        return self._chunk([self._choice(said, None)])

    def piece(self, text: str) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._chunk([self._choice(said, None)])

    def last(self, spoken: Spoken) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return self._chunk([self._choice(said, spoken.finish)])

    def usage_alone(self, spoken: Spoken) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self._usage(spoken)}

    def _chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices)}

    def _choice(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _usage(self, spoken: Spoken) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": spoken.num_tokens,
            "total_tokens": self._prompt_tokens + spoken.num_tokens,
        }

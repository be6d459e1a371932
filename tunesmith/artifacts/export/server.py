"""llama-server on the loopback device, for as long as a check needs it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.artifacts.export.tools import Tools
from tunesmith.errors import ExportError

SCRIPT = Path(__file__).with_name("llama_script.py")
_ANSWER_S = 600  # a large model on a slow machine
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """What a running llama-server answers."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str, *, has_control: bool) -> list[int]:
        """Ids of a text: raw, or with the control tokens in it read as such and BOS added, as the server does
        with a prompt."""
        asked = {"content": text, "add_special": has_control, "parse_special": has_control}
        return [int(id_) for id_ in self._post("/tokenize", asked)["tokens"]]

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt that it makes of messages, by the chat template in the file and its own Jinja."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def complete(self, ids: Sequence[int], number: int, **options: Any) -> Any:
        """The likeliest continuation of token ids, up to `number` tokens: {"tokens", "stop_type"}."""
        asked = {"prompt": list(ids), "n_predict": number, "temperature": 0, "return_tokens": True}
        return self._post("/completion", asked | options)

    def likeliest(self, ids: Sequence[int], number: int, plain_id: int) -> list[tuple[int, float]]:
        """The likeliest next tokens, with their log-probabilities in nats.

        The token that is chosen is `plain_id`, which alters no probability: the server keeps back those of
        tokens that are no whole character."""
        given = self.complete(ids, 1, n_probs=number, logit_bias=[[plain_id, 1000.0]])
        (place,) = given["completion_probabilities"]
        return [(int(item["id"]), float(item["logprob"])) for item in place["top_logprobs"]]

    def _post(self, path: str, value: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._address + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _NO_PROXY.open(request, timeout=_ANSWER_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ExportError(f"llama-server refuses {path}: {said}") from error
        except OSError as error:
            raise ExportError(f"llama-server does not answer {path}: {error}") from error


@contextlib.contextmanager
def serving(file: Path, tools: Tools, *, max_tokens: int, lora: Path | None = None) -> Iterator[Server]:
    """Load a GGUF file, on the CPU, with room for prompt and answer of `max_tokens`.

    Raises ExportError, with what llama.cpp said, if it cannot be loaded."""
    threads = torch.get_num_threads()  # as many as may be busy: llama.cpp's wait for each other by spinning
    command = [sys.executable, SCRIPT, "serve", tools.folder, file, max_tokens, threads]
    command += [lora] if lora else []
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,  # its end tells the server to go, should this process be killed
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address.startswith("http"):
                process.wait()
                log.seek(0)
                lines = log.readlines()
                errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
                raise ExportError(f"llama.cpp cannot load {file.name}: {(errors or lines[-1:] or [''])[0]}")
            yield Server(address)
        finally:
            process.kill()
            process.communicate()

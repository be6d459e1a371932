"""A server that runs while tests ask it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import openai
import uvicorn

from tunesmith.inference.serve import build_app, load_served


class Running:
    """A server in a thread of this process."""

    def __init__(self, model: Path, api_key: str | None = None, max_new_tokens: int = 8) -> None:
        self.served = load_served(str(model), max_new_tokens, print)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        app = build_app(self.served, "127.0.0.1", api_key)
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @property
    def name(self) -> str:
        return self.served.name

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.socket.close()
        self.served.writer.shutdown()

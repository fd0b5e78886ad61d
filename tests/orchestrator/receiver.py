"""A real HTTP server on loopback that takes messages, refuses, redirects or hangs, as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
VARIABLE = "A_WEBHOOK_SECRET"


class Receiver:
    """Keeps what came. `answers(number)` gives the status, and the body, of the answer to each message."""

    def __init__(self, answers: Callable[[int], tuple[int, bytes]] = lambda number: (200, b"")) -> None:
        self.came: list[tuple[dict[str, str], bytes]] = []
        self.hangs = threading.Event()
        """Set: nothing is answered until it is cleared by `close`."""
        self._released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.came.append((dict(self.headers), body))
                if outer.hangs.is_set():
                    outer._released.wait(30)
                status, said = answers(len(outer.came))
                self.send_response(status)
                if status == 302:
                    self.send_header("location", f"{outer.url}/elsewhere")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def hook(self) -> dict[str, Any]:
        """Settings of a webhook that leads here."""
        return {"url": f"{self.url}/path-that-is-secret?key=magpie", "private": True, "secret_env": VARIABLE}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What came, each signature verified as receivers do it."""
        return [dict(Webhook(SECRET).verify(body, headers)) for headers, body in self.came]

    def wait_for(self, count: int, seconds: float = 10.0) -> list[dict[str, Any]]:
        """The messages, as soon as there are so many."""
        until = time.monotonic() + seconds
        while len(self.came) < count:
            assert time.monotonic() < until, [json.loads(body) for _, body in self.came]
            time.sleep(0.005)
        return self.messages

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

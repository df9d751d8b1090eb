"""A proxy in front of an HTTP service that lets some requests fail: on the way there, in the
service, and on the way back.

    with FaultyProxy(endpoint, share=0.6, seed=1) as proxy:
        ...                                     # requests to proxy.address
    proxy.faults                                # how many of which kind there were
"""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

KINDS = ("500", "503", "429", "reply lost", "body cut", "closed at once", "time-out")
_DROPPED = {"connection", "transfer-encoding", "content-length", "date", "server"}


class FaultyProxy:
    """Serves until the block ends. Which request meets which fault is drawn from the seed.

    ``slow``: seconds that a request which times out takes; the client must wait for less.
    """

    def __init__(
        self, target: str, share: float, seed: int, kinds: tuple[str, ...] = KINDS, slow: float = 1.0
    ):
        self.target, self.share, self.kinds, self.slow = urlsplit(target), share, kinds, slow
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def log_message(self, *_: object) -> None: ...

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handler(proxy)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self) -> str | None:
        with self._lock:
            self.requests += 1
            fault = self._rng.choice(self.kinds) if self._rng.random() < self.share else None
            if fault:
                self.faults[fault] += 1
            return fault

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(str(self.target.hostname), self.target.port)
        connection.request(method, path, body, headers)
        return connection.getresponse()


def _handler(proxy: FaultyProxy) -> Callable[[BaseHTTPRequestHandler], None]:
    def handle(request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = proxy.draw()
        if fault == "closed at once":
            request.close_connection = True
            return
        if fault in ("500", "503", "429"):
            request.send_response(int(fault))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "time-out":
            time.sleep(proxy.slow)
            request.close_connection = True
            return
        headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
        reply = proxy.ask(request.command, request.path, headers, body)
        data = reply.read()
        if fault == "reply lost":  # the service has done what it was asked to
            request.close_connection = True
            return
        request.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in _DROPPED:
                request.send_header(name, value)
        length = reply.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault == "body cut":
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        request.wfile.write(data)

    return handle

"""A web server on loopback that knows byte ranges, and faults that a test switches on: what an object store does on a bad day."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

Fault = Callable[[str], str]
"""Returns '' to answer a request for a path as it should be, or '503', 'cut' (half of the body), 'damaged' (one byte changed), 'whole' (the
file instead of the part), or a status such as '403'.
"""


class StoreServer:
    """Serves a folder. Counts the bytes of each file that it sent (`sent`) and each fault that struck (`struck`)."""

    def __init__(self, folder: Path, *, port: int = 0, delay_s: float = 0.0) -> None:
        self.folder, self.delay_s = folder, delay_s
        self.fault: Fault = lambda path: ""
        self.sent, self.struck = Counter[str](), Counter[str]()
        self._port, self._server = port, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer._answer(self, with_body=False)

            def do_GET(self) -> None:
                outer._answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

            def handle_error(self, request: object, client_address: object) -> None:
                """Says nothing: clients that are killed or a server that stops break connections."""

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.connections: list = []
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stops listening and drops every open connection."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in self.connections:
                connection.close()

    def _answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        if request.connection not in self.connections:
            self.connections.append(request.connection)
        if self._server is None:
            self.struck["stopped"] += 1
            request.close_connection = True
            return
        time.sleep(self.delay_s)
        name = request.path.partition("?")[0].lstrip("/")
        fault = self.fault(name)
        if fault:
            self.struck[fault] += 1
        path = self.folder / name
        if fault.isdigit() or not path.is_file():
            request.send_response(int(fault) if fault.isdigit() else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = path.read_bytes()
        size, status = len(data), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if found and fault != "whole":
            start, end = int(found[1]), min(int(found[2]) + 1, size)
            data, status = data[start:end], 206
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not with_body:
            return
        if fault == "damaged":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault == "cut":
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        request.wfile.write(data)
        self.sent[name] += len(data)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

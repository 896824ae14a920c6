"""A web server on loopback that serves a folder: byte ranges, pages of links, and the faults that a test asks for."""

from __future__ import annotations

import html
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from typing import Self
from urllib.parse import quote, unquote, urlsplit

LONG_BYTES, SLOW_S = 64 << 20, 2.0


class WebServer:
    """A context manager, which can also be stopped and started again.

    `fault` gets (method, path) of each request and returns '', '503', 'cut' (the body ends early), 'damaged' (one byte is changed), 'whole' (no
    ranges), 'long' (LONG_BYTES follow the range), 'slow' (a byte at a time, for SLOW_S), or another status. `struck` counts the faults, `asked`
    the requests by method, `sent` the bytes of each file, `authorised` the requests with a password.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder, self.port = folder, port
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.struck, self.asked, self.sent = Counter[str](), Counter[str](), Counter[str]()
        self.authorised = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer._answer(self)

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

            def handle_error(self, request: object, client_address: object) -> None:
                """Says nothing: clients that are killed, or a server that stops, break connections."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._connections: list[socket] = []
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stops listening and drops every open connection."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in self._connections:
                connection.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.connection not in self._connections:
            self._connections.append(request.connection)
        if self._server is None:
            self.struck["stopped"] += 1
            request.close_connection = True
            return
        name = unquote(urlsplit(request.path).path)
        self.asked[request.command] += 1
        self.authorised += "Authorization" in request.headers
        fault = self.fault(request.command, name)
        if fault:
            self.struck[fault] += 1
        path = self.folder / name.strip("/")
        if fault.isdecimal() or not path.exists():
            self._send(request, int(fault or 404), b"")
            return
        if path.is_dir():
            links = "".join(
                f'<a href="{quote(each.name)}{"/" * each.is_dir()}">{html.escape(each.name)}</a>\n' for each in sorted(path.iterdir())
            )
            self._send(request, 200, f'<a href="../">..</a>\n{links}'.encode(), {"Content-Type": "text/html"})
            return
        data, status = path.read_bytes(), 200
        headers = {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and fault != "whole":
            start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        self._send(request, status, data + bytes(LONG_BYTES) if fault == "long" else data, headers, fault=fault)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None, *, fault: str = ""
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", "Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "GET":
            return
        if fault == "damaged":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault == "cut":
            body = body[: len(body) // 2]
            request.close_connection = True
        if fault == "slow":
            end = time.monotonic() + SLOW_S
            for byte in body:
                request.wfile.write(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() > end:
                    break
            request.close_connection = True
            return
        request.wfile.write(body)
        if body and fault != "cut":
            self.sent[unquote(urlsplit(request.path).path).strip("/")] += len(body)

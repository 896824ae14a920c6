"""A web server on loopback that serves a folder: byte ranges, pages of links, and the faults that a test asks for."""

from __future__ import annotations

import html
import re
import threading
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit


class WebServer:
    """A context manager. `fault` gets (method, path) of each request and returns '', '503', 'cut' (the body ends early), 'whole' (no ranges), or
    another status; `struck` counts the faults, `asked` the requests by method, `authorised` the requests with a password.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder, self.port = folder, port
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.struck, self.asked = Counter[str](), Counter[str]()
        self.authorised = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
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
            daemon_threads, request_queue_size = True, 128

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = unquote(urlsplit(request.path).path)
        self.asked[request.command] += 1
        self.authorised += "Authorization" in request.headers
        fault = self.fault(request.command, name)
        if fault:
            self.struck[fault] += 1
        path = self.folder / name.strip("/")
        if fault.isdecimal() or not path.exists():
            return _send(request, int(fault or 404), b"")
        if path.is_dir():
            links = "".join(
                f'<a href="{quote(each.name)}{"/" * each.is_dir()}">{html.escape(each.name)}</a>\n' for each in sorted(path.iterdir())
            )
            return _send(request, 200, f'<a href="../">..</a>\n{links}'.encode(), kind="text/html")
        data, stamp = path.read_bytes(), {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and fault != "whole":
            start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            place = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            return _send(request, 206, data[start:end], headers=stamp | place, cut=fault == "cut")
        return _send(request, 200, data, headers=stamp, cut=fault == "cut")


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    *,
    kind: str = "application/octet-stream",
    headers: dict[str, str] | None = None,
    cut: bool = False,
) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        request.close_connection = True

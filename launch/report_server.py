"""Serves one page and its script to this machine's browser, and nothing else to anybody else."""

import hashlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common.files.atomic_file import as_utf8

HOST = "127.0.0.1"
_PATIENCE = 20.0  # seconds for a client to send its request, and to take the answer


class PageServer(ThreadingHTTPServer):
    """Answers ``GET /`` with the newest page, and ``GET`` of its script with that.

    A page elsewhere may point a name of its own at 127.0.0.1 to read ours through the visitor's
    browser (DNS rebinding); such a request names that host, and is refused.

    Args:
        port: on loopback; 0: one that is free.
        page: the page as of now; called by several threads.
        script: its name and text.
        policy: its Content-Security-Policy.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self, port: int, page: Callable[[], str], script: tuple[str, str], policy: str
    ) -> None:
        self.page, self.script, self.policy = page, script, policy
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether a request that names ``host`` was meant for us."""
        return host.lower() in {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    server_version, sys_version = "widebatch", ""

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0].strip()):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"ask 127.0.0.1\n")
        elif path == f"/{self.server.script[0]}":
            self._answer(HTTPStatus.OK, as_utf8(self.server.script[1]), "text/javascript")
        elif path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"the report is at /\n")
        else:
            body = as_utf8(self.server.page())
            version = f'"{_version(body)}"'
            if self.headers.get("If-None-Match") == version:
                self._answer(HTTPStatus.NOT_MODIFIED, b"", ETag=version)
            else:
                self._answer(HTTPStatus.OK, body, "text/html", ETag=version)

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain", **headers: str
    ) -> None:
        self.send_response(status)
        everywhere: Mapping[str, str] = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{self.server.policy}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
        }
        for name, value in {**everywhere, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silence: requests of a page that refreshes are no news."""


def _version(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]

"""The live page's server: one page, on loopback, to who asked for it by its own name."""

import contextlib
import http.client
import socket
import threading

import pytest

from launch.report_server import PageServer


@pytest.fixture
def server():
    """Serves ``server.text``."""

    class Texts:
        text = "<!doctype html><p>first</p>"

    texts = Texts()
    script = ("library.js", "draw()")
    with PageServer(0, lambda: texts.text, script, "default-src 'none'") as running:
        running.texts = texts
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, path="/", method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        known = host or f"127.0.0.1:{server.server_port}"
        connection.request(method, path, headers={"Host": known, **headers})
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), reply.headers


def test_the_page_is_served_and_asks_browsers_for_care(server):
    status, body, headers = ask(server)
    assert status == 200
    assert body == server.texts.text
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"


def test_what_has_not_changed_is_not_sent_again(server):
    _, _, headers = ask(server)
    status, body, _ = ask(server, **{"If-None-Match": headers["ETag"]})
    assert (status, body) == (304, "")
    server.texts.text = "second"
    assert ask(server, **{"If-None-Match": headers["ETag"]})[:2] == (200, "second")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_a_request_under_another_name_is_refused(server, host):
    """A foreign page may let its own name point here: DNS rebinding."""
    port = server.server_port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        line = f"Host: {host.format(port=port)}\r\n" if host else ""
        client.sendall(f"GET / HTTP/1.1\r\n{line}\r\n".encode())
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 421")
    assert b"first" not in answer


def test_localhost_is_a_name_of_ours(server):
    assert ask(server, host=f"LocalHost:{server.server_port}")[0] == 200


def test_its_script_is_served_beside_the_page(server):
    status, body, headers = ask(server, "/library.js")
    assert (status, body) == (200, "draw()")
    assert headers["Content-Type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize("path", ["/config.json", "/../etc/passwd", "/metrics.jsonl", "*"])
def test_there_is_nothing_but_the_page(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_there_is_nothing_but_get(server, method):
    status, body, _ = ask(server, method=method)
    assert status == 501
    assert "first" not in body


def test_it_listens_on_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_a_browser_that_goes_away_stops_nobody(server, capfd):
    for _ in range(3):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.sendall(b"GET / HT")
        client.close()
    server.texts.text = "x" * 10_000_000
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        client.recv(10)
    server.texts.text = "still here"
    assert ask(server)[1] == "still here"
    assert capfd.readouterr().err == ""

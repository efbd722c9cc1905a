"""Fetching: what came, from where, as what. More of what is refused: tests/serve/test_media.py."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dgemma.fetch import FetchError, FetchRules, fetch

ANY = FetchRules(("*",), is_public=lambda address: True)


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/old" else 200)
        self.send_header("Location", "/new")
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write((self.headers.get("User-Agent") or "").encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def port():
    server = HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_an_answer_comes_with_its_last_address_and_its_type(port):
    got = fetch(f"http://x.example:{port}/old", ANY, lambda host, port: ["127.0.0.1"], {"User-Agent": "me"})
    assert (got.data, got.url, got.type) == (b"me", f"http://x.example:{port}/new", "text/plain; charset=utf-8")


def test_what_comes_packed_all_the_same_is_refused(port):
    with pytest.raises(FetchError, match="compressed"):
        fetch(f"http://x.example:{port}/packed", ANY, lambda host, port: ["127.0.0.1"])


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "0.0.0.0"])
def test_private_addresses_are_never_asked(address):
    with pytest.raises(FetchError, match="public internet"):
        fetch("http://x.example/", FetchRules(("*",)), lambda host, port: [address])

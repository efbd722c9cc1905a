"""Where pictures come from: data URLs, and addresses that are allowed, public, small and quick."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dgemma.fetch import FetchRules, addresses_of
from dgemma.serve.errors import ApiError
from dgemma.serve.media import media_bytes

HERE = FetchRules(("pictures.example",), is_public=lambda address: True)


class Site(BaseHTTPRequestHandler):
    """A web site: a picture, a large one, a slow one, redirects."""

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/nothing" else 200)
        self.end_headers()
        body = b"x" * 3000 if self.path == "/large" else b"picture"
        for place in range(0, len(body), 100):
            self.wfile.write(body[place : place + 100])
            if self.path == "/slow":
                threading.Event().wait(0.3)
                self.wfile.write(b"more")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.hosts = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetched(site: ThreadingHTTPServer, path: str, rules: FetchRules = HERE, host: str = "pictures.example") -> bytes:
    return media_bytes(f"http://{host}:{site.server_port}{path}", rules, "part", lambda host, port: ["127.0.0.1"])


def refusal(*args: object, **kwargs: object) -> str:
    with pytest.raises(ApiError) as caught:
        fetched(*args, **kwargs) if not isinstance(args[0], str) else media_bytes(*args, **kwargs)  # type: ignore
    assert caught.value.status == 400
    assert caught.value.param == "part"
    return caught.value.message


@pytest.mark.parametrize("url", ["data:image/png;base64," + base64.b64encode(b"a\0b").decode(), "data:,a%00b",
                                 "DATA:image/png;BASE64,YQBi", "data:image/png;base64,YQ%42i"])
def test_a_data_url_holds_its_bytes(url):
    assert media_bytes(url, FetchRules(), "part") == b"a\0b"


@pytest.mark.parametrize(("url", "said"), [
    ("data:image/png;base64", "comma"), ("data:image/png;base64,§§", "base64"), ("data:image/png;base64,abc", "base64"),
    ("file:///etc/passwd", "not as file:"), ("picture.png", "not as text"), ("", "not as text"),
    ("https://pictures.example/a.png", "fetches nothing")])
def test_what_is_no_data_url_is_refused_unless_a_domain_is_allowed(url, said):
    assert said in refusal(url, FetchRules(), "part")


def test_an_allowed_domain_and_those_below_it_are_fetched_from(site):
    assert fetched(site, "/a.png") == fetched(site, "/a.png", host="cdn.pictures.example") == b"picture"
    assert site.hosts[-1] == f"cdn.pictures.example:{site.server_port}"


@pytest.mark.parametrize("host", ["elsewhere.example", "notpictures.example", "pictures.example.evil.example"])
def test_other_domains_are_not(site, host):
    assert "does not fetch from" in refusal(site, "/a.png", host=host)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "192.168.1.1", "::1", "fe80::1",
                                     "0.0.0.0", "::ffff:127.0.0.1", "100.64.0.1"])
def test_a_name_that_points_into_a_private_network_is_not_asked(address):
    rules = FetchRules(("*",))
    said = refusal("http://pictures.example/a.png", rules, "part", lambda host, port: ["1.1.1.1", address])
    assert "public internet" in said


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "[::1]"])
def test_this_machine_is_not_asked_by_any_of_its_names(site, host):
    assert refusal(f"http://{host}:{site.server_port}/a.png", FetchRules(("*",)), "part", addresses_of)


def test_redirects_are_followed_to_where_it_is_allowed(site):
    assert fetched(site, "/to//a.png") == b"picture"
    there = f"http://pictures.example:{site.server_port}"
    assert fetched(site, f"/to/{there}/to/{there}/a.png") == b"picture"
    assert "does not fetch from" in refusal(site, "/to/http://elsewhere.example/a.png")
    assert "redirected more than 3 times" in refusal(site, "/to" * 5 + "//a.png")


def test_what_is_too_large_or_too_slow_or_missing_is_refused(site):
    assert "more than 0 MB" in refusal(site, "/large", replace(HERE, max_bytes=2000))
    assert re.search("0.2 seconds|timed out", refusal(site, "/slow", replace(HERE, seconds=0.2)))
    assert "answers 404" in refusal(site, "/nothing")


def test_a_name_without_an_address_is_an_error_of_the_client(site):
    def nowhere(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    assert "no such name" in refusal("http://pictures.example/", FetchRules(("*",)), "part", nowhere)

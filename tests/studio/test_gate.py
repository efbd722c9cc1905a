"""What stands before the pages: who gets in, and what browsers are told to forbid."""

import re
from urllib.parse import urlencode

import pytest
from starlette.responses import HTMLResponse, PlainTextResponse

from dgemma.studio.auth import Passwords, Sessions, set_password
from dgemma.studio.gate import Gate, PagePolicy
from dgemma.studio.store import Store
from support.asgi import request, websocket

PAGE = "<html><script>own()</script><SCRIPT type=module>own()</SCRIPT><p>&lt;script&gt;</p></html>"


async def inside(scope, receive, send):
    """An application that lets everybody do everything."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        return
    response = HTMLResponse(PAGE) if scope["path"] == "/" else PlainTextResponse("inside")
    await response(scope, receive, send)


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def sessions(store):
    return Sessions(store)


@pytest.fixture
def told():
    return []


@pytest.fixture
def gate(sessions, store, told):
    def make(**options):
        return Gate(PagePolicy(inside), sessions, Passwords(store), port=8888, api=("v1", "health"), tell=told.append,
                    **options)
    return make


@pytest.fixture
def cookie(sessions):
    return f"dgemma_studio_8888={sessions.begin('test')}"


def post(gate, fields, **headers):
    return request(gate, "/signin", "POST", body=urlencode(fields).encode(), origin="http://127.0.0.1:8888", **headers)


def test_a_launch_link_sets_a_strict_cookie_that_lets_in(gate, sessions):
    gate = gate()
    response = request(gate, f"/launch?token={sessions.new_token()}")
    assert response.status == 200 and 'http-equiv="refresh"' in response.text
    set_cookie = response.headers["set-cookie"]
    assert "HttpOnly" in set_cookie and "SameSite=strict" in set_cookie and "Path=/" in set_cookie
    assert request(gate, "/", cookie=set_cookie.partition(";")[0]).status == 200


def test_nothing_but_signing_in_is_open(gate):
    gate = gate()
    for path in ("/", "/c/abc", "/_nicegui/3/static/nicegui.js", "/favicon.ico", "/recordings/x", "/launchx"):
        assert request(gate, path).status == 401, path
        assert request(gate, path, accept="text/html").headers["location"] == "/signin", path
        assert request(gate, path, cookie="dgemma_studio_8888=guess").status == 401, path
    assert request(gate, "/launch?token=guess").status == 403
    assert "password" not in request(gate, "/signin").text  # none is set


@pytest.mark.parametrize("cookie", ["", "=", "dgemma_studio_8888", "dgemma_studio_8888=", "a b;;;=\x01", "x" * 5000])
def test_an_odd_cookie_is_no_session(gate, cookie):
    assert request(gate(), "/x", cookie=cookie).status == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8888", "127.0.0.1.nip.io:8888", "", None,
                                  "localhost.evil", "[::1", "127.0.0.1@evil.example"])
def test_a_name_that_was_made_to_point_here_is_refused(gate, cookie, host):
    assert request(gate(), "/", host=host, cookie=cookie).status == 403
    origin = f"http://{host}"
    assert websocket(gate(), "/_nicegui_ws/socket.io/", host=host, origin=origin, cookie=cookie) == [
        {"type": "websocket.close", "code": 1008, "reason": ""}]


@pytest.mark.parametrize("host", ["127.0.0.1:8888", "localhost:8888", "LOCALHOST.:8888", "[::1]:8888",
                                  "192.168.1.7:8888", "box.lan:8888"])
def test_addresses_and_this_machines_names_are_ours(gate, cookie, host):
    assert request(gate(allowed_hosts=("box.lan",)), "/x", host=host, cookie=cookie).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:8888",
                                    "https://127.0.0.1", "file://127.0.0.1:8888", "http://[", "chrome-extension://abc",
                                    "http://127.0.0.1:8888.evil.example", "http://a@127.0.0.1:8888"])
def test_pages_of_other_origins_get_nothing(gate, cookie, origin):
    assert request(gate(), "/x", origin=origin, cookie=cookie).status == 403
    assert request(gate(), "/x", "POST", origin=origin, cookie=cookie).status == 403
    assert websocket(gate(), "/_nicegui_ws/socket.io/", origin=origin, cookie=cookie)[0]["type"] == "websocket.close"


def test_a_websocket_needs_an_origin_and_a_session(gate, cookie):
    own = {"origin": "http://127.0.0.1:8888", "cookie": cookie}
    assert websocket(gate(), "/_nicegui_ws/", **own)[0]["type"] == "websocket.accept"
    for missing in own:
        assert websocket(gate(), "/_nicegui_ws/", **{**own, missing: None})[0]["type"] == "websocket.close", missing


def test_a_websocket_of_a_session_that_was_ended_is_cut_off(gate, cookie, sessions):
    def ended():
        sessions.end(sessions.all()[0].digest)
        return {"type": "websocket.receive", "text": "too late"}

    sent = websocket(gate(), "/_nicegui_ws/", [{"type": "websocket.receive", "text": "in time"}, ended],
                     origin="http://127.0.0.1:8888", cookie=cookie)
    assert [message.get("text") for message in sent] == [None, "in time"]


@pytest.mark.parametrize(("site", "mode", "kind", "status"), [
    ("same-origin", "cors", "empty", 200), ("none", "navigate", "document", 200),
    ("cross-site", "navigate", "document", 200), ("cross-site", "navigate", "iframe", 403),
    ("cross-site", "no-cors", "script", 403), ("same-site", "no-cors", "image", 403)])
def test_what_a_browser_says_of_where_a_request_comes_from_counts(gate, cookie, site, mode, kind, status):
    assert request(gate(), "/x", cookie=cookie, sec_fetch_site=site, sec_fetch_mode=mode,
                   sec_fetch_dest=kind).status == status


def test_a_password_begins_a_session_and_guesses_do_not(gate, store):
    set_password(store, "correct horse")
    gate = gate(with_password=lambda: True)
    assert 'type="password"' in request(gate, "/signin").text
    wrong = post(gate, {"password": "wrong horse"})
    assert wrong.status == 403 and "set-cookie" not in wrong.headers
    right = post(gate, {"password": "correct horse"})
    assert request(gate, "/x", cookie=right.headers["set-cookie"].partition(";")[0]).status == 200


def test_guessing_is_slowed_down(gate, store):
    set_password(store, "correct horse")
    gate = gate(with_password=lambda: True)
    statuses = [post(gate, {"password": f"guess {number}"}).status for number in range(7)]
    assert statuses == [403] * 5 + [429] * 2
    assert post(gate, {"password": "correct horse"}, client="10.0.0.9").status == 200


def test_a_form_of_another_origin_cannot_sign_in(gate):
    assert request(gate(), "/signin", "POST", body=b"password=x", origin="http://evil.example").status == 403


def test_a_form_that_is_too_long_has_no_password(gate):
    assert post(gate(), {"password": "x" * 10_000}).status == 403


def test_whoever_reads_the_terminal_can_have_a_new_link(gate, told):
    gate = gate()
    assert "in the terminal" in post(gate, {"link": "1"}).text
    (link,) = told
    assert link.startswith("http://127.0.0.1:8888/launch?token=")
    assert request(gate, link.removeprefix("http://127.0.0.1:8888")).status == 200


def test_the_api_checks_for_itself_unless_it_is_closed(gate, cookie):
    assert request(gate(), "/v1/models").status == 200
    assert request(gate(closed=True), "/v1/models").status == 401
    assert request(gate(closed=True), "/v1/models", cookie=cookie).status == 200
    assert request(gate(closed=True), "/v1/models", cookie=cookie, origin="http://evil.example").status == 403


def test_a_websocket_under_the_api_is_not_let_through(gate):
    assert websocket(gate(), "/v1/x", origin="http://evil.example")[0]["type"] == "websocket.close"


def test_scripts_run_only_with_the_pages_nonce(gate, cookie):
    first, second = (request(gate(), "/", cookie=cookie) for _ in range(2))
    nonces = re.findall(r"<script nonce=\"([^\"]+)\"", first.text, re.IGNORECASE)
    assert len(nonces) == 2 and len(set(nonces)) == 1
    assert nonces[0] not in second.text
    policy = dict(part.split(" ", 1) for part in first.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and f"'nonce-{nonces[0]}'" in policy["script-src"]
    assert "'unsafe-inline'" not in policy["script-src"] and "*" not in first.headers["content-security-policy"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
    assert int(first.headers["content-length"]) == len(first.body)


def test_every_answer_tells_browsers_to_be_careful(gate, cookie):
    for response in (request(gate(), "/", cookie=cookie), request(gate(), "/signin"), request(gate(), "/x"),
                     request(gate(), "/", host="evil.example")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_the_sign_in_page_has_no_scripts_and_escapes_what_it_says(gate):
    page = request(gate(), "/signin")
    assert "<script" not in page.text and "script-src" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")

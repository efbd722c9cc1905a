"""What stands before every page: hosts, origins, sessions, and what the browser is told to forbid.

Plain ASGI, for HTTP and websockets alike. Works on: `auth`. Knows nothing of: what the pages are.

- **Host**: only addresses, this machine's own names and those that were allowed: a stranger's name that was made to
  point here (DNS rebinding) is refused. An IP address cannot be rebound.
- **Origin**: of websockets it has to be there and be ours (the same-origin policy does not hold them back); of HTTP
  requests it may be missing, where a browser says by `Sec-Fetch-Site` that they come from elsewhere they are refused,
  too, but for the first look: a link that is followed.
- **Session**: a cookie, HttpOnly and SameSite=Strict, named by the port (browsers mix the ports of a host up).
- **Content-Security-Policy**: scripts are this server's files and those with the page's nonce. NiceGUI's page has four
  inline scripts (the import map, the page's elements, two short ones), which get the nonce here; an attacker's inline
  script has none. `'unsafe-eval'` has to be allowed: Vue's build compiles templates in the browser with ``new
  Function``, and NiceGUI runs handlers and `run_javascript` through ``eval``; it lets nothing in by itself, for what is
  evaluated comes over the websocket of this server or from its files. `'unsafe-inline'` for styles has to be, too:
  Quasar and Vue set style attributes. So a page's text must never reach an HTML sink unsanitised; see `markdown`.
  Nothing at all is fetched from, framed by, or posted to another place.
"""

from __future__ import annotations

import html
import re
import secrets
from collections.abc import Callable, Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.serve.auth import host_name, is_address
from dgemma.studio.auth import IDLE_DAYS, Passwords, Sessions, TooManyTriesError

LAUNCH, SIGN_IN = "/launch", "/signin"
_LARGEST_FORM = 8192  # bytes
_HEADERS = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
_SCRIPT = re.compile(rb"<script(?=[\s>])", re.IGNORECASE)


def content_policy(nonce: str) -> str:
    """The policy of a page, whose inline scripts have the nonce."""
    return "; ".join((
        "default-src 'none'", f"script-src 'self' 'nonce-{nonce}' 'unsafe-eval'", "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:", "media-src 'self' blob:", "font-src 'self' data:", "connect-src 'self'",
        "manifest-src 'self'", "worker-src 'self' blob:", "form-action 'self'", "frame-ancestors 'none'",
        "base-uri 'none'", "object-src 'none'"))


class Gate:
    """Lets a request or a websocket in, or answers it.

    ``api`` are first parts of paths that another application checks by itself (`dgemma.serve`); with ``closed`` it does
    not, and its callers need a session as everybody does. ``tell`` shows a new launch link to whoever started the
    server.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, passwords: Passwords, *, port: int,
                 allowed_hosts: Collection[str] = (), api: Collection[str] = (), closed: bool = False,
                 with_password: Callable[[], bool] = lambda: False, tell: Callable[[str], None] = lambda link: None):
        self.app, self.sessions, self.passwords = app, sessions, passwords
        self.cookie = f"dgemma_studio_{port}"
        self._hosts = {host_name(host) for host in allowed_hosts}
        self._api, self._closed, self._with_password, self._tell = frozenset(api), closed, with_password, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        api = first_part(scope["path"]) in self._api
        if api and not self._closed and scope["type"] == "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if (refusal := self._foreign(scope, headers)) is not None:
            await _refuse(scope, receive, send, 403, refusal)
            return
        if not api and scope["type"] == "http" and scope["path"] in (LAUNCH, SIGN_IN):
            await (await self._enter(Request(scope, receive)))(scope, receive, _with_headers(send))
            return
        digest = self.sessions.find(self._cookie_of(headers))
        if digest is None:
            await self._turn_away(scope, receive, send, headers)
            return
        scope["dgemma.session"] = digest
        if scope["type"] == "websocket":
            await self.app(scope, self._while_alive(receive, digest), send)
        else:
            await self.app(scope, receive, send if api else _with_headers(send))

    def _foreign(self, scope: Scope, headers: Headers) -> str | None:
        """Why a request comes from a place that has no business here; None if it does not."""
        host = headers.get("host", "")
        if not (is_address(host) or host_name(host) in self._hosts):
            return f"this studio does not answer to the name {host_name(host)!r:.100}: start it with --allowed-hosts"
        origin = headers.get("origin")
        if origin is None:
            if scope["type"] == "websocket":
                return "a websocket needs an origin"
            site = headers.get("sec-fetch-site", "none")
            followed = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get(
                "sec-fetch-dest") == "document"
            if site in ("cross-site", "same-site") and not followed:
                return "pages of other places may not use this studio"
            return None
        try:
            parts = urlsplit(origin)
        except ValueError:
            return "the origin cannot be read"
        if parts.scheme not in ("http", "https") or parts.netloc.lower() != host.lower():
            return "pages of other places may not use this studio"
        return None

    def _cookie_of(self, headers: Headers) -> str | None:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return None
        return None if found is None else found.value

    def _while_alive(self, receive: Receive, digest: str) -> Receive:
        async def alive() -> Message:
            message = await receive()
            # The page's socket speaks every few seconds; so much longer lives one of a session that was ended.
            return message if self.sessions.alive(digest) else {"type": "websocket.disconnect", "code": 1008}

        return alive

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        wants_page = scope["type"] == "http" and scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        if wants_page:
            await RedirectResponse(SIGN_IN, 303)(scope, receive, _with_headers(send))
        else:
            await _refuse(scope, receive, send, 401, "sign in first: open the link that `dgemma studio` shows")

    async def _enter(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        label = f"{address} · {_browser(request.headers.get('user-agent', ''))}"
        if request.url.path == LAUNCH and request.method == "GET":
            cookie = self.sessions.use_token(request.query_params.get("token", ""), label)
            if cookie is None:
                return _sign_in_page(self._with_password(), "This link was used before, or is too old.", 403)
            return self._welcome(request, cookie)
        if request.url.path == SIGN_IN and request.method == "GET":
            return _sign_in_page(self._with_password())
        if request.url.path == SIGN_IN and request.method == "POST":
            form = await _form(request)
            try:
                if "link" in form:
                    self._tell(f"{request.url.scheme}://{request.headers['host']}{LAUNCH}?token="
                               f"{quote(self.sessions.new_token())}")
                    return _sign_in_page(self._with_password(), "A new link is in the terminal.")
                right = await self.passwords.check(form.get("password", ""), address)
            except TooManyTriesError as error:
                message = f"Too many tries. Wait {error.seconds:.0f} seconds."
                return _sign_in_page(self._with_password(), message, 429)
            if right:
                return self._welcome(request, self.sessions.begin(label))
            return _sign_in_page(self._with_password(), "That is not the password.", 403)
        return PlainTextResponse("method not allowed", 405)

    def _welcome(self, request: Request, cookie: str) -> Response:
        # A page and no redirect: of a link that was followed from elsewhere a browser would take the strict cookie
        # along only with what our own page asks for next.
        response = HTMLResponse('<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/">'
                                '<title>dgemma studio</title><a href="/">Go on</a>')
        response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
        response.headers["Cache-Control"] = "no-store"
        response.set_cookie(self.cookie, cookie, max_age=round(IDLE_DAYS * 86_400), httponly=True, samesite="strict",
                            secure=request.url.scheme == "https", path="/")
        return response


class PagePolicy:
    """Gives a page's inline scripts a nonce, and says which scripts may run. Stands where nothing is compressed yet."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(18)
        start: Message | None = None
        body = bytearray()

        async def outgoing(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers["Content-Security-Policy"] = content_policy(nonce)
                if headers.get("content-type", "").startswith("text/html"):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if message.get("more_body", False):
                    return
                # What a page says of its users is escaped in it: every one of these is NiceGUI's, or ours.
                page = _SCRIPT.sub(b'<script nonce="' + nonce.encode() + b'"', bytes(body))
                MutableHeaders(raw=start["headers"])["content-length"] = str(len(page))
                await send(start)
                start = None
                message = {**message, "body": page}
            await send(message)

        await self.app(scope, receive, outgoing)


def first_part(path: str) -> str:
    """The first part of a path: "v1" of /v1/models."""
    return path.lstrip("/").partition("/")[0]


def _with_headers(send: Send) -> Send:
    async def outgoing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return outgoing


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.close", "code": 1008, "reason": ""})  # before it was accepted: 403
    else:
        await PlainTextResponse(why, status)(scope, receive, _with_headers(send))


async def _form(request: Request) -> dict[str, str]:
    """The fields of a short form; what is longer has none."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_FORM:
            return {}
    return {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _browser(agent: str) -> str:
    """A browser's name as people know it."""
    names = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"))
    return next((name for mark, name in names if mark in agent), "another program")


def _sign_in_page(with_password: bool, message: str = "", status: int = 200) -> Response:
    nonce = secrets.token_urlsafe(18)
    note = f'<p class="note" role="alert">{html.escape(message)}</p>' if message else ""
    field = ('<form method="post" action="/signin"><label for="p">Password</label><input id="p" name="password" '
             'type="password" autocomplete="current-password" autofocus required><button>Sign in</button></form>'
             '<p class="or">or</p>' if with_password else "")
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Sign in · dgemma studio</title>
<style nonce="{nonce}">{_SIGN_IN_STYLE}</style></head><body><main><h1>dgemma studio</h1>{note}{field}
<p>Open the link that <code>dgemma studio</code> shows in its terminal. Each link works once.</p>
<form method="post" action="/signin"><input type="hidden" name="link" value="1">
<button class="quiet">Show a new link in the terminal</button></form></main></body></html>"""
    response = HTMLResponse(page, status)
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
    response.headers["Cache-Control"] = "no-store"
    return response


_SIGN_IN_STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f8;--card:#fff;--ink:#1b1b1f;--soft:#6b6b76;--line:#e4e4ea;--accent:#4f46e5}
@media(prefers-color-scheme:dark){:root{--bg:#131316;--card:#1c1c21;--ink:#ececf1;--soft:#9a9aa6;--line:#2e2e36;
--accent:#8b87ff}}
body{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
main{width:min(22rem,calc(100vw - 4rem));padding:2rem;background:var(--card);border:1px solid var(--line);
border-radius:16px}
h1{font-size:1.25rem;font-weight:650;margin:0 0 1rem}p{color:var(--soft);margin:.75rem 0}
.note{color:var(--ink);padding:.6rem .8rem;border:1px solid var(--line);border-radius:10px}
.or{text-align:center}label{display:block;font-size:.875rem;margin-bottom:.3rem}
input{width:100%;box-sizing:border-box;font:inherit;padding:.6rem .75rem;border:1px solid var(--line);
border-radius:10px;background:var(--bg);color:inherit;margin-bottom:.75rem}
button{width:100%;font:inherit;font-weight:550;padding:.6rem;border:0;border-radius:10px;background:var(--accent);
color:#fff;cursor:pointer}
@media(prefers-color-scheme:dark){button{color:#131316}}
.quiet{background:transparent;color:var(--ink);border:1px solid var(--line)}
code{font-size:.9em}"""

"""An OpenAI-compatible server over HTTP: which models it has, and a chat completion chunk by chunk.

Works on: JSON in and out. Knows nothing of: canvases, terminals. Whatever goes wrong is one line of DgemmaError that
names the address.
"""

from __future__ import annotations

import json
import queue
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dgemma.cli.terminal.console import printable
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0  # a large model on a CPU may take minutes to its first token
HANG_UP_SECONDS = 2.0  # to wait for the connection's thread to notice that it is closed
_LONGEST_MESSAGE = 400  # characters of what a server says


def base_url(url: str) -> str:
    """The address that /chat/completions and /models are under, from what a user gives as --url.

    "/v1" is added unless the path has a version in it already. Raises DgemmaError when it is no HTTP address.
    """
    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        sound = False
    if not sound or parts.query or parts.fragment:
        raise DgemmaError(f"--url {printable(url)!r} is not the address of a server: it looks like "
                          "http://localhost:8000 or https://example.org/v1")
    return url if re.search(r"/v\d", parts.path) else f"{url}/v1"


class OpenAIServer:
    """A server's address and the key that it wants, if it wants one."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = base_url(url)
        self._headers = {"Authorization": f"Bearer {_sound_key(api_key)}"} if api_key else {}
        host = urlsplit(self.url).hostname or ""
        self._local = host == "localhost" or host.startswith("127.") or host == "::1"

    def models(self) -> list[dict[str, Any]]:
        """The models it serves, as /models lists them; raises DgemmaError when that cannot be had."""
        import httpx2

        try:
            with self.client() as client:
                response = client.get("models")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise unreachable(error, self.url) from error
        if response.status_code in (404, 405):
            raise NotListedError(f"{self.url} does not look like an OpenAI-compatible server: it has no /models (HTTP "
                                 f"{response.status_code}); check --url, or name a model with -m")
        if response.status_code != 200:
            raise refusal(response, self.url)
        try:
            models = response.json()["data"]
            if not all(isinstance(model["id"], str) for model in models):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise DgemmaError(f"{self.url} is not an OpenAI-compatible server: its /models is no list of "
                              "models; check --url") from error
        return models

    def client(self) -> httpx2.Client:
        """A connection for one request. What is on this machine is never asked for through a proxy."""
        import httpx2

        return httpx2.Client(base_url=self.url, headers=self._headers, trust_env=not self._local,
                             timeout=httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS))


class NotListedError(DgemmaError):
    """The server does not say what it serves."""


class ChatStream:
    """The chunks of one chat completion as they come; nothing is sent before the first is asked for.

    They are received in a thread of their own, so that whoever waits for one can be woken at any time: `stop` takes no
    lock and may be called from a signal handler. However the iteration ends, the connection is closed then.
    """

    def __init__(self, server: OpenAIServer, body: dict[str, Any]):
        self.stopped = False
        self._server, self._body = server, body
        self._came: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()  # None: the end
        self._socket: socket.socket | None = None
        self._over = False

    def stop(self) -> None:
        """End it: what has come is still handed out, nothing after it."""
        self.stopped = True
        self._came.put(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = threading.Thread(target=self._receive, daemon=True, name="dgemma-http")
        worker.start()
        try:
            while isinstance(came := self._came.get(), dict):
                yield came
            if came is not None:
                raise came
        finally:
            self._over = True
            self._hang_up()
            worker.join(HANG_UP_SECONDS)

    def _receive(self) -> None:
        import httpx2

        url = self._server.url
        try:
            with self._server.client() as client, client.stream(
                    "POST", "chat/completions", json=self._body, extensions={"trace": self._watch}) as response:
                if response.status_code != 200:
                    response.read()
                    raise refusal(response, url)
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    raise DgemmaError(f"{url} did not stream its answer (content type "
                                      f"{response.headers.get('content-type')!r:.80}): it is not an OpenAI-compatible "
                                      "server, or something between here and it collects what it sends")
                for event in httpx2.EventSource(response):
                    if event.data.strip() == "[DONE]":
                        break
                    self._came.put(_chunk(event.data, url))
            self._came.put(None)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            self._came.put(unreachable(error, url))
        except Exception as error:  # raised where the chunks are waited for
            self._came.put(error)

    def _watch(self, step: str, info: dict[str, Any]) -> None:
        """Remember the socket as soon as there is one: closing the client would not wake a thread that waits for it."""
        if step.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._over:
                self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # the other side was first
                self._socket.shutdown(socket.SHUT_RDWR)


def refusal(response: httpx2.Response, url: str) -> DgemmaError:
    """What a status that is not 200 means to a user."""
    status, said = response.status_code, _message(response)
    because = f": {said}" if said else ""
    if status in (401, 403):
        return DgemmaError(f"{url} refuses the API key, or wants one (HTTP {status}{because}): give --api-key, or set "
                           "DGEMMA_API_KEY")
    if status in (429, 503):
        wait = response.headers.get("retry-after", "")
        when = f" in {wait} s" if wait.isdigit() else " later"
        return DgemmaError(f"{url} is busy (HTTP {status}{because}): try again{when}")
    if 300 <= status < 400:
        return DgemmaError(f"{url} is somewhere else: it points to "
                           f"{printable(response.headers.get('location', '?'))}; give that server's address as --url")
    if status == 404 and not said:
        because = ": there is no /chat/completions; is this an OpenAI-compatible server?"
    return DgemmaError(f"{url} refused the request (HTTP {status}{because or f' {response.reason_phrase}'})")


def unreachable(error: Exception, url: str) -> DgemmaError:
    """What went wrong on the way, for a user."""
    import httpx2

    cause = printable(str(error)) or type(error).__name__
    if isinstance(error, httpx2.ConnectTimeout):
        return DgemmaError(f"{url} does not answer (waited {CONNECT_SECONDS:g} s for a connection)")
    if isinstance(error, httpx2.ConnectError):
        return DgemmaError(f"no server can be reached at {url} ({cause}): is it running, and is the address right?")
    if isinstance(error, httpx2.TimeoutException):
        return DgemmaError(f"{url} has said nothing for {SILENCE_SECONDS:g} s: given up")
    return DgemmaError(f"the connection to {url} broke ({cause})")


def chunk_error(chunk: dict[str, Any], url: str) -> DgemmaError | None:
    """The error that a server reports in the middle of a stream, if this chunk is one."""
    if not chunk.get("error"):
        return None
    return DgemmaError(f"{url} could not finish the answer: {_said(chunk) or 'it does not say why'}")


def _chunk(data: str, url: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError) as error:
        raise DgemmaError(f"{url} sent something that is not a chunk of an answer: {printable(data)[:80]!r}") from error
    return chunk


def _message(response: httpx2.Response) -> str:
    """What an error's body says, in one line; nothing if it is a page for a browser."""
    try:
        return _said(response.json())
    except (ValueError, RecursionError):
        return "" if "html" in response.headers.get("content-type", "") else _line(response.text)


def _said(body: Any) -> str:
    """The message in the forms that errors come in: {"error": {"message"}}, {"error": …}, {"message"}, {"detail"}."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), "")
    return _line(body if isinstance(body, str) else json.dumps(body))


def _line(text: str) -> str:
    line = " ".join(printable(text).split()).rstrip(".")
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}…"


def _sound_key(key: str) -> str:
    key = key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise DgemmaError("the API key holds characters that no key can have: give the key alone")
    return key

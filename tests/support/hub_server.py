"""A stand-in for the Hugging Face hub: as much of its HTTP interface as listing and downloading take, on loopback.

A test fills `HubServer.repos` and turns the switches; `requests` lists what was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Answer:
    """What is about to be answered to a request for a file; ``wanted`` is its Range."""

    name: str
    wanted: str | None
    status: int
    headers: dict[str, str]
    data: bytes


@dataclass
class Switches:
    """What goes wrong; all off at first."""

    gated: bool = False  # the files, not the listing: as the hub does
    gated_listing: bool = False
    cut_after: int | None = None  # bytes of a file's answer after which the connection breaks
    cuts: int = 1  # how many answers break
    chunk: int = 1 << 16
    delay: float = 0.0  # seconds between two chunks
    status: int | None = None  # answer to every request for a file
    statuses: int = 1 << 30  # how often
    corrupt: bool = False  # one byte of every large file is another
    ranges: bool = True
    redirect: str | None = None  # another host that has the large files
    token: str | None = None  # must be sent
    alter: Callable[[Answer], Answer | None] | None = None  # makes another of the answer to a request for a file


@dataclass
class HubServer:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commit: str = COMMIT
    switches: Switches = field(default_factory=Switches)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tokens: list[str | None] = field(default_factory=list)
    closed: bool = False

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[tuple[str, str | None]]:
        """The files that were asked for, with the range."""
        return [(path.split("/", 5)[-1], wanted) for method, path, wanted in self.requests
                if method == "GET" and "/resolve/" in path]


def is_large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_of(name: str, data: bytes) -> str:
    """What a file is called among the blobs of the cache."""
    return sha256(data) if is_large(name) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if hub.closed:  # on a connection that was kept open
            self.close_connection = True
            return None
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.append(self.headers.get("Authorization"))
        switches = hub.switches
        if switches.token and self.headers.get("Authorization") != f"Bearer {switches.token}":
            return self._refuse(401, "RepoNotFound")
        if path == "/api/models":
            words = parse_qs(urlsplit(self.path).query).get("search", [""])[0].lower()
            found = [{"id": repo, "downloads": 12_345, "likes": 6, "lastModified": "2026-11-01T12:00:00.000Z",
                      "gated": "manual" if switches.gated else False} for repo in hub.repos if words in repo.lower()]
            return self._send(json.dumps(found).encode(), {})
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            if switches.gated_listing:
                return self._refuse(403, "GatedRepo")
            return self._send(json.dumps(self._info(repo)).encode(), {"Content-Type": "application/json"})
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound")
        if name not in hub.repos[repo]:
            return self._refuse(404, "EntryNotFound")
        if switches.gated:
            return self._refuse(403, "GatedRepo")
        if switches.status and switches.statuses > 0:
            switches.statuses -= 1
            return self._refuse(switches.status, "")
        if switches.redirect and is_large(name):
            self.send_response(302)
            self.send_header("Location", f"{switches.redirect}{self.path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self._file(name, hub.repos[repo][name])

    def _info(self, repo: str) -> dict:
        siblings = []
        for name, data in self.server_hub.repos[repo].items():
            sibling = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if is_large(name):
                sibling["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 134}
            else:
                sibling["blobId"] = blob_of(name, data)
            siblings.append(sibling)
        return {"id": repo, "modelId": repo, "sha": self.server_hub.commit, "private": False, "gated": False,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}

    def _file(self, name: str, data: bytes) -> None:
        switches = self.server_hub.switches
        headers = {"X-Repo-Commit": self.server_hub.commit, "Accept-Ranges": "bytes",
                   "ETag": f'"{blob_of(name, data)}"', "Content-Type": "application/octet-stream"}
        if is_large(name):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            if switches.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
        status, wanted = 200, self.headers.get("Range")
        if wanted and switches.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return self._refuse(416, "")
            end = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            data, status = data[int(first) : end], 206
        answer = Answer(name, wanted, status, headers, data)
        if switches.alter is not None:
            answer = switches.alter(answer) or answer
        self._send(answer.data, answer.headers, answer.status, is_large(name))

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200, large: bool = False) -> None:
        switches = self.server_hub.switches
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = None
        if large and switches.cut_after is not None and switches.cuts > 0:
            switches.cuts -= 1
            limit = switches.cut_after
        try:
            for start in range(0, len(data) if limit is None else min(limit, len(data)), switches.chunk):
                end = start + switches.chunk if limit is None else min(start + switches.chunk, limit)
                self.wfile.write(data[start:end])
                self.wfile.flush()
                if large and switches.delay:
                    time.sleep(switches.delay)
        except OSError:  # who asked has gone
            self.close_connection = True
        if limit is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        body = json.dumps({"error": code or str(status)}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def gguf(size: int, architecture: str = "diffusion-gemma", seed: int = 0) -> bytes:
    """Bytes that begin as a GGUF file of that architecture does."""
    key, value = b"general.architecture", architecture.encode()
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    noise = hashlib.shake_128(str(seed).encode()).digest(max(0, size - len(head)))
    return head + noise


def demo_repos(size: int = 300_000) -> dict[str, dict[str, bytes]]:
    """Repositories as they are found on the hub, but small."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    return {
        "org/diffuse-GGUF": {
            "README.md": b"# card",
            "diffuse-Q4_K_M.gguf": gguf(size, seed=4),
            "diffuse-Q8_0.gguf": gguf(2 * size, seed=8),
            "diffuse-UD-Q2_K_XL.gguf": gguf(size // 2, seed=2),
            "BF16/diffuse-BF16-00001-of-00002.gguf": gguf(size, seed=16),
            "BF16/diffuse-BF16-00002-of-00002.gguf": gguf(size, seed=17),
            "imatrix_unsloth.gguf": gguf(500, "imatrix"),
        },
        "org/diffuse": {
            "README.md": b"# card",
            "config.json": b'{"model_type": "diffusion_gemma"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00002.safetensors": gguf(size, seed=31),
            "model-00002-of-00002.safetensors": gguf(size, seed=32),
            "pytorch_model.bin": b"pickle",
            "original/consolidated.safetensors": gguf(size, seed=33),
        },
    }


def connect(monkeypatch: Any, server: HubServer, cache: Path) -> None:
    """Let the hub's library ask this server, in this process, and keep what it gets in ``cache``."""
    from huggingface_hub import constants

    from dgemma.weights.hub import transfer

    for name, value in {"ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
                        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_TOKEN_PATH": str(cache.parent / "no-token"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "_WAIT", 0.01)


def environment_of(server: HubServer, home: Path) -> dict[str, str]:
    """The same for another process."""
    return {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "0"}

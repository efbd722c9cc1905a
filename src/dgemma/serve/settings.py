"""What whoever runs the server may decide: one frozen record, passed to everything that needs a part of it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from dgemma.errors import DgemmaError
from dgemma.fetch import FetchRules


@dataclass(frozen=True)
class Settings:
    """``served_names``: what clients may call the model; the first one is shown, the others are aliases."""

    served_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()  # none: whoever reaches the port may use it
    max_model_len: int | None = None  # tokens of prompt and answer together; None: what the network takes
    max_body_bytes: int = 16 << 20
    timeout: float = 600.0  # seconds that one request may take, 0: any
    body_timeout: float = 30.0  # seconds that a client may take to send its request
    ping: float = 15.0  # seconds of silence after which a stream shows that it is alive
    rate_limit: float = 0.0  # requests a minute that one client may make, 0: any
    allowed_origins: tuple[str, ...] = ()  # web pages that browsers may call from; ("*",): all
    allowed_hosts: tuple[str, ...] = ()  # names in Host beside this machine's own, where no key is needed; ("*",): all
    access_log: bool = True
    debug_requests: Path | None = None  # a file that every request is written to, its rendered prompt with it
    share_system_prompts: bool = False  # what one key's system prompt was read to is found by the others
    redraw_empty: bool = True  # draw an answer that comes out empty at its first canvas once more
    strict_fields: bool = False  # refuse fields that are unknown or have no effect, rather than tell of them
    media: FetchRules = field(default_factory=FetchRules)  # what may be fetched for a request
    adapters_from: Path | None = None  # where clients may have adapters loaded from; None: nowhere

    def __post_init__(self) -> None:
        if not self.served_names or not all(self.served_names):
            raise DgemmaError("the served model needs a name")
        if any(not key for key in self.api_keys):
            raise DgemmaError("an API key must not be empty")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise DgemmaError(f"max_model_len must be at least 2 tokens, got {self.max_model_len}")
        for name in ("timeout", "rate_limit"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DgemmaError(f"{name} must be 0 (no limit) or more, got {getattr(self, name)}")
        for name in ("max_body_bytes", "body_timeout", "ping"):
            if not getattr(self, name) > 0:
                raise DgemmaError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.adapters_from is not None and not self.adapters_from.is_dir():
            raise DgemmaError(f"adapters_from: {self.adapters_from} is no folder")


def check_adapter_name(name: str, served_names: Collection[str]) -> None:
    """Raises DgemmaError for a name that an adapter cannot have beside the model's own names."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}", name):
        raise DgemmaError(f"an adapter's name is up to 100 letters, digits and . _ : / -, got {name[:100]!r}")
    if name in served_names:
        raise DgemmaError(f"{name!r} is the model's own name: give the adapter another one")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server that listens at ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""Adapters by name, read from their files and ready to be activated on one network.

Works on adapters' files and a network's modules; knows nothing of requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import adaptable, adapters
from dgemma.nn.loaded import LoadedAdapter, loadable

if TYPE_CHECKING:
    from dgemma.weights.adapters import Adapter


class UnknownAdapterError(DgemmaError):
    """No adapter has this name, or none has it any more."""


class AdapterRegistry:
    """A network's adapters under their names. Make it before the network works; to `read` it may work on."""

    def __init__(self, network: DiffusionTransformer):
        self._places = adaptable(network)
        self._fixed = bool(adapters(network))  # one is on already, and always
        self._config = network.config
        # And where it was read. Replaced, never changed: several threads read it.
        self._known: dict[str, tuple[LoadedAdapter, str]] = {}

    def paths(self) -> dict[str, str]:
        """Where each adapter was read."""
        return {name: path for name, (_, path) in self._known.items()}

    def get(self, name: str) -> LoadedAdapter:
        """The adapter that has the name now; raises `UnknownAdapterError`."""
        known = self._known.get(name)
        if known is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return known[0]

    def offers(self, adapter: LoadedAdapter) -> bool:
        """Whether it has its name now."""
        return self._known.get(adapter.name, (None, ""))[0] is adapter

    def read(self, name: str, path: str | Path) -> Adapter:
        """An adapter for this network from its files. Raises DgemmaError."""
        from dgemma.weights.adapters import read_adapter
        from dgemma.weights.load import empty_network

        if self._fixed:
            raise DgemmaError(f"adapter {name!r} cannot be added: this model was loaded with an adapter that is always "
                              "on; load the model without it, and give that one a name, too")
        # The names and shapes are those of a network of this shape: this one's modules may be changing just now.
        return read_adapter(path, empty_network(self._config))

    def loaded(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """The adapter where the network is; nobody knows it yet."""
        return loadable(name, self._places, adapter.config, adapter.factors)

    def put(self, adapter: LoadedAdapter, path: str | Path) -> LoadedAdapter | None:
        """Let an adapter have its name; the one that had it before."""
        before = self._known.get(adapter.name)
        self._known = {**self._known, adapter.name: (adapter, str(path))}
        return before and before[0]

    def take(self, name: str) -> LoadedAdapter:
        """Take a name away, and return what had it; raises `UnknownAdapterError`."""
        adapter = self.get(name)
        self._known = {known: what for known, what in self._known.items() if known != name}
        return adapter


def adapter_files(path: Path) -> tuple[Path, Path]:
    """The files that `AdapterRegistry.read` opens for a path: the settings, and the weights of a folder's adapter."""
    from dgemma.weights.adapters import CONFIG_FILE, WEIGHTS_FILE

    home = path if path.is_dir() else path.parent
    return home / CONFIG_FILE, home / WEIGHTS_FILE

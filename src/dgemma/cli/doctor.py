"""Whether everything that dgemma can use is here: each part looked at, and for what is missing the line that mends it.

Works on this machine. Knows nothing of how it is shown. Only the first parts are needed for an answer; the rest makes
it faster, or is for something else than answering.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from dgemma import __version__, openmp
from dgemma.errors import DgemmaError
from dgemma.files import free_space
from dgemma.formats import size_text
from dgemma.memory import machine_memory

OK, MISSING, BROKEN = "ok", "missing", "broken"
HUB_SECONDS = 3.0  # to wait for an answer
_ROOM = 20_000_000_000  # bytes: what one usual model takes on a disk
_COMPILERS = ("c++", "g++", "clang++", "cl")
_MEND_COMPILER = {"linux": "sudo apt install g++   (or your system's C++ compiler)", "darwin": "xcode-select --install",
                  "win32": "winget install Microsoft.VisualStudio.2022.BuildTools"}
_EXTRAS = {"serve": "the HTTP server", "train": "training", "vision": "pictures", "tools": "the web and MCP tools",
           "iq": "the block types IQ1, IQ2 and IQ3"}


@dataclass(frozen=True)
class Check:
    """One part: ``found`` is what is here, ``mend`` the line that makes it right, None where nothing is wrong.

    ``state``: ok, missing (something that can do without) or broken. ``needed``: no answer without it.
    """

    name: str
    state: str
    found: str
    mend: str | None = None
    needed: bool = False


def checks() -> Iterator[Check]:
    """All checks, in the order in which one part builds on another, each made when it is asked for."""
    for check in (python, torch, threads, model, kernels, compiler, gpu, memory, disk, hub, sandbox):
        try:
            yield check()
        except DgemmaError as error:  # it says itself what to do
            yield Check(check.__name__, BROKEN, str(error), needed=check in _NEEDED)
        except Exception as error:  # the doctor outlives every patient: what a check trips over is its finding
            yield Check(check.__name__, BROKEN, f"{type(error).__name__}: {error}", _REINSTALL, check in _NEEDED)
    yield from extras()


def python() -> Check:
    return Check("python", OK, f"{platform.python_version()} ({platform.system()} {platform.machine()}), dgemma "
                               f"{__version__}", needed=True)


def torch() -> Check:
    import torch as library

    return Check("torch", OK, f"{library.__version__}, {library.get_num_threads()} threads", needed=True)


def threads() -> Check:
    """How OpenMP's threads wait for each other: those that spin take the processor from whatever else runs."""
    waiting = openmp.waiting()
    if waiting == "spinning":
        return Check("threads", MISSING, "they spin while they wait, for torch was imported before dgemma: beside "
                     "other programs a step may take thirty times as long", openmp.ADVICE)
    return Check("threads", OK, f"how they wait: {waiting}")


def model() -> Check:
    """The bundled model, loaded and asked: everything between a prompt and its answer has worked then."""
    import dgemma

    generation = dgemma.load("sudoku", device="cpu").generate("hello", seed=0, max_denoising_steps=2)
    return Check("model", OK, f"the bundled model answers ({generation.seconds:.2f} s)", needed=True)


def kernels() -> Check:
    from dgemma.kernels import native

    if native.available():
        return Check("kernels", OK, f"{native.isa()} (this machine can run {', '.join(native.isas())})")
    if os.environ.get("DGEMMA_ISA") == "torch":
        return Check("kernels", MISSING, "CPU kernels switched off by DGEMMA_ISA=torch", "unset DGEMMA_ISA")
    return Check("kernels", MISSING, f"CPU kernels {native.why_absent()}: quantised weights run on plain torch, slowly",
                 _REINSTALL if _compiler() else f"{_mend_compiler()}, then {_REINSTALL}")


def compiler() -> Check:
    """Only an installation from source needs one, to build the kernels."""
    from dgemma.kernels import native

    if found := _compiler():
        return Check("compiler", OK, found)
    if native.available():
        return Check("compiler", OK, "none, and none needed: the kernels are built")
    return Check("compiler", MISSING, "no C++ compiler to build the kernels with", _mend_compiler())


def gpu() -> Check:
    import torch as library

    if library.cuda.is_available():
        found = []
        for index in range(library.cuda.device_count()):
            free, total = library.cuda.mem_get_info(index)
            found.append(f"{library.cuda.get_device_name(index)} ({size_text(free)} of {size_text(total)} free)")
        return Check("gpu", OK, ", ".join(found))
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", OK, "none: everything runs on the processor")
    if library.version.cuda is None:
        return Check("gpu", MISSING, f"there is a driver, but torch {library.__version__} is built without CUDA",
                     "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130")
    return Check("gpu", MISSING, f"there is a driver, but torch (CUDA {library.version.cuda}) cannot use a GPU",
                 "nvidia-smi   (says what is wrong with the driver)")


def memory() -> Check:
    available, total = machine_memory()
    if available is None or total is None:
        return Check("memory", OK, "this system does not tell")
    return Check("memory", OK, f"{size_text(available)} of {size_text(total)} available (a 26B model in Q4_K_M takes "
                               "18 GB, with pictures 19.6 GB)")


def disk() -> Check:
    """The hub's cache, where models are kept."""
    from dgemma.weights.hub.cache import cache_folder

    folder = cache_folder()
    place = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = free_space(folder)
    elsewhere = "export HF_HOME=/a/larger/disk/huggingface"
    if not os.access(place, os.W_OK):
        return Check("disk", BROKEN, f"{folder} cannot be written to", elsewhere)
    if free < _ROOM:
        return Check("disk", MISSING, f"{size_text(free)} free for models in {folder}, less than one usual model takes",
                     f"dgemma models remove NAME   (or {elsewhere})")
    return Check("disk", OK, f"{size_text(free)} free for models in {folder}")


def hub() -> Check:
    """Whether the hub answers. Models that are here already run without it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    offline = "models that are here already run without it"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", MISSING, f"switched off by HF_HUB_OFFLINE; {offline}", "unset HF_HUB_OFFLINE")
    key = "with a token" if get_token() else "no token: `hf auth login` for gated and private models"
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        return Check("hub", MISSING, f"switched off; {offline}", "unset HF_HUB_OFFLINE")
    except Exception as error:  # of an HTTP client that the hub's library has changed before
        from dgemma.weights.hub.transfer import first_line, is_network_trouble

        if not is_network_trouble(error):
            raise
        return Check("hub", MISSING, f"{constants.ENDPOINT} cannot be reached ({first_line(error)}); {offline}",
                     "export HTTPS_PROXY=http://proxy:port   (if you are behind one)")
    if answer.status_code >= 400:
        return Check("hub", MISSING, f"{constants.ENDPOINT} answers with HTTP {answer.status_code}",
                     "unset HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "hf auth login")
    return Check("hub", OK, f"{constants.ENDPOINT} answers ({key})")


def sandbox() -> Check:
    """Where code that a model writes runs, and nowhere else."""
    from dgemma.tools.sandbox import SandboxError, probe_sandbox

    try:
        probe_sandbox()
    except SandboxError as error:
        return Check("sandbox", MISSING, f"the tools python and bash do not run: {error.why}", error.mend)
    return Check("sandbox", OK, "the tools python and bash run in bubblewrap's")


def extras() -> Iterator[Check]:
    """The optional parts, as the package itself lists what they need."""
    wanted: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    try:
        requirements = metadata.requires("dgemma") or ()
    except metadata.PackageNotFoundError:
        yield Check("extras", MISSING, "this copy of dgemma is not installed, which leaves open what it lacks",
                    "pip install -e '.[serve,train,iq]'")
        return
    for requirement in requirements:
        found = _EXTRA.match(requirement)
        if found and found["extra"] in wanted:
            wanted[found["extra"]].append(found["name"])
    for extra, packages in wanted.items():
        absent = [name for name in packages if not _installed(name)]
        if absent:
            yield Check(extra, MISSING, f"{_EXTRAS[extra]} lacks {', '.join(absent)}", f"pip install 'dgemma[{extra}]'")
        else:
            yield Check(extra, OK, f"{_EXTRAS[extra]}: {', '.join(packages)}")


_REINSTALL = "pip install --force-reinstall --no-deps dgemma"
_NEEDED: tuple[Callable[[], Check], ...] = (python, torch, model)
_EXTRA = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*).*;.*\bextra\s*==\s*['\"](?P<extra>[\w.-]+)['\"]")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _compiler() -> str | None:
    """The path of a C++ compiler, the one that CXX names first."""
    named = os.environ.get("CXX", "").split()
    return next((found for name in (*named[:1], *_COMPILERS) if (found := shutil.which(name))), None)


def _mend_compiler() -> str:
    return _MEND_COMPILER.get(sys.platform, _MEND_COMPILER["linux"])


def works(found: list[Check]) -> bool:
    """Whether a model can be run here."""
    return all(check.state == OK for check in found if check.needed)

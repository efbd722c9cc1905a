"""OpenMP's threads wait asleep, whoever starts dgemma and however; nothing is timed but a process's own idling."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma import openmp

ROOT = Path(__file__).parents[1]
SPUN = """
import time
x = torch.ones(1 << 20)
spun = []
for _ in range(15):
    x.sum()
    began = time.process_time()
    time.sleep(0.02)
    spun.append(time.process_time() - began)
print(json.dumps([dgemma.openmp.waiting(), torch.get_num_threads(), sorted(spun)[7]]))
"""


def python(code, **settings):
    """What a Python of its own prints last, as JSON; ``settings`` alone say how OpenMP waits there."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in openmp.SETTINGS and name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", f"import json, os, sys\n{code}"], env=environment | settings,
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


SHOW = f"print(json.dumps({{name: os.environ.get(name) for name in {openmp.SETTINGS!r}}}))"


@pytest.mark.parametrize("entry", ["import dgemma", "import dgemma.cli.main",
                                   "import dgemma.train.trainer, dgemma.serve.app, dgemma.kernels"])
def test_every_way_in_has_threads_sleep(entry):
    assert python(f"{entry}\n{SHOW}") == openmp.PASSIVE | {"GOMP_SPINCOUNT": None}


def test_the_command_and_what_it_starts_have_threads_sleep(tmp_path):
    """The installed command, `python -m`, and processes that they start: all inherit one environment."""
    for start in ("from importlib.metadata import entry_points\n"
                  "main = entry_points(group='console_scripts')['dgemma'].load()",
                  "import runpy\nmain = lambda: runpy.run_module('dgemma.cli.main', run_name='__main__')"):
        child = f"import subprocess\nsubprocess.run([sys.executable, '-c', {f'import json, os; {SHOW}'!r}], check=True)"
        code = f"{start}\nsys.argv = ['dgemma', '--version']\ntry:\n    main()\nexcept SystemExit:\n    pass\n{child}"
        assert python(code) == openmp.PASSIVE | {"GOMP_SPINCOUNT": None}


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "500"),
                                             ("KMP_BLOCKTIME", "200"), ("OMP_WAIT_POLICY", "")])
def test_who_has_said_how_to_wait_is_left_alone(name, value):
    code = f"import dgemma.openmp\n{SHOW[:-1]}, file=sys.stderr)\n{SHOW}"
    assert python(code, **{name: value}) == dict.fromkeys(openmp.SETTINGS) | {name: value}
    assert python("import dgemma.openmp\nprint(json.dumps(dgemma.openmp.waiting()))",
                  **{name: value}) == f"{name}={value}"


def test_a_process_started_from_here_is_passive_too():
    assert python("import torch, dgemma.openmp\nprint(json.dumps(dgemma.openmp.waiting()))",
                  **openmp.PASSIVE) == "passive"


@pytest.mark.parametrize(("imports", "state"), [("import dgemma.openmp, torch", "passive"),
                                                ("import torch, dgemma.openmp", "short")])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch has another OpenMP")
def test_threads_do_not_spin(imports, state):
    """Processor time that goes by while the process sleeps is spun: 3.5 ms of 20 by default, 0.04 here."""
    waiting, threads, spun = python(f"{imports}\n{SPUN}")
    assert waiting == (state if threads > 1 else "passive" if state == "passive" else "short")
    assert spun < 1e-3


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_dgemma_before_torch(script):
    """They measure what users get; a module of theirs that imports torch does so itself."""
    roots = []
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Import):
            roots += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.append(node.module.partition(".")[0])
    heavy = [i for i, name in enumerate(roots) if name in ("torch", "transformers", "safetensors")]
    assert not heavy or "dgemma" in roots[: heavy[0]]


def test_results_are_those_of_spinning_threads():
    code = ("import dgemma\nanswer = dgemma.load('sudoku').generate('Hello!', seed=1, max_denoising_steps=4)\n"
            "print(json.dumps(answer.token_ids))")
    assert python(code) == python(code, GOMP_SPINCOUNT="1000")

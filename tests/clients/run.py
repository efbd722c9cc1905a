"""Real clients against the server: `make clients`. Each in an environment of its own, everything on this machine.

    python tests/clients/run.py [NAME …]    # all clients, or those named; VERBOSE=1 shows tracebacks

Installs the clients from the package registries into build/clients. Prints a table in Markdown, and ends with 1 if
anything failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import dgemma  # noqa: E402
from dgemma.diffusion.request import Request  # noqa: E402
from dgemma.engine.service import RequestEvents  # noqa: E402
from dgemma.serve.app import create_app  # noqa: E402
from dgemma.serve.settings import Settings  # noqa: E402
from support.scripted_service import ScriptedService, served  # noqa: E402
from support.server_process import serving  # noqa: E402

BUILD = ROOT / "build" / "clients"
# name -> script, packages
PYTHON = {
    "openai 1.x": ("openai_client.py", ["openai<2"]),
    "openai": ("openai_client.py", ["openai>=3"]),
    "anthropic 0.75": ("anthropic_client.py", ["anthropic==0.75.*"]),
    "anthropic": ("anthropic_client.py", ["anthropic>=2"]),
    "openai-agents": ("openai_agents_client.py", ["openai-agents"]),
    "langchain": ("langchain_client.py", ["langchain", "langchain-openai", "langchain-anthropic"]),
    "pydantic-ai": ("pydantic_ai_client.py", ["pydantic-ai-slim[openai,anthropic]"]),
    "instructor": ("instructor_client.py", ["instructor", "anthropic"]),
    "litellm": ("litellm_client.py", ["litellm"]),
    "llm": ("llm_client.py", ["llm"]),
    "llama-index": ("llama_index_client.py", ["llama-index-llms-openai-like"]),
    "smolagents": ("smolagents_client.py", ["smolagents[openai]"]),
    "ollama": ("ollama_client.py", ["ollama"]),
}
NODE = {"AI SDK": ("aisdk_client.mjs", ["ai", "@ai-sdk/openai", "@ai-sdk/anthropic", "@ai-sdk/openai-compatible",
                                        "zod"])}


class Actor(ScriptedService):
    """Plays a model: calls the first tool that is declared, and once a tool has answered says what came of it."""

    async def admit(self, request: Request) -> RequestEvents:
        prompt = self.model.tokenizer.decode(request.prompt_ids)
        last = prompt.rpartition("<|turn>user")[2]
        if "<|tool_response>" in last:
            text = "It rains in Paris."
        elif "declaration:get_weather" in prompt:
            text = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        else:
            text = "Hello there."
        self.answers = (text,)
        return await super().admit(request)


def python_of(name: str, packages: list[str]) -> list[str]:
    """The command of an interpreter that has the packages."""
    folder = BUILD / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *packages],
                       check=True)
        (folder / ".complete").touch()
    return [str(python)]


def node_of(name: str, script: str, packages: list[str]) -> list[str]:
    """The command of a node that finds the packages beside the script."""
    folder = BUILD / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".complete").exists():
        (folder / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *packages], cwd=folder, check=True)
        (folder / ".complete").touch()
    shutil.copy(HERE / script, folder / script)
    return ["node", str(folder / script)]


def results(command: list[str], environment: dict[str, str]) -> list[tuple[str, bool, str]]:
    """A client's checks: name, whether it passed, and why not."""
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900, check=False)
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.startswith(("ok\t", "FAIL\t"))]
    if os.environ.get("VERBOSE") or not rows:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    found = [(row[1], row[0] == "ok", row[2] if len(row) > 2 else "") for row in rows]
    return found or [("it runs", False, f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")]


def main() -> int:
    wanted = sys.argv[1:]
    failed, table = 0, ["| client | what works |", "|---|---|"]
    with ExitStack() as stack:
        actor = Actor(dgemma.load("sudoku"))
        acted = stack.enter_context(served(create_app(actor.model, actor, Settings(("sudoku",)))))
        real = stack.enter_context(serving())
        keys = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL")
        environment = {name: value for name, value in os.environ.items() if name not in keys} | {
            "REAL": real.url, "ACTED": acted, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "PYTHONPATH": str(HERE), "OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none",
            "OPENAI_AGENTS_DISABLE_TRACING": "1", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        for name, (script, packages) in [*PYTHON.items(), *NODE.items()]:
            if wanted and name not in wanted:
                continue
            if name in NODE and not (shutil.which("node") and shutil.which("npm")):
                table.append(f"| {name} | not tried: no node here |")
                continue
            command = node_of(name, script, packages) if name in NODE else [
                *python_of(name, packages), str(HERE / script)]
            found = results(command, environment)
            for check, passed, why in found:
                print(f"{name}: {check}: {'ok' if passed else f'FAILED {why}'}", file=sys.stderr, flush=True)
            failed += sum(not passed for _, passed, _ in found)
            works = "; ".join(check for check, passed, _ in found if passed)
            fails = "; ".join(check for check, passed, _ in found if not passed)
            table.append(f"| {name} | {works}{f' — **not**: {fails}' if fails else ''} |")
    print("\n".join(table))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

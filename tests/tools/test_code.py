"""Python and Bash as tools: what the model reads of a run, and files that stay from call to call."""

from __future__ import annotations

import asyncio

import pytest

from dgemma.tools.code import code_tools
from dgemma.tools.sandbox import Limits, Ran
from dgemma.tools.tool import Toolbox, ToolResult


class Runs:
    """Stands in for the sandbox."""

    def __init__(self, *results: Ran):
        self.results, self.asked = list(results), []

    async def __call__(self, language, code, **options):
        self.asked.append((language, code, options["files"]))
        return self.results.pop(0)


def called(tools, name, code="x") -> ToolResult:
    return asyncio.run(next(tool for tool in tools if tool.name == name).run({"code": code}, lambda _: None))


@pytest.mark.parametrize(("ran", "text"), [
    (Ran("4\n", 0, "exited"), "4"), (Ran("", 0, "exited"), "[it printed nothing]"),
    (Ran("oh\n", 1, "exited"), "oh\n[exit code 1]"),
    (Ran("", None, "time"), "[stopped: it took longer than 60 seconds]"),
    (Ran("", None, "memory"), "[stopped: it took more than 2.1 GB of memory, or too many files]"),
    (Ran("", None, "killed"), "[it was killed]"),
    (Ran("", 0, "exited", {"a.png": b"x" * 2000}, ("b",)),
     "[it printed nothing]\n[files, shown to the user: a.png (2.0 kB)]\n[not kept, too many or too large: b]")])
def test_the_model_reads_what_was_printed_and_how_it_ended(ran, text):
    result = called(code_tools(run=Runs(ran)), "python")
    assert result.text == text
    assert result.failed == (ran.code != 0)


def test_files_stay_from_call_to_call_and_only_new_ones_are_shown():
    runs = Runs(Ran("", 0, "exited", {"a": b"1"}), Ran("", 0, "exited", {"a": b"1", "b": b"2"}),
                Ran("", None, "time"), Ran("", 0, "exited", {"b": b"2"}))
    tools = code_tools(run=runs)
    assert [dict(called(tools, name).files) for name in ("python", "bash", "python", "bash")] == [
        {"a": b"1"}, {"b": b"2"}, {}, {}]
    assert [files for _, _, files in runs.asked] == [{}, {"a": b"1"}, {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"2"}]


def test_each_box_of_tools_has_a_folder_of_its_own():
    runs = Runs(Ran("", 0, "exited", {"a": b"1"}), Ran("", 0, "exited"))
    called(code_tools(run=runs), "python")
    called(code_tools(run=runs), "python")
    assert runs.asked[1][2] == {}


def test_the_model_is_told_of_the_limits():
    (python,) = Toolbox(code_tools(["python"], limits=Limits(seconds=5))).declarations()
    assert "without network" in python["function"]["description"]
    assert "5 seconds" in python["function"]["description"]
    assert python["function"]["parameters"]["required"] == ["code"]

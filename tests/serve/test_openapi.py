"""The API as its own OpenAPI document tells it, held to that document by schemathesis."""

import re
import zlib

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import positive_data_acceptance

import dgemma
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from support.scripted_service import ScriptedService

ANSWERS = ("Hello", 'I look.<|tool_call>call:f{a:1}<tool_call|>', "<|channel>thought\nhm<channel|>So.")
AUTHORISED = {"Authorization": "Bearer key"}


# Test cases are drawn from the document when tests are collected, so the application is made here.
MODEL = dgemma.load("sudoku")
app = create_app(MODEL, ScriptedService(MODEL, *ANSWERS), Settings(("sudoku",), api_keys=("key",)))
# Every value at its limits is tried where each format is spoken first; most fields are the same on its other routes.
SPOKEN = [f"^{path}$" for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")]
schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config.from_dict({
    "phases": {"coverage": {"enabled": False}},
    "operations": [{"include-path-regex": "|".join(SPOKEN), "phases": {"coverage": {"enabled": True}}}]}))


@schema.parametrize()
@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_do_what_it_does_not_document(case):
    if case.meta.phase.name == TestPhase.COVERAGE and zlib.crc32(repr(case.body).encode()) % 4:
        return  # one in four of some thousands
    # A random model's name is always unknown: without this nothing else would be tried.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "sudoku"
    # What is well formed may still be refused: a tool that must be called, two forms of one answer.
    case.call_and_validate(headers=AUTHORISED, excluded_checks=[positive_data_acceptance])


@pytest.fixture(scope="module")
def client():
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("depth", [40, 100, 240, 300, 900, 100_000])
@pytest.mark.parametrize(("path", "body"), [
    ("/v1/responses", '{"model":"sudoku","input":"x","tool_choice":"none","tools":[{"type":"function","name":"f",'
                      '"parameters":DEEP}]}'),
    ("/v1/responses", '{"model":"sudoku","input":"x","reasoning":{"effort":"low","more":DEEP}}'),
    ("/v1/messages", '{"model":"sudoku","max_tokens":9,"messages":[{"role":"user","content":"x"}],'
                     '"tools":[{"name":"f","input_schema":DEEP}]}'),
    ("/v1/messages/count_tokens", '{"model":"sudoku","messages":[{"role":"user","content":"x","more":DEEP}]}'),
    ("/v1/chat/completions", '{"model":"sudoku","messages":[{"role":"user","content":"x","more":DEEP}]}'),
    ("/tokenize", '{"model":"sudoku","messages":[{"role":"user","content":"x"}],"tools":[{"type":"function",'
                  '"function":{"name":"f","parameters":DEEP}}]}'),
])
def test_a_body_may_be_nested_but_not_without_end(client, path, body, depth):
    deep = '{"a":' * depth + "1" + "}" * depth
    answer = client.post(path, content=body.replace("DEEP", deep),
                         headers={**AUTHORISED, "Content-Type": "application/json"})
    assert answer.status_code == (200 if depth == 40 else 400), answer.text


def test_the_document_speaks_of_keys_only_where_there_are_any():
    def operations(keys):
        service = ScriptedService(dgemma.load("sudoku"), "x")
        document = create_app(service.model, service, Settings(("sudoku",), api_keys=keys)).openapi()
        return document, {path: operation for path, methods in document["paths"].items()
                          for operation in methods.values()}

    document, found = operations(("key",))
    assert {path for path, operation in found.items() if "security" not in operation} == {"/health"}
    assert {path for path, operation in found.items() if "401" not in operation["responses"]} == {"/health"}
    document, found = operations(())
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation or "401" in operation["responses"] for operation in found.values())


def test_the_application_knows_all_of_its_paths():
    known = {re.sub(r":\w+}", "}", path) for path in app.state.paths}  # the document names no converters
    assert set(app.openapi()["paths"]) <= known

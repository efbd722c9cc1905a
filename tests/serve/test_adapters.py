"""Adapters behind the server: chosen by the model's name, loaded and unloaded while it runs."""

import copy
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
import torch
from typer.testing import CliRunner

from dgemma.cli.main import app
from dgemma.engine.service import Service
from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, attach
from dgemma.nn.loaded import adapter_bytes
from dgemma.serve.settings import Settings
from dgemma.weights.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_adapter, save_adapter
from support.passes import watched
from support.server_process import serving

PROMPT = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
CONFIGS = {"sql": AdapterConfig(r=2, targets=("attention", "experts")),
           "mails": AdapterConfig(r=3, targets=("mlp", "self_conditioning"), dora=True),
           "newer": AdapterConfig(r=2, targets=("attention",))}
STEPS = 6


@pytest.fixture(scope="module")
def own(model):
    """A copy of the bundled model: adapters come and go on its network."""
    return Model(copy.deepcopy(model.network), model.tokenizer, model.generation_config, "sudoku")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A folder of three adapters, one folder each."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        network = copy.deepcopy(model.network)
        attach(network, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(network).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        save_adapter(network, config, place / name)
    return place


@pytest.fixture(scope="module")
def texts(model, folder):
    """A function (adapter or None, seed) -> what the model with that adapter alone says."""
    known = {}

    def say(name, seed=1):
        if (name, seed) not in known:
            network = copy.deepcopy(model.network)
            if name:
                load_adapter(network, folder / name)
            alone = Model(network, model.tokenizer, model.generation_config, "alone")
            known[name, seed] = alone.generate(PROMPT, seed=seed, max_denoising_steps=STEPS).text
        return known[name, seed]

    return say


@pytest.fixture
def server(own, folder, serve_model):
    """An HTTP client of a server that allows the folder, and its service."""
    with serve_model(own, Settings(("sudoku", "alias"), adapters_from=folder)) as (url, service), \
            httpx.Client(base_url=url, timeout=60) as http:
        yield http, service


def chat(http, model, seed=1):
    answer = http.post("/v1/chat/completions", json={"model": model, "seed": seed, "max_denoising_steps": STEPS,
                                                     "messages": [{"role": "user", "content": PROMPT}]})
    return answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer


def load(http, name, path=None):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path or name})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def names(http):
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


def metric(http, name, adapter):
    found = re.search(rf'^{name}{{adapter="{adapter}"}} (\S+)$', http.get("/metrics").text, re.MULTILINE)
    return found and float(found[1])


def test_requests_choose_by_the_model_s_name(server, texts):
    http, service = server
    for name in ("sql", "mails"):
        assert load(http, name).json() == {"id": name, "object": "model", "loaded": True, "replaced": False}
    assert names(http) == ["sudoku", "alias", "sql", "mails"]
    card = http.get("/v1/models/sql").json()
    assert card["parent"] == "sudoku" and card["root"].endswith("/sql")
    assert http.get("/v1/models/alias").json()["parent"] is None
    asked = [(name, seed) for seed in (1, 2) for name in ("sudoku", "sql", "mails", "alias")]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda one: chat(http, *one), asked))
    wanted = [texts(None if name in ("sudoku", "alias") else name, seed) for name, seed in asked]
    assert said == wanted
    assert len({texts(name) for name in (None, *CONFIGS)}) == 4  # each adapter does something
    assert metric(http, "dgemma_adapter_requests_total", "sql") == 2
    assert metric(http, "dgemma_adapter_requests_running", "sql") == 0
    assert metric(http, "dgemma_adapter_bytes", "sql") == service.adapters.get("sql").nbytes > 0


def test_every_format_chooses(server, texts):
    http, _ = server
    load(http, "sql")
    wanted, sampler = texts("sql"), {"model": "sql", "seed": 1, "max_denoising_steps": STEPS}
    messages = [{"role": "user", "content": PROMPT}]
    anthropic = http.post("/v1/messages", json={**sampler, "max_tokens": 90, "messages": messages})
    assert anthropic.json()["content"][0]["text"] == wanted
    response = http.post("/v1/responses", json={**sampler, "input": PROMPT})
    assert response.json()["output"][0]["content"][0]["text"] == wanted
    tokens = http.post("/tokenize", json={"model": "sql", "messages": messages}).json()["tokens"]
    raw = http.post("/v1/completions", json={**sampler, "prompt": tokens})
    assert raw.json()["choices"][0]["text"] == wanted


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_name_that_is_not_there_gets_the_list_of_those_that_are(server, path):
    http, _ = server
    load(http, "sql")
    answer = http.post(path, json={"model": "mails", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 404 and "this server has 'sudoku', 'alias', 'sql'" in answer.text


def test_without_the_flag_nothing_is_loaded_or_unloaded(scripted):
    http, _ = scripted()
    for answer in (load(http, "sql", "/etc"), unload(http, "sql")):
        assert answer.status_code == 403 and "--adapters-from" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "adapters_not_allowed"


def test_a_key_is_wanted_where_there_is_one(scripted, folder):
    http, _ = scripted(settings=Settings(("sudoku",), api_keys=("key",), adapters_from=folder))
    assert load(http, "sql").status_code == unload(http, "sql").status_code == 401


def test_only_the_folder_is_read(server, folder, tmp_path):
    http, _ = server
    (folder / "link").symlink_to(tmp_path)
    outside = ["../x", str(folder.parent), "/etc/passwd", "/no/such/place", "sql/../../x", "link", "link/x", "a\0b"]
    answers = [load(http, "sql", path) for path in outside]
    (folder / "link").unlink()
    assert {answer.status_code for answer in answers} == {400}
    assert len({answer.text for answer in answers}) == 1 and answers[0].json()["error"]["param"] == "lora_path"
    linked = folder / "linked"  # a folder that lies inside, with a file that does not
    shutil.copytree(folder / "sql", linked)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (linked / name).rename(tmp_path / name)
        (linked / name).symlink_to(tmp_path / name)
        assert load(http, "sql", "linked").text == answers[0].text
        (linked / name).unlink()
        (linked / name).symlink_to(folder / "sql" / name)
    assert load(http, "sql", "linked").status_code == 200
    shutil.rmtree(linked)
    assert load(http, "sql", str(folder / "sql")).status_code == 200


@pytest.mark.parametrize("name", ["sudoku", "alias", "a b", "-x", "ä", "x" * 101, 'a"b', "a\nb"])
def test_names_that_would_confuse_are_refused(server, name):
    answer = load(server[0], name, "sql")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name"


def test_what_does_not_fit_changes_nothing(server, folder, texts):
    http, _ = server
    load(http, "sql")
    (folder / "empty").mkdir(exist_ok=True)
    for path in ("empty", "nowhere", "x" * 300, "."):
        answer = load(http, "sql", path)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path"
    assert chat(http, "sql") == texts("sql")


def test_what_is_unknown_cannot_be_unloaded(server):
    http, _ = server
    for name in ("sql", "sudoku"):
        answer = unload(http, name)
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "lora_name"


def test_running_requests_finish_on_what_they_began_with(server, own, monkeypatch, texts):
    http, service = server
    before = service.engine.memory.limit
    load(http, "sql")
    size = service.adapters.get("sql").nbytes
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        assert go_on.wait(60)

    monkeypatch.setattr(service.engine.runner, "passes", watched(own.network, denoise=hold))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(chat, http, "sql")
        assert inside.wait(60)
        assert load(http, "sql", "newer").json()["replaced"]
        second = pool.submit(chat, http, "sql", 2)
        while metric(http, "dgemma_adapter_requests_running", "sql") != 2:
            pass
        unload(http, "sql")
        gone = chat(http, "sql")
        go_on.set()
        assert first.result() == texts("sql") and second.result() == texts("newer", 2)
    assert gone.status_code == 404 and names(http) == ["sudoku", "alias"]
    assert metric(http, "dgemma_adapter_bytes", "sql") == 0 and size
    assert metric(http, "dgemma_adapter_requests_total", "sql") == 2
    assert service.engine.memory.limit == before


def test_a_request_keeps_the_adapter_that_was_there_when_it_came(server, monkeypatch, texts):
    """Until it is queued its prompt is rendered, and all its choices are queued one by one."""
    http, service = server
    before, check, checked = service.engine.memory.limit, service.engine.check, []

    def unloads_before_the_second(request):
        check(request)
        checked.append(request)
        if len(checked) == 2:
            unload(http, "sql")

    monkeypatch.setattr(service.engine, "check", unloads_before_the_second)
    load(http, "sql")
    answer = http.post("/v1/chat/completions", json={"model": "sql", "seed": 1, "max_denoising_steps": STEPS, "n": 2,
                                                     "messages": [{"role": "user", "content": PROMPT}]})
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == texts("sql")
    checked.clear()
    load(http, "sql")
    load(http, "mails")
    monkeypatch.setattr(service.engine, "check", lambda request: (check(request), load(http, "sql", "newer")))
    assert chat(http, "sql") == texts("sql")
    monkeypatch.undo()
    assert chat(http, "sql") == texts("newer")
    assert metric(http, "dgemma_adapter_bytes", "sql") == service.adapters.get("sql").nbytes
    for name in ("sql", "mails"):
        unload(http, name)
    while service.engine.adopted:
        pass
    assert service.engine.memory.limit == before


def test_a_model_with_an_adapter_that_is_always_on_takes_no_others(own, folder):
    network = copy.deepcopy(own.network)
    load_adapter(network, folder / "sql")
    service = Service(network, own.reader, own.prefixes)
    with pytest.raises(DgemmaError, match="always on"):
        service.load_adapter("mails", folder / "mails")


def test_adapters_leave_memory_for_requests(own, folder):
    size = adapter_bytes(read_adapter(folder / "sql", own.network).factors)
    large = Service(own.network, own.reader, own.prefixes, memory=1 << 32).engine
    least = (large.memory.limit or 0) - (large.room or 0)  # what one request needs
    service = Service(own.network, own.reader, own.prefixes, memory=(least + size * 5 // 2) * 4 // 3)
    for name in ("one", "two"):  # it does not work yet
        service.load_adapter(name, folder / "sql")
    with pytest.raises(DgemmaError, match="this adapter needs .* beside what requests need"):
        service.load_adapter("three", folder / "sql")
    assert list(service.adapters.paths()) == ["one", "two"]
    assert service.engine.room and least


def test_of_two_that_come_at_once_the_one_that_does_not_fit_any_more_is_refused(own, folder, monkeypatch):
    service = Service(own.network, own.reader, own.prefixes, memory=1 << 32)
    loaded = service.adapters.loaded

    def another_comes(name, files):
        service.engine.memory.limit = 1000
        return loaded(name, files)

    monkeypatch.setattr(service.adapters, "loaded", another_comes)
    with pytest.raises(DgemmaError, match="this adapter needs"):
        service.load_adapter("sql", folder / "sql")
    assert not service.adapters.paths() and not service.engine.adopted


@pytest.mark.parametrize(("arguments", "message"), [
    (["--adapter", "sql=FOLDER/sql", "--adapter", "sql=FOLDER/mails"], "two adapters called 'sql'"),
    (["--adapter", "sudoku=FOLDER/sql"], "the model's own name"),
    (["--adapter", "sql=FOLDER/nowhere"], "there is no .*nowhere"),
    (["--adapter", "sql="], "there is no path"),
    (["--adapter", "our/sql=FOLDER/sql", "--adapter", "our/sql=FOLDER/sql"], "two adapters called 'our/sql'"),
    (["--adapter", "FOLDER/sql", "--adapter", "FOLDER/mails"], "cannot both be always on"),
    (["--adapter", "FOLDER/sql", "--adapter", "m=FOLDER/mails"], "always on"),
    (["--adapter", "FOLDER/sql", "--adapters-from", "FOLDER"], "always on"),
    (["--adapters-from", "FOLDER/nowhere"], "is no folder"),
])
def test_the_command_says_at_once_what_cannot_be(folder, arguments, message):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    with pytest.raises(DgemmaError, match=message):
        CliRunner().invoke(app, ["serve", "-m", "no-such-model", "--served-model-name", "sudoku", "--port", "0",
                                 *arguments], catch_exceptions=False)


def test_the_command_serves_adapters_by_name_and_one_for_all(folder, texts):
    named = serving("--adapter", f"sql={folder / 'sql'}", "--adapters-from", str(folder))
    with named as process, httpx.Client(base_url=process.url, timeout=60) as http:
        assert names(http) == ["sudoku", "sql"]
        assert (chat(http, "sql"), chat(http, "sudoku")) == (texts("sql"), texts(None))
        assert load(http, "sql", "newer").status_code == 200 and chat(http, "sql") == texts("newer")
    fixed = serving("--adapter", str(folder / "mails"))
    with fixed as process, httpx.Client(base_url=process.url, timeout=60) as http:
        assert names(http) == ["sudoku"] and chat(http, "sudoku") == texts("mails")

"""Answers that start from a canvas, and text between two others, as OpenAI's own client asks for them."""

import openai
import pytest

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVE = [{"role": "user", "content": PUZZLE}]


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def solution(model):
    return model.generate(PUZZLE, seed=1).text


def chat(client, *, stream_options=None, **fields):
    options = {} if stream_options is None else {"stream": True, "stream_options": stream_options}
    return client.chat.completions.create(model="sudoku", messages=SOLVE, seed=3, extra_body=fields, **options)


def drafts_of(chunks):
    return [chunk.dgemma["draft"] for chunk in chunks if not chunk.choices]


def test_a_row_is_filled_in_between_text_that_stays(client, solution):
    answer = chat(client, canvas=[solution[:30], {"blank": 9}, solution[39:], {"end": True}])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (solution, "stop")


def test_an_answer_goes_on_from_a_draft(client, solution):
    options = {"include_drafts": True, "drafts_per_second": 100}
    drafts = drafts_of(chat(client, stream_options=options))
    seen = drafts[-2]
    answer = chat(client, canvas=seen["canvas_ids"], from_step=seen["step"])
    assert answer.choices[0].message.content == solution
    assert answer.usage.denoising_steps < drafts[-1]["step"]


def test_drafts_tell_all_that_a_step_came_to(client, model):
    options = {"include_drafts": True, "drafts_per_second": 100, "candidates": 3}
    drafts = drafts_of(chat(client, stream_options=options, canvas=["5", {"blank": 1}, "4"]))
    length = model.config.canvas_length
    for draft in drafts:
        assert all(len(draft[name]) == length for name in ("token_ids", "tokens", "canvas_ids", "entropies", "accepted",
                                                           "changed", "pinned", "candidates"))
        assert draft["pinned"] == [True, False, True] + [False] * (length - 3)
        assert draft["mean_entropy"] == pytest.approx(sum(draft["entropies"]) / length, abs=1e-3)
        assert draft["temperature"] > 0 and draft["seconds"] > 0
        for place in draft["candidates"]:
            assert len(place) == 3 and all(isinstance(token, int) and isinstance(text, str) and 0 <= p <= 1
                                           for token, text, p in place)
    assert [place[0][:2] for place in draft["candidates"][3:]] == [
        list(pair) for pair in zip(draft["token_ids"], draft["tokens"], strict=True)][3:]


def test_candidates_are_made_for_drafts_only(scripted):
    http, service = scripted("Hello")
    body = {"model": "sudoku", "messages": SOLVE, "stream": True}
    for options in ({"candidates": 3}, {"include_drafts": True}, {"include_drafts": True, "candidates": 3}):
        assert http.post("/v1/chat/completions", json={**body, "stream_options": options}).status_code == 200
    assert [(request.candidates, request.drafts) for request in service.requests] == [(0, False), (0, True), (3, True)]
    answer = http.post("/v1/chat/completions", json={**body, "stream_options": {"include_drafts": True}})
    assert '"candidates"' not in answer.text


def test_a_prefix_has_been_said(scripted, model):
    http, service = scripted("Hello")
    body = {"model": "sudoku", "messages": SOLVE}
    for prefix in ("I think", model.tokenizer.encode("I think")):
        answer = http.post("/v1/chat/completions", json={**body, "prefix": prefix}).json()
        assert answer["choices"][0]["message"]["content"] == "Hello"
        assert model.tokenizer.decode(service.requests[-1].prompt_ids).endswith("I think")


@pytest.mark.parametrize(("fields", "param"), [
    ({"canvas": ["x" * 91]}, "canvas"), ({"canvas": [{"text": 3}]}, "canvas[0]"), ({"canvas": [300]}, "canvas"),
    ({"canvas": ["x", {"blank": 91}]}, "canvas[1]"), ({"canvas": [1, None], "pinned": [True, True]}, "pinned"),
    ({"pinned": [True]}, "pinned"), ({"canvas": "x", "from_step": 48}, "from_step"), ({"from_step": 3}, "from_step"),
    ({"from_step": -1}, "from_step"), ({"prefix": [300]}, "prefix"), ({"prefix": "x", "guided_regex": "x"}, "prefix"),
    ({"canvas": "x", "guided_regex": "[0-9]"}, "pinned"), ({"canvas": {"text": "x"}}, "canvas"),
], ids=str)
def test_what_cannot_be_started_from_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **fields)
    assert error.value.body["param"].split(".")[0] == param


# Text completions with a suffix


def complete(client, prompt, suffix, **fields):
    return client.completions.create(model="sudoku", prompt=prompt, suffix=suffix, seed=1, **fields)


@pytest.fixture(scope="module")
def prompt(model):
    return model.prompt_ids(PUZZLE)


def test_what_stands_between_prompt_and_suffix_is_filled_in(client, prompt, solution):
    answer = complete(client, prompt, solution[20:], max_tokens=20)
    assert answer.choices[0].text == solution[:20]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)


def test_a_stream_of_it_says_the_same_and_stop_strings_end_it(client, prompt, solution):
    *chunks, last = complete(client, prompt, solution[20:], max_tokens=20, stream=True,
                             stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == solution[:20]
    assert last.usage.completion_tokens == 20
    stopped = complete(client, prompt, solution[20:], max_tokens=20, stop="\n").choices[0]
    assert (stopped.text, stopped.finish_reason) == (solution[:9], "stop")


def test_several_prompts_and_echo_go_with_a_suffix(client, solution):
    answer = complete(client, ["a", "b"], "xyz", max_tokens=4, n=2, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.usage.completion_tokens <= 16


def test_the_middle_has_openais_default_length_and_no_more_than_fits(scripted):
    http, service = scripted("Hello")
    for fields in ({}, {"max_tokens": 1000}, {"max_tokens": -1}, {"suffix": "x" * 1000, "max_tokens": 1000}):
        body = {"model": "sudoku", "prompt": "a", "suffix": "xyz", **fields}
        assert http.post("/v1/completions", json=body).status_code == 200
    assert [request.settings.max_tokens for request in service.requests] == [16, 86, 16, 45]
    assert all(len(request.canvas) == 90 for request in service.requests)


def test_an_empty_suffix_is_none(scripted):
    http, service = scripted("Hello")
    for fields in ({"suffix": ""}, {"suffix": None}, {}):
        assert http.post("/v1/completions", json={"prompt": "a", **fields}).status_code == 200
    assert all(request.canvas is None for request in service.requests)


@pytest.mark.parametrize(("regex", "text"), [("[0-9]{20}", 20), ("[0-9]{5}", 5)])
def test_a_form_is_the_middles(client, prompt, regex, text):
    answer = complete(client, prompt, "xx", max_tokens=20, extra_body={"guided_regex": regex}).choices[0]
    assert answer.text.isdigit() and len(answer.text) == text

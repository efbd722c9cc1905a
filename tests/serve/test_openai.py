"""OpenAI's chat and text completions, held to OpenAI's own client."""

import json

import openai
import pytest

from dgemma.diffusion.events import TokenLogprob
from dgemma.engine.service import Overloaded
from support.scripted_service import eventually

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HELLO = [{"role": "user", "content": "Hello"}]
SOLVE = [{"role": "user", "content": PUZZLE}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nhm<channel|>"


def digits(text):
    return "".join(char for char in text if char.isdigit())


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def scripted_client(scripted):
    def start(*answers, **options):
        http, service = scripted(*answers, **options)
        return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0), service
    return start


def chat(client, messages=HELLO, **fields):
    return client.chat.completions.create(model="sudoku", messages=messages, **fields)


# With the bundled model


def test_the_bundled_model_solves_a_puzzle_over_http(client, model):
    answer = chat(client, SOLVE, seed=1)
    direct = model.generate(SOLVE, seed=1)
    assert answer.choices[0].message.content == direct.text
    assert digits(direct.text) == SOLUTION
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        direct.prompt_tokens, len(direct.token_ids))
    assert answer.usage.total_tokens == direct.prompt_tokens + len(direct.token_ids)
    assert (answer.seed, answer.usage.denoising_steps) == (1, sum(direct.steps))


def test_a_stream_says_the_same_and_ends_with_its_usage(client):
    whole = chat(client, SOLVE, seed=3)
    chunks = list(chat(client, SOLVE, seed=3, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_drafts_come_in_chunks_that_ordinary_clients_ignore(client, model):
    chunks = list(chat(client, SOLVE, seed=3, stream=True,
                       stream_options={"include_drafts": True, "drafts_per_second": 100}))
    drafts = [chunk.dgemma["draft"] for chunk in chunks if not chunk.choices]
    assert drafts and all(len(drafts[0][name]) == 90 for name in ("token_ids", "tokens", "entropies", "accepted"))
    assert [draft["step"] for draft in drafts] == sorted(draft["step"] for draft in drafts)
    assert drafts[0]["max_steps"] == model.generation_config.max_denoising_steps
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == chat(client, SOLVE, seed=3).choices[0].message.content


def test_drafts_are_no_more_than_were_asked_for(client):
    chunks = list(chat(client, SOLVE, seed=3, stream=True,
                       stream_options={"include_drafts": True, "drafts_per_second": 0.01}))
    assert len([chunk for chunk in chunks if not chunk.choices]) == 1


def test_several_choices_are_those_of_the_seeds_that_follow(client):
    answer = chat(client, HELLO, seed=5, n=3, temperature=2.0)
    alone = [chat(client, HELLO, seed=5 + i, temperature=2.0).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == alone
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == chat(client, HELLO).usage.prompt_tokens


def test_several_choices_stream_under_their_own_index(client):
    whole = chat(client, HELLO, seed=5, n=2, temperature=2.0)
    texts = ["", ""]
    for chunk in chat(client, HELLO, seed=5, n=2, temperature=2.0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_sampler_settings_are_taken_by_their_names(client):
    answer = chat(client, SOLVE, extra_body={"max_denoising_steps": 1})
    assert answer.usage.denoising_steps == 1


def test_greedy_answers_are_the_most_probable_at_every_step(client):
    first, second = (chat(client, SOLVE, temperature=0, seed=1).choices[0].message.content for _ in range(2))
    assert first == second and digits(first) == SOLUTION


def test_the_length_limit_ends_an_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, SOLVE, **{name: 10})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 10


def test_a_stop_string_ends_an_answer_before_it(client):
    whole = chat(client, SOLVE, seed=2).choices[0].message.content
    stop = whole[20:24]
    answer = chat(client, SOLVE, seed=2, stop=[stop, "never"]).choices[0]
    assert answer.message.content == whole[:whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_logprobs_are_those_of_the_text(client):
    answer = chat(client, SOLVE, seed=2, logprobs=True, top_logprobs=2).choices[0]
    entries = answer.logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == answer.message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert all(entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in entries)


def test_models_are_listed_under_every_name(client):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["sudoku", "alias"]
    assert all(card.owned_by == "dgemma" and card.max_model_len == 8192 for card in cards)
    assert client.models.retrieve("alias") == cards[1]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no/such")
    assert error.value.body["code"] == "model_not_found"


def test_a_text_completion_goes_on_with_the_prompt_as_it_is(client, model):
    prompt = model.tokenizer.render(SOLVE)
    answer = client.completions.create(model="alias", prompt=prompt, seed=1)
    assert answer.choices[0].text == model.generate(SOLVE, seed=1).text
    ids = model.prompt_ids(SOLVE)
    assert client.completions.create(model="sudoku", prompt=ids, seed=1).choices[0].text == answer.choices[0].text
    assert answer.usage.prompt_tokens == len(ids)


def test_text_completions_take_several_prompts_and_echo_them(client, model):
    prompts = [model.tokenizer.render(SOLVE), model.tokenizer.render(HELLO)]
    answer = client.completions.create(model="sudoku", prompt=prompts, seed=1, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(prompts[choice.index // 2]) for choice in answer.choices)
    assert answer.usage.prompt_tokens == sum(len(model.prompt_ids(messages)) for messages in (SOLVE, HELLO))


def test_text_completions_stream(client, model):
    prompt = model.tokenizer.render(SOLVE)
    chunks = list(client.completions.create(model="sudoku", prompt=prompt, seed=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == model.generate(SOLVE, seed=1).text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_completions_have_the_old_form_of_logprobs(client, model):
    answer = client.completions.create(model="sudoku", prompt=model.tokenizer.render(SOLVE), seed=1, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == list(range(len(logprobs.tokens)))
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)


def test_offsets_of_old_logprobs_count_characters_of_the_whole_text(scripted_client):
    client, service = scripted_client(["é!a", "é!b"])
    entries = [TokenLogprob(token, -0.5, []) for token in service.model.tokenizer.encode("é!a")]
    assert len(entries) == 4
    service.logprobs = entries  # of either canvas
    whole = client.completions.create(model="sudoku", prompt="x", logprobs=0).choices[0]
    assert (whole.text, whole.logprobs.text_offset) == ("é!aé!b", [0, 0, 1, 2, 3, 3, 4, 5])
    chunks = [chunk.choices[0] for chunk in client.completions.create(model="sudoku", prompt="x", logprobs=0,
                                                                      stream=True)]
    assert [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset] == whole.logprobs.text_offset


@pytest.mark.parametrize("form", [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": False}}}},
    {"extra_body": {"guided_json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                                    "additionalProperties": False}}},
    {"extra_body": {"structured_outputs": {"choice": ['{"a": 1}', '{"a": 2}'], "grammar": None,
                                           "disable_fallback": False}}},
    {"response_format": {"type": "json_object", "schema": {"type": "object", "properties": {"a": {"type": "integer"}},
                                                           "required": ["a"], "additionalProperties": False}}},
])
def test_an_answer_has_the_form_that_was_asked_for(client, form):
    answer = chat(client, HELLO, **form).choices[0]
    assert answer.finish_reason == "stop" and list(json.loads(answer.message.content)) == ["a"]


def test_an_answer_in_a_form_that_looks_like_a_call_is_text(client):
    schema = {"type": "object", "properties": {"name": {"const": "weather"}, "arguments": {"const": {}}},
              "required": ["name", "arguments"], "additionalProperties": False}
    answer = chat(client, tools=[WEATHER], tool_choice="none", response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}).choices[0]
    assert json.loads(answer.message.content) == {"name": "weather", "arguments": {}}
    assert answer.message.tool_calls is None and answer.finish_reason == "stop"


# With scripted answers


def test_thoughts_stand_beside_the_text(scripted_client):
    client, service = scripted_client(f"{THOUGHT}Hello")
    answer = chat(client, reasoning_effort="high")
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Hello", "hm", "hm")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("thought\nhm") + 2
    assert service.requests[0].prompt_ids != service.model.prompt_ids(HELLO)  # thinking is on
    deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Hello"


@pytest.mark.parametrize(("fields", "thinking"), [
    ({"thinking": True}, True), ({"thinking": {"type": "enabled"}}, True), ({"thinking": {"type": "disabled"}}, False),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({"reasoning_effort": "none"}, False), ({}, False),
])
def test_thinking_is_switched_by_any_of_its_spellings(scripted_client, fields, thinking):
    client, service = scripted_client("x")
    chat(client, extra_body=fields)
    assert service.requests[0].prompt_ids == service.model.prompt_ids(HELLO, thinking=thinking)


def test_tool_calls_are_returned_and_answered(scripted_client):
    client, service = scripted_client(f"Let me see.{CALL}", "It is sunny.")
    answer = chat(client, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function", "weather", {"city": "Paris"})
    conversation = [*HELLO, choice.message.model_dump(exclude_none=True),
                    {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert chat(client, conversation, tools=[WEATHER]).choices[0].message.content == "It is sunny."
    prompt = service.model.tokenizer.decode(service.requests[1].prompt_ids)
    assert 'response:weather{value:<|"|>sunny<|"|>}' in prompt and "call:weather{" in prompt


def test_tool_calls_stream_whole_each_with_its_index(scripted_client):
    client, _ = scripted_client(CALL + CALL.replace("Paris", "Rome"))
    chunks = list(chat(client, tools=[WEATHER], stream=True))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [(call.index, json.loads(call.function.arguments)["city"]) for call in calls] == [(0, "Paris"), (1, "Rome")]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_parallel_tool_calls_can_be_refused(scripted_client):
    client, _ = scripted_client(CALL + CALL)
    assert len(chat(client, tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert len(chat(client, tools=[WEATHER]).choices[0].message.tool_calls) == 2


def test_without_tool_choice_the_model_is_told_of_no_tools(scripted_client):
    client, service = scripted_client("x")
    chat(client, tools=[WEATHER], tool_choice="none")
    assert service.requests[0].prompt_ids == service.model.prompt_ids(HELLO)


def test_the_choices_reach_the_engine(scripted_client):
    client, service = scripted_client("x")
    chat(client, temperature=0.5, top_p=0.9, logit_bias={"7": -5}, max_tokens=17, user="me", stop="end",
         extra_body={"top_k": 4, "entropy_bound": 0.2})
    request = service.requests[0]
    choices = request.sampling
    assert (choices.temperature, choices.top_p, choices.top_k, choices.logit_bias) == (0.5, 0.9, 4, ((7, -5.0),))
    assert (request.settings.max_tokens, request.settings.entropy_bound, request.stop) == (17, 0.2, ("end",))
    assert request.user == "me"


def test_harmless_fields_are_ignored(scripted_client):
    client, _ = scripted_client("Hello")
    answer = chat(client, metadata={"a": "b"}, store=True, service_tier="auto", presence_penalty=0,
                  top_logprobs=0,
                  extra_body={"unheard_of": 1, "repetition_penalty": 1.0, "ignore_eos": False})
    assert answer.choices[0].message.content == "Hello"


@pytest.mark.parametrize(("fields", "param"), [
    ({"extra_body": {"best_of": 3}}, "best_of"), ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"), ({"temperature": -1}, "temperature"), ({"n": 0}, "n"),
    ({"top_p": -0.1}, "top_p"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"stop": ["x"] * 17}, "stop"), ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "clock"}}, "tools": [WEATHER]}, "tool_choice"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -2}, "max_completion_tokens"),
    ({"extra_body": {"t_min": 0.9, "t_max": 0.1}}, "t_max"),
    ({"extra_body": {"guided_grammar": "x"}}, "guided_grammar"),
    ({"extra_body": {"chat_template_kwargs": {"other": 1}}}, "chat_template_kwargs"),
    ({"extra_body": {"guided_json": "{"}}, "guided_json"),
    ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_choice"),
    ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, "structured_outputs"),
])
def test_what_cannot_be_honoured_is_refused_by_name(scripted_client, fields, param):
    client, service = scripted_client("x")
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **fields)
    assert error.value.body["param"] == param
    assert service.requests == []


@pytest.mark.parametrize(("messages", "param"), [
    ([], "messages"), ([{"role": "alien", "content": "x"}], "messages[0].role"), ([{"role": "user"}], "messages[0]"),
    ([HELLO[0], {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[1].content[0]"),
    ([{"role": "tool", "content": "x"}], "messages[0]"), ([{"role": "user", "content": "x" * 8150}], "messages"),
    ([{"role": "user", "content": "x" * 10000}], "messages"),
])
def test_messages_that_cannot_be_read_are_named(scripted_client, messages, param):
    client, _ = scripted_client("x")
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages, max_tokens=500)
    assert error.value.body["param"] == param


@pytest.mark.parametrize(("fields", "param"), [
    ({"echo": True, "logprobs": 1}, "echo"), ({"prompt": []}, "prompt"),
    ({"prompt": [999]}, "prompt"), ({"prompt": ["x"] * 129}, "prompt"), ({"best_of": 2}, "best_of"),
])
def test_text_completions_refuse_by_name_too(scripted_client, fields, param):
    client, _ = scripted_client("x")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "sudoku", "prompt": "x", **fields})
    assert error.value.body["param"] == param


def test_an_unknown_model_does_not_exist(scripted_client):
    client, _ = scripted_client("x")
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert (error.value.body["param"], error.value.body["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(scripted_client, stream):
    client, _ = scripted_client(Overloaded("busy", 2.5))
    with pytest.raises(openai.RateLimitError) as error:
        chat(client, stream=stream)
    assert error.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_breaks_says_so(scripted_client, stream, caplog):
    client, _ = scripted_client(RuntimeError("bad luck"))
    with pytest.raises(openai.APIError, match="the server's log says why") as error:
        list(chat(client, stream=stream))
    assert "bad luck" not in str(error.value)  # an exception's words are not for clients
    assert "bad luck" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_an_error(scripted_client, stream):
    client, _ = scripted_client("Hel", finish="cancelled")
    with pytest.raises(openai.APIError, match="cut off"):
        list(chat(client, stream=stream))


def test_one_choice_that_breaks_ends_the_others(scripted_client):
    client, service = scripted_client(["Hello"], RuntimeError("bad luck"), seconds=0.5)
    with pytest.raises(openai.InternalServerError, match="could not finish"):
        chat(client, n=2)
    assert eventually(lambda: service.closed == 1)


def test_tokens_are_counted_and_spelt(http, model):
    body = http.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True}).json()
    assert body["tokens"] == [model.tokenizer.bos_id, *model.tokenizer.encode("Hé")]
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == 8192
    chat_ids = http.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert chat_ids == model.prompt_ids(HELLO)
    assert http.post("/detokenize", json={"tokens": body["tokens"][1:]}).json() == {"prompt": "Hé"}
    assert http.post("/detokenize", json={"tokens": [2**30]}).json()["error"]["param"] == "tokens"
    assert http.post("/tokenize", json={}).status_code == 400

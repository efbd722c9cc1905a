"""The autoregressive baseline: what it writes is what the encoder's causal logits say, whoever computes them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import dgemma
from dgemma.errors import DgemmaError
from dgemma.nn.head import soft_cap
from dgemma.train.batch import collate
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.examples import prepare
from dgemma.train.eval.baseline import CausalModel
from dgemma.train.noise import draw_noise
from dgemma.train.objective import Objective, batch_loss
from dgemma.train.runs.state import initialise
from support.reference import SHAPES, network_like, random_network, reference_model, tiny_config

PROMPTS = [[2, 7, 11], [2, 9, 3, 14, 8, 21, 30, 4, 17], [2, 40, 41, 42, 43, 44]]


@pytest.fixture(scope="module")
def bundled():
    return dgemma.load("sudoku")


@pytest.fixture
def tiny(bundled):
    """Random weights over 50 tokens; token 1 stops."""
    settings = dataclasses.replace(bundled.generation_config, eos_token_id=(1,), max_tokens=20)
    return CausalModel(random_network(tiny_config(), seed=3), bundled.tokenizer, settings, "tiny")


def stopping_at(model, *tokens):
    """The same model with other stop tokens."""
    return CausalModel(model.network, model.tokenizer,
                       dataclasses.replace(model.generation_config, eos_token_id=tokens), model.name)


def test_answers_are_those_of_the_reference_encoder_read_anew_for_every_token(bundled):
    """Greedy ones, and drawn ones (greedy ones of random weights soon repeat a token): the same draws from the
    reference's probabilities."""
    reference = reference_model(SHAPES["odd-sizes"], seed=5)
    ours = CausalModel(network_like(reference), bundled.tokenizer,
                       dataclasses.replace(bundled.generation_config, eos_token_id=()), "reference")
    embedding = reference.get_input_embeddings().weight
    canvas = torch.zeros(1, reference.config.canvas_length, dtype=torch.long)
    for temperature in (0.0, 3.0):
        answers = ours.generate_batch(PROMPTS, seeds=[1, 2, 3], max_tokens=12, temperature=temperature)
        for prompt, seed, answer in zip(PROMPTS, [1, 2, 3], answers, strict=True):
            ids, generator = list(prompt), torch.Generator().manual_seed(seed)
            for _ in range(12):
                hidden = reference(input_ids=torch.tensor([ids]), decoder_input_ids=canvas).encoder_last_hidden_state
                logits = soft_cap(F.linear(hidden[0, -1], embedding), 10.0)
                ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                               if temperature else logits.argmax()))
            assert answer.token_ids == ids[len(prompt):]
    assert len(set(answers[0].token_ids)) > 6  # more than a few repeated


def test_an_answer_does_not_depend_on_the_batch(tiny):
    for temperature in (0.0, 1.0):
        together = tiny.generate_batch(PROMPTS, seeds=[4, 5, 6], temperature=temperature)
        for index, prompt in enumerate(PROMPTS):
            alone = tiny.generate_batch([prompt], seeds=[4 + index], temperature=temperature)[0]
            assert alone.token_ids == together[index].token_ids
            assert alone.finish_reason == together[index].finish_reason


def test_a_rows_logits_step_by_step_are_those_of_the_whole_text_read_at_once(tiny):
    answers = tiny.generate_batch(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = torch.tensor([prompt + answer.token_ids])
        hidden = tiny.network.encode(text, tiny.network.new_cache(1))
        predicted = tiny.network.logits(hidden)[0, len(prompt) - 1 :].argmax(-1).tolist()
        end = [answer.stop_token_id] if answer.finish_reason == "stop" else predicted[-1:]
        assert predicted == answer.token_ids + end


def test_a_stop_token_ends_an_answer_and_does_not_belong_to_it(tiny):
    free = tiny.generate_batch(PROMPTS, max_tokens=9)
    stop = free[1].token_ids[5]
    stopped = stopping_at(tiny, 1, stop).generate_batch(PROMPTS, max_tokens=9)[1]
    place = free[1].token_ids.index(stop)
    assert (stopped.token_ids, stopped.finish_reason) == (free[1].token_ids[:place], "stop")
    assert stopped.stop_token_id == stop


def test_passes_are_counted_as_a_canvas_counts_its_steps(tiny):
    """Canvases of 8: 20 tokens in 20 passes; with the stop token it is one pass more than tokens."""
    answer = stopping_at(tiny).generate_batch(PROMPTS[:1])[0]
    assert (answer.steps, answer.tokens_per_forward, answer.finish_reason) == ([8, 8, 4], 1.0, "length")
    place = answer.token_ids.index(answer.token_ids[7])
    stopped = stopping_at(tiny, answer.token_ids[7]).generate_batch(PROMPTS[:1])[0]
    assert sum(stopped.steps) == place + 1
    assert stopped.tokens_per_forward == place / (place + 1)


def test_draws_follow_the_tempered_softmax_and_the_seed(tiny):
    prompt, count = PROMPTS[1], 3000
    hidden = tiny.network.encode(torch.tensor([prompt]), tiny.network.new_cache(1))
    wanted = (tiny.network.logits(hidden)[0, -1] / 0.7).softmax(-1)
    answers = tiny.generate_batch([prompt] * count, seeds=range(count), max_tokens=1, temperature=0.7)
    firsts = torch.tensor([(answer.token_ids or [answer.stop_token_id])[0] for answer in answers])
    seen = torch.bincount(firsts, minlength=50) / count
    assert (seen - wanted).abs().max() < 0.03
    assert wanted.max() < 0.9
    again = tiny.generate_batch([prompt] * 3, seeds=range(3), max_tokens=1, temperature=0.7)
    assert [a.token_ids for a in again] == [a.token_ids for a in answers[:3]]


def test_the_samplers_settings_change_nothing_and_what_does_not_exist_is_refused(tiny):
    plain = tiny.generate_batch(PROMPTS)
    swept = tiny.generate_batch(PROMPTS, max_denoising_steps=2, entropy_bound=0.5)
    assert [a.token_ids for a in swept] == [a.token_ids for a in plain]
    for option in ({"canvas": [1]}, {"response_format": {"type": "json_object"}}, {"top_k": 3}, {"beams": 2}):
        with pytest.raises(DgemmaError, match=next(iter(option))):
            tiny.generate_batch(PROMPTS, **option)
    with pytest.raises(DgemmaError, match="2 seeds"):
        tiny.generate_batch(PROMPTS, seeds=[1, 2])
    with pytest.raises(DgemmaError, match="temperature"):
        tiny.generate_batch(PROMPTS, temperature=-1.0)
    assert tiny.generate_batch([]) == []


def test_positions_are_not_exceeded(bundled):
    model = CausalModel(random_network(tiny_config(max_position_embeddings=24), seed=3), bundled.tokenizer,
                        dataclasses.replace(bundled.generation_config, eos_token_id=()), "short")
    answers = model.generate_batch(PROMPTS, max_tokens=100)
    assert [len(prompt) + len(answer.token_ids) for prompt, answer in zip(PROMPTS, answers, strict=True)] == [24] * 3


def test_a_network_fitted_to_three_answers_by_the_causal_loss_writes_them(bundled):
    said = {"ab": "The first.", "abc d": "Second, and longer.", "x": "3"}
    rows = [conversation_of({"prompt": prompt, "response": response}) for prompt, response in said.items()]
    text = dict(vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=16,
                layer_types=["sliding_attention", "full_attention"])
    network = dgemma.nn.DiffusionTransformer(tiny_config(canvas_length=12, **text))
    initialise(network, seed=0, layers=len(network.layers))
    examples = prepare(rows, bundled.tokenizer, 12, stop_ids=bundled.generation_config.eos_token_id).examples
    assert len(examples) == 4  # the second answer takes two canvases
    batch = collate(examples)
    objective = Objective(denoising_weight=0.0, causal_on="response", self_conditioning_probability=0.0)
    untrained = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(80):
        noise = draw_noise(objective, len(examples), 12, 288, torch.Generator().manual_seed(step))
        loss, _ = batch_loss(network, batch, objective, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = CausalModel(network, bundled.tokenizer, bundled.generation_config, "fitted")
    answers = model.generate_batch(list(said))
    assert [answer.text for answer in answers] == list(said.values())
    assert {answer.finish_reason for answer in answers} == {"stop"}
    network.load_state_dict(untrained)
    assert [answer.text for answer in model.generate_batch(list(said), max_tokens=24)] != list(said.values())

"""What is trained is what the sampler will be asked for: the contexts of inference, and answers that read back."""

import dataclasses

import pytest

import dgemma
from dgemma.chat.reply import read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.train.batch import collate
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.examples import batches, examples_of, prepare
from dgemma.train.data.turns import turn_of
from support.gemma_files import write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a place"}}]
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "n": [1, None]}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Do <turn|> and <eos> end?"},
    {"role": "assistant", "content": "No: <turn|> é.", "reasoning": "<turn|> is letters"},
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": None, "reasoning": "a tool", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    {"role": "assistant", "content": "Sunny.\n\n  Dry."},
]
TALK = conversation_of({"messages": MESSAGES, "tools": TOOLS}, where="talk")

# What stock templates do and the bundled one does not. Closes an empty thought when thinking is off; shows the thoughts
# of a turn that calls tools; leaves a turn open for the tool's answer.
CLOSES = """{{ bos_token }}{% if enable_thinking %}<|turn>system
<|think|><turn|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|tool_response>{{ m.content }}<tool_response|>{% else %}
{{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|turn>' ~ m.role ~ '\n' }}
{%- if m.tool_calls and m.reasoning %}<|channel>thought
{{ m.reasoning }}
<channel|>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<|tool_call>call:{{ c.function.name }}{
{{- '' }}city:<|"|>{{ c.function.arguments.city }}<|"|>,n:[1,null]}<tool_call|>{% endfor %}
{{- '' if m.tool_calls else '<turn|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '' if messages[-1].role == 'tool' else '<|turn>assistant\n' }}
{%- if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}"""
# Opens a thought when thinking is on.
OPENS = """{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}
{{ m.content }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>assistant
{% if enable_thinking %}<|channel>thought
{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def model():
    return dgemma.load("sudoku", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


def with_template(tokenizer, template):
    return Tokenizer(tokenizer.backend, template, tokenizer.special_tokens, "a test")


def talk(*pairs, **last):
    messages = [{"role": role, "content": text} for role, text in pairs]
    messages[-1] |= last
    return conversation_of({"messages": messages}, where="talk")


def spelt(tokenizer, turn):
    return tokenizer.decode(turn.response_ids)


@pytest.mark.parametrize(("thinking", "on"), [("auto", True), ("on", True), ("off", False)])
def test_every_context_is_the_prompt_of_inference(model, thinking, on):
    for message in TALK.trained:
        turn = turn_of(TALK, message, model.tokenizer, thinking=thinking)
        assert turn.context_ids == model.prompt_ids(MESSAGES[:message], thinking=on, tools=TOOLS)
        assert turn.thinking is on


def test_responses_are_the_thought_the_answer_the_calls_and_the_stop_token(tokenizer):
    assert [spelt(tokenizer, turn_of(TALK, message, tokenizer)) for message in TALK.trained] == [
        "<|channel>thought\n<turn|> is letters\n<channel|>No: <turn|> é.<turn|>",
        '<|channel>thought\na tool\n<channel|><|tool_call>call:weather{city:<|"|>Bern<|"|>,n:[1,null]}<tool_call|>'
        "<|tool_response>",
        "Sunny.\n\n  Dry.<turn|>",
    ]
    assert spelt(tokenizer, turn_of(TALK, 2, tokenizer, thinking="off")) == "No: <turn|> é.<turn|>"


def test_what_only_spells_a_stop_token_is_letters(tokenizer):
    response = turn_of(TALK, 2, tokenizer).response_ids
    stop = tokenizer.token_to_id("<turn|>")
    assert [i for i, token in enumerate(response) if token == stop] == [len(response) - 1]


@pytest.mark.parametrize("template", [None, CLOSES])
@pytest.mark.parametrize("thinking", ["auto", "off"])
def test_an_answer_reads_back_as_it_was_written(tokenizer, template, thinking):
    tokenizer = with_template(tokenizer, template) if template else tokenizer
    for message in TALK.trained:
        turn = turn_of(TALK, message, tokenizer, thinking=thinking)
        answer = read_answer(tokenizer, turn.context_ids, turn.response_ids[:-1])
        assert answer.text == (MESSAGES[message]["content"] or "")
        assert answer.reasoning == (MESSAGES[message].get("reasoning") if thinking == "auto" else None)
        assert answer.tool_calls == [call["function"] for call in MESSAGES[message].get("tool_calls", [])]


def test_an_empty_thought_in_the_generation_prompt_is_context_not_response(tokenizer):
    tokenizer = with_template(tokenizer, CLOSES)
    turn = turn_of(talk(("user", "a"), ("assistant", "b")), 1, tokenizer)
    assert tokenizer.decode(turn.context_ids).endswith("<|turn>assistant\n<|channel>thought\n<channel|>")
    assert spelt(tokenizer, turn) == "b<turn|>"


def test_a_thought_that_the_template_shows_is_not_written_twice(tokenizer):
    response = spelt(tokenizer, turn_of(TALK, 4, with_template(tokenizer, CLOSES)))
    assert response.startswith("<|channel>thought\na tool\n<channel|><|tool_call>")
    assert response.endswith("<tool_call|><|tool_response>")


def test_a_thought_that_the_prompt_opens_is_gone_on_with(tokenizer):
    tokenizer = with_template(tokenizer, OPENS)
    conversation = talk(("user", "a"), ("assistant", "b"), reasoning="c")
    assert spelt(tokenizer, turn_of(conversation, 1, tokenizer)) == "c\n<channel|>b<turn|>"
    assert spelt(tokenizer, turn_of(conversation, 1, tokenizer, thinking="off")) == "b<turn|>"


def test_a_template_that_leaves_something_out_is_refused(tokenizer):
    with pytest.raises(DgemmaError, match="talk, message 4: .*reads back with the tool calls .., which is not"):
        turn_of(TALK, 4, with_template(tokenizer, OPENS))
    shouting = OPENS.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(DgemmaError, match="reads back with the text 'B'"):
        turn_of(talk(("user", "a"), ("assistant", "b")), 1, with_template(tokenizer, shouting))


def test_a_template_that_ends_no_answer_or_shows_it_elsewhere_is_refused(tokenizer):
    conversation = talk(("user", "a"), ("assistant", "b"))
    with pytest.raises(DgemmaError, match="ends an answer without a stop token"):
        turn_of(conversation, 1, with_template(tokenizer, OPENS.replace("<turn|>", "")))
    reversed_order = OPENS.replace("for m in messages", "for m in messages | reverse")
    with pytest.raises(DgemmaError, match="no telling what the model has to write"):
        turn_of(conversation, 1, with_template(tokenizer, reversed_order))


def test_a_token_over_the_border_leaves_its_second_half_to_be_written(tokenizer):
    """A vocabulary with a token of two line breaks, an answer that begins with one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = dict(tokenizer.backend.get_vocab()) | {"ĊĊ": tokenizer.vocab_size}
    backend = Backend(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for _, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())])
    merging = Tokenizer(backend, OPENS, tokenizer.special_tokens)
    turn = turn_of(talk(("user", "a"), ("assistant", "\nb")), 1, merging)
    assert merging.decode(turn.context_ids).endswith("assistant\n")
    assert spelt(merging, turn) == "\nb<turn|>"


def test_a_gemma_tokenizer_and_a_template_without_generation_prompt(tmp_path):
    """The small Gemma-like checkpoint: byte pairs over ▁, whose template never opens the model's turn."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    conversation = talk(("user", "ab cd"), ("assistant", "é ab"))
    with pytest.raises(DgemmaError, match="reads back with the text 'assistant"):
        turn_of(conversation, 1, tokenizer)
    opening = tokenizer.chat_templates["default"] + "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
    turn = turn_of(conversation, 1, with_template(tokenizer, opening))
    assert spelt(tokenizer, turn) == "é ab<turn|>"


def test_a_long_response_is_canvases_in_a_row(tokenizer):
    text = "x" * 19  # and the stop token: 20 tokens
    examples = examples_of(talk(("user", "a"), ("assistant", text)), tokenizer, 8, fill_weight=0.25)
    turn = examples[0].turn
    assert [example.canvas_index for example in examples] == [0, 1, 2]
    assert [token for example in examples for token in example.canvas_ids][:20] == turn.response_ids
    for example in examples:
        assert example.context_ids == turn.context_ids + turn.response_ids[: 8 * example.canvas_index]
        assert (example.context_length, example.prompt_length) == (len(example.context_ids), len(turn.context_ids))
    assert examples[2].canvas_ids[4:] == [tokenizer.eos_id] * 4
    assert [example.weights for example in examples] == [[1.0] * 8, [1.0] * 8, [1.0] * 4 + [0.25] * 4]
    assert [example.real_length for example in examples] == [8, 8, 4]


def test_fill_is_the_end_of_text_whatever_the_turn_ends_with(tmp_path):
    """Chat models name <turn|> as their eos_token, and others that as padding: no tail of those is taught."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<turn|>", "pad_token": "<turn|>"}')
    (tmp_path / "chat_template.jinja").write_text(OPENS)
    gemma = Tokenizer.from_folder(tmp_path)
    assert gemma.id_to_token(gemma.eos_id) == "<turn|>"
    for fill, token in (("eos", "<eos>"), ("pad", "<pad>")):
        (example,) = examples_of(talk(("user", "a"), ("assistant", "b")), gemma, 8, fill=fill)
        spelt = [gemma.id_to_token(token_id) for token_id in example.canvas_ids]
        assert spelt[:2] == ["b", "<turn|>"] and spelt[2:] == [token] * 6


def test_a_response_that_just_fits_needs_no_fill(tokenizer):
    examples = examples_of(talk(("user", "a"), ("assistant", "x" * 15)), tokenizer, 8, fill="pad")
    assert [example.real_length for example in examples] == [8, 8]
    examples = examples_of(talk(("user", "a"), ("assistant", "x" * 16)), tokenizer, 8, fill="pad")
    assert examples[-1].canvas_ids == [tokenizer.token_to_id("<turn|>")] + [tokenizer.pad_id] * 7


PAIRS = [("system", "S"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]


def test_a_context_that_is_too_long_is_an_error_or_shortened_at_a_turn_or_left_out(model):
    tokenizer, conversation = model.tokenizer, talk(*PAIRS)
    limit = len(model.prompt_ids(conversation.messages[:2]))
    with pytest.raises(DgemmaError, match=f"talk, message 4: .* tokens .* {limit} are allowed"):
        examples_of(conversation, tokenizer, 8, max_context=limit)
    kept = examples_of(conversation, tokenizer, 8, max_context=limit, too_long="skip")
    assert [example.turn.message for example in kept] == [2]
    system_and_last = model.prompt_ids([conversation.messages[i] for i in (0, 3)])
    cut = examples_of(conversation, tokenizer, 8, max_context=len(system_and_last), too_long="truncate")
    assert [(example.turn.context_ids, example.turn.dropped) for example in cut] == [
        (model.prompt_ids(conversation.messages[:2]), 0), (system_and_last, 2)]
    with pytest.raises(DgemmaError, match="even without earlier turns"):
        examples_of(conversation, tokenizer, 8, max_context=5, too_long="truncate")


def test_the_room_for_earlier_canvases_counts(tokenizer):
    conversation = talk(("user", "a"), ("assistant", "x" * 15))  # 16 tokens: the second canvas stands behind 8 more
    context = len(turn_of(conversation, 1, tokenizer).context_ids)
    assert len(examples_of(conversation, tokenizer, 8, max_context=context + 8)) == 2
    assert examples_of(conversation, tokenizer, 8, max_context=context + 7, too_long="skip") == []


def test_what_cannot_be_prepared_stops_or_is_listed(tokenizer):
    good, bad = talk(*PAIRS), dataclasses.replace(TALK, where="bad")
    plain = with_template(tokenizer, OPENS)
    with pytest.raises(DgemmaError, match="^bad, message 4"):
        prepare([good, bad], plain, 8)
    found = prepare([good, bad], plain, 8, skip_bad=True)
    assert {example.turn.row for example in found.examples} == {"talk"}
    assert len(found.skipped) == 1
    limit = len(turn_of(good, 2, tokenizer).context_ids)
    assert prepare([good], tokenizer, 8, max_context=limit, too_long="skip").skipped == ["talk, message 4: too long"]
    with pytest.raises(DgemmaError, match="nothing to train on"):
        prepare([bad], plain, 8, skip_bad=True)


@pytest.fixture(scope="module")
def examples(tokenizer):
    conversations = [talk(("user", "q" * (i * 7 % 50 + 1)), ("assistant", "x" * (i % 20 + 1))) for i in range(60)]
    return prepare(conversations, tokenizer, 8).examples


def test_an_epoch_has_every_example_once_and_depends_on_seed_and_epoch_only(examples):
    one = batches(examples, 4, seed=3, epoch=0)
    assert sorted(index for batch in one for index in batch) == list(range(len(examples)))
    assert batches(examples, 4, seed=3, epoch=0) == one
    assert batches(examples, 4, seed=3, epoch=1) != one
    assert batches(examples, 4, seed=4, epoch=0) != one
    assert all(len(batch) <= 4 for batch in one)


def test_batches_hold_similar_lengths(examples):
    def padded(made):
        found = [collate([examples[i] for i in batch]) for batch in made]
        return sum(batch.context.numel() - sum(batch.before[i] for i in batch.last) for batch in found)

    plain = [list(range(start, len(examples), 24)) for start in range(24)]
    assert padded(batches(examples, 4, seed=0, epoch=0)) < 0.4 * padded(plain)


def test_a_batch_pads_contexts_behind_their_ends(examples):
    batch = collate(examples[:3])
    for row, example in enumerate(examples[:3]):
        assert batch.context[row].tolist() == example.context_ids + [0] * (max(batch.lengths) - batch.lengths[row])
        assert batch.canvas[row].tolist() == example.canvas_ids
        assert batch.weights[row].tolist() == example.weights
    assert batch.prompts == tuple(example.prompt_length for example in examples[:3])


def test_the_canvases_of_a_turn_share_a_batch(tokenizer):
    rows = [conversation_of({"prompt": "x" * (1 + index % 7), "response": "word " * 5}, where=str(index))
            for index in range(12)]
    examples = prepare(rows, tokenizer, 10).examples
    shared = cut = 0
    for batch in batches(examples, 6, seed=0, epoch=0):
        for row in {examples[index].turn.row for index in batch}:
            places = [index for index in batch if examples[index].turn.row == row]
            shared += len(places) == 3
            cut += len(places) < 3
            assert [examples[i].canvas_index for i in places] == sorted(examples[i].canvas_index for i in places)
    assert shared == 12
    assert cut == 0

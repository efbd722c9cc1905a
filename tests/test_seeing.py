"""`dgemma.load(…).generate(…, images=…)`: pictures wherever they stand in a prompt, and what is said of bad ones."""

import base64

import pytest

import dgemma
from dgemma.errors import DgemmaError
from dgemma.memory.inference import mapped_bytes
from dgemma.model import Model
from support.films import film
from support.pictures import as_file, random_picture
from support.vision import save_seeing_model

IMAGE = random_picture(60, 50)
SETTINGS = {"max_tokens": 16, "seed": 1, "max_denoising_steps": 2, "image_tokens": 70, "eos_token_id": ()}
TOKENS = 9 * 7  # of a picture of 60 × 50 pixels, of 70 that it may have


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def model(folder):
    return dgemma.load(folder)


def image_tokens_in(request, model):
    return request.prompt_ids.count(model.config.vision.image_token_id)


def test_a_picture_changes_the_answer_and_takes_its_tokens(model):
    plain = model.generate("What is this?", **SETTINGS)
    seen = model.generate("What is this?", images=[IMAGE], **SETTINGS)
    assert seen.token_ids != plain.token_ids
    assert seen.prompt_tokens == plain.prompt_tokens + TOKENS + 2
    assert model.generate("What is this?", images=[IMAGE], **SETTINGS).token_ids == seen.token_ids
    other = model.generate("What is this?", images=[random_picture(60, 50, seed=1)], **SETTINGS)
    assert other.token_ids != seen.token_ids


def test_the_tower_is_read_when_the_first_picture_comes(folder):
    model = dgemma.load(folder)
    model.generate("Hello", **SETTINGS)
    assert model.pictures.vision is None
    model.request("What is this?", images=[IMAGE])
    assert model.pictures.vision is not None


def test_memory_for_requests_is_what_seeing_leaves(folder):
    seeing, free = dgemma.load(folder), 8 << 30
    weights = sum(tensor.nbytes for tensor in seeing.pictures.load().state_dict().values())
    ahead = seeing.pictures.ahead
    assert ahead > weights + seeing.pictures.kept
    blind = Model(seeing.network, seeing.tokenizer, seeing.generation_config, "blind")
    assert seeing.request_memory(free) == pytest.approx(blind.request_memory(free) - ahead * 4 / 5, abs=1)
    seeing.generate("Hi", images=[IMAGE], **SETTINGS)
    assert seeing.pictures.ahead == ahead - weights - seeing.pictures.nbytes + mapped_bytes(seeing.pictures.vision)


def test_the_next_question_about_a_picture_does_not_ask_the_tower_again(folder):
    model = dgemma.load(folder)
    conversation = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}]
    first = model.generate(conversation, **SETTINGS)
    conversation += [{"role": "assistant", "content": "That."}, {"role": "user", "content": "And this?"}]
    second = model.generate(conversation, **SETTINGS)
    assert (model.pictures.seen, model.pictures.reused) == (1, 1)
    assert second.cached_tokens > TOKENS > first.cached_tokens


def test_every_way_to_give_a_picture_is_the_same_prompt(model, tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(data := as_file(IMAGE, "PNG"))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"

    def message(part):
        return [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "Read it"}]}]

    given = [("Read it", [IMAGE]), ("Read it", [path]), ("Read it", [str(path)]), ("Read it", [data]),
             (message({"image": IMAGE}), None), (message({"path": str(path)}), None), (message({"url": url}), None),
             ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, "Read it"]}], None),
             ([{"role": "user", "content": "Read it"}], [IMAGE])]
    requests = [model.request(prompt, images=images, **SETTINGS) for prompt, images in given]
    assert {tuple(request.prompt_ids) for request in requests} == {tuple(requests[0].prompt_ids)}
    assert {request.spans[0].digest for request in requests} == {requests[0].spans[0].digest}
    assert all(len(request.spans) == 1 for request in requests)


@pytest.mark.filterwarnings("ignore:a picture stands behind")
def test_pictures_stand_where_they_were_put(model):
    other = random_picture(50, 60)
    request = model.request([{"role": "user", "content": [
        {"type": "text", "text": "First "}, {"type": "image", "image": IMAGE}, {"type": "text", "text": " then "},
        {"type": "image", "image": other}]}], **SETTINGS)
    assert model.tokenizer.decode(request.prompt_ids).replace("<|image|>", "") == (
        "<|turn>user\nFirst <|image><image|> then <|image><image|><turn|>\n<|turn>model")
    for span in request.spans:
        ids = request.prompt_ids[span.start - 1 : span.stop + 1]
        vision = model.config.vision
        assert [ids[0], *set(ids[1:-1]), ids[-1]] == [vision.boi_token_id, vision.image_token_id, vision.eoi_token_id]


def test_a_prompt_of_ids_has_places_for_pictures(model):
    soft = model.config.vision.image_token_id
    request = model.request([1, 2, soft, 3], images=[IMAGE], **SETTINGS)
    assert image_tokens_in(request, model) == TOKENS and request.spans[0].start == 3


def test_an_image_token_that_somebody_typed_is_text(model):
    request = model.request("<|image|> What is this?", images=[IMAGE], **SETTINGS)
    assert image_tokens_in(request, model) == TOKENS


def test_without_a_number_a_picture_has_as_many_as_what_is_asked_needs(model):
    settings = SETTINGS | {"image_tokens": None}

    def tokens(words, image):
        return image_tokens_in(model.request(words, images=[image], **settings), model)

    large = random_picture(1600, 900)
    assert 250 < tokens("What is this?", large) <= 280
    assert 500 < tokens("Read it to me", random_picture(1200, 800)) <= 560
    assert tokens("Read it to me", IMAGE) == TOKENS


def test_a_film_is_a_picture_for_every_frame_with_its_time_before_it(model):
    request = model.request("What happens?", video=film(90, 30), **SETTINGS)
    text = model.tokenizer.decode(request.prompt_ids).replace("<|video|>", "")
    assert "00:00 <|image><image|> 00:01 <|image><image|> 00:02 <|image><image|>" in text
    assert len(request.spans) == 3
    assert model.generate("What happens?", video=film(90, 30), **SETTINGS).prompt_tokens == len(request.prompt_ids)


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ("?", {"images": "a.png"}, "images must be a list of pictures, not str"),
    ("?", {"images": [b"no picture"]}, "image 1: this is not a picture of a kind that can be read"),
    ("?", {"images": [IMAGE, 5]}, "a picture is a path, the bytes of a file or a PIL.Image, not int"),
    ("?", {"images": ["nowhere.png"]}, "nowhere.png: cannot be read"),
    ("?", {"images": [IMAGE], "image_tokens": 100}, "at most 70, 140, 280, 560 or 1120 soft tokens, got 100"),
    ([1, 2], {"images": [IMAGE]}, "places for 0 pictures, and there are 1"),
    ([{"role": "system", "content": "x"}], {"images": [IMAGE]}, "images belong to a message of the user"),
    ([{"role": "user", "content": [{"type": "image"}, "x"]}], {}, "image 1: an image part needs it"),
    ([{"role": "user", "content": [{"type": "image", "url": "https://x.org/a.png"}, "x"]}], {}, "nothing is fetched"),
    ([{"role": "user", "content": [{"type": "image", "url": "data:image/png;base64,&"}, "x"]}], {}, "not valid base64"),
    ([{"role": "user", "content": [{"type": "video", "url": "data:video/mp4;base64,AA=="}, "x"]}], {},
     "video 1: not a film"),
], ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_what_cannot_be_seen_is_said(model, prompt, options, message):
    with pytest.raises(DgemmaError) as caught:
        model.generate(prompt, **SETTINGS | options)
    assert message in str(caught.value)


def test_a_prompt_that_is_too_long_with_its_pictures_does_not_bother_the_tower(folder):
    model = dgemma.load(folder)
    soft = model.config.vision.image_token_id
    with pytest.raises(DgemmaError, match="tokens; this model takes at most"):
        model.request([1, soft] * 20, images=[IMAGE] * 20, **SETTINGS)
    assert model.pictures.vision is None


def test_a_model_without_a_tower_says_so(model):
    blind = Model(model.network, model.tokenizer, model.generation_config, "blind")
    with pytest.raises(DgemmaError, match="this model sees no pictures: it has no vision tower"):
        blind.generate("What is this?", images=[IMAGE])

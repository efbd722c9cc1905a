"""Pictures are learnt from: they reach the loss, by a tower that stays or learns, and what is written sees them."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import dgemma
from dgemma.cli.main import app
from dgemma.errors import DgemmaError
from dgemma.model import read_parts, seeing
from dgemma.nn.adapters import AdapterConfig, adapters
from dgemma.nn.passes import Passes
from dgemma.train.batch import collate
from dgemma.train.checks.bench import Bench
from dgemma.train.checks.inputs import pictures_are_seen
from dgemma.train.checks.plan import recipe_plan
from dgemma.train.checks.preflight import run_preflight
from dgemma.train.data.conversations import read_conversations
from dgemma.train.data.examples import prepare
from dgemma.train.noise import draw_noise
from dgemma.train.objective import Objective, batch_loss, totals_of
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.recipe import ConversationData, Evaluation, OptimizerSettings, Recipe
from dgemma.train.runs.state import begin, parts_of
from dgemma.train.sights import PreparedPictures
from dgemma.train.trainer import Trainer
from support.pictures import random_picture
from support.seeing import CAPTIONS, captioned, save_captions, save_pupil
from train.conftest import MODEL

RANKS = Ranks(torch.device("cpu"))
QUIET = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pupil(tmp_path_factory.mktemp("pupil"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return save_captions(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def examples(folder, captions):
    return examples_of(folder, captions)


def examples_of(folder, data):
    parts = read_parts(folder)
    return prepare(read_conversations(data, image_tokens=70).rows, parts.tokenizer, parts.config.canvas_length,
                   stop_ids=parts.generation_config.eos_token_id,
                   pictures=PreparedPictures.of(seeing(parts)[0])).examples


@pytest.fixture(scope="module")
def state(folder, captions):
    return begun(recipe(folder, captions))


def begun(settings):
    return begin(settings, parts_of(settings), RANKS.device, sees=True)


def recipe(folder, captions, **others):
    return Recipe(**{"name": "taught", "model": str(folder), "max_steps": 2, "batch_size": 2,
                     "data": ConversationData((str(captions),), (str(captions),), image_tokens=70),
                     "optimizer": OptimizerSettings(lr=3e-3, warmup_steps=1),
                     "evaluation": Evaluation(every=1000, examples=2)} | others)


def loss(state, examples, passes=None, **settings):
    batch, objective = collate(examples), Objective(**settings)
    noise = draw_noise(objective, *batch.canvas.shape, state.network.config.vocab_size,
                       torch.Generator().manual_seed(0))
    return float(batch_loss(state.network, batch, objective, noise, passes=passes)[0])


def test_the_loss_moves_with_what_is_in_a_picture(state, examples):
    one, other = examples
    swapped = dataclasses.replace(one, turn=dataclasses.replace(one.turn, sights=tuple(
        dataclasses.replace(sight, medium=other.sights[0].medium) for sight in one.sights)))
    assert one.context_ids == other.context_ids  # pictures of one size are the same tokens
    with torch.no_grad():
        assert loss(state, [one]) == loss(state, [one])
        assert abs(loss(state, [one]) - loss(state, [swapped])) > 1e-4
        assert loss(state, [one, other]) == pytest.approx((loss(state, [one]) + loss(state, [other])) / 2, rel=0.2)


def test_soft_tokens_and_the_marks_around_them_have_no_loss(state, examples):
    one = examples[0]
    [sight], vision = one.sights, state.network.config.vision
    marks = one.context_ids[sight.start - 1], one.context_ids[sight.stop]
    assert marks == (vision.boi_token_id, vision.eoi_token_id)
    counted = totals_of([collate([one])], Objective(causal_on="prompt")).causal
    assert counted == len(one.context_ids) - 1 - sight.tokens - 2
    assert not set(one.canvas_ids) & {*marks, vision.image_token_id}


def test_pictures_of_one_size_share_no_row(examples):
    batch = collate(examples)
    assert batch.owners is None and [row for row, _ in batch.sights] == [0, 1]
    assert batch.spans == [[(sight.start, sight.stop)] for one in examples for sight in one.sights]


def test_canvases_of_one_turn_share_a_reading_of_its_picture(state, folder, captions, tmp_path):
    rows = [captioned(str(captions.parent / f"{index}.png"), caption * 4) for index, caption in enumerate(CAPTIONS)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = examples_of(folder, data)
    batch = collate(examples)
    assert batch.owners == (0, 0, 1, 1) and [row for row, _ in batch.sights] == [0, 1]
    with torch.no_grad():
        one, other = (loss(state, [example], causal_weight=0.0) for example in examples[:2])
        assert one != other
    assert all(check.passed for check in run_preflight(state.network, examples, Objective()))


def test_a_tower_that_stays_sees_every_picture_once(folder, captions, examples):
    state = begun(recipe(folder, captions))
    passes = state.seeing(Passes.of(state.network))
    with torch.no_grad():
        plain = loss(state, examples)
        assert [loss(state, examples, passes) for _ in range(3)] == [pytest.approx(plain, rel=1e-5)] * 3
    assert (state.pictures.seen, state.pictures.reused) == (2, 4)


@pytest.mark.parametrize("freeze", [None, (".router.",)], ids=["frozen", "learning"])
def test_the_preflight_holds_with_pictures_and_knows_one_without_sight(folder, captions, examples, freeze):
    state = begun(recipe(folder, captions, freeze=freeze))
    passes = state.seeing(Passes.of(state.network))
    checks = {check.name: check for check in run_preflight(state.network, examples, Objective(), passes=passes)}
    assert all(check.passed for check in checks.values()), checks
    assert "pictures are seen" in checks

    blind = dataclasses.replace(passes, see=lambda pictures: [torch.zeros_like(soft) for soft in passes.see(pictures)])
    assert not pictures_are_seen(Bench(state.network, blind, collate(examples), Objective())).passed


@QUIET
def test_a_network_learns_what_two_pictures_are(folder, captions, tmp_path):
    settings = recipe(folder, captions, max_steps=220, objective=Objective(self_conditioning_probability=0.0))
    run = Trainer(settings, tmp_path / "run", ranks=RANKS)
    before = run.stepper.take(0)[0]["loss"]
    run.train()
    assert run.stepper.take(0)[0]["loss"] < before / 10
    model = dgemma.load(tmp_path / "run" / "last")
    said = [model.generate("What is this?", images=[captions.parent / f"{index}.png"], image_tokens=70, seed=1,
                           max_tokens=16).text for index in range(len(CAPTIONS))]
    assert said == list(CAPTIONS)


@QUIET
def test_a_tower_that_learns_is_written_with_the_network_and_resumes(folder, captions, tmp_path):
    settings = recipe(folder, captions, freeze=(".router.",), max_steps=3,
                      optimizer=OptimizerSettings(lr=3e-3, warmup_steps=1, ema=0.5))
    whole, parts = (Trainer(dataclasses.replace(settings, save_every=1), tmp_path / name, ranks=RANKS)
                    for name in ("whole", "parts"))
    whole.train()

    class AfterOne:
        def is_set(self):
            return parts.step >= 1

    parts._stop = AfterOne()
    assert not parts.train()
    resumed = Trainer(settings, tmp_path / "parts", ranks=RANKS)
    assert resumed.step == 1 and resumed.train()
    trained = dict(whole.network.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in resumed.network.named_parameters())
    with whole.optimizers.averaged():
        written = dgemma.load(tmp_path / "whole" / "last").pictures.load().state_dict()
        assert all(torch.equal(tensor, written[name]) for name, tensor in whole.network.vision.state_dict().items())
    before = dgemma.load(folder).pictures.load()
    changed = [name for name, p in before.named_parameters() if not torch.equal(p, written[name])]
    assert "embed_vision.embedding_projection.weight" in changed
    assert "vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight" in changed


@QUIET
@pytest.mark.parametrize("targets", [("vision",), ("attention", "embed_vision")], ids="-".join)
def test_an_adapter_on_the_tower_is_written_and_loaded(folder, captions, tmp_path, targets):
    run = Trainer(recipe(folder, captions, adapter=AdapterConfig(r=2, targets=targets)), tmp_path / "run", ranks=RANKS)
    run.train()
    names = {name for name in adapters(run.network) if name.startswith("vision.")}
    assert "vision.embed_vision.embedding_projection" in names
    assert any(".vision_tower." in name for name in names) == (targets == ("vision",))
    assert not any(".mlp." in name for name in names)
    model = dgemma.load(folder, adapter=tmp_path / "run" / "last")
    for name, adapter in adapters(run.network).items():
        assert torch.equal(adapter.a, adapters(model.network)[name].a)
        assert torch.equal(adapter.b, adapters(model.network)[name].b) and bool(adapter.b.any())
    picture = random_picture(60, 50)
    settings = {"images": [picture], "image_tokens": 70, "seed": 1, "max_tokens": 8, "eos_token_id": ()}
    with torch.no_grad():
        found = model.request("What?", **settings).spans[0].embeddings
        wanted = run.state.model().request("What?", **settings).spans[0].embeddings
        plain = dgemma.load(folder).request("What?", **settings).spans[0].embeddings
    assert torch.equal(found, wanted) and not torch.equal(found, plain)


def test_an_adapter_s_attention_is_the_text_network_s_alone(folder, captions):
    state = begun(recipe(folder, captions, adapter=AdapterConfig(r=2, targets=("attention", "mlp"))))
    assert not any(name.startswith("vision.") for name in adapters(state.network))


@QUIET
def test_what_is_not_there_is_said(folder, captions, tmp_path):
    with pytest.raises(DgemmaError, match=r"captions.jsonl:1, message 1: there are pictures .* no vision tower"):
        Trainer(recipe("sudoku", captions), tmp_path / "blind", ranks=RANKS)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "Hi", "response": "Hello"}))
    with pytest.raises(DgemmaError, match="no 'vision' to adapt here"):
        Trainer(recipe(folder, text, adapter=AdapterConfig(targets=("vision",))), tmp_path / "text", ranks=RANKS)
    with pytest.raises(DgemmaError, match="a vision tower learns in one process only so far; this is one of 2"):
        Trainer(recipe(folder, captions, freeze=(".router.",)), tmp_path / "two",
                ranks=dataclasses.replace(RANKS, world=2))


@QUIET
def test_an_adapter_over_a_gguf_file_sees_by_the_tower_beside_it(folder, captions, tmp_path):
    made = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "pupil.gguf"), "--type", "q8_0"])
    assert made.exit_code == 0 and (tmp_path / "mmproj-pupil.gguf").exists()
    settings = recipe(tmp_path / "pupil.gguf", captions, adapter=AdapterConfig(r=2, targets=("attention", "vision")),
                      evaluation=Evaluation(every=1000, metric="exact", count=2, max_tokens=4, sweep=(1,)))
    assert Trainer(settings, tmp_path / "run", ranks=RANKS).train()
    model = dgemma.load(tmp_path / "pupil.gguf", adapter=tmp_path / "run" / "last")
    assert any(name.startswith("vision.") for name in adapters(model.network))
    assert model.generate("What?", images=[captions.parent / "0.png"], image_tokens=70, max_tokens=4).token_ids


@QUIET
@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
def test_a_network_of_fresh_weights_has_a_tower_where_its_config_describes_one(folder, conversations, captions,
                                                                               tmp_path, pictures):
    described = json.loads((folder / "config.json").read_text())["vision_config"]
    text = {**MODEL["text_config"], "max_position_embeddings": 1000}
    settings = recipe(folder, captions if pictures else conversations,
                      model={**MODEL, "text_config": text, "vision_config": described})
    run = Trainer(settings, tmp_path / "run", ranks=RANKS)
    assert all(p.requires_grad for p in run.network.vision.parameters())
    run.train()
    model = dgemma.load(tmp_path / "run" / "last")
    assert model.config.vision.image_token_id == model.tokenizer.token_to_id("<|image|>")
    written = model.pictures.load().state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in run.network.vision.state_dict().items())


def test_the_plan_counts_the_tower(folder, captions, examples):
    soft = examples[0].sights[0].tokens

    def total(soft_tokens, **settings):
        made = recipe(folder, captions, **settings)
        return recipe_plan(made, parts_of(made).config, folder, 100, RANKS.device, soft_tokens=soft_tokens)

    vision = dgemma.load(folder).pictures.load()
    weights = sum(tensor.nbytes for tensor in vision.state_dict().values())
    frozen, learning = total(soft), total(soft, freeze=(".router.",))
    text, seen, taught = ({line.name: line.nbytes for line in plan.lines} for plan in (total(0), frozen, learning))
    assert seen["weights"] - text["weights"] == weights and "pictures" not in text and seen["pictures"] > 0
    assert seen["optimizer state"] == text["optimizer state"]
    parameters = sum(p.numel() for p in vision.parameters())
    assert taught["optimizer state"] - text["optimizer state"] == 8 * parameters
    assert taught["pictures"] > seen["pictures"]


def test_the_plan_of_several_processes_has_the_whole_tower_on_each(folder, captions):
    made = recipe(folder, captions)
    weights = sum(tensor.nbytes for tensor in dgemma.load(folder).pictures.load().state_dict().values())
    one, four = (recipe_plan(made, parts_of(made).config, folder, 100, RANKS.device, ranks, 63).lines[0]
                 for ranks in (1, 4))
    assert four.nbytes == weights + (one.nbytes - weights) // 4 and "the tower whole on every device" in four.reason

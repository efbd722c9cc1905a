"""A run: it resumes as if it had never stopped, leaves what loads, and loses nothing to a full disk or a kill."""

import dataclasses
import itertools
import json
import threading

import pytest
import torch
import yaml

import dgemma
from dgemma.errors import DgemmaError
from dgemma.model import read_parts
from dgemma.nn.adapters import AdapterConfig, adapters
from dgemma.nn.passes import Passes
from dgemma.train import trainer as trainer_module
from dgemma.train.log.events import Ended, Loading, Noted, Saved, Started, Working
from dgemma.train.log.journal import read_journal
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.recipe import ConversationData, Evaluation, Recipe, load_recipe
from dgemma.train.runs import state as state_module
from dgemma.train.runs.run import STATE, RunFolder
from dgemma.train.trainer import Trainer
from support.killed_run import kill_after_a_save
from support.told import StopAt, Told, stepped, working

RANKS = Ranks(torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("quick")


def trainer(recipe, folder, *listeners, stop=None):
    return Trainer(recipe, folder, ranks=RANKS, listeners=listeners, stop=stop)


def stopped(recipe, folder, when, at=0):
    """A run that ends before it is done: at the ``at``-th event of a kind."""
    stop = StopAt(when, at)
    run = trainer(recipe, folder, stop, stop=stop)
    assert not run.train()
    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.network.parameters()])


def tuned(conversations, **others):
    """A recipe for an adapter on the bundled model."""
    return Recipe(**{"name": "tuned", "model": "sudoku", "data": ConversationData((str(conversations),), fill="pad"),
                     "max_steps": 4, "batch_size": 3, "adapter": AdapterConfig(r=2, dropout=0.1),
                     "evaluation": Evaluation(every=100, examples=2), **others})


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(sudoku_recipe, tmp_path):
    whole = trainer(sudoku_recipe, tmp_path / "whole")
    assert whole.train()
    assert stopped(sudoku_recipe, tmp_path / "parts", stepped(2)).step == 2
    second = trainer(sudoku_recipe, tmp_path / "parts")
    assert second.step == 2
    assert second.train()
    assert second.step == sudoku_recipe.max_steps
    assert torch.equal(weights(whole), weights(second))
    losses = [[(r.step, r.values["loss"]) for r in read_journal(tmp_path / name) if r.kind == "validation" and "loss"
               in r.values] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_an_adapter_with_dropout_and_an_average_resumes_to_the_bit(conversations, tmp_path):
    recipe = tuned(conversations)
    recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, ema=0.9), epochs=None)
    whole = trainer(recipe, tmp_path / "whole")
    whole.train()
    stopped(recipe, tmp_path / "parts", stepped(3))
    second = trainer(recipe, tmp_path / "parts")
    second.train()
    assert all(torch.equal(tensor, second.optimizers.tensors()[name])
               for name, tensor in whole.optimizers.tensors().items())


def test_micro_batches_train_as_the_whole_batch_does(conversations, tmp_path):
    recipe = dataclasses.replace(tuned(conversations), adapter=AdapterConfig(r=2), max_steps=2)
    found = []
    for size in (None, 1, 2):
        run = trainer(dataclasses.replace(recipe, micro_batch=size), tmp_path / str(size))
        run.train()
        found.append(torch.cat([p.detach().flatten() for p in run.optimizers.parameters.values()]))
    # Adam divides by the gradient's size: rounding decides where that is nearly 0, so most, not all, is compared.
    for other in found[1:]:
        assert (found[0] - other).abs().median() < 1e-7


def test_the_checkpoint_loads_and_generates(recipe, tmp_path):
    trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run").train()
    for name in ("best", "last"):
        model = dgemma.load(tmp_path / "run" / name)
        assert model.generation_config.max_denoising_steps == 2
        assert model.generation_config.eos_token_id == (1, 106, 50)
        assert model.generate("hello", seed=1, max_tokens=5).steps == [2]


def test_the_adapter_loads_and_is_what_was_trained(conversations, tmp_path):
    run = trainer(tuned(conversations), tmp_path / "run")
    run.train()
    model = dgemma.load("sudoku", adapter=tmp_path / "run" / "last")
    for name, adapter in adapters(model.network).items():
        assert torch.equal(adapter.a, adapters(run.network)[name].a)
        assert torch.equal(adapter.b, adapters(run.network)[name].b)
    assert any(bool(adapter.b.abs().sum()) for adapter in adapters(model.network).values())


def test_full_training_keeps_what_is_not_the_network_s_and_freezes_the_router(conversations, tmp_path):
    run = trainer(tuned(conversations, adapter=None, max_steps=2), tmp_path / "run")
    before = dgemma.load("sudoku").network
    run.train()
    after = dgemma.load(tmp_path / "run" / "last").network
    changed = {name for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True)
               if not torch.equal(p, q)}
    assert "layers.0.self_attn.q_proj.weight" in changed
    assert not any(".router." in name for name in changed)
    assert (tmp_path / "run" / "last" / "chat_template.jinja").exists()


def test_a_parameter_to_freeze_that_does_not_exist_is_named(conversations, tmp_path):
    with pytest.raises(DgemmaError, match="no parameter has 'vision'"):
        trainer(tuned(conversations, adapter=None, freeze=("vision",)), tmp_path / "run")


def test_another_models_folder_is_refused(recipe, tmp_path):
    trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run").train()
    model = {**recipe.model, "text_config": {**recipe.model["text_config"], "hidden_size": 24}}
    with pytest.raises(DgemmaError, match=r"state\.safetensors: was made by another model"):
        trainer(dataclasses.replace(recipe, model=model), tmp_path / "run")


def test_a_damaged_state_is_named(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STATE).write_bytes(b"nothing")
    with pytest.raises(DgemmaError, match=r"state\.safetensors: is damaged"):
        trainer(recipe, tmp_path / "run")


def test_a_full_disk_costs_one_save_and_not_the_run(recipe, tmp_path, full_disk):
    saves = itertools.count(1)
    full_disk(lambda path: STATE in path and next(saves) == 2)
    told = Told()
    assert trainer(dataclasses.replace(recipe, save_every=1), tmp_path / "run", told).train()
    assert "No space left on device" in told.notes
    assert [event.step for event in told.events if isinstance(event, Saved)] == [1, 3, 4]
    assert trainer(recipe, tmp_path / "run").step == 4
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_at_the_end_is_an_error_and_the_last_good_state_stays(recipe, tmp_path, full_disk):
    trainer(dataclasses.replace(recipe, max_steps=2), tmp_path / "run").train()
    longer = trainer(recipe, tmp_path / "run")
    full_disk()
    with pytest.raises(DgemmaError, match="No space left"):
        longer.train()
    assert trainer(recipe, tmp_path / "run").step == 2
    assert dgemma.load(tmp_path / "run" / "best").network


def test_a_kill_between_two_renamings_loses_no_checkpoint(recipe, tmp_path):
    trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run").train()
    (tmp_path / "run" / "best").rename(tmp_path / "run" / "best.old")
    trainer(recipe, tmp_path / "run")
    assert dgemma.load(tmp_path / "run" / "best").network
    assert not (tmp_path / "run" / "best.old").exists()


def test_the_preflight_stops_a_run_that_would_go_wrong(whole, recipe, tmp_path, monkeypatch):
    original = trainer_module.shard

    def ignoring(*arguments, **others):
        found = original(*arguments, **others)
        return dataclasses.replace(found, denoise=lambda canvas, cache, soft=None: found.denoise(
            torch.zeros_like(canvas), cache, soft))

    monkeypatch.setattr(trainer_module, "shard", ignoring)
    with pytest.raises(DgemmaError, match=r"preflight: this run would go wrong:\n- canvas is used"):
        trainer(recipe, tmp_path / "run")


class Given(Trainer):
    """A run whose evaluations find these losses, and that keeps the names of what it exported."""

    def __init__(self, *arguments, losses, **options):
        self.losses, self.exported = iter(losses), []
        super().__init__(*arguments, ranks=RANKS, **options)

    def _measured(self):
        values, score = super()._measured()
        return values | {"validation/loss": next(self.losses)}, score

    def _export(self, name, tensors, required=True):
        self.exported.append(name)
        return super()._export(name, tensors, required)


def test_the_best_checkpoint_is_that_of_the_best_evaluation(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, evaluation=Evaluation(every=2))
    run = Given(recipe, tmp_path / "run", losses=[3.0, 1.0, 2.0])
    run.train()
    assert run.exported == ["best", "best", "last"]  # before the first step, after two, and the end
    assert run.best == -1.0


def test_a_task_is_asked_with_the_sampler_and_swept_at_the_end(whole, conversations, tmp_path):
    evaluation = Evaluation(every=2, metric="exact", count=1, examples=1, sweep=(1, 2), settings={"entropy_bound": 1.0})
    run = trainer(tuned(conversations, max_steps=2, evaluation=evaluation), tmp_path / "run")
    run.train()
    records = read_journal(tmp_path / "run")
    assert [r.step for r in records if r.kind == "task"] == [0, 2]
    assert [r.values["max_steps"] for r in records if r.kind == "sweep"] == [1, 2]
    samples = [r.extra["samples"] for r in records if r.kind == "samples"][-1]
    assert samples[0]["reference"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["finished"]
    assert about["trainable"] < about["parameters"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml")[""] == run.recipe


def test_a_metric_without_questions_is_an_error(conversations, tmp_path):
    data = ConversationData((str(conversations),), held_out_share=0.0, fill="pad")
    with pytest.raises(DgemmaError, match="nothing is held out to ask"):
        trainer(tuned(conversations, data=data, evaluation=Evaluation(metric="exact")), tmp_path / "run")


def test_a_changed_recipe_is_told_when_a_run_goes_on(conversations, tmp_path):
    recipe = tuned(conversations, max_steps=1)
    trainer(recipe, tmp_path / "run").train()
    told = Told()
    trainer(dataclasses.replace(recipe, max_steps=2, seed=5), tmp_path / "run", told).close()
    assert "the recipe has changed since: seed was 0, is 5" in told.notes
    assert "resuming at step 1" in told.notes


def test_a_run_that_took_its_steps_with_other_settings_is_not_called_this_recipe_s(recipe, tmp_path):
    short = dataclasses.replace(recipe, max_steps=1)
    trainer(short, tmp_path / "run").train()
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    other = dataclasses.replace(short, optimizer=dataclasses.replace(short.optimizer, lr=1e-4))
    with pytest.raises(DgemmaError, match=r"has taken its 1 steps with other settings \(optimizer.lr was 0.003"):
        trainer(other, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    looked_at = dataclasses.replace(short, evaluation=dataclasses.replace(short.evaluation, examples=3))
    assert trainer(looked_at, tmp_path / "run").train()


def test_settings_that_did_not_exist_when_a_run_was_saved_had_their_defaults(sudoku_recipe, tmp_path):
    folder = RunFolder(tmp_path, sudoku_recipe)
    before = {**folder.settings, "data": {"kind": "sudoku", "bases": 40}}
    assert list(folder.changes(before)) == []
    assert list(folder.changes({**before, "seed": 3})) == ["seed was 3, is 0"]


def test_a_folder_is_one_run_s_until_it_is_over(recipe, tmp_path):
    first = trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run")
    with pytest.raises(DgemmaError, match="another process is training in this folder"):
        trainer(recipe, tmp_path / "run")
    first.train()
    second = trainer(recipe, tmp_path / "run")
    assert second.step == 1
    second.close()
    second.close()
    trainer(recipe, tmp_path / "run").close()


@pytest.mark.parametrize("at", [1, 2])
def test_an_evaluation_that_was_cut_off_is_made_up_for(recipe, tmp_path, at):
    recipe = dataclasses.replace(recipe, evaluation=Evaluation(every=2, examples=2))
    stopped(recipe, tmp_path / "run", working("validating"), at)
    again = trainer(recipe, tmp_path / "run")
    assert again.step == 2 * at
    assert again.train()
    records = [record.step for record in read_journal(tmp_path / "run") if record.kind == "validation"]
    assert records == [0, 2, 4]
    assert trainer(recipe, tmp_path / "run").evaluated == 4


def test_a_sweep_that_was_cut_off_is_made_up_for(conversations, tmp_path):
    evaluation = Evaluation(every=9, metric="exact", count=1, examples=1, sweep=(1, 2),
                            settings={"max_denoising_steps": 3})
    recipe = tuned(conversations, max_steps=1, evaluation=evaluation)
    run = stopped(recipe, tmp_path / "run", working("step sweep"))  # once the first of the sweep is there
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    trained = weights(run)
    again = trainer(recipe, tmp_path / "run")
    assert again.train()
    sweeps = [record.values["max_steps"] for record in read_journal(tmp_path / "run") if record.kind == "sweep"]
    assert sweeps == [1, 1, 2]
    assert torch.equal(weights(again), trained)  # the best was in its place only for so long


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2)], ids=["all", "adapter"])
def test_an_exported_checkpoint_stands_in_for_the_network(conversations, tmp_path, adapter):
    run = trainer(tuned(conversations, max_steps=2, adapter=adapter), tmp_path / "run")
    began = weights(run)
    run.state.export(tmp_path / "begin")
    run.train()
    with run.state.exported(tmp_path / "begin"):
        assert torch.equal(weights(run), began)
    assert not torch.equal(weights(run), began)


def test_a_stop_before_the_first_step_is_no_error(whole, recipe, tmp_path):
    stop, told = threading.Event(), Told()
    stop.set()
    assert not trainer(recipe, tmp_path / "run", told, stop=stop).train()
    assert [type(event) for event in told.events if not isinstance(event, (Noted, Working))] == [
        Started, Ended]
    assert "holds no records yet" in told.events[-1].problem


def test_what_was_measured_before_a_stop_is_recorded(recipe, tmp_path):
    stopped(recipe, tmp_path / "run", stepped(2))
    assert [record.step for record in read_journal(tmp_path / "run") if record.kind == "train"] == [2]


def test_a_run_that_is_longer_than_it_has_to_be_is_finished(recipe, tmp_path):
    trainer(dataclasses.replace(recipe, max_steps=2), tmp_path / "run").train()
    assert trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run").train()


@pytest.mark.parametrize(("evaluation", "message"), [
    ({"metric": "exakt"}, "there is no metric 'exakt'"), ({"metric": "json"}, "needs a reference answer that is JSON"),
    ({"metric": "exact", "settings": {"entropy_bond": 1.0}}, "unknown setting entropy_bond"),
    ({"metric": "exact", "settings": {"entropy_bound": -1.0}}, "evaluation: settings: entropy_bound"),
    ({"metric": "exact", "settings": {"temperature": "hot"}}, "evaluation: settings: temperature must be"),
])
def test_a_metric_that_cannot_work_is_told_before_weights_are_read(conversations, tmp_path, evaluation, message):
    told = Told()
    with pytest.raises(DgemmaError, match=message):
        trainer(tuned(conversations, evaluation=Evaluation(**evaluation)), tmp_path / "run", told)
    assert not any(isinstance(event, Loading) for event in told.events)


def test_the_memory_is_told_before_weights_are_read(conversations, tmp_path):
    told = Told()

    def full(event):
        if isinstance(event, Loading):
            raise DgemmaError("out of memory")

    with pytest.raises(DgemmaError, match="out of memory"):
        trainer(tuned(conversations), tmp_path / "run", told, full)
    assert "memory: about" in told.notes
    assert "it never gets to its full height" in told.notes


def test_reading_weights_shows_how_far_it_is(conversations, tmp_path):
    told = Told()
    trainer(tuned(conversations), tmp_path / "run", told)
    last = [event for event in told.events if isinstance(event, Loading)][-1]
    assert last.done == last.total > 0


@pytest.mark.parametrize(("rank", "written"), [(0, {"preflight.json", "plan.json", ".lock"}), (1, set())])
def test_of_several_processes_only_the_first_writes_what_was_checked(whole, conversations, tmp_path, monkeypatch,
                                                                     rank, written):
    class ArrivedError(Exception):
        pass

    class Alone(Ranks):
        def any(self, flag):
            return flag

    def arrived(*_):
        raise ArrivedError

    monkeypatch.setattr(trainer_module, "shard", lambda network, *_: Passes.of(network))
    monkeypatch.setattr(trainer_module, "Optimizers", arrived)  # what comes after the checks
    with pytest.raises(ArrivedError):
        Trainer(tuned(conversations), tmp_path / "run", ranks=Alone(torch.device("cpu"), rank, 2))
    assert {path.name for path in (tmp_path / "run").iterdir()} == written


def test_a_gguf_file_is_trained_by_an_adapter_only(conversations):
    parts = dataclasses.replace(read_parts("sudoku"), gguf=object())
    with pytest.raises(DgemmaError, match="by an adapter only"):
        state_module.begin(tuned(conversations, adapter=None), parts, RANKS.device)


def test_questions_think_as_the_recipe_says(conversations, tmp_path):
    data = ConversationData((str(conversations),), fill="pad", thinking="on")
    run = trainer(tuned(conversations, data=data, evaluation=Evaluation(metric="exact")), tmp_path / "run")
    assert all(question.thinking for question in run.evaluator.questions)


def test_of_equal_checkpoints_the_one_with_the_lower_loss_is_the_best(conversations, tmp_path):
    recipe = tuned(conversations, evaluation=Evaluation(every=2, metric="exact", count=1))
    Given(recipe, tmp_path / "run", losses=[3.0, 1.0, 2.0]).train()
    records = [(r.step, r.extra["best"]) for r in read_journal(tmp_path / "run") if r.kind == "task"]
    assert records == [(0, True), (2, True), (4, False)]


def test_with_another_metric_or_other_data_the_best_is_chosen_anew(conversations, tmp_path):
    recipe = tuned(conversations, max_steps=1)
    trainer(recipe, tmp_path / "run").train()
    same = trainer(recipe, tmp_path / "run")
    assert same.best < 0
    same.close()
    asked = dataclasses.replace(recipe, evaluation=Evaluation(metric="exact", count=1, examples=2))
    told = Told()
    other = trainer(asked, tmp_path / "run", told)
    assert (other.best != other.best, other.evaluated) == (True, -1)
    other.close()
    assert "the conversations to train on have changed" not in told.notes
    conversations.write_text(conversations.read_text().replace("one", "won"))
    trainer(recipe, tmp_path / "run", told)
    assert "the conversations to train on have changed" in told.notes


def test_a_best_checkpoint_that_cannot_be_written_costs_no_run(recipe, tmp_path, full_disk):
    exports = itertools.count(1)
    full_disk(lambda path: "best" in path.removeprefix(str(tmp_path)) and next(exports) == 2)
    told, recipe = Told(), dataclasses.replace(recipe, evaluation=Evaluation(every=2))
    run = Given(recipe, tmp_path / "run", losses=[3.0, 2.0, 1.0], listeners=[told])
    assert run.train()
    assert run.exported == ["best", "best", "best", "last"]
    assert "going on without this checkpoint" in told.notes


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_and_ends_the_same(talk_data, tmp_path):
    """SIGKILL, several times over; the last good state is never lost."""
    talk_data |= {"max_steps": 40, "save_every": 1, "evaluation": {"every": 7, "examples": 2}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(talk_data))
    for seconds in (0.0, 0.03, 0.11, 0.2):
        kill_after_a_save(path, tmp_path / "run", seconds)
    again = trainer(load_recipe(path)[""], tmp_path / "run")
    assert 4 <= again.step < 40
    again.train()
    whole = trainer(load_recipe(path)[""], tmp_path / "whole")
    whole.train()
    assert again.step == 40
    assert torch.equal(weights(again), weights(whole))


def test_a_run_in_another_thread_tells_what_happens_in_order_and_can_be_stopped(recipe, tmp_path):
    told, stop = Told(), StopAt(stepped(1))
    run = trainer(recipe, tmp_path / "run", told, stop, stop=stop)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join(60)
    names = [type(event).__name__ for event in told.events if not isinstance(event, Noted)]
    assert names == ["Started", "Working", "Evaluated", "Stepped", "Averaged", "Saved", "Ended"]
    assert told.events[-1].step == 1 and not told.events[-1].complete

"""Several processes train what one does. This file is also what each of two processes runs (see `two`)."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dgemma.cache import store
from dgemma.config import FULL, SLIDING, VisionConfig
from dgemma.engine.pictures import PictureEncoder
from dgemma.errors import DgemmaError
from dgemma.nn.adapters import AdapterConfig, attach
from dgemma.nn.vision import Vision
from dgemma.train.batch import collate
from dgemma.train.checks.preflight import run_preflight
from dgemma.train.noise import keyed_noise, noise_key
from dgemma.train.objective import Objective, batch_loss, totals_of
from dgemma.train.parallel.distributed import Ranks, clip_gradients, collect, gathered, joined, shard, spread
from dgemma.train.sights import Medium, PreparedPictures, Sight
from support.pictures import random_picture
from support.reference import random_network, randomise, tiny_config

VOCAB, CANVAS, STEPS = 50, 8, 3
TOWER = VisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=12, position_embedding_size=64)
ONE = Ranks(torch.device("cpu"))

pytestmark = pytest.mark.timeout(600)  # two processes that wait for each other, on a machine that may be busy


@dataclass(frozen=True)
class Example:
    context_ids: list[int]
    prompt_length: int
    canvas_ids: list[int]
    real_length: int
    weights: list[float]
    sights: tuple = ()


@dataclass(frozen=True)
class Case:
    """What is trained; ``piece`` is how many context tokens are encoded at once, and before the first ``pictures``
    canvases is a picture each."""

    kind: str = "full"
    checkpointing: bool = False
    causal_weight: float = 1.0
    examples: int = 6
    piece: int = 1024
    pictures: int = 0

    def network(self, ranks):
        config = tiny_config(num_hidden_layers=2, layer_types=[SLIDING, FULL])
        network = random_network(dataclasses.replace(config, vision=TOWER if self.pictures else None))
        if self.pictures:
            network.attach_vision(Vision(TOWER, config.hidden_size).eval().requires_grad_(False))
            randomise(network.vision, seed=1)
        if self.kind == "full":
            network.requires_grad_(True)
            if network.vision is not None:
                network.vision.requires_grad_(False)
            for layer in network.layers:
                layer.router.requires_grad_(False)
        else:
            if "bf16" in self.kind:
                network.to(torch.bfloat16)
            targets = ("attention", "mlp") if "dora" in self.kind else ("attention", "mlp", "experts")
            attach(network, AdapterConfig(r=4, targets=targets, dora="dora" in self.kind))
        passes = shard(network, ranks, self.checkpointing)
        if self.pictures:
            passes = dataclasses.replace(passes, see=PictureEncoder.of(network).see)
        # A large eps: Adam makes rounding errors of a tiny gradient as large as any other number.
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-3, eps=1e-3)
        return network, passes, optimizer

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)

        def ids(count):
            return torch.randint(VOCAB, (count,), generator=generator).tolist()

        lengths = [5 + (7 * place + step) % 11 for place in range(self.examples)]
        sights = [(sight_of(place + step),) if place < self.pictures else () for place in range(self.examples)]
        room = [sum(sight.stop for sight in own) for own in sights]
        return [Example(ids(length + more), length + more, ids(CANVAS), CANVAS - place % 3, [1.0 + place] * CANVAS, own)
                for place, (length, more, own) in enumerate(zip(lengths, room, sights, strict=True))]


def sight_of(seed):
    """A picture that begins behind two tokens."""
    part = {"type": "image", "image": random_picture(60, 50, seed=seed), "tokens": 70}
    medium = Medium(part, "", PreparedPictures(TOWER), "image 1", "row")
    size = medium.sizes.pictures[0]
    return Sight(medium, 0, 2, size.tokens, (size.width, size.height))


CASES = {
    "full": Case(checkpointing=True),
    "full, only keys and values lead back into the encoder": Case(causal_weight=0.0),
    "adapters, fewer examples than processes": Case("lora", examples=1),
    "dora on bfloat16": Case("bf16 dora", checkpointing=True, examples=3),
    "contexts of several pieces": Case("lora", checkpointing=True, causal_weight=0.0, examples=4, piece=4),
    "pictures, that one process sees": Case(checkpointing=True, examples=4, pictures=2),
    "pictures in contexts of several pieces": Case("lora", causal_weight=0.0, examples=4, piece=4, pictures=1),
}
# Pieces are for reading only: the preflight of that case is that of other adapters.
CHECKED = [name for name, case in CASES.items() if case.piece == Case.piece]
RESUMED = ("full", "adapters, fewer examples than processes")
# In float32 sums in another order are all that differs; bfloat16 rounds what they change.
CLOSE = {name: 1e-2 if "bfloat16" in name else 1e-5 for name in CASES}


def step_of(case, network, passes, optimizer, step, ranks):
    """The loss of one step over all ranks, and the norm of its gradient."""
    objective = Objective(causal_weight=case.causal_weight)
    examples = case.batch(step)
    totals = totals_of([collate(examples)], objective)
    loss = torch.zeros(())
    for part in ranks.share(examples, most=2):
        keys = [noise_key(0, step, part.start + index) for index in range(len(part.items))]
        noise = keyed_noise(objective, keys, CANVAS, VOCAB)
        own, _ = batch_loss(network, collate(part.items), objective, noise, totals, passes)
        own = own * part.weight
        own.backward()
        loss = loss + own.detach()
    norm = clip_gradients(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return ranks.sum({"loss": loss})["loss"].item(), norm


def state_of(network, optimizer, ranks):
    memory = {f"memory/{index}/{key}": value for index, state in optimizer.state_dict()["state"].items()
              for key, value in state.items()}
    return collect({**dict(network.named_parameters()), **memory}, ranks)


def parameters_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("memory/")}


def resume(case, saved, ranks):
    """The first step after ``saved``."""
    network, passes, optimizer = case.network(ranks)
    state = spread(saved, network, ranks)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(state[name])
    memory = defaultdict(dict)
    for name in state.keys() - parameters_of(state).keys():
        _, index, key = name.split("/")
        memory[int(index)][key] = state[name]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(memory)})
    return step_of(case, network, passes, optimizer, STEPS, ranks)


def train(case, ranks):
    """Losses and norms of a few steps, and what the run is then."""
    whole, store.READ_AT_ONCE = store.READ_AT_ONCE, case.piece
    try:
        network, passes, optimizer = case.network(ranks)
        return [step_of(case, network, passes, optimizer, step, ranks) for step in range(STEPS)], (
            state_of(network, optimizer, ranks))
    finally:
        store.READ_AT_ONCE = whole


def alone_while_gathered(ranks):
    """What only the second process computes, and the main one saves, between two steps; and the step after it."""
    network, passes, optimizer = CASES["full"].network(ranks)
    step_of(CASES["full"], network, passes, optimizer, 0, ranks)
    found = torch.zeros(3)
    with gathered(network) as tensors, torch.no_grad():
        if ranks.rank == ranks.world - 1:
            cache = network.new_cache()
            network.encode(torch.arange(9).unsqueeze(0), cache)
            found = network.logits(network.denoise(torch.arange(CANVAS).unsqueeze(0), cache))[0, :3, 0]
        saved = {name: p.clone() for name, p in tensors.items()} if ranks.is_main else {}
    return ranks.sum({"found": found})["found"], saved, step_of(CASES["full"], network, passes, optimizer, 1, ranks)


def preflights(ranks):
    """The preflight of sharded networks: what it found, a loss before and after, and the step after it."""
    found = {}
    for name in CHECKED:
        case = CASES[name]
        network, passes, optimizer = case.network(ranks)
        before = state_of(network, optimizer, ranks)
        checks = run_preflight(network, case.batch(0)[:2], Objective(causal_weight=case.causal_weight), passes=passes)
        after = state_of(network, optimizer, ranks)
        same = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        results = {check.name: check.passed or check.measured for check in checks}
        found[name] = results, same, step_of(case, network, passes, optimizer, 0, ranks)
    return found


def agreements(ranks):
    return {"sum": ranks.sum({"b": torch.tensor([ranks.rank, 2.0]), "a": torch.tensor(1.0)}),
            "stop": [ranks.any(ranks.rank == 1), ranks.any(False)], "main": ranks.from_main(f"rank {ranks.rank}"),
            "parts": ranks.share(list(range(7)), most=2)}


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    saved = torch.load(folder / "one.pt", weights_only=True)
    with joined("cpu") as ranks:
        result = {"runs": {name: train(case, ranks) for name, case in CASES.items()},
                  "resumed": {name: resume(CASES[name], saved[name] if ranks.is_main else {}, ranks)
                              for name in saved},
                  "gathered": alone_while_gathered(ranks), "agreed": agreements(ranks),
                  "preflights": preflights(ranks)}
        ranks.any(False)  # until all have come here
    torch.save(result, folder / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def one():
    return {name: train(case, ONE) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """What two processes found, started as torchrun and accelerate launch do; of each."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({name: one[name][1] for name in RESUMED}, folder / "one.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(sys.path)}
        processes.append(subprocess.Popen([sys.executable, __file__, str(folder)], env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(one, two, name):
    losses, state = one[name]
    main, other = (found["runs"][name] for found in two)
    close = CLOSE[name]
    torch.testing.assert_close(main[0], losses, atol=close, rtol=close)
    assert main[0] == other[0]
    assert other[1] == {}
    assert main[1].keys() == state.keys()
    torch.testing.assert_close(parameters_of(main[1]), parameters_of(state), atol=close, rtol=close)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_saved_on_two_goes_on_on_one_and_the_reverse(one, two, name):
    torch.testing.assert_close(resume(CASES[name], two[0]["runs"][name][1], ONE),
                               two[0]["resumed"][name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resume(CASES[name], one[name][1], ONE), two[1]["resumed"][name], atol=1e-5, rtol=1e-5)


def test_while_gathered_each_process_computes_and_saves_by_itself(two):
    found, saved, after = alone_while_gathered(ONE)
    torch.testing.assert_close(two[0]["gathered"][0], found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two[0]["gathered"][1], saved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two[1]["gathered"][2], after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHECKED)
def test_the_preflight_looks_at_a_sharded_network_and_leaves_it_as_it_was(one, two, name):
    for checks, same, step in (found["preflights"][name] for found in two):
        assert all(found is True for found in checks.values()), checks
        assert len(checks) == (8 if CASES[name].pictures else 7)
        assert same
        torch.testing.assert_close(step, one[name][0][0], atol=CLOSE[name], rtol=CLOSE[name])


def test_processes_agree(two):
    for rank, found in enumerate(result["agreed"] for result in two):
        assert found["sum"]["a"] == 2
        assert found["sum"]["b"].tolist() == [1, 4]
        assert found["stop"] == [True, False]
        assert found["main"] == "rank 0"
        assert found["parts"] == Ranks(torch.device("cpu"), rank, 2).share(list(range(7)), most=2)


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_shares_are_equally_many_small_enough_and_hold_everything_once(count, world, most):
    items = list(range(100, 100 + count))
    shares = [Ranks(torch.device("cpu"), rank, world).share(items, most) for rank in range(world)]
    assert len({len(parts) for parts in shares}) == 1
    assert all(1 <= len(part.items) <= most for parts in shares for part in parts)
    real = [part for parts in shares for part in parts if part.weight]
    assert [item for part in real for item in part.items] == items
    assert all(items[part.start] == part.items[0] for part in real)


def test_a_single_process_needs_no_environment(environment):
    environment(WORLD_SIZE=None)
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
        assert agreements(ranks)["main"] == "rank 0"


def test_half_an_environment_is_an_error(environment):
    environment(RANK=None, LOCAL_RANK=None, MASTER_ADDR=None, MASTER_PORT=None, WORLD_SIZE="2")
    with pytest.raises(DgemmaError, match="WORLD_SIZE=2 but not RANK.*torchrun"), joined("cpu"):
        pass


if __name__ == "__main__":
    work(Path(sys.argv[1]))

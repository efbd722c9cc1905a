"""What was made of forms is kept by its bytes: many large forms, and long answers, do not add up."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from dgemma.constrain import ByteCache, constraint_of, made
from support.constrain_helpers import STOPS, denoise, random_log_probs, walk


@dataclass
class Blob:
    nbytes: int


@pytest.fixture
def empty_cache():
    """The constraints' own cache, for one test alone."""
    made.clear()
    before = made.limit
    yield made
    made.limit = before
    made.clear()


def test_what_was_used_longest_ago_goes_first():
    cache = ByteCache(100)
    for name in "abc":
        cache.put(name, Blob(30))
    assert cache.get("a") is not None
    cache.put("d", Blob(30))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    assert cache.nbytes == 90 and len(cache) == 3


def test_what_is_larger_than_all_room_is_not_kept():
    cache = ByteCache(100)
    cache.put("large", Blob(101))
    cache.put("key", Blob(50), beside=51)
    assert len(cache) == 0
    cache.put("fits", Blob(100))
    assert cache.get("fits") is not None


def test_what_has_grown_is_measured_anew():
    cache, first, second = ByteCache(100), Blob(10), Blob(10)
    cache.put("first", first)
    cache.put("second", second)
    first.nbytes = 95
    assert cache.get("second") is second
    assert cache.get("first") is None


def test_a_key_that_is_put_again_counts_once():
    cache = ByteCache(100)
    for size in (40, 60, 80):
        cache.put("a", Blob(size))
    assert cache.nbytes == 80


def test_many_threads_leave_it_within_its_limit():
    cache = ByteCache(1000)

    def use(number):
        cache.put(number % 50, Blob(90))
        return cache.get((number * 7) % 50)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(2000)))
    assert cache.nbytes <= 1000


def test_a_series_of_large_forms_does_not_add_up(byte_tokenizer, empty_cache):
    empty_cache.limit = 7 * constraint_of({"type": "regex", "regex": "[a-z]{400}"}, byte_tokenizer, STOPS).nbytes
    held = []
    for number in range(12):
        form = {"type": "regex", "regex": f"({number}|[a-z]{{400}}|[0-9 ]{{300}})"}
        constraint_of(form, byte_tokenizer, STOPS)
        held.append((len(empty_cache), empty_cache.nbytes))
    assert all(nbytes <= empty_cache.limit for _, nbytes in held)
    assert 0 < held[-1][0] < 12


def test_the_same_form_is_made_once(byte_tokenizer, empty_cache):
    form = {"type": "choice", "choice": ["a", "b"]}
    first = constraint_of(form, byte_tokenizer, STOPS)
    assert constraint_of(dict(form), byte_tokenizer, STOPS) is first
    assert constraint_of(form, byte_tokenizer, STOPS, thinking=True) is not first


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "regex", "regex": "[a-z]{1,50}(, [a-z]{1,50})*"}])
def test_what_an_answer_makes_known_counts(form, byte_tokenizer, empty_cache):
    constraint = constraint_of(form, byte_tokenizer, STOPS)
    before = constraint.nbytes
    guide = constraint.guide(200)
    scores = random_log_probs(60, byte_tokenizer.vocab_size, torch.Generator().manual_seed(0))
    guide.template(60, 200)
    guide.choose(walk(scores), 60, 200, torch.rand(60, generator=torch.Generator().manual_seed(1)))
    assert constraint.nbytes > before
    assert empty_cache.nbytes >= constraint.nbytes


def test_what_has_grown_too_large_is_begun_anew_for_the_next_answer(byte_tokenizer, empty_cache, monkeypatch):
    constraint = constraint_of({"type": "json_object"}, byte_tokenizer, STOPS)
    answer = denoise(constraint, byte_tokenizer, 60, 16, 3, 1.0)
    grown = constraint.nbytes
    monkeypatch.setattr("dgemma.constrain.guide.MOST_GROWN", 1000)
    constraint.guide(200)
    assert constraint.nbytes < grown
    assert denoise(constraint, byte_tokenizer, 60, 16, 3, 1.0) == answer

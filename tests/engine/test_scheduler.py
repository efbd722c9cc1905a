"""Who comes next, how reading is shared out, what memory allows."""

import pytest

from dgemma.diffusion.sequence import SequenceState
from dgemma.engine.scheduler import FairQueue, Memory, shares
from support.reference import tiny_config


@pytest.fixture
def queue_of(ask):
    """A function that makes a queue of sequences, given as (client, id)."""

    def make(*sequences):
        queue = FairQueue()
        for client, id in sequences:
            queue.push(SequenceState(ask(id=id, client=client), tiny_config()))
        return queue

    return make


def drained(queue):
    return [queue.pop().request.id for _ in range(len(queue))]


def test_one_client_is_served_in_order(queue_of):
    assert drained(queue_of(*[("a", id) for id in range(5)])) == [0, 1, 2, 3, 4]


def test_clients_take_turns_however_much_one_asks(queue_of):
    queue = queue_of(*[("greedy", id) for id in range(5)], ("b", 10), ("b", 11), ("c", 20))
    assert drained(queue) == [0, 10, 20, 1, 11, 2, 3, 4]


def test_what_comes_next_is_what_is_taken(queue_of):
    queue = queue_of(("a", 0), ("b", 1), ("a", 2))
    while len(queue):
        assert queue.peek() is queue.pop()
    assert queue.peek() is None


def test_rows_can_be_taken_out_of_the_middle(queue_of):
    queue = queue_of(("a", 0), ("a", 1), ("b", 2), ("c", 3), ("a", 4))
    gone = queue.remove(lambda sequence: sequence.request.id in (1, 2))
    assert sorted(sequence.request.id for sequence in gone) == [1, 2]
    assert drained(queue) == [0, 3, 4]


@pytest.mark.parametrize(("unread", "budget", "given"), [
    ([], 10, []),
    ([5], 10, [5]),
    ([50], 10, [10]),
    ([3, 100], 10, [3, 7]),
    ([100, 3, 100], 11, [4, 3, 4]),
    ([1, 1, 1], 100, [1, 1, 1]),
    ([4, 4, 4], 2, [0, 1, 1]),
])
def test_reading_is_shared_out_evenly(unread, budget, given):
    assert shares(unread, budget) == given


def test_memory_is_promised_up_to_its_limit_but_one_request_may_always_run():
    memory = Memory(100)
    assert memory.fits(1000)
    memory.reserved = 60
    assert memory.fits(40)
    assert not memory.fits(41)
    assert Memory(None).fits(10**15)


@pytest.fixture
def rows_of(ask):
    """A function that pushes sequences, given as (client, user, id), into a new queue."""

    def make(*sequences):
        queue = FairQueue()
        for client, user, id in sequences:
            queue.push(SequenceState(ask(id=id, client=client, user=user), tiny_config()))
        return queue

    return make


def test_a_client_s_users_take_turns(rows_of):
    queue = rows_of(*[("a", "greedy", id) for id in range(4)], ("a", "x", 10), ("a", "y", 20), ("a", "x", 11))
    assert drained(queue) == [0, 10, 20, 1, 11, 2, 3]


def test_invented_users_do_not_push_another_client_back(rows_of):
    queue = rows_of(*[("a", f"user {id}", id) for id in range(50)], ("b", "", 100), ("b", "", 101), ("b", "me", 102))
    order = drained(queue)
    assert [order.index(id) for id in (100, 102, 101)] == [1, 3, 5]
    assert sorted(order[6:]) == list(range(3, 50))


def test_users_of_one_name_at_two_clients_are_two(rows_of):
    assert drained(rows_of(("a", "me", 0), ("a", "me", 1), ("b", "me", 2))) == [0, 2, 1]


def test_clients_keep_their_turn_however_rows_come_and_go(rows_of, ask):
    queue = rows_of(("a", "x", 0), ("a", "y", 1), ("b", "", 2))
    assert queue.pop().request.id == 0
    queue.push(SequenceState(ask(id=3, client="a", user="x"), tiny_config()))
    assert [sequence.request.id for sequence in queue.remove(lambda sequence: sequence.request.id == 2)] == [2]
    queue.push(SequenceState(ask(id=4, client="b", user="z"), tiny_config()))
    assert len(queue) == 3
    assert drained(queue) == [1, 4, 3]
    assert not list(queue)

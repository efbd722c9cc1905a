"""What battles come to, against values that are known."""

import csv
import io
import json

import pytest

from dgemma.studio.battles import Battle, Contestant, Outcome
from dgemma.studio.results import figures, pairs, to_csv, to_json, wilson

FAST, CAREFUL = Contestant("Fast", options={"max_denoising_steps": 8}), Contestant("Careful")


def battle(verdict, first=FAST, second=CAREFUL, **more):
    info = {"steps": [4, 4], "tokens": 40, "seconds": 2.0}
    return Battle(str(id(object())), "s", more.pop("prompt", "Hi"), Outcome(first, info=info), Outcome(second),
                  status="done", verdict=verdict, **more)


@pytest.mark.parametrize(("won", "of", "low", "high"), [
    # R: prop.test(won, of, correct = FALSE)$conf.int
    (8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (5, 10, 0.2365931, 0.7634069),
    (1, 1, 0.2065493, 1.0), (0, 0, 0.0, 1.0)])
def test_wilsons_interval_is_that_of_r(won, of, low, high):
    assert wilson(won, of) == pytest.approx((low, high), abs=1e-6)


def test_wilsons_bounds_are_where_the_score_test_is_just_refused():
    won, of, z = 37, 90, 1.959963984540054
    for bound in wilson(won, of):
        assert abs(won / of - bound) / (bound * (1 - bound) / of) ** 0.5 == pytest.approx(z)


def test_a_pair_is_the_same_whoever_is_named_first():
    (pair,) = pairs([battle("first"), battle("first", CAREFUL, FAST), battle("second", CAREFUL, FAST), battle("tie"),
                     battle("both bad"), battle(None, blind=False)])
    assert (pair.first.title, pair.second.title) == ("Fast", "Careful")
    assert (pair.won, pair.lost, pair.ties, pair.bad, pair.open) == (2, 1, 1, 1, 1)
    assert pair.share.rate == pytest.approx(2 / 3)
    assert pair.median(0, "steps") == 8 and pairs([battle("tie")])[0].median(1, "seconds") is None


def test_other_settings_are_another_contestant_and_another_name_is_not():
    other = Contestant("Fast", options={"max_denoising_steps": 9})
    renamed = Contestant("Swift", options=FAST.options)
    found = pairs([battle("first", renamed), battle("first"), battle("first", other)])
    assert [(pair.first.title, pair.won) for pair in found] == [("Swift", 2), ("Fast", 1)]


def test_a_blind_battle_counts_nowhere_until_it_is_voted_on():
    assert pairs([battle(None)]) == []


def test_figures_of_an_answer_are_read_from_what_became_of_it():
    assert figures(battle(None).first) == {"steps": 8, "tokens": 40, "tokens_per_forward": 5.0, "seconds": 2.0,
                                           "tokens_per_second": 20.0}
    assert set(figures(battle(None).second).values()) == {None}


def test_the_table_as_csv_holds_no_formula():
    (row,) = csv.DictReader(io.StringIO(to_csv([battle("first", prompt='=HYPERLINK("x")')])))
    assert row["prompt"] == "'=HYPERLINK(\"x\")" and row["verdict"] == "first" and row["first_steps"] == "8"
    assert to_csv([]) == ""


def test_the_table_as_json_has_the_pairs_with_their_intervals():
    known = json.loads(to_json([battle("first"), battle("tie")]))
    assert known["pairs"][0]["win_rate"] == 1.0 and known["pairs"][0]["wilson_95"] == [pytest.approx(0.2065493), 1.0]
    assert known["battles"][0]["first"]["contestant"]["options"] == {"max_denoising_steps": 8}

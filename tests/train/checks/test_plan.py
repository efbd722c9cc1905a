"""The plan of a training run: the question that a recipe asks, the table, and what to change."""

import json

import pytest

from dgemma.errors import DgemmaError
from dgemma.memory import program_bytes
from dgemma.nn.adapters import AdapterConfig
from dgemma.train.checks.plan import memory_plan, stored_types
from support.reference import the_26b, tiny_config


def lines(plan):
    return {line.name: line.nbytes for line in plan.lines}


def test_stored_types_are_those_of_the_checkpoint():
    from dgemma.weights.files import bundled_path

    types = stored_types(bundled_path("sudoku"))
    assert set(types.values()) <= {"F32", "BF16", "F16"} and "layers.0.experts.gate_up_proj" in types


def test_the_26b_trains_packed_in_24_gb():
    plan = memory_plan(the_26b(), weights="Q4_K_M", adapter=AdapterConfig(r=16), context=1024)
    assert lines(plan)["weights"] == pytest.approx(16.8e9, rel=0.01)
    assert lines(plan)["runtime"] > program_bytes(262_144, training=True)
    assert plan.total < 24e9 and plan.advice(24_000_000_000) == ()
    with_experts = memory_plan(the_26b(), weights="Q4_K_M", context=1024,
                               adapter=AdapterConfig(r=16, targets=("attention", "mlp", "experts")))
    advice = with_experts.advice(24_000_000_000)
    assert with_experts.total > 24e9 and [step.change for step in advice] == ["rank 8"] and advice[-1].total < 24e9


def test_advice_is_ordered_and_ends_where_it_fits():
    plan = memory_plan(the_26b(), weights="BF16", adapter=AdapterConfig(), context=1024, micro_batch=4,
                       checkpointing=False)
    advice = plan.advice(24_000_000_000)
    totals = [plan.total, *(step.total for step in advice)]
    assert totals == sorted(totals, reverse=True) and totals[-2] > 24e9 >= totals[-1]
    assert advice[0].change == "checkpointing: on" and advice[-1].change == "the base packed as Q4_K_M"


def test_a_plan_prints_and_is_json():
    plan = memory_plan(tiny_config(), adapter=AdapterConfig(), context=8, ema=True)
    assert f"{plan.total / 1e9:.2f} GB" in plan.text(1) and "does not fit" in plan.text(1)
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["total"] == sum(line["nbytes"] for line in data["lines"]) and data["run"]["context"] == 8


@pytest.mark.parametrize(("change", "named"), [({"context": 0}, "context"), ({"optimizer": "sgd"}, "sgd"),
                                               ({"weights": "Q9"}, "Q9")])
def test_what_cannot_be_planned_is_named(change, named):
    with pytest.raises(DgemmaError, match=named):
        memory_plan(tiny_config(), **{"context": 8, **change})

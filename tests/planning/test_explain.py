"""What a key does and costs, from the schema, the rules and the planner."""

from collections.abc import Sequence

import pytest

from megagpt.config import RunConfig
from megagpt.planning.cost.accelerators import ACCELERATORS
from megagpt.planning.explain import explain, full_key
from megagpt.planning.placement import hosts_of
from megagpt.planning.plan import Limits, Plan, assume, make_plan
from megagpt.planning.rules import RULES
from megagpt.schema.errors import all_keys
from megagpt.utils import UserError
from tests import REPOSITORY

PATH = str(REPOSITORY / "ds_configs" / "gpt2_124m.json")


def planned(items: Sequence[str]) -> Plan:
    rates = assume(ACCELERATORS["H100"], 8)
    return make_plan(PATH, items, hosts_of(8, 8), Limits(80), rates)


def explained(word: str) -> str:
    return explain(word, PATH, [], planned)


def test_costs_are_those_of_the_plan() -> None:
    lines = explained("recompute").splitlines()
    assert lines[0].startswith("megagpt.training.recompute: activations to recompute in backward")
    assert '  values: "none", "selective", "full"; default: "none"' in lines
    for value in ("none", "full"):
        plan = planned([f"megagpt.training.recompute={value}"])
        (row,) = (line.split() for line in lines if line.split()[:1] == [f'"{value}"'])
        assert row[1:3] == [f"{plan.estimate.step_s:.4g}", f"{plan.device_gib:.2f}"]


def test_what_a_key_excludes_is_the_rules_own_text() -> None:
    shown = explained("megagpt.parallel.virtual_stages")
    own = [rule.reason for rule in RULES if rule.key == "megagpt.parallel.virtual_stages"]
    assert own
    assert all(f"some of its values: {reason}" in shown for reason in own)
    assert "2 is refused: it splits the stages of a pipeline" in shown
    assert "acts at ZeRO 3" in explained("sub_group_size")
    assert "0  " in explained("zero_optimization.stage")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("zero_optimization.mics_shard_size", "a key of DeepSpeed"),
        ("megagpt.checkpoint.keep", "cost: none that the planner counts"),
        ("megagpt.parallel", "  megagpt.parallel.tensor: tensor-parallel ranks"),
        ("optimizer.params.lr", "identity: part of what is trained"),
        ("n_layer", "megagpt.model.num_layers: number of transformer blocks"),
    ],
)
def test_every_kind_of_key(word: str, said: str) -> None:
    assert said in explained(word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pin_memory", "several keys end so; give one of zero_optimization.offload_optimizer.pin_"),
        ("megagpt.training.recomputed", 'did you mean "megagpt.training.recompute"'),
    ],
)
def test_an_unclear_key_is_answered_with_those_that_exist(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        full_key(word)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_key_of_the_schema_is_explained() -> None:
    plan = planned([])
    keys = list(dict.fromkeys(all_keys(RunConfig)))
    assert len(keys) > 150
    for key in keys:
        first, *more = explain(key, PATH, [], lambda items: plan).splitlines()
        assert first.startswith(f"{key}: ")
        assert len(first) > len(f"{key}: ")
        assert more

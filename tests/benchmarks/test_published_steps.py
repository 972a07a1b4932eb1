"""The planner's step times beside published ones."""

import statistics

import pytest

from benchmarks.published_steps import DEVICES, of_device, published_steps
from megagpt.planning.cost.accelerators import ACCELERATORS

STEPS = published_steps()


def test_there_are_fifteen_and_their_models_are_those_that_were_trained() -> None:
    assert len(STEPS) >= 15
    for step in STEPS:
        assert step.row["source"]
        published = step.row.get("parameters", step.layout.model.num_parameters)
        assert step.layout.model.num_parameters == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_not_fitted_is_predicted(device: str) -> None:
    """The fitted half has a median error of 0, the other half one of at most 15 %."""
    efficiency = ACCELERATORS[device].efficiency
    assert efficiency is not None
    to_fit, to_predict = of_device(STEPS, device)
    assert abs(statistics.median(step.error(efficiency) for step in to_fit)) < 0.02
    errors = [abs(step.error(efficiency)) for step in to_predict]
    assert statistics.median(errors) < 0.15
    assert max(errors) < 0.3

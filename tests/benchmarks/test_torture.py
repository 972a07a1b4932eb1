"""Random kills, in a short version; the long one is python -m benchmarks.torture."""

from argparse import Namespace

import pytest

from benchmarks.torture import EXECUTIONS, torture


@pytest.mark.slow
@pytest.mark.parametrize("execution", EXECUTIONS[:2])
def test_a_tortured_run_ends_where_an_undisturbed_one_does(
    compiled_ops: None, execution: tuple[int, bool]
) -> None:
    """At ZeRO 1, and at ZeRO 3 with saves in the background."""
    rows = torture(Namespace(minutes=0.5, mean_s=2.0, steps=60, ranks=2, seed=1), [execution])
    assert rows
    assert sum(row["kills"] for row in rows) > 0
    assert sum(row["restarts"] for row in rows) > 0
    assert all(row["bit_equal"] for row in rows)

"""Random kills, in a short version; the long one is python -m benchmarks.torture."""

from argparse import Namespace

import pytest

from benchmarks.torture import torture


@pytest.mark.slow
def test_a_tortured_run_ends_where_an_undisturbed_one_does(compiled_ops: None) -> None:
    rows = torture(Namespace(minutes=0.5, mean_s=2.0, steps=60, ranks=2, stage=1, seed=1))
    assert rows
    assert sum(row["kills"] for row in rows) > 0
    assert sum(row["restarts"] for row in rows) > 0
    assert all(row["bit_equal"] for row in rows)

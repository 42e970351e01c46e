"""Weights of the loss by scale."""
from importlib import import_module

import pytest
from conftest import quick_table

weighing = import_module("experiments.loss_weights")


@pytest.mark.slow
def test_rows_of_the_loss_weights_differ_and_are_kept(cli):
    first, again = (quick_table(cli, "experiments.loss_weights.py") for _ in range(2))
    assert first == again and [row[0] for row in first[1]][:3] == list(weighing.POWERS)
    assert first[1][0][1] != first[1][2][1], "bits of two losses"

"""Weights of the loss by scale."""
from importlib import import_module

import pytest
from conftest import quick_table

weighing = import_module("experiments.loss_weights")


def test_weights_of_the_loss_have_mean_1_and_share_it_as_promised():
    scales = (1, 2, 4)
    token, side, scale = (weighing.weights(scales, power) for power in (0, 1, 2))
    assert token.tolist() == [1.0] * 21
    assert [float(part.sum()) for part in scale.split([1, 4, 16])] == pytest.approx([7, 7, 7])
    assert side.split([1, 4, 16])[1][0] == pytest.approx(2 * side[-1])
    assert side.mean() == pytest.approx(1)


@pytest.mark.slow
def test_rows_of_the_loss_weights_differ_and_are_kept(cli):
    first, again = (quick_table(cli, "experiments.loss_weights.py") for _ in range(2))
    assert first == again and [row[0] for row in first[1]][:3] == list(weighing.POWERS)
    assert first[1][0][1] != first[1][2][1], "bits of two losses"

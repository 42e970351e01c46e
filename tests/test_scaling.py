"""The power law of the size, and the arithmetic of a model."""
from importlib import import_module

import pytest
from conftest import quick_table

scaling = import_module("experiments.scaling")
models = import_module("04_var_transformer")


def test_a_power_law_is_found_again():
    x = [1.0, 2, 5, 10, 30]
    a, half, correlation = scaling.power_law(x, [3 * n ** -0.25 for n in x])
    assert a == pytest.approx(0.25) and half < 1e-6 and correlation == pytest.approx(-1)
    # By hand: logarithms 0, 1, 2 and 0, -1, -1: slope -1/2, residuals 1/6, -1/3, 1/6.
    e = 2.718281828459045
    a, half, _ = scaling.power_law([1, e, e * e], [1, 1 / e, 1 / e])
    assert a == pytest.approx(0.5) and half == pytest.approx(12.71 * (1 / 6 / 2) ** 0.5)


def test_operations_are_counted_by_hand():
    """One token, D = 4, V = 8, hidden 16: qkv 48, projection 16, MLP 128, head 32."""
    var = models.VAR(models.VARConfig(scales=(1,), vocab_size=8, latent_dim=4, depth=1, width=4,
                                      heads=1))
    assert scaling.operations(var) == 6 * (48 + 16 + 128 + 32) + 12 * 4


@pytest.mark.slow
def test_more_parameters_are_more_arithmetic_and_another_loss(cli):
    head, found = quick_table(cli, "experiments.scaling.py")
    sizes, losses = [float(row[1]) for row in found], {row[3] for row in found}
    assert len(found) == 4 and sizes == sorted(sizes) and len(losses) == 4

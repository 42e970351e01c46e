"""Training in float16: the factor on the loss, and that it is part of a run."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.loss_scale import LossScale
from engine.optimizers import orthogonal


@given(bad=st.lists(st.booleans(), max_size=20), interval=st.integers(1, 4))
def test_the_factor_is_that_of_torchs_own_scaler(bad, interval):
    ours = LossScale("float16", interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0 ** 11, growth_interval=interval)
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, loss = torch.optim.SGD([q]), torch.tensor(3.0)
    for overflow in bad:
        assert ours.scale(loss) == theirs.scale(loss)
        p.grad = torch.tensor([1.0, torch.inf if overflow else 2.0])
        q.grad = p.grad.clone()
        ours.unscale([p])
        theirs.unscale_(optimizer)
        assert torch.equal(p.grad, q.grad)
        ours.update(skipped=torch.tensor(overflow))
        theirs.update()
        assert ours.factor == max(theirs.get_scale(), 1)
        if theirs.get_scale() < 1:                         # ours stops there
            return


@pytest.mark.parametrize("size", [2e-7, 1e6])
def test_muons_products_in_float16_do_not_depend_on_the_size_of_the_gradient(size):
    torch.manual_seed(0)
    g = torch.randn(2, 30, 100)
    assert torch.allclose(orthogonal(size * g, torch.float16), orthogonal(g), atol=0.02)

"""Chapter 3: a token attends to its own scale and to coarser ones, and to nothing else.
The graders (exercises/grade_03.py) compare attention itself with slow loops."""
from importlib import import_module

import pytest
import torch
from hypothesis import given, strategies as st

m3 = import_module("03_block_causal_mask")
seeds = st.integers(0, 10_000)
# Sides in any order: neither the mask nor attention assumes that scales grow.
schedules = st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=4).map(tuple)


def length(scales):
    return sum(side * side for side in scales)


def random_qkv(scales, dtype=torch.float64):
    return torch.randn(3, 2, 2, length(scales), 3, dtype=dtype).unbind(0)


def masked(q, k, v, scales, qk_factor=None):
    return m3.attention(q, k, v, m3.block_causal_mask(scales), qk_factor)


@given(scales=schedules)
def test_mask_equals_a_slow_double_loop(scales):
    owner = [k for k, side in enumerate(scales) for _ in range(side * side)]
    assert m3.scale_of_token(scales).tolist() == owner
    found = m3.block_causal_mask(scales)
    assert found.dtype == torch.bool
    assert found.tolist() == [[other <= mine for other in owner] for mine in owner]


@given(scales=schedules)
def test_each_token_attends_to_a_prefix_that_ends_with_its_own_map(scales):
    """Which is why a cache needs no mask."""
    found = iter(m3.block_causal_mask(scales).int().tolist())
    L = length(scales)
    for k, side in enumerate(scales):
        end = length(scales[:k + 1])
        for _ in range(side * side):
            assert next(found) == [1] * end + [0] * (L - end)


def test_worked_examples_next_scale_and_raster_order():
    assert m3.block_causal_mask((1, 2)).int().tolist() == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4
    assert torch.equal(m3.block_causal_mask((1,) * 9), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.08)])
@given(scales=schedules, factor=st.sampled_from([None, 1.0]), seed=seeds)
def test_prefixes_equal_the_mask_in_values_and_gradients(dtype, tolerance, scales, factor, seed):
    torch.manual_seed(seed)
    weight = torch.randn(2, 2, length(scales), 3).double()
    qkv = [x.requires_grad_() for x in random_qkv(scales, dtype)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    found = m3.block_causal_attention(*qkv, scales, factor)
    expected = masked(*exact, scales, factor)
    assert found.dtype == dtype and torch.allclose(found.double(), expected, atol=tolerance)
    gradients = torch.autograd.grad((found * weight).sum(), qkv)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip(gradients, wanted):
        assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("attend", [masked, m3.block_causal_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(scales=schedules.filter(lambda scales: len(scales) > 1), seed=seeds)
def test_finer_scales_move_coarser_outputs_by_exactly_zero(attend, dtype, scales, seed):
    torch.manual_seed(seed)
    before = random_qkv(scales, dtype)
    n = length(scales[:-1])
    after = [torch.cat([x[:, :, :n], 3 * torch.randn_like(x[:, :, n:])], 2) for x in before]
    moved = (attend(*after, scales) - attend(*before, scales)).abs().amax((0, 1, 3))
    assert not moved[:n].any() and moved[n:].all()

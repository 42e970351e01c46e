"""Chapter 3: everyone looks at their own scale and at coarser ones, and at nothing else."""
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, strategies as st

m3 = import_module("03_block_causal_mask")
seeds = st.integers(0, 10_000)
# Any order of sides: a mask does not care whether scales grow.
schedules = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
# 10 x 10 alone is a full group.
grouped = st.lists(st.sampled_from([1, 2, 3, 6, 7, 10, 11]), min_size=1, max_size=4).map(tuple)
PAPER = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def length(scales):
    return sum(side * side for side in scales)


def random_qkv(scales, dtype=torch.float64, batch=1):
    return torch.randn(3, batch, 2, length(scales), 3, dtype=dtype).unbind(0)


@given(scales=schedules)
def test_mask_equals_a_slow_double_loop(scales):
    owner = [k for k, side in enumerate(scales) for _ in range(side * side)]
    assert m3.scale_of_token(scales).tolist() == owner
    found = m3.block_causal_mask(scales)
    assert found.dtype == torch.bool
    assert found.tolist() == [[mine >= other for other in owner] for mine in owner]


def test_worked_examples_next_scale_and_raster_order():
    assert m3.block_causal_mask((1, 2)).int().tolist() == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4
    assert torch.equal(m3.block_causal_mask((1,) * 9), torch.ones(9, 9).tril().bool())


def slow_attention(q, k, v, scales, factor):
    """softmax(factor q.k) v, one query at a time over the keys it may see."""
    owner, out = m3.scale_of_token(scales).tolist(), torch.zeros_like(v)
    for b, head, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = [j for j in range(len(owner)) if owner[j] <= owner[i]]
        weight = [math.exp(factor * float(q[b, head, i] @ k[b, head, j])) for j in seen]
        for j, w in zip(seen, weight):
            out[b, head, i] += w / sum(weight) * v[b, head, j]
    return out


@given(scales=schedules.filter(lambda scales: length(scales) < 20),
       factor=st.sampled_from([None, 1.0, 0.3]), seed=seeds)
def test_both_ways_equal_the_slow_loop(scales, factor, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(scales)
    expected = slow_attention(q, k, v, scales, factor or 1 / math.sqrt(3))
    reference = m3.attention(q, k, v, m3.block_causal_mask(scales), factor)
    assert torch.allclose(reference, expected, atol=1e-12)
    assert torch.allclose(m3.block_causal_attention(q, k, v, scales, None, factor), expected,
                          atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [          # bfloat16 goes another way on a CPU
    (torch.float64, 1e-12), (torch.bfloat16, 0.08)])
@given(scales=grouped, factor=st.sampled_from([None, 1.0]), given_mask=st.booleans(), seed=seeds)
def test_prefixes_equal_the_reference_in_values_and_gradients(dtype, tolerance, scales, factor,
                                                              given_mask, seed):
    torch.manual_seed(seed)
    mask, weight = m3.block_causal_mask(scales), torch.randn(2, 2, length(scales), 3).double()
    qkv = [x.requires_grad_() for x in random_qkv(scales, dtype, batch=2)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    reference = m3.attention(*exact, mask, factor)
    found = m3.block_causal_attention(*qkv, scales, mask if given_mask else None, factor)
    assert found.dtype == dtype and torch.allclose(found.double(), reference, atol=tolerance)
    gradients = zip(torch.autograd.grad((found * weight).sum(), qkv),
                    torch.autograd.grad((reference * weight).sum(), exact))
    for a, b in gradients:
        assert torch.allclose(a.double(), b, rtol=0, atol=tolerance * max(1, b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(scales=grouped.filter(lambda scales: len(scales) > 1), seed=seeds)
def test_finer_scales_move_coarser_outputs_by_exactly_zero(dtype, scales, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(scales, dtype)
    before = m3.block_causal_attention(q, k, v, scales)
    for first in range(1, len(scales)):
        n = length(scales[:first])
        fresh = [torch.cat([x[:, :, :n], 3 * torch.randn_like(x[:, :, n:])], 2) for x in (q, k, v)]
        after = m3.block_causal_attention(*fresh, scales)
        assert torch.equal(after[:, :, :n], before[:, :, :n])
        assert not torch.equal(after[:, :, n:], before[:, :, n:])


def written_by_slices(node, seen):
    """Numbers that the gradients of slices write: each has the size of what it was cut from."""
    if node is None or node in seen:
        return 0
    seen.add(node)
    own = math.prod(node._saved_self_sym_sizes) if node.name() == "SliceBackward0" else 0
    return own + sum(written_by_slices(parent, seen) for parent, _ in node.next_functions)


@pytest.mark.parametrize("scales, most", [(PAPER, 5), ((1, 2, 3, 4, 6, 8), 2)])
def test_gradients_of_prefixes_write_few_tensors_of_full_size(scales, most):
    """Cut from the whole, ten prefixes would write 28 of them, and as many again to add them up."""
    q, k, v = (x.requires_grad_() for x in random_qkv(scales))
    y = m3.block_causal_attention(q, k, v, scales)
    assert q.numel() < written_by_slices(y.grad_fn, set()) <= most * q.numel()

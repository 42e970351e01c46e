"""Chapter 3: a token attends to its own map and to coarser ones, and to nothing else.

The course's graders (exercises/grade_03.py) compare attention with slow loops, and a
property in exercises/properties.py finds leaks in float32. These tests add bfloat16."""
from importlib import import_module

import pytest
import torch
from hypothesis import given, strategies as st

m3 = import_module("03_block_causal_mask")
# Sides in any order: neither the mask nor attention assumes that scales grow.
schedules = st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=4).map(tuple)


@given(scales=schedules)
def test_mask_equals_a_slow_double_loop(scales):
    owner = [k for k, side in enumerate(scales) for _ in range(side * side)]
    assert m3.scale_of_token(scales).tolist() == owner
    mask = m3.block_causal_mask(scales)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[other <= mine for other in owner] for mine in owner]


def test_worked_examples_next_scale_and_raster_order():
    assert m3.block_causal_mask((1, 2)).int().tolist() == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4
    assert torch.equal(m3.block_causal_mask((1,) * 9), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.08)])
@given(scales=schedules, seed=st.integers(0, 10_000))
def test_prefixes_equal_the_mask_and_neither_leaks(dtype, tolerance, scales, seed):
    torch.manual_seed(seed)
    scale, mask = m3.scale_of_token(scales), m3.block_causal_mask(scales)
    q, k, v = torch.randn(3, 2, 2, len(scale), 3, dtype=dtype)     # (B, heads, L, d) each
    exact = m3.attention(q.double(), k.double(), v.double(), mask)
    found = m3.block_causal_attention(q, k, v, scales)
    assert found.dtype == dtype and torch.allclose(found.double(), exact, atol=tolerance)
    finest = scale == len(scales) - 1
    new_k = torch.where(finest[:, None], 3 * torch.randn_like(k), k)
    new_v = torch.where(finest[:, None], 3 * torch.randn_like(v), v)
    new = m3.block_causal_attention(q, new_k, new_v, scales)
    assert torch.equal((new != found).any(-1).any(0).any(0), finest)
    moved = m3.attention(q, new_k, new_v, mask) != m3.attention(q, k, v, mask)
    assert torch.equal(moved.any(-1).any(0).any(0), finest)

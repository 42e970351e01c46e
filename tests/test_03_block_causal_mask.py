"""Chapter 3: a token attends to its own map and to coarser ones, and to nothing else.

The course's graders (exercises/grade_03.py) compare attention with slow loops, and a
property in exercises/properties.py finds leaks in float32. These tests add bfloat16."""
from importlib import import_module

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


@given(scales=schedules, seed=st.integers(0, 10_000))
def test_prefixes_equal_the_mask_and_neither_leaks_in_half_precision(scales, seed):
    torch.manual_seed(seed)
    scale, mask = m3.scale_of_token(scales), m3.block_causal_mask(scales)
    q, k, v = torch.randn(3, 2, 2, len(scale), 3).bfloat16()       # (B, heads, L, d) each
    exact = m3.attention(q.double(), k.double(), v.double(), mask)
    finest = scale == len(scales) - 1
    new_k = torch.where(finest[:, None], 3 * torch.randn_like(k), k)
    new_v = torch.where(finest[:, None], 3 * torch.randn_like(v), v)
    for attend, how in ((m3.attention, mask), (m3.block_causal_attention, scales)):
        found = attend(q, k, v, how)
        assert found.dtype == q.dtype and torch.allclose(found.double(), exact, atol=0.08)
        moved = (attend(q, new_k, new_v, how) != found).any(-1).any(0).any(0)        # (L,)
        assert torch.equal(moved, finest)

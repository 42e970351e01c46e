"""Chapter 3: everyone looks at their own scale and at coarser ones, and at nothing else."""
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, strategies as st

mask = import_module("03_block_causal_mask")
seeds = st.integers(0, 10_000)
# Any order of sides: a mask does not care whether scales grow.
schedules = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)
ways = ["dense_attention", "masked_attention", "prefix_attention", "block_causal_attention"]


def length(scales):
    return sum(side * side for side in scales)


def random_qkv(scales, dtype=torch.float32):
    return torch.randn(3, 2, 2, length(scales), 3, dtype=dtype).unbind(0)


# ---------------------------------------------------------------------------- the mask


@given(scales=schedules)
def test_mask_equals_a_slow_double_loop(scales):
    owner = [k for k, side in enumerate(scales) for _ in range(side * side)]
    expected = [[owner[j] <= owner[i] for j in range(len(owner))] for i in range(len(owner))]
    assert mask.scale_of_token(scales).tolist() == owner
    found = mask.block_causal_mask(scales)
    assert found.dtype == torch.bool and found.tolist() == expected


def test_mask_of_the_worked_example():
    assert mask.block_causal_mask((1, 2)).int().tolist() == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4


@given(scales=schedules)
def test_mask_is_reflexive_and_transitive(scales):
    may = mask.block_causal_mask(scales)
    assert may.diagonal().all()
    two_steps = (may.float() @ may.float()) > 0
    assert torch.equal(two_steps, may)                # a friend's friend is a friend, no more


@given(scales=schedules)
def test_rows_see_as_many_tokens_as_there_are_up_to_their_scale(scales):
    rows = mask.block_causal_mask(scales).sum(1).tolist()
    expected = [length(scales[:k + 1]) for k, side in enumerate(scales) for _ in range(side * side)]
    assert rows == expected


@given(scales=schedules)
def test_mask_of_the_first_scales_is_the_corner_of_the_whole(scales):
    for k in range(1, len(scales) + 1):
        n = length(scales[:k])
        corner = mask.block_causal_mask(scales)[:n, :n]
        assert torch.equal(mask.block_causal_mask(scales[:k]), corner)


@given(n=st.integers(1, 30))
def test_raster_order_is_lower_triangular(n):
    assert torch.equal(mask.block_causal_mask((1,) * n), torch.ones(n, n).tril().bool())


# ---------------------------------------------------------------------------- attention


def slow_attention(q, k, v, scales, scale):
    """softmax(scale q.k) v, one query at a time over the keys it may see."""
    owner = mask.scale_of_token(scales).tolist()
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(len(owner)):
                seen = [j for j in range(len(owner)) if owner[j] <= owner[i]]
                weight = [math.exp(scale * float(q[b, head, i] @ k[b, head, j])) for j in seen]
                for j, w in zip(seen, weight):
                    out[b, head, i] += w / sum(weight) * v[b, head, j]
    return out


@pytest.mark.parametrize("way", ways)
@given(scales=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
       scale=st.sampled_from([None, 1.0, 0.3]), grad=st.booleans(), seed=seeds)
def test_every_way_equals_the_slow_loop(way, scales, scale, grad, seed):
    torch.manual_seed(seed)
    q, k, v = (x[:1] for x in random_qkv(scales, torch.float64))
    with torch.set_grad_enabled(grad):                # the fastest way depends on this
        found = getattr(mask, way)(q, k, v, scales, scale)
    expected = slow_attention(q, k, v, scales, scale or 1 / math.sqrt(3))
    assert torch.allclose(found, expected, atol=1e-12)


@given(scales=schedules, seed=seeds)
def test_all_ways_agree_in_values_and_gradients(scales, seed):
    torch.manual_seed(seed)
    qkv = [x.requires_grad_() for x in random_qkv(scales, torch.float64)]
    weight = torch.randn(2, 2, length(scales), 3, dtype=torch.float64)
    outputs = [getattr(mask, way)(*qkv, scales) for way in ways]
    gradients = [torch.autograd.grad((y * weight).sum(), qkv) for y in outputs]
    for y, gradient in zip(outputs[1:], gradients[1:]):
        assert torch.allclose(y, outputs[0], atol=1e-12)
        for a, b in zip(gradient, gradients[0]):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("scales", [(1,) * 300, (1, 2, 4, 16), (1,) * 20])
@pytest.mark.parametrize("grad", [False, True])
def test_long_and_raster_sequences_agree_with_the_dense_reference(scales, grad):
    torch.manual_seed(0)
    q, k, v = random_qkv(scales)
    with torch.set_grad_enabled(grad):
        found = mask.block_causal_attention(q, k, v, scales)
        assert torch.allclose(found, mask.dense_attention(q, k, v, scales), atol=1e-5)


@pytest.mark.parametrize("way", ways)
@given(scales=schedules.filter(lambda s: len(s) > 1), grad=st.booleans(), seed=seeds)
def test_finer_scales_move_coarser_outputs_by_exactly_zero(way, scales, grad, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(scales)
    attend = getattr(mask, way)
    with torch.set_grad_enabled(grad):
        before = attend(q, k, v, scales)
        for first in range(1, len(scales)):
            n = length(scales[:first])
            fresh = [torch.cat([x[:, :, :n], 3 * torch.randn_like(x[:, :, n:])], 2)
                     for x in (q, k, v)]
            after = attend(*fresh, scales)
            assert torch.equal(after[:, :, :n], before[:, :, :n])
            assert not torch.equal(after[:, :, n:], before[:, :, n:])


@pytest.mark.parametrize("scales", [(1,) * 20, (1,) * 300])
@pytest.mark.parametrize("grad", [False, True])
def test_raster_outputs_never_see_later_tokens(scales, grad):
    torch.manual_seed(0)
    q, k, v = random_qkv(scales)
    with torch.set_grad_enabled(grad):
        before = mask.block_causal_attention(q, k, v, scales)
        for n in (1, 7, len(scales) - 1):
            fresh = [torch.cat([x[:, :, :n], torch.randn_like(x[:, :, n:])], 2) for x in (q, k, v)]
            after = mask.block_causal_attention(*fresh, scales)
            assert torch.equal(after[:, :, :n], before[:, :, :n])


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("grad", [False, True])
def test_the_first_token_of_a_block_sees_the_last_of_its_block(way, grad):
    torch.manual_seed(0)
    scales = (1, 2, 3)
    q, k, v = random_qkv(scales)
    attend = getattr(mask, way)
    for side, begin, end in [(2, 1, 5), (3, 5, 14)]:
        changed = v.clone()
        changed[:, :, end - 1] += 1
        with torch.set_grad_enabled(grad):
            moved = attend(q, k, changed, scales) - attend(q, k, v, scales)
        assert (moved[:, :, begin:end].abs() > 1e-4).all(), f"side {side} is blind inside its block"


@pytest.mark.parametrize("device, grad, scales, way", [
    ("cpu", True, (1, 2, 3), "dense_attention"), ("meta", True, (1, 2, 3), "masked_attention"),
    ("meta", True, (1, 2, 16), "prefix_attention"), ("meta", False, (1, 2, 3), "prefix_attention"),
    ("cpu", False, (1, 2, 3), "prefix_attention")])
def test_which_way_is_taken(monkeypatch, device, grad, scales, way):
    """Short sequences are trained under the mask; "meta" stands for a GPU."""
    taken = []
    for name in ways[:3]:
        def spy(*args, name=name, real=getattr(mask, name)):
            taken.append(name)
            return real(*args)
        monkeypatch.setattr(mask, name, spy)
    q = torch.empty(1, 2, length(scales), 4, device=device)
    with torch.set_grad_enabled(grad):
        assert mask.block_causal_attention(q, q, q, scales).shape == q.shape
    assert taken == [way]


def test_the_mask_is_made_once_and_where_it_is_needed():
    first, elsewhere = [mask.mask_on(torch.device(name), (1, 2, 5)) for name in ("cpu", "meta")]
    assert torch.equal(first, mask.block_causal_mask((1, 2, 5))) and elsewhere.device.type == "meta"
    assert mask.mask_on(torch.device("cpu"), (1, 2, 5)) is first
    assert mask.mask_on(torch.device("cpu"), (1, 5, 2)) is not first

"""Chapter 1: where codes start, how they learn from a batch, and signs as codes.

The course's graders (exercises/grade_01.py) compare Lloyd's algorithm, nearest codes, the
losses, the EMA update and residual_quantize with slow loops. These tests cover the rest."""
import math
from copy import deepcopy
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from conftest import same
from hypothesis import given, strategies as st

vq = import_module("01_vq")
seeds = st.integers(0, 10_000)


def placed(codes, **options):
    """A quantizer with these codes (V, C)."""
    codes = torch.as_tensor(codes, dtype=torch.float32)
    quantizer = vq.VectorQuantizer(*codes.shape, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
        quantizer.sums.copy_(codes)
        quantizer.initialised.fill_(True)
    return quantizer


def test_worked_examples_of_levels():
    assert vq.uniform_levels(torch.tensor([0., 8., 1.]), 4).tolist() == [1, 3, 5, 7]
    assert vq.equal_mass_levels(torch.tensor([9., 0., 1., 3.]), 2).tolist() == [0.5, 6]


@given(n=st.integers(1, 9), vocab_size=st.integers(1, 9), seed=seeds)
def test_codes_start_once_on_different_vectors_if_there_are_enough(n, vocab_size, seed):
    torch.manual_seed(seed)
    quantizer, x = vq.VectorQuantizer(vocab_size, 4), 5 + torch.randn(n, 4)
    quantizer.start_on_data([x * torch.nan])
    assert not quantizer.initialised
    quantizer.start_on_data([x])
    distance, chosen = torch.cdist(quantizer.codebook, x).min(1)
    assert (distance < 0.06 * x.norm(dim=1).max()).all()             # noise of 1 %
    if vocab_size <= n:
        assert len(chosen.unique()) == vocab_size
    assert len(quantizer.codebook.unique(dim=0)) == vocab_size
    assert torch.equal(quantizer.sums, quantizer.codebook)
    before = deepcopy(quantizer.state_dict())
    quantizer.start_on_data([x + 50])
    assert same(quantizer.state_dict(), before)


def test_small_groups_get_as_many_codes_as_large_ones():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(400, 2)
    quantizer.start_on_data([torch.ones(1, 2), torch.full((30, 10, 2), 3.)])
    assert 160 < (quantizer.codebook[:, 0] < 2).sum() < 240


def test_worked_example_of_learning_from_two_groups():
    quantizer = placed([[0.], [8.]], decay=0.5, revive=False)
    groups = [torch.tensor([[2.]]), torch.tensor([[[1.], [6.]]])]
    quantizer.learn(groups, [torch.tensor([0]), torch.tensor([[0, 1]])])
    assert quantizer.codebook.tolist() == [[1], [7]]       # (0 + 2 + 1) / 3, (8 + 6) / 2


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_an_unused_code_is_revived_once_and_a_non_finite_batch_changes_nothing(way):
    torch.manual_seed(0)
    quantizer, x = placed([[0., 0.], [1., 1.], [900., 900.]], learn=way), torch.randn(30, 2)
    quantizer.hits[2] = 1e-4
    quantizer.sums[2] = 9.0
    before = deepcopy(quantizer.state_dict())
    idx = quantizer.nearest(x)
    quantizer.learn([torch.where(torch.arange(60).view(30, 2) == 15, math.nan, x)], [idx])
    assert same(quantizer.state_dict(), before)
    quantizer.learn([x], [idx])
    revived = quantizer.codebook[2].clone()
    assert (x - revived).norm(dim=1).min() < 0.1           # it lies on one of the vectors
    for _ in range(5):                       # stale sums and hits would carry it away again
        quantizer.learn([50 + torch.randn(30, 2)], [torch.tensor([0, 1] * 15)])
        assert torch.allclose(quantizer.codebook[2], revived, rtol=1e-5)


def test_revived_codes_go_where_the_error_is_and_stay_for_a_while():
    torch.manual_seed(0)
    quantizer = placed([[0., 0.]] * 4 + [[90., 90.]] * 3, decay=0.9)
    quantizer.hits[4:] = 0
    far = torch.tensor([[5., 0.], [0., 5.], [5., 5.]])               # 3 vectors of 203
    x = torch.cat([0.01 * torch.randn(200, 2), far])
    quantizer.learn([x], [quantizer.nearest(x)])
    assert (torch.cdist(far, quantizer.codebook[4:]).min(1).values < 0.5).all()
    assert (quantizer.hits[4:] > 0.5 * quantizer.hits[:4].mean()).all()


def test_processes_sum_their_statistics_and_share_the_drawn_codes(monkeypatch):
    """All-reduce doubles, as if both processes had the same batch; broadcast brings 7."""
    torch.manual_seed(0)
    start, x = torch.randn(6, 2), torch.randn(20, 2)
    whole, part = placed(start), placed(start)
    idx = whole.nearest(x)
    whole.learn([x, x], [idx, idx])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7))
    part.learn([x], [idx])
    assert torch.allclose(part.hits, whole.hits)
    assert torch.allclose(part.codebook, whole.codebook, atol=1e-6)
    fresh = vq.VectorQuantizer(6, 2)
    fresh.start_on_data([x])
    assert (fresh.codebook == 7).all()
    before = part.codebook.clone()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.fill_(math.nan))
    part.learn([x], [idx])                   # the other process had a non-finite batch
    assert torch.equal(part.codebook, before)


@given(bits=st.integers(1, 6), seed=seeds)
def test_lookup_free_nearest_is_the_nearest_of_all_sign_patterns(bits, seed):
    torch.manual_seed(seed)
    quantizer, x = vq.LookupFreeQuantizer(bits), torch.randn(2, 5, bits)
    signs = torch.cartesian_prod(*[torch.tensor([-1., 1.])] * bits).view(-1, bits)
    codes = signs.flip(1) / math.sqrt(bits)               # (V, C), bit 0 changes fastest
    assert torch.allclose(quantizer.codebook, codes)
    distances = (x[:, :, None] - codes).square().sum(-1)             # (2, 5, V)
    assert torch.equal(quantizer.nearest(x), distances.argmin(-1))


@pytest.mark.parametrize("bits", [3, 16])
def test_the_entropy_loss_prefers_certainty_and_even_usage_of_codes_not_of_bits(bits):
    torch.manual_seed(0)
    quantizer = vq.LookupFreeQuantizer(bits, entropy=0.2)
    signs = torch.cartesian_prod(*[torch.tensor([-9., 9.])] * bits)  # (V, C): all codes
    opposite = torch.stack([signs[1], -signs[1]] * 4)      # all bits are used, two codes
    even, two, one, unsure = map(quantizer.extra_loss, (
        signs, opposite, signs[:1].expand(8, bits), signs / 9e3))
    groups = max(bits // 8, 1)                             # of eight bits each
    assert even.item() == pytest.approx(-0.2 * bits * math.log(2), rel=1e-4)
    assert two.item() == pytest.approx(-0.2 * groups * math.log(2), abs=1e-4)
    assert one.item() == pytest.approx(0, abs=1e-4)
    assert unsure.item() == pytest.approx(0, abs=1e-3)

"""Chapter 1: rounding finds the nearest code, and the codes learn where they are needed.

Lloyd's algorithm, the losses, the EMA update and residual_quantize are compared with slow loops
by the course's graders (exercises/grade_01.py); here is what those leave out."""
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

vq = import_module("01_vq")
sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)


def placed(codes, **options):
    """A quantizer whose codes (V, C) lie where the test wants them."""
    codes = torch.as_tensor(codes, dtype=torch.float32)
    quantizer = vq.VectorQuantizer(*codes.shape, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
        quantizer.sums.copy_(codes)
        quantizer.initialised.fill_(True)
    return quantizer


def learn(quantizer, x, indices=None):
    """One step on the vectors x (N, C); without indices they use their nearest codes."""
    indices = quantizer.nearest(x) if indices is None else torch.as_tensor(indices)
    quantizer.learn([x], [indices])


def same(one, other):
    other = other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def vector_under(codes, x):
    """The vector that each code was placed on: within noise of 1 %, at most 6 %. -> (V,)"""
    distance, chosen = torch.cdist(codes, x).min(1)
    assert (distance < 0.06 * x.norm(dim=1).max()).all(), "a code lies on no vector"
    return chosen


# -- Numbers and vectors -------------------------------------------------------------------

def test_worked_examples_of_levels():
    assert vq.uniform_levels(torch.tensor([0., 8., 1.]), 4).tolist() == [1, 3, 5, 7]
    assert vq.equal_mass_levels(torch.tensor([9., 0., 1., 3.]), 2).tolist() == [0.5, 6]
    x = torch.tensor([-9., 0.4, 0.6, 9.])
    assert vq.round_to(x, torch.tensor([0., 1., 4.])).tolist() == [0, 0, 1, 2]


@given(n=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
def test_nearest_is_the_closest_of_all_codes_and_lookup_returns_it(n, vocab_size, dim, seed):
    torch.manual_seed(seed)
    # With whole numbers distances are exact, so even ties can be checked.
    quantizer = placed(torch.randint(-3, 4, (vocab_size, dim)))
    x = torch.randint(-4, 5, (2, n, dim)).float()
    idx = quantizer.nearest(x)
    assert idx.shape == (2, n) and idx.dtype == torch.int64
    distances = (x[:, :, None] - quantizer.codebook).square().sum(-1)        # (2, n, V)
    code = quantizer.lookup(idx)
    assert torch.equal((x - code).square().sum(-1), distances.amin(-1))
    assert torch.equal(code, quantizer.codebook[idx])


# -- Where codes start ---------------------------------------------------------------------

@given(n=st.integers(1, 9), vocab_size=st.integers(1, 9), seed=seeds)
def test_codes_start_on_vectors_and_share_none_unless_they_must(n, vocab_size, seed):
    torch.manual_seed(seed)
    quantizer = vq.VectorQuantizer(vocab_size, 4)
    x = 5 + torch.randn(n, 4)
    quantizer.start_on_data([x])
    chosen = vector_under(quantizer.codebook, x)
    if vocab_size <= n:
        assert len(chosen.unique()) == vocab_size
    assert len(quantizer.codebook.unique(dim=0)) == vocab_size    # no two codes are equal
    assert torch.equal(quantizer.sums, quantizer.codebook)


def test_codes_start_once_on_finite_data_and_a_checkpoint_keeps_its_own():
    quantizer, other = vq.VectorQuantizer(4, 3), vq.VectorQuantizer(4, 3)
    other.load_state_dict(quantizer.state_dict())
    quantizer.start_on_data([torch.full((9, 3), math.nan)])
    assert same(quantizer, other)
    quantizer.start_on_data([torch.ones(9, 3)])
    assert quantizer.initialised and (quantizer.codebook - 1).abs().max() < 0.06
    other.load_state_dict(quantizer.state_dict())
    other.start_on_data([torch.full((9, 3), 50.)])
    assert same(quantizer, other)


def test_small_groups_get_as_many_codes_as_large_ones():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(400, 2)                 # one vector in 301 gets half of them
    quantizer.start_on_data([torch.ones(1, 2), torch.full((30, 10, 2), 3.)])
    assert 160 < (quantizer.codebook[:, 0] < 2).sum() < 240


# -- How codes learn -----------------------------------------------------------------------

@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_worked_example_of_learning_from_two_groups(way):
    quantizer = placed([[0.], [8.], [5.]], learn=way, decay=0.5, revive=False)
    groups = [torch.tensor([[2.]]), torch.tensor([[[1.], [6.]]])]
    quantizer.learn(groups, [torch.tensor([0]), torch.tensor([[0, 1]])])
    # hits: (1 + 2) / 2, (1 + 1) / 2, (1 + 0) / 2; sums: (0 + 2 + 1) / 2, (8 + 6) / 2, 5 / 2
    assert quantizer.hits.tolist() == [1.5, 1, 0.5]
    assert quantizer.sums.tolist() == [[1.5], [7], [2.5]]
    moved = [[1], [7], [5]] if way == "ema" else [[0], [8], [5]]
    assert quantizer.codebook.tolist() == moved


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(way):
    quantizer = placed([[0., 0.], [1., 1.], [900., 900.]], learn=way)
    quantizer.hits[2] = 1e-4                               # it would be revived
    before = placed(torch.zeros(3, 2), learn=way)
    before.load_state_dict(quantizer.state_dict())
    x = torch.randn(30, 2)
    x[7, 1] = math.nan
    learn(quantizer, x, [0] * 30)
    assert same(quantizer, before)


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_a_revived_code_stays_where_it_was_revived(way):
    torch.manual_seed(0)
    quantizer = placed([[0., 0.], [1., 1.], [900., 900.]], learn=way)
    quantizer.hits[2] = 1e-4
    quantizer.sums[2] = 9.0
    x = torch.randn(30, 2)
    learn(quantizer, x)
    vector_under(quantizer.codebook[2:], x)                # it moved onto one of the vectors
    revived = quantizer.codebook[2].clone()
    for _ in range(5):                                     # no vector is near: nothing uses it
        learn(quantizer, 50 + torch.randn(30, 2), [0, 1] * 15)
        assert torch.allclose(quantizer.codebook[2], revived, rtol=1e-5)


def test_codes_in_use_are_never_revived():
    one, two = (placed([[0.], [10.], [20.]], revive=revive) for revive in (False, True))
    for quantizer in (one, two):
        for _ in range(20):
            learn(quantizer, torch.tensor([[1.], [9.], [21.], [19.]]))
    assert same(one, two)


def on_two_ranks(monkeypatch, work):
    """Run work(rank) in two threads whose collectives meet at a barrier, as processes do."""
    barrier, tensors, here = threading.Barrier(2, timeout=10), {}, threading.local()

    def start(rank):
        here.rank = rank
        work(rank)

    def meet(tensor, combine):
        tensors[here.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(combine(tensors[0], tensors[1]))
        barrier.wait()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: meet(x, torch.add))
    monkeypatch.setattr(dist, "broadcast", lambda x, source: meet(x, lambda *both: both[source]))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, (0, 1)))


@pytest.mark.parametrize("way", ["ema", "gradient"])
@pytest.mark.parametrize("revive", [False, True])
def test_two_processes_keep_one_codebook(way, revive, monkeypatch):
    torch.manual_seed(0)
    start, batches = torch.randn(6, 2), torch.randn(5, 2, 20, 2)             # (step, rank, N, C)
    whole, *ranks = (placed(start, learn=way, decay=0.7, revive=revive) for _ in range(3))
    for quantizer in (whole, *ranks):
        quantizer.hits[5] = 1e-4 if revive else 1.0
    for x in batches:
        learn(whole, x.flatten(0, 1))
    on_two_ranks(monkeypatch, lambda rank: [learn(ranks[rank], x[rank]) for x in batches])
    assert same(*ranks)
    before = placed(start, learn=way)
    before.load_state_dict(ranks[0].state_dict())
    broken = batches[0].clone()
    broken[1, 3] = math.nan                                # in one of the two processes
    on_two_ranks(monkeypatch, lambda rank: learn(ranks[rank], broken[rank]))
    assert same(ranks[0], before) and same(ranks[1], before)
    if not revive:                                         # what is revived is drawn
        assert torch.allclose(ranks[0].codebook, whole.codebook, atol=1e-5)
        assert torch.allclose(ranks[0].hits, whole.hits, atol=1e-5)
    fresh = [vq.VectorQuantizer(6, 2) for _ in range(2)]
    on_two_ranks(monkeypatch, lambda rank: fresh[rank].start_on_data([batches[0, rank]]))
    assert fresh[0].initialised and torch.equal(fresh[0].codebook, fresh[1].codebook)


# -- Signs ---------------------------------------------------------------------------------

@given(bits=st.integers(1, 6), seed=seeds)
def test_lookup_free_nearest_is_the_nearest_of_all_sign_patterns(bits, seed):
    torch.manual_seed(seed)
    quantizer, every = vq.LookupFreeQuantizer(bits), torch.arange(2 ** bits)
    signs = [[1.0 if index >> c & 1 else -1.0 for c in range(bits)] for index in every.tolist()]
    codes = torch.tensor(signs) / math.sqrt(bits)          # of length 1
    assert torch.allclose(quantizer.codebook, codes)
    assert torch.equal(quantizer.nearest(quantizer.lookup(every)), every)
    x = torch.randn(2, 5, bits)
    distances = (x[:, :, None] - codes).square().sum(-1)
    assert torch.equal(quantizer.nearest(x), distances.argmin(-1))


def test_entropy_term_prefers_even_usage_and_certainty():
    quantizer = vq.LookupFreeQuantizer(3, entropy=0.2)
    sure = 9 * quantizer.codebook
    even, one, unsure = map(quantizer.extra_loss, (sure, sure[5].expand(8, 3), sure / 180))
    assert even.item() == pytest.approx(-0.2 * math.log(2), abs=1e-4)
    assert one.item() == pytest.approx(0, abs=1e-4)
    assert unsure.item() == pytest.approx(0, abs=1e-3) and unsure > even

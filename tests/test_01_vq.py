"""Chapter 1: rounding finds the nearest code, and the codes learn where they are needed."""
import math
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

vq = import_module("01_vq")
sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)


def placed(codes, **options):
    """A quantizer whose codes lie where the test wants them, past its start on data."""
    codes = torch.as_tensor(codes, dtype=torch.float32)
    quantizer = vq.VectorQuantizer(*codes.shape, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
        quantizer.sums.copy_(codes)
        quantizer.initialised.fill_(True)
    return quantizer


def learn(quantizer, x, indices=None, accepted=True):
    """One step on the vectors x (N, C), which use their nearest codes unless indices say others."""
    indices = quantizer.nearest(x) if indices is None else torch.as_tensor(indices)
    quantizer.observe([x], [indices])
    quantizer.update(torch.tensor(accepted))


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name])
               for name, value in one.state_dict().items())


# -- Numbers ---------------------------------------------------------------------------------------

def test_levels_of_worked_examples():
    assert vq.uniform_levels(torch.tensor([0., 8., 1.]), 4).tolist() == [1, 3, 5, 7]
    assert vq.equal_mass_levels(torch.tensor([9., 0., 1., 3.]), 2).tolist() == [0.5, 6]
    assert vq.round_to(torch.tensor([-9., 0.4, 0.6, 9.]), torch.tensor([0., 1., 4.])).tolist() == [
        0, 0, 1, 2]


@given(levels=sizes, extra=st.integers(0, 30), seed=seeds)
def test_lloyd_starts_at_equal_mass_never_gets_worse_and_ends_on_means(levels, extra, seed):
    torch.manual_seed(seed)
    x = torch.randn(levels + extra) ** 3
    assert torch.equal(vq.lloyd_levels(x, levels, 0), vq.equal_mass_levels(x, levels))
    errors = []
    for iterations in (0, 1, 2, 3, 100):
        centres = vq.lloyd_levels(x, levels, iterations)
        idx = vq.round_to(x, centres)
        errors.append(float((x - centres[idx]).double().square().mean()))
    for before, after in zip(errors, errors[1:]):
        assert after <= before * (1 + 1e-5) + 1e-9
    for i in idx.unique():
        assert torch.allclose(centres[i], x[idx == i].mean(), atol=1e-4)


# -- Vectors ---------------------------------------------------------------------------------------

@given(n=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
def test_nearest_is_the_closest_of_all_codes_and_lookup_returns_it(n, vocab_size, dim, seed):
    torch.manual_seed(seed)
    # Whole numbers: distances are exact, so even ties can be checked.
    quantizer = placed(torch.randint(-3, 4, (vocab_size, dim)))
    x = torch.randint(-4, 5, (2, n, dim)).float()
    idx = quantizer.nearest(x)
    assert idx.shape == (2, n) and idx.dtype == torch.int64
    distances = (x[:, :, None] - quantizer.codebook).square().sum(-1)        # (2, n, V)
    code = quantizer.lookup(idx)
    assert torch.equal((x - code).square().sum(-1), distances.amin(-1))
    assert torch.equal(code, quantizer.codebook[idx])


def test_straight_through_is_the_code_forwards_and_the_identity_backwards():
    torch.manual_seed(1)
    x, code = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    weight, x_hat = torch.randn(5, 4), vq.straight_through(x, code)
    (x_hat * weight).sum().backward()
    assert torch.allclose(x_hat, code, atol=1e-6)
    assert torch.equal(x.grad, weight) and code.grad is None


@given(n=sizes, dim=sizes, seed=seeds)
def test_commitment_moves_the_vectors_and_the_codebook_loss_the_codes(n, dim, seed):
    torch.manual_seed(seed)
    for loss, moved, still in ((vq.commitment_loss, 0, 1), (vq.codebook_loss, 1, 0)):
        pair = [torch.randn(n, dim, requires_grad=True) for _ in range(2)]
        difference = (pair[moved] - pair[still]).detach()
        value = loss(*pair)
        value.backward()
        assert torch.allclose(value, difference.square().mean())
        assert torch.allclose(pair[moved].grad, 2 * difference / (n * dim))
        assert pair[still].grad is None


# -- Where codes start -----------------------------------------------------------------------------

def vector_under(codes, x):
    """Which vector each code was placed on: within a nudge of about 1 %, 6 % at the very most."""
    close = ((codes[:, None] - x).abs() <= 0.06 * x.abs()).all(-1)           # (V, N)
    assert close.any(1).all(), "a code lies on no vector"
    return close.float().argmax(1)


@given(n=st.integers(1, 9), vocab_size=st.integers(1, 9), seed=seeds)
def test_codes_start_on_data_vectors_and_share_none_unless_they_must(n, vocab_size, seed):
    torch.manual_seed(seed)
    quantizer = vq.VectorQuantizer(vocab_size, 4)
    x = 5 + torch.randn(n, 4)
    quantizer.start_on_data([x])
    chosen = vector_under(quantizer.codebook, x)
    if vocab_size <= n:
        assert len(chosen.unique()) == vocab_size
    assert len(quantizer.codebook.unique(dim=0)) == vocab_size   # no code is wasted as a twin
    assert torch.equal(quantizer.sums, quantizer.codebook)


def test_codes_start_on_data_until_a_step_was_accepted():
    quantizer = vq.VectorQuantizer(4, 3)
    for accepted, value in ((False, 50.), (True, 1.)):
        assert not quantizer.started
        quantizer.start_on_data([torch.full((9, 3), value)])
        assert quantizer.started and (quantizer.codebook / value - 1).abs().max() < 0.06
        learn(quantizer, quantizer.codebook, range(4), accepted)
    again = vq.VectorQuantizer(4, 3)
    again.load_state_dict(quantizer.state_dict())          # codes of a checkpoint stay
    again.start_on_data([torch.full((9, 3), 50.)])
    assert quantizer.started and quantizer.initialised and same(quantizer, again)


@pytest.mark.parametrize("vocab_size, small, large, least, most", [
    (400, 1, 300, 160, 240),               # one vector in 301 gets half of the codes
    (40, 50, 5000, 10, 28)])               # none is taken twice; by chance it would be 0.4 of 40
def test_small_groups_get_as_many_codes_as_large_ones(vocab_size, small, large, least, most):
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(vocab_size, 2)
    quantizer.start_on_data([torch.ones(small, 2), torch.full((large // 10, 10, 2), 3.)])
    assert least < (quantizer.codebook[:, 0] < 2).sum() < most


# -- How codes learn -------------------------------------------------------------------------------

@given(vocab_size=sizes, dim=sizes, decay=st.sampled_from([0.0, 0.5, 0.9]), seed=seeds,
       way=st.sampled_from(["ema", "gradient"]))
def test_moving_average_steps_equal_a_slow_loop(vocab_size, dim, decay, seed, way):
    torch.manual_seed(seed)
    quantizer = placed(torch.randn(vocab_size, dim), learn=way, decay=decay, revive=False)
    codes = list(quantizer.codebook.detach().clone())
    sums, hits = list(codes), [1.0] * vocab_size
    for _ in range(3):
        groups = [torch.randn(1, 2, dim), torch.randn(4, dim), torch.randn(3, dim)]
        indices = [quantizer.nearest(x) for x in groups]
        quantizer.observe(groups[:2], indices[:2])         # one batch in two parts
        quantizer.observe(groups[2:], indices[2:])
        quantizer.update()
        for code in range(vocab_size):
            mine = torch.cat([x[idx == code] for x, idx in zip(groups, indices)])
            hits[code] = decay * hits[code] + (1 - decay) * len(mine)
            sums[code] = decay * sums[code] + (1 - decay) * mine.sum(0)
            if way == "ema" and hits[code] > 1e-3:
                codes[code] = sums[code] / hits[code]
    assert torch.allclose(quantizer.codebook, torch.stack(codes), atol=1e-4)
    assert torch.allclose(quantizer.hits, torch.tensor(hits), atol=1e-4)


@pytest.mark.parametrize("way", ["ema", "gradient"])
@pytest.mark.parametrize("value, accepted", [(1.0, False), (math.nan, True)])
def test_a_refused_step_leaves_no_trace_in_any_later_one(way, value, accepted):
    ends = []
    for refused in (True, False):
        quantizer = placed([[0., 0.], [1., 1.], [900., 900.]], learn=way)
        quantizer.hits[2] = 1e-4                           # to be revived
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(30, 2)
            if refused:
                learn(quantizer, value * x, [0] * 30, accepted)
            torch.manual_seed(step)                        # what is revived is drawn
            learn(quantizer, x)
        ends.append(quantizer)
    assert same(*ends) and (ends[0].hits != 1).all()


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_a_revived_code_stays_where_it_was_revived(way):
    torch.manual_seed(0)
    quantizer = placed([[0., 0.], [1., 1.], [900., 900.]], learn=way)
    quantizer.hits[2] = 1e-4
    quantizer.sums[2] = 9.0
    x = torch.randn(30, 2)
    learn(quantizer, x)
    vector_under(quantizer.codebook[2:], x)                # it jumped onto one of the vectors
    revived = quantizer.codebook[2].clone()
    for _ in range(5):                                     # nobody uses it, and no vector is near
        learn(quantizer, 50 + torch.randn(30, 2), [0, 1] * 15)
        assert torch.allclose(quantizer.codebook[2], revived, rtol=1e-5)


def test_codes_in_use_are_never_revived():
    one, two = (placed([[0.], [10.], [20.]], revive=revive) for revive in (False, True))
    for quantizer in (one, two):
        for _ in range(20):
            learn(quantizer, torch.tensor([[1.], [9.], [21.], [19.]]))
    assert same(one, two)


@pytest.mark.parametrize("revive", [False, True])
def test_statistics_are_summed_and_revived_codes_shared_among_processes(monkeypatch, revive):
    """A second process that always has the same numbers doubles every sum."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(dist, "broadcast", lambda x, source: x.fill_(7))
    quantizer = placed([[0.], [10.]], decay=0.5, revive=revive)
    quantizer.hits[1] = 1e-4
    learn(quantizer, torch.tensor([[1.], [3.]]), [0, 0])
    assert quantizer.hits[0] == 2.5 and quantizer.sums[0] == 4
    assert (quantizer.codebook[1] == 7) == revive


# -- Residuals and signs ---------------------------------------------------------------------------

@given(n=sizes, vocab_size=sizes, dim=sizes, depth=st.integers(0, 5), shared=st.booleans(),
       seed=seeds)
def test_each_level_quantizes_what_is_left_and_x_hat_is_the_sum(n, vocab_size, dim, depth, shared,
                                                                seed):
    torch.manual_seed(seed)
    levels = [vq.VectorQuantizer(vocab_size, dim) for _ in range(6)]
    levels = levels[:1] * 6 if shared else levels
    x = torch.randn(n, dim)
    x_hat, indices = vq.residual_quantize(x, levels[0] if shared else levels, depth)
    assert len(indices) == depth
    rest = x
    for level, idx in zip(levels, indices):
        distances = torch.cdist(rest, level.codebook)
        chosen = distances.gather(1, idx[:, None])[:, 0]
        assert torch.allclose(chosen, distances.amin(1), atol=1e-5)
        rest = rest - level.codebook[idx]
    assert torch.allclose(x_hat, x - rest, atol=1e-5)


@given(bits=st.integers(1, 6), seed=seeds)
def test_lookup_free_nearest_is_the_nearest_of_all_sign_codes(bits, seed):
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
    even_and_sure = 9 * quantizer.codebook
    one_and_sure = 9 * quantizer.codebook[5].expand(8, 3)
    even_but_unsure = 0.05 * quantizer.codebook
    even, one, unsure = map(quantizer.extra_loss, (even_and_sure, one_and_sure, even_but_unsure))
    assert even.item() == pytest.approx(-0.2 * math.log(2), abs=1e-4)
    assert one.item() == pytest.approx(0, abs=1e-4)
    assert unsure.item() == pytest.approx(0, abs=1e-3) and unsure > even

"""Chapter 1: rounding finds the nearest code, and the codes learn where they are needed."""
import itertools
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


def learn(quantizer, groups, indices, accepted=True):
    quantizer.observe(groups, indices)
    quantizer.update(torch.tensor(accepted))


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def squared_error(x, centres):
    return float((x - centres[vq.round_to(x, centres)]).double().square().mean())


def test_levels_of_worked_examples():
    assert vq.uniform_levels(torch.tensor([0., 8., 1.]), 4).tolist() == [1, 3, 5, 7]
    assert vq.equal_mass_levels(torch.tensor([9., 0., 1., 3.]), 2).tolist() == [0.5, 6]
    assert vq.round_to(torch.tensor([-9., 0.4, 0.6, 9.]), torch.tensor([0., 1., 4.])).tolist() == [
        0, 0, 1, 2]


@given(levels=sizes, extra=st.integers(0, 30), seed=seeds)
def test_lloyd_error_never_rises_and_ends_below_equal_mass(levels, extra, seed):
    torch.manual_seed(seed)
    x = torch.randn(levels + extra) ** 3
    errors = [squared_error(x, vq.lloyd_levels(x, levels, n)) for n in range(6)]
    assert errors[0] == pytest.approx(squared_error(x, vq.equal_mass_levels(x, levels)))
    for before, after in zip(errors, errors[1:]):
        assert after <= before * (1 + 1e-5) + 1e-9


def test_lloyd_really_improves_and_ends_on_the_means_of_its_buckets():
    torch.manual_seed(0)
    x = torch.randn(500)
    centres = vq.lloyd_levels(x, 4, 300)
    idx = vq.round_to(x, centres)
    means = torch.stack([x[idx == i].mean() for i in range(4)])
    assert torch.allclose(centres, means, atol=1e-4)
    assert squared_error(x, centres) < 0.9 * squared_error(x, vq.equal_mass_levels(x, 4))


@given(n=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
def test_nearest_equals_a_slow_loop(n, vocab_size, dim, seed):
    torch.manual_seed(seed)
    # Whole numbers: distances are exact, so even ties can be checked.
    quantizer = placed(torch.randint(-3, 4, (vocab_size, dim)))
    x = torch.randint(-4, 5, (2, n, dim)).float()
    idx = quantizer.nearest(x)
    assert idx.shape == (2, n) and idx.dtype == torch.int64
    for b, i in itertools.product(range(2), range(n)):
        distances = [sum((float(x[b, i, c]) - float(code[c])) ** 2 for c in range(dim))
                     for code in quantizer.codebook]
        assert distances[idx[b, i]] == min(distances)


@given(n=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
def test_a_code_is_its_own_nearest_code(n, vocab_size, dim, seed):
    torch.manual_seed(seed)
    quantizer = vq.VectorQuantizer(vocab_size, dim)
    idx = torch.randint(vocab_size, (n, 2))
    codes = quantizer.lookup(idx)
    assert codes.shape == (n, 2, dim)
    assert torch.equal(codes[0, 1], quantizer.codebook[idx[0, 1]])
    assert torch.equal(quantizer.nearest(codes), idx)


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
        assert len(set(chosen.tolist())) == vocab_size
    assert len(quantizer.codebook.unique(dim=0)) == vocab_size   # no code is wasted as a twin
    assert torch.equal(quantizer.sums, quantizer.codebook) and bool((quantizer.hits == 1).all())


def test_codes_start_on_data_until_a_step_was_accepted():
    quantizer = vq.VectorQuantizer(4, 3)
    for accepted, value in ((False, 50.), (True, 1.)):
        assert not quantizer.started
        quantizer.start_on_data([torch.full((9, 3), value)])
        assert quantizer.started and (quantizer.codebook / value - 1).abs().max() < 0.06
        learn(quantizer, [quantizer.codebook], [torch.arange(4)], accepted)
    before, again = snapshot(quantizer), vq.VectorQuantizer(4, 3)
    again.load_state_dict(before)                     # a checkpoint's codes stay where they are
    again.start_on_data([torch.full((9, 3), 50.)])
    assert quantizer.started and quantizer.initialised and same(before, again.state_dict())


def test_small_groups_get_as_many_codes_as_large_ones():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(400, 2)
    quantizer.start_on_data([torch.ones(1, 1, 2), torch.full((10, 30, 2), 3.)])
    share = float((quantizer.codebook[:, 0] < 2).float().mean())
    assert 0.4 < share < 0.6                          # one vector in 301, half of the codes
    quantizer = vq.VectorQuantizer(40, 2)             # enough vectors: none is taken twice
    quantizer.start_on_data([torch.ones(50, 2), torch.full((5000, 2), 3.)])
    assert 10 <= (quantizer.codebook[:, 0] < 2).sum() <= 28, "by chance it would be 0.4 of 40"


@given(vocab_size=sizes, dim=sizes, decay=st.sampled_from([0.0, 0.5, 0.9]), seed=seeds)
def test_moving_average_steps_equal_a_slow_loop(vocab_size, dim, decay, seed):
    torch.manual_seed(seed)
    quantizer = placed(torch.randn(vocab_size, dim), decay=decay, revive=False)
    codes = quantizer.codebook.double().tolist()
    sums, hits = [list(c) for c in codes], [1.0] * vocab_size
    for _ in range(3):
        groups = [torch.randn(1, 2, dim), torch.randn(4, dim)]
        indices = [quantizer.nearest(g) for g in groups]
        learn(quantizer, groups, indices)
        users = [(x, i) for g, idx in zip(groups, indices)
                 for x, i in zip(g.reshape(-1, dim).tolist(), idx.flatten().tolist())]
        for code in range(vocab_size):
            mine = [x for x, i in users if i == code]
            hits[code] = decay * hits[code] + (1 - decay) * len(mine)
            for c in range(dim):
                sums[code][c] = decay * sums[code][c] + (1 - decay) * sum(x[c] for x in mine)
            if hits[code] > 1e-3:
                codes[code] = [s / hits[code] for s in sums[code]]
    assert torch.allclose(quantizer.codebook, torch.tensor(codes), atol=1e-4)
    assert torch.allclose(quantizer.hits, torch.tensor(hits), atol=1e-4)


def test_neither_unused_codes_nor_a_nan_spoil_the_codebook():
    torch.manual_seed(0)
    quantizer, first = placed([[0., 0.], [100., -100.]], decay=0.5, revive=False), torch.zeros(10)
    for step in range(200):                           # hits fall to 0.5 ** 199: 0 in float32
        x = torch.randn(10, 2) if step != 5 else torch.full((10, 2), torch.nan)
        learn(quantizer, [x], [first.long()])
    assert quantizer.hits[1] == 0
    assert torch.allclose(quantizer.codebook[1], torch.tensor([100., -100.]))
    assert quantizer.codebook.isfinite().all()


def test_a_revived_code_stays_where_it_was_revived():
    torch.manual_seed(0)
    quantizer = placed([[0., 0.], [1., 1.], [900., 900.]])
    quantizer.hits[2] = 1e-4
    quantizer.sums[2] = 9.0
    x = torch.randn(30, 2)
    learn(quantizer, [x], [quantizer.nearest(x)])
    vector_under(quantizer.codebook[2:], x)           # it jumped onto one of the vectors
    revived = quantizer.codebook[2].clone()
    for _ in range(5):                                # nobody uses it yet; no vector is near it
        elsewhere = 50 + torch.randn(30, 2)
        learn(quantizer, [elsewhere], [torch.arange(30) % 2])
        assert torch.allclose(quantizer.codebook[2], revived, rtol=1e-5)


def test_codes_in_use_are_never_revived():
    torch.manual_seed(0)
    one, two = (placed([[0.], [10.], [20.]], revive=revive) for revive in (False, True))
    x = torch.tensor([[1.], [9.], [21.], [19.]])
    for quantizer in (one, two):
        for _ in range(20):
            learn(quantizer, [x], [quantizer.nearest(x)])
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("way", ["ema", "gradient"])
@pytest.mark.parametrize("revive", [False, True])
def test_a_collapsed_codebook_recovers_by_revival_and_not_without(way, revive):
    torch.manual_seed(0)
    quantizer = placed(100 + torch.randn(32, 4), learn=way, decay=0.8, revive=revive)
    x = torch.randn(256, 4)
    for _ in range(30):
        learn(quantizer, [x], [quantizer.nearest(x)])
    used = len(quantizer.nearest(x).unique())
    assert used > 28 if revive else used < 4


@pytest.mark.parametrize("way", ["all_reduce", "broadcast"])
def test_statistics_are_summed_and_revived_codes_shared_among_processes(monkeypatch, way):
    """A second process that always has the same numbers doubles every sum."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(dist, "broadcast", lambda x, source: x.fill_(7))
    quantizer = placed([[0.], [10.]], decay=0.5, revive=way == "broadcast")
    quantizer.hits[1] = 1e-4
    learn(quantizer, [torch.tensor([[1.], [3.]])], [torch.tensor([0, 0])])
    assert quantizer.hits[0] == 2.5 and quantizer.sums[0] == 4
    assert (quantizer.codebook[1] == 7) == (way == "broadcast")


@given(n=sizes, vocab_size=sizes, dim=sizes, depth=st.integers(0, 5), seed=seeds)
def test_residual_x_hat_is_the_sum_of_its_codes(n, vocab_size, dim, depth, seed):
    torch.manual_seed(seed)
    quantizer, x = vq.VectorQuantizer(vocab_size, dim), torch.randn(n, dim)
    x_hat, indices = vq.residual_quantize(x, quantizer, depth)
    assert len(indices) == depth
    rest = x.clone()
    for idx in indices:
        distances = (rest[:, None] - quantizer.codebook).square().sum(-1)
        chosen = distances.gather(1, idx[:, None])[:, 0]
        assert torch.allclose(chosen, distances.amin(1), atol=1e-5)
        rest = rest - quantizer.codebook[idx]
    assert torch.allclose(x_hat, x - rest, atol=1e-5)


def test_a_list_of_quantizers_has_one_for_each_level():
    levels = [placed([[0.], [8.]]), placed([[0.], [2.]]), placed([[-0.5], [1.]])]
    x_hat, indices = vq.residual_quantize(torch.tensor([[9.5], [2.]]), levels, 2)
    assert x_hat.tolist() == [[10.], [2.]] and [i.tolist() for i in indices] == [[1, 0], [1, 1]]
    assert vq.residual_quantize(torch.tensor([[9.5]]), levels, 3)[0].item() == 9.5


@given(bits=st.integers(1, 6), seed=seeds)
def test_lookup_free_nearest_is_the_nearest_of_all_sign_codes(bits, seed):
    torch.manual_seed(seed)
    quantizer = vq.LookupFreeQuantizer(bits)
    codes = torch.tensor([[1.0 if index >> c & 1 else -1.0 for c in range(bits)]
                          for index in range(2 ** bits)]) / math.sqrt(bits)
    assert torch.allclose(quantizer.codebook, codes)
    assert torch.allclose(codes.norm(dim=1), torch.ones(2 ** bits))
    x = torch.randn(2, 5, bits)
    distances = (x[:, :, None] - codes).square().sum(-1)
    assert torch.equal(quantizer.nearest(x), distances.argmin(-1))
    every = torch.arange(2 ** bits)
    assert torch.equal(quantizer.nearest(quantizer.lookup(every)), every)


def test_entropy_term_prefers_even_usage_and_certainty():
    quantizer = vq.LookupFreeQuantizer(3, entropy=0.1)
    even_and_sure = 9 * quantizer.codebook
    one_and_sure = 9 * quantizer.codebook[5].expand(8, 3)
    even_but_unsure = 0.05 * quantizer.codebook
    even, one, unsure = map(quantizer.extra_loss, (even_and_sure, one_and_sure, even_but_unsure))
    assert even.item() == pytest.approx(-0.1 * math.log(2), abs=1e-4)
    assert one.item() == pytest.approx(0, abs=1e-4)
    assert unsure.item() == pytest.approx(0, abs=1e-3) and unsure > even
    twice = vq.LookupFreeQuantizer(3, entropy=0.2)
    assert torch.allclose(twice.extra_loss(even_and_sure), 2 * even)


@pytest.mark.parametrize("make", [lambda: vq.VectorQuantizer(4, 2, learn="by heart"),
                                  lambda: vq.LookupFreeQuantizer(0),
                                  lambda: vq.LookupFreeQuantizer(25),
                                  lambda: vq.QUANTIZERS["lfq"].build(7, 3, "ema")])
def test_bad_arguments_raise_value_error(make):
    with pytest.raises(ValueError):
        make()

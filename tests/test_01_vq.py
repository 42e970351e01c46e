"""Chapter 1: rounding finds the nearest code, and the codes learn where they are needed."""
import itertools
import math
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def learn(quantizer, groups, indices):
    quantizer.observe(groups, indices)
    quantizer.update()


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------- numbers


def squared_error(x, centres):
    return float((x - centres[vq.round_to(x, centres)]).double().square().mean())


def test_uniform_and_equal_mass_levels_of_worked_examples():
    assert vq.uniform_levels(torch.tensor([0., 8., 1.]), 4).tolist() == [1, 3, 5, 7]
    assert vq.equal_mass_levels(torch.tensor([9., 0., 1., 3.]), 2).tolist() == [0.5, 6]


def test_round_to_picks_the_nearest_centre():
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


# ---------------------------------------------------------------------------- nearest, lookup


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


def test_any_number_of_leading_dimensions_will_do():
    quantizer = vq.VectorQuantizer(4, 3).eval()
    for shape in [(3,), (0, 3), (2, 1, 2, 3)]:
        x_hat, idx, _ = quantizer(torch.ones(shape))
        assert x_hat.shape == shape and idx.shape == shape[:-1]


# ---------------------------------------------------------------------------- forward, loss


@pytest.mark.parametrize("make", [lambda: vq.VectorQuantizer(6, 4),
                                  lambda: vq.VectorQuantizer(6, 4, learn="gradient"),
                                  lambda: vq.LookupFreeQuantizer(4)])
@pytest.mark.parametrize("training", [False, True])
def test_forwards_the_code_backwards_straight_through(make, training):
    torch.manual_seed(1)
    quantizer = make().train(training)
    x = torch.randn(5, 4, requires_grad=True)
    quantizer(x.detach())                             # in training: past the start on data
    codes = quantizer.codebook.detach().clone()
    x_hat, idx, _ = quantizer(x)
    weight = torch.randn(5, 4)
    (x_hat * weight).sum().backward()
    assert torch.allclose(x_hat, codes[idx], atol=1e-6)
    assert torch.equal(x.grad, weight)


@given(n=sizes, vocab_size=sizes, dim=sizes, beta=st.sampled_from([0.0, 0.25, 3.0]), seed=seeds,
       training=st.booleans())
def test_beta_weighs_the_commitment_and_never_the_codes(n, vocab_size, dim, beta, seed, training):
    torch.manual_seed(seed)
    quantizer = placed(torch.randn(vocab_size, dim), beta=beta, learn="gradient", revive=False)
    quantizer.train(training)
    x = torch.randn(n, dim, requires_grad=True)
    _, idx, loss = quantizer(x)
    loss.backward()
    difference = (x - quantizer.codebook[idx]).detach()
    assert torch.allclose(loss, (1 + beta) * difference.square().mean())
    assert torch.allclose(x.grad, beta * 2 * difference / (n * dim), atol=1e-6)
    codes = torch.zeros(vocab_size, dim)
    for i, code in enumerate(idx.tolist()):
        codes[code] -= 2 * difference[i] / (n * dim)
    assert torch.allclose(quantizer.codebook.grad, codes, atol=1e-6)


def test_moving_averages_leave_the_commitment_as_the_only_loss():
    quantizer = placed([[0.], [10.]], beta=0.5).eval()
    x = torch.tensor([[1.], [7.]], requires_grad=True)
    loss = quantizer(x)[2]
    loss.backward()
    assert loss.item() == 0.5 * (1 + 9) / 2
    assert x.grad.tolist() == [[0.5], [-1.5]]         # beta * 2 * (x - code) / 2
    assert list(quantizer.parameters()) == []


def test_codes_learnt_by_gradient_move_onto_their_vectors():
    torch.manual_seed(0)
    quantizer = placed([[0., 0.], [5., 5.]], learn="gradient", revive=False)
    x = torch.tensor([[1., 0.], [4., 6.]])
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(x)[2].backward()
        optimizer.step()
    assert torch.allclose(quantizer.codebook, x, atol=1e-3)


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_eval_changes_nothing(learn):
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(8, 3, learn=learn).eval()
    before = snapshot(quantizer)
    quantizer(100 + torch.randn(50, 3))
    assert same(before, quantizer.state_dict()) and not quantizer.initialised
    quantizer.train()
    quantizer(100 + torch.randn(50, 3))               # the same call, in training, does
    assert not same(before, quantizer.state_dict()) and quantizer.initialised


# ---------------------------------------------------------------------------- start on data


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


def test_codes_start_on_data_once_only():
    quantizer = vq.VectorQuantizer(4, 3)
    quantizer.start_on_data([torch.ones(9, 3)])
    quantizer.initialised.fill_(True)                 # by the first step that is accepted
    before = snapshot(quantizer)
    quantizer.start_on_data([torch.full((9, 3), 50.)])
    assert same(before, quantizer.state_dict())
    assert (quantizer.codebook - 1).abs().max() < 0.06


def test_small_groups_get_as_many_codes_as_large_ones():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(400, 2)
    quantizer.start_on_data([torch.ones(1, 1, 2), torch.full((10, 30, 2), 3.)])
    share = float((quantizer.codebook[:, 0] < 2).float().mean())
    assert 0.4 < share < 0.6                          # one vector in 301, half of the codes
    quantizer = vq.VectorQuantizer(40, 2)             # enough vectors: none is taken twice
    quantizer.start_on_data([torch.ones(50, 2), torch.full((5000, 2), 3.)])
    assert 10 <= (quantizer.codebook[:, 0] < 2).sum() <= 28, "by chance it would be 0.4 of 40"


# ---------------------------------------------------------------------------- moving averages


def test_moving_average_step_of_a_worked_example():
    quantizer = placed([[0.], [10.]], decay=0.5, revive=False)
    learn(quantizer, [torch.tensor([[1.], [3.]]), torch.tensor([[8.]])],
          [torch.tensor([0, 0]), torch.tensor([1])])
    assert quantizer.hits.tolist() == [1.5, 1.0]      # (1 + 2) / 2, (1 + 1) / 2
    assert quantizer.sums.tolist() == [[2.0], [9.0]]  # (0 + 4) / 2, (10 + 8) / 2
    assert torch.allclose(quantizer.codebook, torch.tensor([[4 / 3], [9.]]))


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


def test_training_forward_takes_one_moving_average_step():
    torch.manual_seed(0)
    one, two = (placed([[0., 1.], [3., 3.], [-2., 0.]]) for _ in range(2))
    x = torch.randn(20, 2)
    torch.manual_seed(5)
    one(x)
    torch.manual_seed(5)
    learn(two, [x], [two.nearest(x)])
    assert same(one.state_dict(), two.state_dict())
    assert not torch.equal(one.codebook, torch.tensor([[0., 1.], [3., 3.], [-2., 0.]]))


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_a_refused_step_leaves_no_trace_in_codes_or_counters(learn):
    torch.manual_seed(0)
    one, two = (placed(torch.arange(6.).view(3, 2), learn=learn) for _ in range(2))
    for refused in (torch.randn(9, 2), torch.full((9, 2), torch.nan)):
        before = snapshot(one)
        one.observe([refused], [torch.arange(9) % 2])
        one.update(accepted=torch.tensor(bool(refused.isnan().all())))     # a nan is refused anyway
        assert same(before, one.state_dict())
    for quantizer in (one, two):
        torch.manual_seed(1)
        quantizer.observe([torch.ones(9, 2)], [torch.arange(9) % 2])
        quantizer.update()
    assert same(one.state_dict(), two.state_dict()) and not same(before, one.state_dict())


def test_a_code_never_used_keeps_its_place():
    torch.manual_seed(0)
    quantizer = placed([[0., 0.], [100., -100.]], decay=0.5, revive=False)
    for _ in range(200):                              # hits fall to 0.5 ** 200: 0 in float32
        quantizer(torch.randn(10, 2))
    assert quantizer.hits[1] == 0
    assert torch.allclose(quantizer.codebook[1], torch.tensor([100., -100.]))
    assert quantizer.codebook.isfinite().all()


# ---------------------------------------------------------------------------- revival


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


@pytest.mark.parametrize("learn", ["ema", "gradient"])
@pytest.mark.parametrize("revive", [False, True])
def test_a_collapsed_codebook_recovers_by_revival_and_not_without(learn, revive):
    torch.manual_seed(0)
    codes = 100 + torch.randn(32, 4)
    quantizer = placed(codes, learn=learn, decay=0.8, revive=revive)
    x = torch.randn(256, 4)
    for _ in range(30):
        quantizer(x)
    share = vq.usage(quantizer.nearest(x), 32)[0]
    assert share > 0.9 if revive else share < 0.1


# ---------------------------------------------------------------------------- many processes


def train_rank(rank, folder):
    """One of two processes, each with data of its own, for 20 steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    quantizer = vq.VectorQuantizer(16, 3, decay=0.7)
    plain = placed(torch.arange(12.).view(4, 3), decay=0.7, revive=False)
    seen, revived = [], 0
    for step in range(20):
        x = torch.randn(8, 3) + 5 * rank + step       # the data move on, so codes fall out of use
        before = quantizer.hits.clone()
        quantizer(x)
        revived += int(((quantizer.hits == 1) & (before != 1)).sum())
        seen.append(x + 5)
        learn(plain, [x + 5], [torch.arange(8) % 4])
    torch.save({"state": quantizer.state_dict(), "plain": plain.state_dict(), "revived": revived,
                "seen": torch.stack(seen)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_codebooks_of_two_processes_stay_identical_bit_for_bit(tmp_path):
    torch.multiprocessing.spawn(train_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["revived"] > 0 and not torch.equal(first["seen"], second["seen"])
    assert same(first["state"], second["state"])
    assert same(first["plain"], second["plain"])
    # Two processes learn what one would learn from both halves of the batch.
    alone = placed(torch.arange(12.).view(4, 3), decay=0.7, revive=False)
    for a, b in zip(first["seen"], second["seen"]):
        learn(alone, [a, b], [torch.arange(8) % 4] * 2)
    for name, value in alone.state_dict().items():
        assert torch.allclose(value.float(), first["plain"][name].float(), rtol=1e-5), name


# ---------------------------------------------------------------------------- residual levels


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


@given(n=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
def test_residual_error_never_rises_when_zero_is_a_code(n, vocab_size, dim, seed):
    torch.manual_seed(seed)
    quantizer = placed(torch.cat([torch.zeros(1, dim), torch.randn(vocab_size, dim)]))
    x = 2 * torch.randn(n, dim)
    errors = [(x - vq.residual_quantize(x, quantizer, depth)[0]).norm(dim=1) for depth in range(6)]
    for before, after in zip(errors, errors[1:]):
        assert (after <= before + 1e-5).all()


# ---------------------------------------------------------------------------- signs


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


def test_lookup_free_worked_example():
    quantizer = vq.LookupFreeQuantizer(4)
    idx = quantizer.nearest(torch.tensor([0.9, -0.1, 0.2, -7.0]))
    assert idx.item() == 1 + 4                        # + - + -: bits 0 and 2
    assert quantizer.lookup(idx).tolist() == [0.5, -0.5, 0.5, -0.5]


def test_entropy_term_prefers_even_usage_and_certainty():
    quantizer = vq.LookupFreeQuantizer(3, entropy=0.1)
    even_and_sure = 9 * quantizer.codebook
    one_and_sure = 9 * quantizer.codebook[5].expand(8, 3)
    even_but_unsure = 0.05 * quantizer.codebook
    even, one, unsure = map(quantizer.extra_loss, (even_and_sure, one_and_sure, even_but_unsure))
    assert even.item() == pytest.approx(-0.1 * math.log(2), abs=1e-4)
    assert one.item() == pytest.approx(0, abs=1e-4)
    assert unsure.item() == pytest.approx(0, abs=1e-3) and unsure > even


def test_lookup_free_loss_is_weighted_commitment_plus_entropy():
    torch.manual_seed(0)
    quantizer = vq.LookupFreeQuantizer(3, beta=2.0, entropy=0.3)
    x = torch.randn(7, 3)
    x_hat, idx, loss = quantizer(x)
    assert torch.allclose(loss, 2 * F.mse_loss(x, quantizer.lookup(idx)) + quantizer.extra_loss(x))
    twice = vq.LookupFreeQuantizer(3, entropy=0.6)
    assert torch.allclose(twice.extra_loss(x), 2 * quantizer.extra_loss(x))


# ---------------------------------------------------------------------------- usage, bad input


@given(vocab_size=st.integers(1, 20), times=sizes)
def test_even_use_has_perplexity_v_and_one_code_has_perplexity_one(vocab_size, times):
    share, perplexity = vq.usage(torch.arange(vocab_size).repeat(times, 1), vocab_size)
    assert share == 1 and perplexity == pytest.approx(vocab_size)
    share, perplexity = vq.usage(torch.full((3, times), vocab_size - 1), vocab_size)
    assert share == pytest.approx(1 / vocab_size) and perplexity == pytest.approx(1)


def test_usage_worked_example():
    share, perplexity = vq.usage(torch.tensor([0, 0, 1, 3]), 8)
    assert share == 3 / 8 and perplexity == pytest.approx(2 ** 1.5)      # entropy 1.5 bits


@pytest.mark.parametrize("make", [lambda: vq.VectorQuantizer(4, 2, learn="by heart"),
                                  lambda: vq.LookupFreeQuantizer(0),
                                  lambda: vq.LookupFreeQuantizer(25)])
def test_bad_arguments_raise_value_error(make):
    with pytest.raises(ValueError):
        make()

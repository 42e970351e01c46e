"""Chapter 2: Algorithms 1 and 2 for every kind of tokenizer, and what trains what.

One fixed schedule is compared with slow loops, gradients included, by the course's graders
(exercises/grade_02.py): resizing, phi, Algorithm 1, teacher inputs and the vq loss."""
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

vq, ms = import_module("01_vq"), import_module("02_multiscale_vqvae")
seeds = st.integers(0, 10_000)
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
kinds = st.sampled_from([dict(), dict(residual=False), dict(phis=1), dict(phis=3),
                         dict(quantizer="lfq"), dict(quantizer="lfq", residual=False)])


def tiny(scales=(1, 2, 4), **changes):
    """A tokenizer for images of twice the last scale, small enough for slow loops."""
    sizes = dict(image_size=2 * scales[-1], scales=scales, vocab_size=8, latent_dim=3,
                 channels=4, unshuffle=2, groups=2)
    return ms.MultiScaleVQVAE(ms.TokenizerConfig(**{**sizes, **changes})).eval()


def some(tokenizer, batch=2):
    """A random feature map and a random image that fit the tokenizer."""
    side, size = tokenizer.scales[-1], tokenizer.config.image_size
    f = torch.randn(batch, tokenizer.config.latent_dim, side, side)
    return f, torch.rand(batch, 3, size, size) * 2 - 1


def all_equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- Algorithms 1 and 2 --------------------------------------------------------------------

def slow_map(tokenizer, k, tokens_k):
    """What tokens of scale k add at full size: look up, enlarge, smooth."""
    side, full = tokenizer.scales[k], tokenizer.scales[-1]
    z = tokenizer.quantizer.codebook[tokens_k]                               # (B, side*side, C)
    z = z.transpose(1, 2).unflatten(2, (side, side))
    h = F.interpolate(z, size=(full, full), mode="bicubic") if side != full else z
    phi = tokenizer.phis[ms.phi_of_scale(len(tokenizer.scales), tokenizer.config.phis)[k]]
    return (h + F.conv2d(h, phi.weight, phi.bias, padding=1)) / 2


def slow_features(tokenizer, tokens):
    """Algorithm 2: the sum of the maps, or the last map alone. -> f_hat, 0 for no tokens"""
    maps = [slow_map(tokenizer, k, tokens_k) for k, tokens_k in enumerate(tokens)]
    return sum(maps) if tokenizer.config.residual or not maps else maps[-1]


def shrunk(x, side):
    """(B, C, h, w) -> (B, side*side, C), each the mean of its area"""
    return F.interpolate(x, size=(side, side), mode="area").flatten(2).transpose(1, 2)


def slow_tokens(tokenizer, f):
    """Algorithm 1, one vector at a time."""
    tokens, codes = [], tokenizer.quantizer.codebook.double()
    for side in tokenizer.scales:
        rest = f - slow_features(tokenizer, tokens) if tokenizer.config.residual else f
        vectors = shrunk(rest, side).double().flatten(0, 1)
        nearest = [int((codes - x).square().sum(1).argmin()) for x in vectors]
        tokens.append(torch.tensor(nearest).view(len(f), side * side))
    return tokens


@settings(max_examples=20)
@given(scales=schedules, kind=kinds, seed=seeds)
@torch.no_grad()
def test_both_algorithms_equal_the_slow_ones_and_sampling_sees_the_same(scales, kind, seed):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, **kind)
    f, _ = some(tokenizer)
    tokens = slow_tokens(tokenizer, f)
    assert all_equal(tokenizer.quantize(f), tokens)
    assert all_equal(tokenizer.quantize(f.flip(0)), [t.flip(0) for t in tokens])
    pyramid, f_hat, shown = tokenizer.pyramid(tokens), 0, [torch.zeros(2, 0, 3)]
    for k, tokens_k in enumerate(tokens):
        want = slow_features(tokenizer, tokens[:k + 1])
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        assert torch.allclose(pyramid[k], want, atol=1e-5)
        assert torch.allclose(f_hat, want, atol=1e-5)
        if k + 1 < len(scales):
            assert torch.allclose(inputs, shrunk(want, scales[k + 1]), atol=1e-5)
            shown.append(inputs)
    assert inputs is None and len(pyramid) == len(scales)
    assert torch.equal(tokenizer.features(tokens), pyramid[-1])
    assert torch.allclose(tokenizer.teacher_inputs(tokens), torch.cat(shown, 1), atol=1e-6)
    # A mixture that is one code alone stands for its token.
    mixtures = [F.one_hot(t, 8).float() @ tokenizer.quantizer.codebook for t in tokens]
    assert torch.allclose(tokenizer.features(mixtures), pyramid[-1], atol=1e-5)


@pytest.mark.parametrize("K, phis, expected", [
    (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (6, 4, [0, 0, 1, 2, 3, 3]), (1, 4, [0]),
    (5, 1, [0] * 5), (4, 2, [0, 0, 1, 1]), (5, 3, [0, 0, 1, 2, 2])])
def test_phi_of_scale_goes_to_the_nearest_tick(K, phis, expected):
    assert ms.phi_of_scale(K, phis) == expected


@torch.no_grad()
def test_an_image_is_decoded_features_within_its_range():
    torch.manual_seed(0)
    tokenizer = tiny((1, 3, 4), image_size=16, multipliers=(1, 2), attention=True)
    tokenizer.decoder.conv_out.weight.mul_(50)             # far out of range
    tokens = tokenizer.image_to_tokens(some(tokenizer)[1])
    raw = tokenizer.decode(tokenizer.features(tokens))
    assert raw.shape == (2, 3, 16, 16) and raw.abs().max() > 1
    assert torch.equal(tokenizer.tokens_to_image(tokens), raw.clamp(-1, 1))


# -- Losses --------------------------------------------------------------------------------

@pytest.mark.parametrize("scales", [(1, 2, 3, 4), (1, 4)])         # with two, two phis are unused
def test_every_parameter_learns_from_finite_losses(scales):
    torch.manual_seed(0)
    tokenizer = tiny(scales, learn="gradient", attention=True).train()
    _, _, losses = tokenizer(some(tokenizer)[1])
    assert set(losses) == {"reconstruction", "vq", "extra"}
    sum(losses.values()).backward()
    for name, p in tokenizer.named_parameters():
        learns = p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        assert learns == p.requires_grad, name
    assert sum(p.requires_grad for p in tokenizer.phis.parameters()) == 2 * min(len(scales), 4)


def test_the_vq_loss_is_that_of_the_features_before_straight_through():
    """Beta weighs the encoder's part, and the codebook gets a gradient."""
    torch.manual_seed(0)
    tokenizer = tiny((4,), learn="gradient", beta=0.3)
    _, image = some(tokenizer)
    f, loss = tokenizer.encode(image), tokenizer(image)[2]["vq"]
    f_hat = tokenizer.features(tokenizer.quantize(f))
    inputs = tokenizer.quant_conv.weight, tokenizer.quantizer.codebook, tokenizer.phis[0].weight
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    error = (f - f_hat).square().mean()
    wanted = torch.autograd.grad(error, inputs)
    assert torch.allclose(loss, 1.3 * error)
    for scale, a, b in zip((0.3, 1, 1), found, wanted):
        assert a.any() and torch.allclose(a, scale * b, rtol=1e-3, atol=1e-6)


def test_reconstruction_decodes_f_hat_and_its_gradient_passes_the_rounding():
    torch.manual_seed(0)
    tokenizer = tiny()
    _, image = some(tokenizer)
    reconstruction, tokens, losses = tokenizer(image)
    assert all_equal(tokens, tokenizer.image_to_tokens(image))
    decoded = tokenizer.decode(tokenizer.features(tokens))
    assert torch.allclose(reconstruction, decoded, atol=1e-5)
    assert torch.allclose(losses["reconstruction"], F.mse_loss(decoded, image), rtol=1e-4)
    # Straight through: the encoder gets the gradient that f would get in place of f_hat.
    found, = torch.autograd.grad(losses["reconstruction"], tokenizer.quant_conv.weight)
    f_hat = tokenizer.features(tokens).detach().requires_grad_()
    pull, = torch.autograd.grad(F.mse_loss(tokenizer.decode(f_hat), image), f_hat)
    expected, = torch.autograd.grad(tokenizer.encode(image), tokenizer.quant_conv.weight, pull)
    assert found.any() and torch.allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_the_entropy_of_signs_is_averaged_over_scales_and_reaches_the_encoder_alone():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="lfq")
    _, image = some(tokenizer)
    extra, f = tokenizer(image)[2]["extra"], tokenizer.encode(image)
    terms = [tokenizer.quantizer.extra_loss(x) for x, _, _ in tokenizer.rounds(f)]
    assert torch.allclose(extra, sum(terms) / 3, atol=1e-6) and extra != 0
    inputs = tokenizer.quant_conv.weight, tokenizer.phis[0].weight
    grad, none = torch.autograd.grad(extra, inputs, allow_unused=True)
    assert grad.any() and none is None


def test_rounding_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4, 6), vocab_size=512)
    _, image = some(tokenizer, batch=8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        f = tokenizer.encode(image)
        _, tokens, _ = tokenizer(image)
        alone = tokenizer.image_to_tokens(image)
    assert f.dtype == torch.bfloat16
    expected = tokenizer.quantize(f.float())
    assert all_equal(tokens, expected) and all_equal(alone, expected)


# -- The quantizer inside ------------------------------------------------------------------

def test_codes_learn_in_training_alone_start_once_and_count_every_scale_once():
    torch.manual_seed(0)
    tokenizer = tiny()
    _, image = some(tokenizer, batch=4)
    quantizer, before = tokenizer.quantizer, tokenizer.quantizer.codebook.clone()
    tokenizer(image)
    assert torch.equal(quantizer.codebook, before) and not quantizer.initialised
    tokenizer.train()
    tokenizer(image * torch.nan)
    assert torch.equal(quantizer.codebook, before) and not quantizer.initialised
    quantizer.revive = False
    _, tokens, _ = tokenizer(image)
    assert quantizer.initialised and not torch.equal(quantizer.codebook, before)
    uses = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=8)
    assert uses.sum() == 4 * (1 + 4 + 16)                  # hits = 0.99 * 1 + 0.01 * uses
    assert torch.allclose(quantizer.hits, 0.99 + 0.01 * uses, atol=1e-5)
    before = quantizer.codebook.clone()
    tokenizer(image)
    assert (quantizer.codebook - before).abs().max() < 0.2 * before.abs().max()


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_codes_start_on_what_scales_would_see_if_nothing_were_lost(residual, monkeypatch):
    tokenizer, groups = tiny((1, 3, 4), residual=residual).train(), []
    monkeypatch.setattr(tokenizer.quantizer, "start_on_data", groups.extend)
    f, _ = some(tokenizer)
    tokenizer.quantize_with_losses(f)
    maps = [tokenizer.upsample_from(x, k) for k, x in enumerate(groups)]
    assert [x.shape for x in groups] == [(2, 1, 3), (2, 9, 3), (2, 16, 3)]
    assert torch.allclose(sum(maps) if residual else maps[-1], f, atol=1e-5)


class Halves(vq.LookupFreeQuantizer):
    """A quantizer from outside: two codes, all channels 1 or all -1, by the first channel."""

    def nearest(self, x):
        return (x[..., 0] > 0).long()

    def lookup(self, idx):
        return (2.0 * idx - 1)[..., None].expand(*idx.shape, self.dim)


def test_a_new_quantizer_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(vq.QUANTIZERS, "halves", lambda vocab_size, dim, learn: Halves(dim))
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="halves", vocab_size=2).train()
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    _, image = some(tokenizer)
    first = tokenizer(image)[2]
    sum(first.values()).backward()
    optimizer.step()
    assert sum(tokenizer(image)[2].values()) < sum(first.values())


@pytest.mark.slow
def test_torch_compile_trains_the_same():
    finals = []
    for compiled in (False, True):
        torch.manual_seed(0)
        tokenizer = tiny().train()
        model = torch.compile(tokenizer, backend="eager") if compiled else tokenizer
        optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            sum(model(some(tokenizer)[1])[2].values()).backward()
            optimizer.step()
        finals.append(list(tokenizer.state_dict().values()))
    assert all_equal(*finals)


@pytest.mark.parametrize("changes, word", [
    (dict(scales=(1, 2, 3)), "last scale must be 8"), (dict(image_size=48), "last scale"),
    (dict(multipliers=(1, 2, 2)), "last scale"), (dict(scales=(1, 4, 2, 8)), "grow"),
    (dict(scales=(1, 2, 2, 8)), "grow"), (dict(scales=()), "1 or more"),
    (dict(scales=(0, 2, 8)), "1 or more"), (dict(phis=0), "1 or more"),
    (dict(quantizer="lfq", latent_dim=8, vocab_size=512), "2\\*\\*latent_dim"),
    (dict(quantizer="lfq", latent_dim=25, vocab_size=2 ** 25), "24"),
    (dict(coarse=1.5), "coarse"), (dict(learn="by heart"), "gradient"),
    (dict(quantizer="x"), "'vq', 'lfq'"), (dict(channels=6, groups=4), "multiple of 4")])
def test_bad_settings_raise_one_clear_line(changes, word):
    with pytest.raises(ValueError, match=word):
        ms.TokenizerConfig(**changes)

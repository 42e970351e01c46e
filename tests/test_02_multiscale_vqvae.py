"""Chapter 2: Algorithms 1 and 2 against slow loops, and what each scale may depend on."""
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from engine.devices import lay_out

vq, ms = import_module("01_vq"), import_module("02_multiscale_vqvae")
seeds = st.integers(0, 10_000)
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
kinds = st.sampled_from([dict(), dict(residual=False), dict(phis=1), dict(phis=3),
                         dict(quantizer="lfq"), dict(quantizer="lfq", residual=False)])


def tiny(scales=(1, 2, 4), **changes):
    """A tokenizer for images of twice the last scale, small enough for slow loops."""
    defaults = dict(image_size=2 * scales[-1], scales=scales, vocab_size=8, latent_dim=3,
                    channels=4, multipliers=(1,), unshuffle=2, groups=2)
    return ms.MultiScaleVQVAE(ms.TokenizerConfig(**{**defaults, **changes})).eval()


def some(tokenizer, batch=2):
    """A feature map and an image that fit the tokenizer."""
    side, size = tokenizer.scales[-1], tokenizer.config.image_size
    f = torch.randn(batch, tokenizer.config.latent_dim, side, side)
    return f, torch.rand(batch, 3, size, size) * 2 - 1


def all_equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# -- Algorithms 1 and 2 ----------------------------------------------------------------------------

def slow_map(tokenizer, k, tokens_k):
    """What tokens of scale k stand for, at full size: look up, enlarge, smooth."""
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


def slow_vectors(tokenizer, f, tokens):
    """What scale k = len(tokens) quantizes: what these tokens left of f, at its own size."""
    rest = f - slow_features(tokenizer, tokens) if tokenizer.config.residual else f
    return shrunk(rest, tokenizer.scales[len(tokens)])


def slow_tokens(tokenizer, f):
    """Algorithm 1, one vector at a time."""
    tokens, codes = [], tokenizer.quantizer.codebook.double()
    for side in tokenizer.scales:
        vectors = slow_vectors(tokenizer, f, tokens).double().flatten(0, 1)
        nearest = [int((codes - x).square().sum(1).argmin()) for x in vectors]
        tokens.append(torch.tensor(nearest).view(len(f), side * side))
    return tokens


@settings(max_examples=15)
@given(scales=schedules, kind=kinds, seed=seeds)
@torch.no_grad()
def test_quantize_and_features_equal_the_slow_algorithms(scales, kind, seed):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, **kind)
    f, _ = some(tokenizer)
    tokens = slow_tokens(tokenizer, f)
    assert all_equal(tokenizer.quantize(f), tokens)
    assert all_equal(tokenizer.quantize(f.flip(0)), [t.flip(0) for t in tokens])
    for k, f_hat in enumerate(tokenizer.pyramid(tokens)):
        assert torch.allclose(f_hat, slow_features(tokenizer, tokens[:k + 1]), atol=1e-5)
    assert k + 1 == len(scales) and torch.equal(tokenizer.features(tokens), f_hat)


@pytest.mark.parametrize("K, phis, expected", [
    (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (6, 4, [0, 0, 1, 2, 3, 3]), (1, 4, [0]),
    (5, 1, [0] * 5), (4, 2, [0, 0, 1, 1]), (5, 3, [0, 0, 1, 2, 2])])
def test_phi_of_scale_goes_to_the_nearest_tick(K, phis, expected):
    assert ms.phi_of_scale(K, phis) == expected


def test_resize_matrices_are_made_once_follow_the_model_and_are_not_saved(monkeypatch):
    tokenizer = tiny((1, 3, 4))
    with torch.device("meta"):                        # as chapter 6 builds what it then fills
        bare = tiny((1, 3, 4))
    monkeypatch.setattr(ms, "resize_matrix", None)
    assert not [name for name in tokenizer.state_dict() if name.startswith(("down", "up"))]
    for name in ("down0", "down1", "up0", "up1"):
        assert torch.equal(bare.get_buffer(name), tokenizer.get_buffer(name))
    tokens = tokenizer.quantize(some(tokenizer)[0])
    assert tokenizer.half().pyramid(tokens)[-1].dtype == torch.float16


@given(scales=schedules, kind=kinds, seed=seeds)
@torch.no_grad()
def test_inputs_scale_by_scale_equal_the_teacher_inputs(scales, kind, seed):
    """Each is what has been rebuilt so far, at the size of the next map."""
    torch.manual_seed(seed)
    tokenizer = tiny(scales, **kind)
    tokens = tokenizer.quantize(some(tokenizer)[0])
    f_hat, shown = 0, [torch.zeros(2, 0, 3)]
    for k, tokens_k in enumerate(tokens):
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        if k < len(scales) - 1:
            assert torch.allclose(inputs, shrunk(f_hat, scales[k + 1]), atol=1e-5)
            shown.append(inputs)
    assert inputs is None
    assert torch.allclose(torch.cat(shown, 1), tokenizer.teacher_inputs(tokens), atol=1e-6)
    assert torch.allclose(f_hat, tokenizer.features(tokens), atol=1e-6)


@torch.no_grad()
def test_an_image_is_decoded_features_within_its_range():
    torch.manual_seed(0)
    tokenizer = tiny((1, 3, 4), image_size=16, multipliers=(1, 2), attention=True)
    tokenizer.decoder.conv_out.weight.mul_(50)             # far out of range
    tokens = tokenizer.image_to_tokens(some(tokenizer)[1])
    raw = tokenizer.decode(tokenizer.features(tokens))
    assert raw.shape == (2, 3, 16, 16) and raw.abs().max() > 1
    assert torch.equal(tokenizer.tokens_to_image(tokens), raw.clamp(-1, 1))


# -- Losses ----------------------------------------------------------------------------------------

def slow_equation_5(tokenizer, f, tokens, beta, coarse):
    """beta |f - sg f_hat|^2 + |sg f - f_hat|^2, averaged over the f_hat of every scale; a coarser
    one counts `coarse`, the last what is left of their number."""
    K, total = len(tokens), 0
    weights = [coarse] * (K - 1) + [K - coarse * (K - 1)]
    for k, weight in enumerate(weights):
        f_hat = slow_features(tokenizer, tokens[:k + 1])
        total = total + weight * beta * (f - f_hat.detach()).square().mean()
        total = total + weight * (f.detach() - f_hat).square().mean()
    return total / K


@settings(max_examples=12)
@given(scales=schedules, beta=st.sampled_from([0.0, 0.25, 4.0]), residual=st.booleans(), seed=seeds,
       coarse=st.sampled_from([0.2, 0.5, 1.0]))
def test_vq_loss_and_all_its_gradients_equal_a_slow_equation_5(scales, beta, residual, seed,
                                                               coarse):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, beta=beta, residual=residual, learn="gradient", coarse=coarse)
    _, image = some(tokenizer)
    _, tokens, losses = tokenizer(image)
    parameters = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    found, expected = (torch.autograd.grad(loss, parameters.values(), allow_unused=True)
                       for loss in (losses["vq"], slow_equation_5(
                           tokenizer, tokenizer.encode(image), tokens, beta, coarse)))
    for name, a, b in zip(parameters, found, expected):
        assert (a is None) == (b is None) == name.startswith(("decoder", "post_")), name
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    gradients = dict(zip(parameters, found))
    assert gradients["quantizer.codebook"].any()
    assert gradients["quant_conv.bias"].any() or beta == 0


def test_every_parameter_learns_from_finite_losses():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 3, 4), learn="gradient", attention=True, image_size=8).train()
    _, _, losses = tokenizer(some(tokenizer)[1])
    assert set(losses) == {"reconstruction", "vq", "extra"}
    sum(losses.values()).backward()
    for name, p in tokenizer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_reconstruction_decodes_f_hat_and_its_gradient_passes_the_rounding():
    torch.manual_seed(0)
    tokenizer = tiny()
    _, image = some(tokenizer)
    reconstruction, tokens, losses = tokenizer(image)
    assert all_equal(tokens, tokenizer.image_to_tokens(image))
    decoded = tokenizer.decode(tokenizer.features(tokens))
    assert torch.allclose(reconstruction, decoded, atol=1e-5)
    assert torch.allclose(losses["reconstruction"], F.mse_loss(decoded, image), rtol=1e-4)
    # Straight through: the encoder's gradient is the one f itself would get in place of f_hat.
    found, = torch.autograd.grad(losses["reconstruction"], tokenizer.quant_conv.weight)
    f_hat = tokenizer.features(tokens).detach().requires_grad_()
    pull, = torch.autograd.grad(F.mse_loss(tokenizer.decode(f_hat), image), f_hat)
    expected, = torch.autograd.grad(tokenizer.encode(image), tokenizer.quant_conv.weight, pull)
    assert found.any() and torch.allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_the_entropy_of_signs_is_averaged_over_scales_and_reaches_the_encoder():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="lfq")
    _, image = some(tokenizer)
    _, tokens, losses = tokenizer(image)
    f = tokenizer.encode(image)
    terms = [tokenizer.quantizer.extra_loss(slow_vectors(tokenizer, f, tokens[:k]))
             for k in range(3)]
    assert torch.allclose(losses["extra"], sum(terms) / 3, atol=1e-6) and losses["extra"] != 0
    grad, none = torch.autograd.grad(
        losses["extra"], [tokenizer.quant_conv.weight, tokenizer.phis[0].weight], allow_unused=True)
    assert grad.any() and none is None, "phi does not learn from it"


# -- Precision and layout --------------------------------------------------------------------------

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


@pytest.mark.parametrize("device, precision, layout", [
    ("cpu", "float32", torch.channels_last), ("cpu", "bfloat16", torch.contiguous_format),
    ("meta", "float32", torch.contiguous_format)])
def test_layout_of_convolutions_goes_by_device_and_precision(device, precision, layout):
    moved = lay_out(torch.nn.Conv2d(4, 4, 3), torch.device(device), precision)
    assert moved.weight.is_contiguous(memory_format=layout)


def test_norms_in_half_precision_are_those_of_float32_rounded(monkeypatch):
    """Under autocast CUDA's group norm would copy every activation, into float32 and back."""
    def like_cuda(x, groups, weight, bias, eps):
        assert not torch.is_autocast_enabled("cpu") and x.dtype == weight.dtype
        return plain(x, groups, weight, bias, eps)
    plain = F.group_norm
    monkeypatch.setattr(ms.GroupNorm, "mixed", ())         # as if the CPU were a GPU
    torch.manual_seed(0)
    norm, x = ms.GroupNorm(8, 2), 3 + torch.randn(2, 8, 5, 5)
    exact = norm(x)
    assert torch.equal(exact, torch.nn.GroupNorm.forward(norm, x)) and norm.eps == 1e-6
    monkeypatch.setattr(F, "group_norm", like_cuda)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.04
    rounded.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


# -- The quantizer inside --------------------------------------------------------------------------

def test_only_training_is_observed_and_there_every_scale_counts_once():
    torch.manual_seed(0)
    tokenizer = tiny()
    _, image = some(tokenizer, batch=4)
    buffers = {name: b.clone() for name, b in tokenizer.named_buffers()}
    tokenizer(image)
    assert all(torch.equal(buffers[name], b) for name, b in tokenizer.named_buffers())
    tokenizer.train().quantizer.revive = False
    _, tokens, _ = tokenizer(image)
    codes = tokenizer.quantizer.codebook.clone()
    assert not torch.equal(codes, buffers["quantizer.codebook"]), "they start on data"
    assert (tokenizer.quantizer.hits == 1).all(), "they learn in update()"
    tokenizer.quantizer.update()
    uses = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=8)
    assert uses.sum() == 4 * (1 + 4 + 16)                  # hits = 0.99 * 1 + 0.01 * uses
    assert torch.allclose(tokenizer.quantizer.hits, 0.99 + 0.01 * uses, atol=1e-5)
    codes = tokenizer.quantizer.codebook.clone()
    tokenizer(image)
    assert torch.equal(tokenizer.quantizer.codebook, codes), "they start once"


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_codes_start_on_what_scales_would_see_if_nothing_were_lost(residual, monkeypatch):
    tokenizer, groups = tiny((1, 3, 4), residual=residual).train(), []
    monkeypatch.setattr(tokenizer.quantizer, "start_on_data", groups.extend)
    f, _ = some(tokenizer)
    tokenizer.learn_to_quantize(f)
    maps = [tokenizer.upsample_from(x, k) for k, x in enumerate(groups)]
    assert [x.shape for x in groups] == [(2, 1, 3), (2, 9, 3), (2, 16, 3)]
    assert torch.allclose(sum(maps) if residual else maps[-1], f, atol=1e-5)


class Halves(vq.Quantizer):
    """A toy from outside: two codes, all channels 1 or all -1, by the first channel alone."""

    @classmethod
    def build(cls, vocab_size, dim, learn):
        return cls()

    def nearest(self, x):
        return (x[..., 0] > 0).long()

    def lookup(self, idx):
        return (2.0 * idx - 1)[..., None].expand(*idx.shape, 3)


def test_a_new_quantizer_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(vq.QUANTIZERS, "halves", Halves)
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="halves", vocab_size=2).train()
    assert isinstance(tokenizer.quantizer, Halves)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    _, image = some(tokenizer)
    first = tokenizer(image)[2]
    sum(first.values()).backward()
    optimizer.step()
    tokenizer.quantizer.update(accepted=torch.tensor(True))
    assert sum(tokenizer(image)[2].values()) < sum(first.values())


@pytest.mark.parametrize("changes, word", [
    (dict(scales=(1, 2, 3)), "last scale"),
    (dict(image_size=48), "last scale"),
    (dict(multipliers=(1, 2, 2)), "last scale"),
    (dict(scales=()), "1 or more"), (dict(scales=(1, 4, 2, 8)), "grow"),
    (dict(scales=(1, 2, 2, 8)), "grow"),
    (dict(scales=(0, 2, 8)), "1 or more"),
    (dict(quantizer="lfq", latent_dim=8, vocab_size=512), "256"),
    (dict(quantizer="lfq", latent_dim=25, vocab_size=2 ** 25), "24"),
    (dict(quantizer="lfq", latent_dim=0, vocab_size=1), "1 to 24"), (dict(coarse=1.5), "coarse"),
    (dict(learn="by heart"), "gradient"), (dict(quantizer="x"), "vq or lfq"),
    (dict(phis=0), "phis"), (dict(channels=6, groups=4), "groups"),
])
def test_bad_settings_raise_value_error_with_a_hint(changes, word):
    with pytest.raises(ValueError, match=word):
        ms.TokenizerConfig(**changes)

"""Chapter 2: Algorithms 1 and 2 for every kind of tokenizer, and which loss trains what.

The course's graders (exercises/grade_02.py) compare embed, the teacher inputs and the vq
loss with slow loops, gradients included."""
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from hypothesis import given, strategies as st

from exercises.properties import small_tokenizer

ms = import_module("02_multiscale_vqvae")
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(sorted)


def tiny(scales=(1, 2, 4), **changes):
    return small_tokenizer(ms, scales, **changes)


def random_image(tokenizer, batch=2):
    size = tokenizer.config.image_size
    return torch.rand(batch, 3, size, size) * 2 - 1


def shrunk(x, side):
    """(B, C, h, w) -> (B, side*side, C), the means of its areas"""
    return F.adaptive_avg_pool2d(x, side).flatten(2).transpose(1, 2)


@given(scales=schedules, residual=st.booleans(), kind=st.sampled_from(["vq", "lfq"]),
       seed=st.integers(0, 10_000))
@torch.no_grad()
def test_algorithms_and_sampling_add_up_the_same_maps_or_keep_the_last(
        scales, residual, kind, seed):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, residual=residual, quantizer=kind)
    codes, f = tokenizer.quantizer.codebook, torch.randn(2, 3, scales[-1], scales[-1])
    tokens, f_hat, inputs = tokenizer.quantize(f), 0, None
    steps, expected = tokenizer.pyramid(tokens), torch.zeros_like(f)
    for k, tokens_k in enumerate(tokens):
        if k > 0:
            assert torch.allclose(inputs, shrunk(expected, scales[k]), atol=1e-5)
        x = shrunk(f - expected if residual else f, scales[k])
        assert torch.equal(tokens_k, (x[:, :, None] - codes).square().sum(-1).argmin(-1))
        h = tokenizer.embed(k, tokens_k)
        expected = expected + h if residual else h
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        assert torch.allclose(f_hat, expected, atol=1e-5)
        assert torch.allclose(steps[k], expected, atol=1e-5)
    assert inputs is None
    # A mixture that consists of one code alone stands for its token.
    assert torch.allclose(tokenizer.features([codes[t] for t in tokens]), f_hat, atol=1e-5)


def test_phi_of_scale_is_the_nearest_tick():
    assert ms.phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert ms.phi_of_scale(5, 3) == [0, 0, 1, 2, 2]


def test_every_parameter_learns_except_unused_phis():
    torch.manual_seed(0)
    tokenizer = tiny((1, 4), learn="gradient", attention=True).train()
    losses = tokenizer(random_image(tokenizer))[2]
    sum(losses.values()).backward()
    for name, p in tokenizer.named_parameters():
        learns = p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        assert learns == p.requires_grad, name
    learns = [phi.weight.requires_grad for phi in tokenizer.phis]
    assert learns == [True, False, False, True]


def test_forward_decodes_f_hat_and_its_losses_reach_the_encoder():
    torch.manual_seed(0)
    tokenizer = tiny(quantizer="lfq")
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(10)         # out of range
    image, weight = random_image(tokenizer), tokenizer.quant_conv.weight
    reconstruction, tokens, losses = tokenizer(image)
    assert same(tokens, tokenizer.image_to_tokens(image))
    rebuilt = tokenizer.tokens_to_image(tokens)
    assert torch.allclose(rebuilt, reconstruction.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(losses["reconstruction"], F.mse_loss(reconstruction, image))
    vectors = [x for x, _, _ in tokenizer.rounds(tokenizer.encode(image))]
    extra = sum(map(tokenizer.quantizer.extra_loss, vectors)) / 3
    assert torch.allclose(losses["extra"], extra) and extra != 0
    for name in ("reconstruction", "extra"):
        assert torch.autograd.grad(losses[name], weight, retain_graph=True)[0].any()


@torch.no_grad()
def test_rounding_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4, 6), vocab_size=512)
    image = random_image(tokenizer, batch=8)
    with torch.autocast("cpu", torch.bfloat16):
        f, tokens = tokenizer.encode(image), tokenizer(image)[1]
        alone = tokenizer.image_to_tokens(image)
    assert f.dtype == torch.bfloat16
    assert same(tokens, tokenizer.quantize(f.float())) and same(alone, tokens)


def test_codes_learn_in_training_alone_and_count_the_tokens_of_every_scale():
    torch.manual_seed(0)
    tokenizer = tiny()
    image, quantizer = random_image(tokenizer, batch=4), tokenizer.quantizer
    before = quantizer.codebook.clone()
    tokenizer(image)
    tokenizer.train()(image * torch.nan)
    assert torch.equal(quantizer.codebook, before) and not quantizer.initialised
    quantizer.revive = False
    tokens = tokenizer(image)[1]
    assert quantizer.initialised and not torch.equal(quantizer.codebook, before)
    uses = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=8)
    assert torch.allclose(quantizer.hits, 0.99 + 0.01 * uses, atol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_codes_start_on_what_scales_would_see_if_nothing_were_lost(residual, monkeypatch):
    tokenizer, groups = tiny((1, 3, 4), residual=residual).train(), []
    monkeypatch.setattr(tokenizer.quantizer, "start_on_data", groups.extend)
    f = torch.randn(2, 3, 4, 4)
    tokenizer.quantize_with_losses(f)
    maps = [tokenizer.upsample_from(x, k) for k, x in enumerate(groups)]
    assert torch.allclose(sum(maps) if residual else maps[-1], f, atol=1e-5)


@pytest.mark.parametrize("changes, word", [
    (dict(scales=(1, 2, 3)), "last scale must be 8"), (dict(scales=(1, 3, 2, 8)), "shrink"),
    (dict(groups=7), "multiple of 7"), (dict(quantizer="lfq", latent_dim=8), "latent_dim")])
def test_sizes_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        ms.TokenizerConfig(**changes)

"""Chapter 2: Algorithms 1 and 2 against slow loops, and what each scale may depend on."""
from fractions import Fraction
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.devices import lay_out

vq, ms = import_module("01_vq"), import_module("02_multiscale_vqvae")
BATCH, seeds = 7, st.integers(0, 10_000)
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))


def tiny(scales=(1, 2, 4), **changes):
    """A tokenizer for pictures of twice the last scale, small enough for slow loops."""
    defaults = dict(image_size=2 * scales[-1], scales=scales, vocab_size=8, latent_dim=3,
                    channels=4, multipliers=(1,), unshuffle=2, groups=2)
    return ms.MultiScaleVQVAE(ms.TokenizerConfig(**{**defaults, **changes})).eval()


def some(tokenizer, batch=2):
    """A feature map and a picture that fit the tokenizer."""
    side = tokenizer.scales[-1]
    return torch.randn(batch, tokenizer.config.latent_dim, side, side), torch.rand(
        batch, 3, tokenizer.config.image_size, tokenizer.config.image_size) * 2 - 1


def all_equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


options = st.sampled_from([dict(), dict(residual=False), dict(phis=1), dict(phis=3),
                           dict(quantizer="lfq"), dict(quantizer="lfq", residual=False)])


def slow_phi(tokenizer, k):
    """The phi whose tick lies nearest to k / (K - 1); of two equally near ones, either will do."""
    n, K = tokenizer.config.phis, len(tokenizer.scales)
    first = Fraction(1, 12) if n == 4 else Fraction(1, 2 * n)
    ticks = [first + i * (1 - 2 * first) / max(n - 1, 1) for i in range(n)]
    distances = [abs(tick - Fraction(k, max(K - 1, 1))) for tick in ticks]
    chosen = tokenizer.phi_index[k]
    assert distances[chosen] == min(distances)
    return tokenizer.phis[chosen]


def slow_map(tokenizer, k, tokens_k):
    """What tokens of scale k stand for, at full size: look up, enlarge, smooth."""
    side, full = tokenizer.scales[k], tokenizer.scales[-1]
    codebook = tokenizer.quantizer.codebook
    z = torch.stack([torch.stack([codebook[int(t)] for t in row]) for row in tokens_k])
    z = z.permute(0, 2, 1).reshape(len(tokens_k), -1, side, side)
    h = F.interpolate(z, size=(full, full), mode="bicubic") if side != full else z
    phi = slow_phi(tokenizer, k)
    return (h + F.conv2d(h, phi.weight, phi.bias, padding=1)) / 2


def slow_algorithm_1(tokenizer, f):
    """-> tokens, the f_hat after each scale. One cell at a time."""
    codes = tokenizer.quantizer.codebook.double()
    rest, f_hat, tokens, f_hats = f, torch.zeros_like(f), [], []
    for k, side in enumerate(tokenizer.scales):
        small = F.interpolate(rest, size=(side, side), mode="area").double()
        tokens_k = torch.tensor([[int((codes - small[b, :, i, j]).square().sum(1).argmin())
                                  for i in range(side) for j in range(side)]
                                 for b in range(len(f))])
        h = slow_map(tokenizer, k, tokens_k)
        if tokenizer.config.residual:
            rest, f_hat = rest - h, f_hat + h
        else:
            f_hat = h
        tokens.append(tokens_k)
        f_hats.append(f_hat)
    return tokens, f_hats


def slow_algorithm_2(tokenizer, tokens):
    """-> f_hat"""
    f_hat = 0
    for k, tokens_k in enumerate(tokens):
        h = slow_map(tokenizer, k, tokens_k)
        f_hat = f_hat + h if tokenizer.config.residual else h
    return f_hat


@settings(max_examples=15)
@given(scales=schedules, options=options, seed=seeds)
@torch.no_grad()
def test_quantize_and_features_equal_the_slow_algorithms(scales, options, seed):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, **options)
    f, _ = some(tokenizer)
    tokens, f_hats = slow_algorithm_1(tokenizer, f)
    assert all_equal(tokenizer.quantize(f), tokens)
    assert [t.shape for t in tokens] == [(2, s * s) for s in scales]
    assert all_equal(tokenizer.quantize(f.flip(0)), [t.flip(0) for t in tokens])
    for fast, slow in zip(tokenizer.pyramid(tokens), f_hats, strict=True):
        assert torch.allclose(fast, slow, atol=1e-5)
    assert torch.allclose(tokenizer.features(tokens), f_hats[-1], atol=1e-5)


@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), mode=st.sampled_from(["area", "bicubic"]),
       seed=seeds)
def test_a_resize_matrix_does_what_interpolate_does(n_in, n_out, mode, seed):
    torch.manual_seed(seed)
    x, matrix = torch.randn(2, 3, n_in, n_in), ms.resize_matrix(n_in, n_out, mode)
    expected = F.interpolate(x, size=(n_out, n_out), mode=mode)
    assert matrix.shape == (n_out, n_in)
    assert torch.allclose(matrix @ x @ matrix.t(), expected, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_training_step_builds_no_resize_matrix_anew():
    tokenizer, called = tiny().train(), []
    _, image = some(tokenizer)
    tokenizer(image)                                  # the codes are placed outside of the graph

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    torch.compile(tokenizer, backend=backend)(image)
    assert any("conv2d" in name for name in called)
    assert not [name for name in called if "eye" in name or "interpolate" in name]


def test_resize_matrices_are_no_part_of_a_checkpoint_and_follow_the_model():
    tokenizer = tiny((1, 3, 4))
    assert not [name for name in tokenizer.state_dict() if name.startswith(("down", "up"))]
    with torch.device("meta"):                        # as chapter 6 builds what it then fills
        bare = tiny((1, 3, 4))
    for name in ("down0", "down1", "up0", "up1"):
        assert torch.equal(bare.get_buffer(name), tokenizer.get_buffer(name))
    tokens = [torch.randint(8, (2, s * s)) for s in (1, 3, 4)]
    assert tokenizer.half().pyramid(tokens)[-1].dtype == torch.float16


def test_phi_of_scale_goes_to_the_nearest_tick():
    assert ms.phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert ms.phi_of_scale(6, 4) == [0, 0, 1, 2, 3, 3]
    assert ms.phi_of_scale(1, 4) == [0] and ms.phi_of_scale(5, 1) == [0] * 5
    assert ms.phi_of_scale(4, 2) == [0, 0, 1, 1]


@given(scales=schedules, options=options, seed=seeds)
@torch.no_grad()
def test_inputs_scale_by_scale_equal_the_teacher_inputs(scales, options, seed):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, **options)
    tokens = tokenizer.quantize(some(tokenizer)[0])
    f_hat, shown = 0, [torch.zeros(2, 0, 3)]
    for k, tokens_k in enumerate(tokens):
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        if inputs is not None:
            assert inputs.shape == (2, scales[k + 1] ** 2, 3)
            # What has been rebuilt so far, at the size of the next map.
            small = F.interpolate(f_hat, size=(scales[k + 1],) * 2, mode="area")
            assert torch.allclose(inputs, small.flatten(2).transpose(1, 2), atol=1e-5)
            shown.append(inputs)
    assert inputs is None and len(shown) == len(scales)
    assert torch.allclose(torch.cat(shown, 1), tokenizer.teacher_inputs(tokens), atol=1e-6)
    assert torch.allclose(f_hat, tokenizer.features(tokens), atol=1e-6)


@torch.no_grad()
def test_pictures_and_tokens_have_the_promised_shapes_and_ranges():
    torch.manual_seed(0)
    tokenizer = tiny((1, 3, 4), image_size=16, multipliers=(1, 2), attention=True)
    _, image = some(tokenizer, batch=5)
    f = tokenizer.encode(image)
    assert f.shape == (5, 3, 4, 4)
    assert tokenizer.decode(f).shape == image.shape
    tokens = tokenizer.image_to_tokens(image)
    assert [t.shape for t in tokens] == [(5, 1), (5, 9), (5, 16)]
    assert all(t.dtype == torch.int64 and t.min() >= 0 and t.max() < 8 for t in tokens)
    assert all_equal(tokens, tokenizer.quantize(f))
    tokenizer.decoder.conv_out.weight.mul_(50)        # far out of range before it is clamped
    raw = tokenizer.decode(tokenizer.features(tokens))
    assert raw.abs().max() > 1
    assert torch.equal(tokenizer.tokens_to_image(tokens), raw.clamp(-1, 1))


def slow_equation_5(tokenizer, f, tokens, beta, coarse):
    """beta |f - sg f_hat|^2 + |sg f - f_hat|^2, averaged over the f_hat of every scale; a coarser
    one counts `coarse`, the last what is left of their number."""
    total, left = 0, len(tokens)
    for k in range(len(tokens)):
        weight = left if k == len(tokens) - 1 else coarse
        left -= weight
        f_hat = slow_algorithm_2(tokenizer, tokens[:k + 1])
        total = total + weight * beta * (f - f_hat.detach()).square().mean()
        total = total + weight * (f.detach() - f_hat).square().mean()
    assert left == pytest.approx(0)
    return total / len(tokens)


@settings(max_examples=12)
@given(scales=schedules, beta=st.sampled_from([0.0, 0.25, 4.0]), residual=st.booleans(), seed=seeds,
       coarse=st.sampled_from([0.2, 0.5, 1.0]))
def test_vq_loss_and_all_its_gradients_equal_a_slow_equation_5(scales, beta, residual, seed,
                                                               coarse):
    torch.manual_seed(seed)
    tokenizer = tiny(scales, beta=beta, residual=residual, learn="gradient", coarse=coarse)
    _, image = some(tokenizer)
    _, tokens, losses = tokenizer(image)
    parameters = dict(tokenizer.named_parameters())
    parameters = {n: p for n, p in parameters.items()     # a phi that serves no scale stays put
                  if p.requires_grad and not n.startswith(("decoder", "post_"))}
    found = torch.autograd.grad(losses["vq"], parameters.values(), allow_unused=True)
    slow = slow_equation_5(tokenizer, tokenizer.encode(image), tokens, beta, coarse)
    expected = torch.autograd.grad(slow, parameters.values(), allow_unused=True)
    assert torch.allclose(losses["vq"], slow, rtol=1e-4)
    for name, a, b in zip(parameters, found, expected):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    if beta:
        assert found[list(parameters).index("quant_conv.bias")].abs().max() > 0
    assert found[list(parameters).index("quantizer.codebook")].abs().max() > 0


def test_losses_are_finite_and_reach_every_parameter():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 3, 4), learn="gradient", attention=True, image_size=8).train()
    _, image = some(tokenizer)
    _, _, losses = tokenizer(image)
    assert set(losses) == {"reconstruction", "vq", "extra"}
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, p in tokenizer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


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
    assert found.abs().max() > 0 and torch.allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_the_entropy_of_signs_is_averaged_over_scales_and_reaches_the_encoder():
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="lfq")
    _, image = some(tokenizer)
    _, tokens, losses = tokenizer(image)
    f, terms = tokenizer.encode(image), []
    for k, side in enumerate((1, 2, 4)):
        rest = f - (slow_algorithm_2(tokenizer, tokens[:k]) if k else 0)
        small = F.interpolate(rest, size=(side, side), mode="area").flatten(2).transpose(1, 2)
        terms.append(tokenizer.quantizer.extra_loss(small))
    assert torch.allclose(losses["extra"], sum(terms) / 3, atol=1e-6) and losses["extra"] != 0
    grad, none = torch.autograd.grad(
        losses["extra"], [tokenizer.quant_conv.weight, tokenizer.phis[0].weight], allow_unused=True)
    assert grad.abs().max() > 0 and none is None, "phi does not learn from it"


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


class LikeCuda(TorchFunctionMode):
    """CUDA's group norm: in float32 where autocast is on, contiguous whatever it was given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.group_norm:
            half = torch.is_autocast_enabled("cpu")
            args = ((args[0].float() if half else args[0]).contiguous(), *args[1:])
            assert args[0].dtype == kwargs["weight"].dtype, "x and weights, for the kernel"
        return func(*args, **kwargs or {})


class Copies(TorchDispatchMode):
    """Counts activations that are copied: into another dtype, or into the layout of the weights."""
    dtype = layout = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.aten.convolution.default:
            plain, last = ([x.is_contiguous(memory_format=way) for x in args[:2]]
                           for way in (torch.contiguous_format, torch.channels_last))
            self.layout += not (all(plain) or all(last))
        self.layout += func == torch.ops.aten.clone.default
        self.dtype += func == torch.ops.aten._to_copy.default and len(args[0]) == BATCH
        return func(*args, **kwargs or {})


def copies(layout):
    """Of one encode and decode in bfloat16, on something like a GPU."""
    tokenizer = tiny((4,), image_size=16, multipliers=(1, 2, 2), unshuffle=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Copies() as found, LikeCuda():
        tokenizer.to(memory_format=layout).decode(tokenizer.encode(some(tokenizer, BATCH)[1]))
    return found


def test_on_a_gpu_activations_change_neither_layout_nor_precision(monkeypatch):
    monkeypatch.setattr(ms.GroupNorm, "mixed", ())         # as if the CPU were a GPU
    found = copies(torch.contiguous_format)
    assert found.layout == 0 and found.dtype == 3, "the image, and f_hat there and back"
    assert copies(torch.channels_last).layout > 20         # this test would notice
    monkeypatch.setattr(ms.GroupNorm, "forward", torch.nn.GroupNorm.forward)
    assert copies(torch.contiguous_format).dtype > 20


def test_layout_of_convolutions_goes_by_device_and_precision():
    for device, precision, layout in (("cpu", "float32", torch.channels_last),
                                      ("cpu", "bfloat16", torch.contiguous_format),
                                      ("meta", "float32", torch.contiguous_format)):
        moved = lay_out(torch.nn.Conv2d(4, 4, 3), torch.device(device), precision)
        assert moved.weight.is_contiguous(memory_format=layout), (device, precision)


def test_norms_in_half_precision_are_those_of_float32_rounded(monkeypatch):
    monkeypatch.setattr(ms.GroupNorm, "mixed", ())
    torch.manual_seed(0)
    norm, x = ms.GroupNorm(8, 2), 3 + torch.randn(2, 8, 5, 5)
    exact = norm(x)
    assert torch.equal(exact, torch.nn.GroupNorm.forward(norm, x)) and norm.eps == 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.04
    rounded.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_forward_in_eval_changes_no_buffer_and_every_scale_counts_in_training():
    torch.manual_seed(0)
    tokenizer = tiny()
    _, image = some(tokenizer, batch=4)
    before = {name: b.clone() for name, b in tokenizer.named_buffers()}
    tokenizer(image)
    assert all(torch.equal(before[name], b) for name, b in tokenizer.named_buffers())
    tokenizer.train().quantizer.revive = False
    _, tokens, _ = tokenizer(image)
    tokenizer.quantizer.update()
    uses = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=8)
    assert uses.sum() == 4 * (1 + 4 + 16)             # one step: hits = 0.99 * 1 + 0.01 * uses
    assert torch.allclose(tokenizer.quantizer.hits, 0.99 + 0.01 * uses, atol=1e-5)


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_codes_move_when_a_step_is_accepted_and_only_then(learn):
    """Neither a pass forwards nor a refused step leaves a trace in any later step."""
    ends = []
    for refuse in (True, False):
        torch.manual_seed(0)
        tokenizer = tiny(learn=learn).train()
        images = [some(tokenizer)[1] for _ in range(3)]
        for step, image in enumerate(images):
            if refuse:
                torch.manual_seed(99)
                before = {n: b.clone() for n, b in tokenizer.quantizer.state_dict().items()}
                tokenizer(image * (torch.nan if step == 1 else 1))
                tokenizer.quantizer.update(accepted=torch.tensor(False))
                after = tokenizer.quantizer.state_dict()
                assert step == 0 or all(torch.equal(before[n], after[n]) for n in after)
                assert bool(tokenizer.quantizer.initialised) == (step > 0)
            torch.manual_seed(step)
            tokenizer(image)
            tokenizer.quantizer.update(accepted=torch.tensor(True))
        ends.append(tokenizer.quantizer.state_dict())
        assert not torch.equal(ends[-1]["hits"], torch.ones(8)) and ends[-1]["initialised"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_codes_learn_alike_from_a_batch_and_from_its_two_halves():
    ends = []
    for parts in (1, 2):
        torch.manual_seed(0)
        tokenizer = tiny().train()
        tokenizer.quantizer.revive = False
        _, image = some(tokenizer, batch=6)
        tokenizer(image)
        tokenizer.quantizer.update()
        for part in image.flip(0).chunk(parts):
            tokenizer(part)
        tokenizer.quantizer.update()
        ends.append(tokenizer.quantizer.state_dict())
    assert all(torch.allclose(ends[0][n].float(), ends[1][n].float(), atol=1e-6) for n in ends[0])


@torch.no_grad()
def test_codes_start_on_what_scales_would_see_if_nothing_were_lost():
    for residual in (True, False):
        tokenizer = tiny((1, 3, 4), residual=residual)
        f, _ = some(tokenizer)
        groups = tokenizer._unquantized(f)
        maps = [tokenizer.upsample_from(x, k) for k, x in enumerate(groups)]
        assert [x.shape for x in groups] == [(2, 1, 3), (2, 9, 3), (2, 16, 3)]
        assert torch.allclose(sum(maps) if residual else maps[-1], f, atol=1e-5)


class Halves(vq.Quantizer):
    """A toy from outside: two codes, each channel 1 or -1, by the first channel alone."""

    def nearest(self, x):
        return (x[..., 0] > 0).long()

    def lookup(self, idx):
        return (2.0 * idx - 1)[..., None].expand(*idx.shape, 3)

    @classmethod
    def build(cls, vocab_size, dim, learn):
        if vocab_size != 2:
            raise ValueError("halves are two")
        return cls()


def test_a_new_quantizer_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(vq.QUANTIZERS, "halves", Halves)
    with pytest.raises(ValueError, match="two"):
        tiny(quantizer="halves")
    _, config, _ = import_module("05_train").read_settings(
        ["--quantizer", "halves", "--vocab-size", "2"])
    assert config.quantizer == "halves"
    torch.manual_seed(0)
    tokenizer = tiny((1, 2, 4), quantizer="halves", vocab_size=2).train()
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
    (dict(scales=(1, 4, 2, 8)), "grow"),
    (dict(scales=(1, 2, 2, 8)), "grow"),
    (dict(scales=(0, 2, 8)), "1 or more"),
    (dict(quantizer="lfq", latent_dim=8, vocab_size=512), "256"),
    (dict(quantizer="lfq", latent_dim=25, vocab_size=2 ** 25), "24"), (dict(coarse=1.5), "coarse"),
    (dict(learn="by heart"), "gradient"), (dict(quantizer="x"), "vq or lfq"),
    (dict(phis=0), "phis"), (dict(channels=6, groups=4), "groups"),
])
def test_bad_settings_raise_value_error_with_a_hint(changes, word):
    with pytest.raises(ValueError, match=word):
        ms.TokenizerConfig(**changes)

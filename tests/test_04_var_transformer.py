"""Chapter 4: one pass with a mask equals a pass per scale with a cache; labels; initial values.
The graders (exercises/grade_04.py) compare the cache, the block and `step` with slow versions."""
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, strategies as st

m4 = import_module("04_var_transformer")
CLASSES, CODES, LATENT = 5, 7, 3


def small(scales=(1, 2, 3), opened=True, **changes):
    """A tiny model in eval mode. The gates of a new one are almost shut, which would hide errors:
    random numbers open them."""
    sizes = dict(num_classes=CLASSES, vocab_size=CODES, latent_dim=LATENT, depth=2, width=16,
                 heads=2, label_dropout=0.0, drop_path=0.0)
    var = m4.VAR(m4.VARConfig(scales=scales, **{**sizes, **changes})).eval()
    if opened:
        with torch.no_grad():
            for p in var.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return var


def batch(var, n=3):
    return torch.randint(CLASSES + 1, (n,)), torch.randn(n, var.L - var.first, LATENT)


# -- With a cache as with a mask -------------------------------------------------------------------

kinds = st.fixed_dictionaries(dict(
    depth=st.integers(1, 3), shared_adaln=st.booleans(), qk_norm=st.booleans(),
    mlp_ratio=st.sampled_from([1.0, 4.0])))


@given(scales=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
       heads=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 8]), kind=kinds,
       training=st.booleans(), seed=st.integers(0, 10_000))
def test_cached_equals_masked(scales, heads, head_dim, kind, training, seed):
    torch.manual_seed(seed)
    var = small(scales, heads=heads, width=heads * head_dim, **kind).double().train(training)
    labels, shown = batch(var)
    masked = var(labels, shown.double())
    cached = m4.scale_by_scale(var, labels, shown.double())
    assert masked.shape == (3, var.L, CODES)
    assert (masked - cached).abs().max() < 1e-11 * masked.abs().max()


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_autocast_reaches_both_ways(qk_norm):
    torch.manual_seed(0)
    var = small(qk_norm=qk_norm)
    labels, shown = batch(var)
    exact = var(labels, shown)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, _ = var.blocks[0].attention.project(torch.randn(1, 5, 16))
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        for found in (var(labels, shown), m4.scale_by_scale(var, labels, shown)):
            assert found.dtype == torch.bfloat16
            assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_mask_is_no_part_of_a_checkpoint():
    var = small((1, 2, 5))
    assert torch.equal(var.mask, m4.masking.block_causal_mask((1, 2, 5)))
    assert not {"mask", "scale_of_token"} & set(var.state_dict())
    assert var.to("meta").mask.is_meta, "it follows the model to its device"


# -- Training --------------------------------------------------------------------------------------

def test_a_dropped_label_is_the_learned_row_of_the_null_class_in_training_only():
    torch.manual_seed(0)
    var, every = small(label_dropout=1.0), torch.arange(CLASSES + 1)
    shown = batch(var, 1)[1].expand(CLASSES + 1, -1, -1)
    logits = var(every, shown)
    for c in range(CLASSES):                               # eval keeps every label
        assert (logits[c] - logits[CLASSES]).abs().max() > 1e-3
    assert torch.equal(var.train()(every, shown), var.eval()(every * 0 + CLASSES, shown))
    var.train()(every, shown).square().sum().backward()
    grad = var.class_embed.weight.grad
    assert grad.shape == (CLASSES + 1, 16) and grad[CLASSES].all() and not grad[:CLASSES].any()


@torch.no_grad()
def test_training_drops_about_the_given_share_of_labels():
    torch.manual_seed(0)
    var = small((1,), label_dropout=0.25)
    labels, shown = torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, 0, LATENT)
    null = var(labels[:1] + CLASSES, shown[:1])
    dropped = (var.train()(labels, shown) - null).abs().amax((1, 2)) < 1e-5
    assert 0.2 < float(dropped.float().mean()) < 0.3
    assert labels.max() == 0                               # the caller's labels are unchanged


@torch.no_grad()
def test_drop_path_grows_with_depth_and_keeps_the_mean():
    assert [b.drop_rate for b in small(depth=3, drop_path=0.5).blocks] == [0, 0.25, 0.5]
    torch.manual_seed(0)
    block, h = small(drop_path=0.4).blocks[1], torch.ones(4000, 2, 3)
    assert torch.equal(block.drop_path(h), h)              # eval: nothing happens
    assert float(block.train().drop_path(h).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_every_parameter_gets_its_gradient_with_and_without_checkpointing(shared_adaln):
    torch.manual_seed(0)
    var, gradients = small(shared_adaln=shared_adaln), []
    inputs = batch(var)
    for var.activation_checkpointing in (False, True):
        var.zero_grad()
        var(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in var.parameters()])
    for name, plain, twice in zip(dict(var.named_parameters()), *gradients):
        assert plain.any() and torch.equal(plain, twice)
        assert "modulation" not in name or plain.any(-1).all(), "a gate, stretch or shift is unused"


# -- Initial values and sizes ----------------------------------------------------------------------

@pytest.mark.parametrize("depth, gate, shared_adaln", [
    (23, 1e-3, False), (24, 1e-4, False), (30, 1e-5, False), (36, 5e-6, False), (36, 5e-6, True)])
@torch.no_grad()
def test_weights_start_at_the_original_sizes(depth, gate, shared_adaln):
    torch.manual_seed(0)
    var = small(opened=False, depth=depth, width=48, heads=4, shared_adaln=shared_adaln)
    std, branch = math.sqrt(1 / (3 * 48)), 1 / math.sqrt(2 * depth)
    sizes = {"word_embed.weight": std, "position": std, "class_embed.weight": std,
             "qkv.weight": std, "mlp.0.weight": std, "attention.proj.weight": branch * std,
             "mlp.2.weight": branch * std, "head.weight": 0.02 * std,
             "head_modulation.weight": 0.5 * std}
    for name, p in var.named_parameters():
        for end in filter(name.endswith, sizes):
            assert float(p.std()) == pytest.approx(sizes[end], rel=0.2), name
        assert not name.endswith("bias") or not p.any()
        assert not name.endswith("log_scale") or torch.allclose(p.exp(), torch.tensor(4.0))
    for b in var.blocks:
        six = b.modulation_offset[0, 0] if shared_adaln else b.modulation.weight.view(6, 48, 48)
        unit = 1 / math.sqrt(48) if shared_adaln else std
        assert float(six[:2].std()) == pytest.approx(gate * unit, rel=0.3)
        assert float(six[2:].std()) == pytest.approx(0.5 * unit, rel=0.3)


@torch.no_grad()
def test_the_factor_of_a_head_grows_up_to_one_hundred():
    torch.manual_seed(0)
    layer, factors = small().blocks[0].attention, []
    for value in (50, 99, 100, 8000):
        layer.log_scale.fill_(math.log(value))
        q, k, _, qk_factor = layer.project(torch.randn(1, 5, 16))
        factors.append(float((q.norm(dim=-1) * k.norm(dim=-1)).mean()) * qk_factor)
    assert factors == pytest.approx([50, 99, 100, 100], rel=1e-4)


def test_depth_sets_width_heads_and_drop_path_unless_they_are_given():
    config = m4.VARConfig(depth=6)
    assert (config.width, config.heads, config.drop_path) == (384, 6, pytest.approx(0.025))
    config = m4.VARConfig(depth=6, width=48, heads=3, drop_path=0.0)
    assert (config.width, config.heads, config.drop_path) == (48, 3, 0)


@pytest.mark.parametrize("wrong, word", [
    (dict(width=10, heads=3), "multiple of heads"), (dict(heads=0), "at least 1"),
    (dict(scales=()), "at least 1"), (dict(scales=(1, 0)), "at least 1"),
    (dict(drop_path=1.0), "drop_path"), (dict(label_dropout=1.5), "label_dropout")])
def test_sizes_that_do_not_fit_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        m4.VARConfig(**wrong)

"""Chapter 4: one pass with a mask equals a pass per scale with a cache, and what labels do."""
import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import scale_by_scale
from hypothesis import given, strategies as st

from engine import BadInput

m4 = import_module("04_var_transformer")
seeds = st.integers(0, 10_000)
schedules = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
CLASSES, CODES, LATENT = 5, 7, 3


def small(scales=(1, 2, 3), opened=True, dtype=torch.float32, **changes):
    """In eval mode. The gates of a new transformer are shut and prove nothing: open them."""
    defaults = dict(num_classes=CLASSES, scales=scales, vocab_size=CODES, latent_dim=LATENT,
                    depth=2, width=16, heads=2, label_dropout=0.0, drop_path=0.0)
    var = m4.VAR(m4.VARConfig(**{**defaults, **changes})).to(dtype).eval()
    with torch.no_grad():
        for p in var.parameters() if opened else ():
            p.add_(0.1 * torch.randn_like(p))
    return var


def batch(var, n=3):
    dtype = var.start.dtype
    return torch.randint(CLASSES + 1, (n,)), torch.randn(n, var.L - var.first, LATENT, dtype=dtype)


kinds = st.fixed_dictionaries(dict(
    depth=st.integers(1, 3), shared_adaln=st.booleans(), qk_norm=st.booleans(),
    mlp_ratio=st.sampled_from([1.0, 4.0])))


# -- Cached == masked ------------------------------------------------------------------------------

@given(scales=schedules, heads=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 8]), kind=kinds,
       double=st.booleans(), grad=st.booleans(), training=st.booleans(), seed=seeds)
def test_cached_equals_masked(scales, heads, head_dim, kind, double, grad, training, seed):
    torch.manual_seed(seed)
    var = small(scales, heads=heads, width=heads * head_dim, **kind,
                dtype=torch.float64 if double else torch.float32).train(training)
    labels, shown = batch(var)
    with torch.set_grad_enabled(grad):
        masked, cached = var(labels, shown), scale_by_scale(var, labels, shown)
    assert masked.shape == (3, var.L, CODES)
    assert (masked - cached).abs().max() < (1e-11 if double else 1e-4) * masked.abs().max()


@given(scales=schedules.filter(lambda scales: len(scales) > 1), kind=kinds, grad=st.booleans(),
       seed=seeds)
def test_an_input_is_seen_by_its_own_map_and_by_finer_ones_alone(scales, kind, grad, seed):
    torch.manual_seed(seed)
    var = small(scales, **kind)
    labels, shown = batch(var)
    with torch.set_grad_enabled(grad):
        before, scale = var(labels, shown), var.scale_of_token
        for i in range(var.first, var.L):
            fresh = shown.clone()
            fresh[:, i - var.first] += 1
            moved = (var(labels, fresh) - before).abs().amax(-1)
            assert not moved[:, scale < scale[i]].any(), "exactly zero"
            assert (moved[:, scale == scale[i]] > 0).all()


# -- Labels ----------------------------------------------------------------------------------------

def test_a_dropped_label_is_the_learnt_row_of_no_class_in_training_only():
    torch.manual_seed(0)
    var, every = small(label_dropout=1.0), torch.arange(CLASSES + 1)
    shown = batch(var, 1)[1].expand(CLASSES + 1, -1, -1)
    logits = var(every, shown)
    for c in range(CLASSES):                               # in eval each class speaks for itself
        assert (logits[c] - logits[CLASSES]).abs().max() > 1e-3
    assert torch.equal(var.train()(every, shown), var.eval()(every * 0 + CLASSES, shown))
    var.train()(every, shown).square().sum().backward()
    grad = var.class_embed.weight.grad
    assert grad.shape == (CLASSES + 1, 16) and grad[CLASSES].all() and not grad[:CLASSES].any()


@torch.no_grad()
def test_training_drops_about_the_given_share_of_labels():
    torch.manual_seed(0)
    var = small((1,), label_dropout=0.25, depth=1)
    labels, shown = torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, 0, LATENT)
    kept, null = var(labels, shown)[:1], var(labels + CLASSES, shown)[:1]
    found = var.train()(labels, shown)
    is_kept, is_null = ((found - x).abs().amax((1, 2)) < 1e-5 for x in (kept, null))
    assert (is_kept ^ is_null).all() and 0.2 < float(is_null.float().mean()) < 0.3
    assert labels.max() == 0                               # the caller's labels are left alone


# -- The mask and drop-path ------------------------------------------------------------------------

def test_the_mask_is_made_once_and_is_no_part_of_the_checkpoint():
    var = small((1, 2, 5))
    assert torch.equal(var.mask, m4.masking.block_causal_mask((1, 2, 5)))
    assert not {"mask", "scale_of_token"} & set(var.state_dict())
    assert var.to("meta").mask.is_meta, "it goes where the model goes"


@torch.no_grad()
def test_drop_path_leaves_out_whole_branches_of_images_and_keeps_the_mean():
    assert [b.drop_rate for b in small(depth=3, drop_path=0.5).blocks] == [0, 0.25, 0.5]
    torch.manual_seed(0)
    var, h = small(drop_path=0.4), torch.ones(4000, 2, 3)
    block = var.blocks[1]
    assert torch.equal(block.drop_path(h), h)              # eval: nothing happens
    each = block.train().drop_path(h).flatten(1)
    assert torch.equal(each.amin(1), each.amax(1))
    assert torch.allclose(each[each > 0], torch.tensor(1 / 0.6))
    assert float(each.mean()) == pytest.approx(1, abs=0.05)
    block.drop_rate = 1 - 1e-7                             # both branches out: the identity
    x, modulation = torch.randn(3, var.L, 16), var.conditioning(torch.tensor([0, 1, 2])).blocks[1]
    assert torch.equal(block(x, modulation), x)
    assert not torch.allclose(block.eval()(x, modulation), x, atol=1e-3)


# -- At the start ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_at_first_the_loss_is_ln_v_and_every_block_nearly_the_identity(shared_adaln):
    torch.manual_seed(0)
    var = small(opened=False, vocab_size=100, width=64, shared_adaln=shared_adaln)
    labels, shown = batch(var, 20)
    loss = F.cross_entropy(var(labels, shown).flatten(0, 1), torch.randint(100, (20 * var.L,)))
    assert float(loss) == pytest.approx(math.log(100), rel=0.01)
    for block, modulation in zip(var.blocks, var.conditioning(labels).blocks):
        x = torch.randn(20, var.L, 64)
        assert (block(x, modulation) - x).abs().max() < 0.01 * x.abs().max()


@pytest.mark.parametrize("depth, gate", [(4, 1e-3), (23, 1e-3), (24, 1e-4), (30, 1e-5), (36, 5e-6)])
@torch.no_grad()
def test_weights_start_at_the_original_sizes(depth, gate):
    torch.manual_seed(0)
    D = 48
    var = small(opened=False, depth=depth, width=D, heads=4, latent_dim=200)
    sizes = {"word_embed.weight": 1, "position": 1, "class_embed.weight": 1, "qkv.weight": 1,
             "mlp.0.weight": 1, "attention.proj.weight": 1 / math.sqrt(2 * depth),
             "mlp.2.weight": 1 / math.sqrt(2 * depth), "head.weight": 0.02,
             "head_modulation.weight": 0.5}
    weights = [([p for name, p in var.named_parameters() if name.endswith(end)], size)
               for end, size in sizes.items()]
    weights.append(([b.modulation.weight[:2 * D] for b in var.blocks], gate))
    weights.append(([b.modulation.weight[2 * D:] for b in var.blocks], 0.5))
    for same_size, size in weights:
        flat = torch.cat([w.flatten() for w in same_size]) / math.sqrt(1 / (3 * D))
        assert float(flat.std()) == pytest.approx(size, rel=0.15)
        assert abs(float(flat.mean())) < 0.2 * size
    assert all(torch.allclose(b.attention.log_scale.exp(), torch.tensor(4.0)) for b in var.blocks)
    assert not any(p.any() for name, p in var.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_every_parameter_gets_its_gradient_also_when_blocks_are_computed_twice(shared_adaln):
    torch.manual_seed(0)
    var, gradients = small(shared_adaln=shared_adaln), []
    shown = batch(var)
    for var.activation_checkpointing in (False, True):
        var.zero_grad()
        var(*shown).square().sum().backward()
        gradients.append([p.grad.clone() for p in var.parameters()])
    for name, plain, twice in zip(dict(var.named_parameters()), *gradients):
        assert plain.any() and torch.equal(plain, twice)
        assert "modulation" not in name or plain.any(-1).all(), "a gate, scale or shift is unused"


# -- Attention and sizes ---------------------------------------------------------------------------

@torch.no_grad()
def test_the_factor_of_a_head_grows_up_to_one_hundred():
    torch.manual_seed(0)
    layer = small().blocks[0].attention
    factors = []
    for value in (50, 99, 100, 8000):
        layer.log_scale.fill_(math.log(value))
        q, k, _, qk_factor = layer.project(torch.randn(1, 5, 16))
        factors.append(float((q.norm(dim=-1) * k.norm(dim=-1)).mean()) * qk_factor)
    assert factors == pytest.approx([50, 99, 100, 100], rel=1e-4)


def test_depth_sets_width_and_heads_unless_they_are_given_and_sizes_must_fit():
    config = m4.VARConfig(depth=6)
    assert (config.width, config.heads, config.drop_path) == (384, 6, pytest.approx(0.025))
    assert m4.VARConfig(depth=6, drop_path=0.0).drop_path == 0
    assert (m4.VARConfig(depth=6, width=48).width, m4.VARConfig(depth=6, heads=3).heads) == (48, 3)
    for wrong, word in [(dict(width=10, heads=3), "multiple of heads"), (dict(heads=0), "or more"),
                        (dict(depth=0), "1 or more"), (dict(scales=()), "1 or more"),
                        (dict(scales=(1, 0)), "1 or more"), (dict(drop_path=-0.5), "drop_path"),
                        (dict(drop_path=1.0), "drop_path"), (dict(label_dropout=1.5), "dropout"),
                        (dict(mlp_ratio=0.0001), "mlp_ratio")]:
        with pytest.raises(BadInput, match=word):
            m4.VARConfig(**wrong)

"""Chapter 4: half precision, what differs in training, and initial values.

The course's graders (exercises/grade_04.py) compare the cache, the block and `step` with
slow versions; test_golden.py compares everything with the original code."""
import math
from importlib import import_module

import pytest
import torch

from exercises.compare import random_var

m4 = import_module("04_var_transformer")
CLASSES = 5
SIZES = dict(num_classes=CLASSES, vocab_size=7, latent_dim=3, depth=2, width=16, heads=2,
             label_dropout=0.0, drop_path=0.0)


def small(scales=(1, 2, 3), **changes):
    return random_var(m4, scales, **(SIZES | changes))


@torch.no_grad()
def test_autocast_reaches_both_ways():
    torch.manual_seed(0)
    var = small()
    inputs = torch.tensor([0, 1, CLASSES]), torch.randn(3, var.L - 1, 3)
    exact = var(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, _ = var.blocks[0].attention.project(torch.randn(1, 5, 16))
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        for found in (var(*inputs), m4.scale_by_scale(var, *inputs)):
            assert found.dtype == torch.bfloat16
            assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_training_hides_a_share_of_the_labels_behind_a_learned_null_class():
    torch.manual_seed(0)
    var, labels = small((1,), label_dropout=0.25), torch.arange(2000) % CLASSES
    shown = torch.zeros(2000, 0, 3)
    own, null = var(labels, shown), var(torch.full_like(labels, CLASSES), shown)
    assert ((own - null).abs().amax((1, 2)) > 1e-3).all(), "eval keeps every label"
    logits = var.train()(labels, shown)                              # (2000, 1, V)
    hidden = (logits - null).abs().amax((1, 2)) < 1e-5
    assert 0.2 < float(hidden.float().mean()) < 0.3
    assert torch.allclose(logits[~hidden], own[~hidden], atol=1e-5)
    null.square().sum().backward()
    assert var.class_embed.weight.grad[CLASSES].all()


@torch.no_grad()
def test_drop_path_grows_with_depth_and_keeps_the_mean():
    assert [b.drop_rate for b in small(depth=3, drop_path=0.5).blocks] == [0, 0.25, 0.5]
    torch.manual_seed(0)
    block, h = small(drop_path=0.4).blocks[1], torch.ones(4000, 2, 3)
    assert torch.equal(block.drop_path(h), h)
    assert float(block.train().drop_path(h).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_every_parameter_gets_its_gradient_with_and_without_checkpointing(shared_adaln):
    torch.manual_seed(0)
    var, gradients = small(shared_adaln=shared_adaln), []
    inputs = torch.tensor([0, 1, CLASSES]), torch.randn(3, var.L - 1, 3)
    assert torch.equal(var.train()(*inputs), var.eval()(*inputs)), "nothing is dropped"
    for checkpointing in (False, True):
        var.activation_checkpointing = checkpointing
        var.zero_grad()
        var(*inputs).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in var.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad.any() and torch.equal(grad, gradients[1][name])
        assert "modulation" not in name or grad.any(-1).all(), "one of the six is unused"


@pytest.mark.parametrize("depth, gate, shared_adaln", [
    (23, 1e-3, False), (24, 1e-4, False), (30, 1e-5, False), (36, 5e-6, True)])
@torch.no_grad()
def test_weights_start_at_the_original_sizes(depth, gate, shared_adaln):
    torch.manual_seed(0)
    var = m4.VAR(m4.VARConfig(scales=(1, 2), depth=depth, width=48, heads=4,
                              shared_adaln=shared_adaln))
    std, branch = math.sqrt(1 / (3 * 48)), 1 / math.sqrt(2 * depth)
    sizes = {"position": std, "class_embed.weight": std, "qkv.weight": std,
             "attention.proj.weight": branch * std, "mlp.2.weight": branch * std,
             "head.weight": 0.02 * std, "head_modulation.weight": 0.5 * std}
    for name, p in var.named_parameters():
        for ending in filter(name.endswith, sizes):
            assert float(p.std()) == pytest.approx(sizes[ending], rel=0.2), name
        assert not name.endswith("bias") or not p.any()
        assert not name.endswith("log_scale") or torch.allclose(p.exp(), torch.tensor(4.0))
    block, unit = var.blocks[0], 1 / math.sqrt(48) if shared_adaln else std
    six = (block.modulation_offset if shared_adaln else block.modulation.weight).view(6, -1)
    assert float(six[:2].std()) == pytest.approx(gate * unit, rel=0.3)
    assert float(six[2:].std()) == pytest.approx(0.5 * unit, rel=0.3)


@torch.no_grad()
def test_the_factor_of_a_head_is_at_most_one_hundred():
    torch.manual_seed(0)
    layer = small().blocks[0].attention
    layer.log_scale.fill_(9.0)
    q, k, _, factor = layer.project(torch.randn(1, 5, 16))
    products = q.norm(dim=-1) * k.norm(dim=-1) * factor
    assert torch.allclose(products, torch.full_like(products, 100))


def test_depth_sets_width_heads_and_drop_path_and_sizes_must_fit():
    config = m4.VARConfig(depth=6)
    assert (config.width, config.heads, config.drop_path) == (384, 6, pytest.approx(0.025))
    for wrong in (dict(width=10, heads=3), dict(scales=()), dict(drop_path=1.0)):
        with pytest.raises(ValueError):
            m4.VARConfig(**wrong)

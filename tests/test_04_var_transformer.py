"""Chapter 4: one pass with a mask equals a pass per scale with a cache, and what labels do."""
import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

m4 = import_module("04_var_transformer")
seeds = st.integers(0, 10_000)
schedules = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
CLASSES, CODES, LATENT = 5, 7, 3


def small(scales=(1, 2, 3), opened=True, dtype=torch.float32, **changes):
    """In eval mode. The gates of a new transformer are shut and prove nothing: open them."""
    defaults = dict(num_classes=CLASSES, scales=scales, vocab_size=CODES, latent_dim=LATENT,
                    depth=2, width=16, heads=2)
    var = m4.VAR(m4.VARConfig(**{**defaults, **changes})).to(dtype).eval()
    if opened:
        with torch.no_grad():
            for p in var.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return var


def batch(var, n=3):
    dtype = var.start.dtype
    return torch.randint(CLASSES + 1, (n,)), torch.randn(n, var.L - var.first, LATENT, dtype=dtype)


def scale_by_scale(var, labels, teacher_inputs):
    """Logits of all scales from `step`, as sampling calls it."""
    conditioning, cache, logits, begin = var.conditioning(labels), var.new_cache(), [], 0
    for k, side in enumerate(var.config.scales):
        inputs = teacher_inputs[:, begin:begin + side * side] if k else None
        begin += side * side if k else 0
        logits.append(var.step(k, inputs, conditioning, cache))
        assert logits[-1].shape == (len(labels), side * side, CODES)
    return torch.cat(logits, 1)


def tokens_up_to(var, k):
    return sum(side * side for side in var.config.scales[:k])


kinds = st.fixed_dictionaries(dict(
    depth=st.integers(1, 3), shared_adaln=st.booleans(), qk_norm=st.booleans(),
    mlp_ratio=st.sampled_from([1.0, 4.0])))


# ---------------------------------------------------------------------------- cached == masked


@given(scales=schedules, heads=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 8]), kind=kinds,
       double=st.booleans(), grad=st.booleans(), seed=seeds)
def test_cached_equals_masked(scales, heads, head_dim, kind, double, grad, seed):
    torch.manual_seed(seed)
    var = small(scales, heads=heads, width=heads * head_dim, **kind,
                dtype=torch.float64 if double else torch.float32)
    labels, shown = batch(var)
    with torch.set_grad_enabled(grad):
        masked, cached = var(labels, shown), scale_by_scale(var, labels, shown)
    assert masked.shape == (3, var.L, CODES)
    limit = 1e-11 if double else 1e-4
    assert (masked - cached).abs().max() < limit * masked.abs().max()


@given(scales=schedules.filter(lambda s: len(s) > 1), kind=kinds, grad=st.booleans(), seed=seeds)
def test_finer_teacher_inputs_move_coarser_logits_by_exactly_zero(scales, kind, grad, seed):
    torch.manual_seed(seed)
    var = small(scales, **kind)
    labels, shown = batch(var)
    with torch.set_grad_enabled(grad):
        before = var(labels, shown)
        for k in range(1, len(scales)):
            n = tokens_up_to(var, k)
            fresh = shown.clone()
            fresh[:, n - var.first:] = torch.randn_like(fresh[:, n - var.first:])
            after = var(labels, fresh)
            assert torch.equal(after[:, :n], before[:, :n])
            end = tokens_up_to(var, k + 1)
            assert (after[:, n:end] - before[:, n:end]).abs().amax(-1).min() > 0


@torch.no_grad()
def test_every_token_of_a_map_sees_the_whole_map():
    torch.manual_seed(0)
    var = small((1, 3))
    labels, shown = batch(var)
    fresh = shown.clone()
    fresh[:, -1] += 1                                 # the last cell of the 3x3 map
    moved = (var(labels, fresh) - var(labels, shown)).abs().amax((0, 2))
    assert moved[0] == 0 and (moved[1:] > 1e-6).all()


@pytest.mark.parametrize("grad", [False, True])
def test_raster_order_is_blocks_of_one_token(grad):
    torch.manual_seed(0)
    var = small((1,) * 16)
    labels, shown = batch(var)
    assert var.L == 16 and shown.shape == (3, 15, LATENT)
    with torch.set_grad_enabled(grad):
        before = var(labels, shown)
        assert torch.allclose(before, scale_by_scale(var, labels, shown), atol=1e-5)
        for i in range(15):                           # input i is seen from token i + 1 on
            fresh = shown.clone()
            fresh[:, i] += 1
            moved = (var(labels, fresh) - before).abs().amax((0, 2))
            assert moved[:i + 1].max() == 0 and moved[i + 1] > 1e-5


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    var = small(dtype=torch.float64)
    labels, shown = batch(var, 4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(var(labels, shown)[order], var(labels[order], shown[order]), atol=1e-12)


@torch.no_grad()
def test_the_cache_refuses_a_second_picture():
    var = small((1, 2))
    labels, shown = batch(var)
    conditioning, cache = var.conditioning(labels), var.new_cache()
    var.step(0, None, conditioning, cache)
    var.step(1, shown, conditioning, cache)
    with pytest.raises(AssertionError, match="cache"):
        var.step(0, None, conditioning, cache)
    full = m4.KVCache(5)
    full.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(AssertionError, match="cache"):
        full.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))


def test_the_cache_returns_all_it_was_given_in_order():
    cache, k, v = m4.KVCache(6), torch.randn(2, 1, 6, 3), torch.randn(2, 1, 6, 3)
    for begin, end in [(0, 1), (1, 4), (4, 6)]:
        found_k, found_v = cache.append(k[:, :, begin:end], v[:, :, begin:end])
        assert torch.equal(found_k, k[:, :, :end]) and torch.equal(found_v, v[:, :, :end])


# ---------------------------------------------------------------------------- labels


@torch.no_grad()
def test_eval_never_drops_a_label():
    torch.manual_seed(0)
    var = small(label_dropout=1.0, drop_path=0.9)
    _, shown = batch(var, 1)
    shown = shown.expand(CLASSES + 1, -1, -1)
    logits = var(torch.arange(CLASSES + 1), shown)
    assert torch.equal(logits, var(torch.arange(CLASSES + 1), shown))
    for c in range(CLASSES):                          # each class speaks for itself
        assert (logits[c] - logits[CLASSES]).abs().max() > 1e-3


@torch.no_grad()
def test_training_with_every_label_dropped_gives_the_null_label():
    torch.manual_seed(0)
    var = small(label_dropout=1.0, drop_path=0.0)
    labels, shown = torch.arange(CLASSES), batch(var, CLASSES)[1]
    null = var(torch.full((CLASSES,), CLASSES), shown)
    assert not torch.allclose(null, var(labels, shown), atol=1e-3)
    assert torch.equal(null, var.train()(labels, shown))


@torch.no_grad()
def test_training_drops_about_the_given_share_of_labels():
    torch.manual_seed(0)
    var = small((1,), label_dropout=0.25, drop_path=0.0, depth=1)
    labels, shown = torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, 0, LATENT)
    kept, null = var(labels, shown)[:1], var(labels + CLASSES, shown)[:1]
    found = var.train()(labels, shown)
    is_kept, is_null = ((found - x).abs().amax((1, 2)) < 1e-5 for x in (kept, null))
    assert (is_kept ^ is_null).all()
    assert 0.2 < float(is_null.float().mean()) < 0.3
    assert labels.max() == 0                          # the caller's labels are left alone


def test_without_dropout_training_equals_eval():
    torch.manual_seed(0)
    var = small(label_dropout=0.0, drop_path=0.0)
    labels, shown = batch(var)
    assert torch.equal(var(labels, shown), var.train()(labels, shown))


def test_the_null_class_is_a_learnt_row():
    torch.manual_seed(0)
    var = small(label_dropout=1.0, drop_path=0.0).train()
    labels, shown = torch.arange(CLASSES), batch(var, CLASSES)[1]
    var(labels, shown).square().sum().backward()
    grad = var.class_embed.weight.grad
    assert grad.shape == (CLASSES + 1, 16)
    assert grad[CLASSES].abs().min() > 0 and grad[:CLASSES].abs().max() == 0


@torch.no_grad()
def test_the_null_row_speaks_for_the_null_label_alone_in_forward_and_in_step():
    torch.manual_seed(0)
    var = small()
    labels, shown = torch.tensor([0, CLASSES]), batch(var, 2)[1]
    before = var(labels, shown), scale_by_scale(var, labels, shown)
    var.class_embed.weight[CLASSES] += torch.randn(16)
    after = var(labels, shown), scale_by_scale(var, labels, shown)
    for a, b in zip(before, after):
        moved = (a - b).abs().amax(-1)
        assert moved[0].max() == 0 and moved[1].min() > 1e-5


@torch.no_grad()
def test_the_class_steers_the_start_the_blocks_and_the_head():
    torch.manual_seed(0)
    var = small()
    row, blocks, head = var.conditioning(torch.tensor([1, 4, 1]))
    assert row.shape == (3, 1, 16) and head.shape == (3, 1, 2, 16)
    assert [b.shape for b in blocks] == [(3, 1, 6, 16)] * 2
    for part in (row, *blocks, head):
        assert torch.allclose(part[0], part[2]) and not torch.allclose(part[0], part[1])


# ---------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_scale_embeddings_act_alike_in_forward_and_in_step(training):
    torch.manual_seed(0)
    var = small((1, 2, 3), label_dropout=0.0, drop_path=0.0).train(training)
    labels, shown = batch(var)
    for k in range(3):
        before = var(labels, shown), scale_by_scale(var, labels, shown)
        var.scale_embed.weight[k] += torch.randn(16)
        moved = [a - b for a, b in zip((var(labels, shown), scale_by_scale(var, labels, shown)),
                                       before)]
        begin, end = tokens_up_to(var, k), tokens_up_to(var, k + 1)
        assert torch.allclose(*moved, atol=1e-4)
        for m in moved:
            assert m[:, begin:end].abs().amax(-1).min() > 1e-3
            assert not m[:, :begin].any()


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_every_token_has_its_position_in_forward_and_in_step(training):
    torch.manual_seed(0)
    var = small((1, 2), label_dropout=0.0, drop_path=0.0, dtype=torch.float64).train(training)
    labels, shown = batch(var)
    for i in range(var.L):
        before = var(labels, shown), scale_by_scale(var, labels, shown)
        var.position[:, i] += torch.randn(16)
        after = var(labels, shown), scale_by_scale(var, labels, shown)
        moved = [(a - b).abs().amax((0, 2)) for a, b in zip(after, before)]
        assert torch.allclose(*moved, atol=1e-10) and moved[0].argmax() == i


# ---------------------------------------------------------------------------- drop-path


def test_drop_path_rates_rise_in_equal_steps_to_the_last_block():
    assert [b.drop_path for b in small(depth=3, drop_path=0.5).blocks] == [0, 0.25, 0.5]
    assert m4.VARConfig(depth=12).drop_path == pytest.approx(0.05)
    assert m4.VARConfig(depth=24).drop_path == pytest.approx(0.1)
    assert m4.VARConfig(depth=24, drop_path=0.0).drop_path == 0
    assert [b.drop_path for b in small(depth=1, drop_path=0.5).blocks] == [0]


def test_drop_path_leaves_out_whole_pictures_and_keeps_the_mean():
    torch.manual_seed(0)
    block = small(depth=2, drop_path=0.4).blocks[1]
    h = torch.ones(4000, 2, 3)
    assert torch.equal(block.skip(h), h)              # eval: nothing happens
    y = block.train().skip(h)
    per_picture = y.flatten(1)
    assert torch.equal(per_picture.amin(1), per_picture.amax(1))
    kept = per_picture[:, 0] > 0
    assert torch.allclose(per_picture[kept], torch.tensor(1 / 0.6))
    assert float(y.mean()) == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_a_block_whose_branches_are_all_dropped_is_the_identity():
    torch.manual_seed(0)
    var = small(drop_path=1 - 1e-7)
    x, modulation = torch.randn(3, var.L, 16), var.conditioning(torch.tensor([0, 1, 2]))[1][1]
    block = var.blocks[1]
    assert not torch.allclose(block(x, modulation), x, atol=1e-3)
    assert torch.equal(block.train()(x, modulation), x)


# ---------------------------------------------------------------------------- at the start


@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_first_loss_is_ln_v(shared_adaln):
    torch.manual_seed(0)
    var = small((1, 2, 3, 4), opened=False, vocab_size=300, width=64, shared_adaln=shared_adaln)
    labels, shown = batch(var, 8)
    tokens = torch.randint(300, (8, var.L))
    loss = F.cross_entropy(var(labels, shown).flatten(0, 1), tokens.flatten())
    assert float(loss) == pytest.approx(math.log(300), rel=0.01)


@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_every_block_starts_as_nearly_the_identity(shared_adaln):
    torch.manual_seed(0)
    var = small(opened=False, width=64, shared_adaln=shared_adaln)
    x = torch.randn(2, var.L, 64)
    for block, modulation in zip(var.blocks, var.conditioning(torch.tensor([0, 1]))[1]):
        change = (block(x, modulation) - x).norm() / x.norm()
        if shared_adaln:                              # the shared layer itself is not shut
            change = (block(x, modulation * 0 + block.modulation_offset) - x).norm() / x.norm()
        assert 0 < change < 2e-3


@torch.no_grad()
def test_initial_weights_have_the_original_sizes():
    torch.manual_seed(0)
    depth, D = 4, 96
    var = small(opened=False, depth=depth, width=D, heads=4)
    std = math.sqrt(1 / (3 * D))

    def check(weight, factor):
        assert float(weight.std()) == pytest.approx(factor * std, rel=0.15)
        assert abs(float(weight.mean())) < 0.2 * factor * std
    check(var.word_embed.weight, 1)
    check(var.position, 1)
    check(var.class_embed.weight, 1)
    check(var.head.weight, 0.02)
    check(var.head_modulation.weight, 0.5)
    for block in var.blocks:
        check(block.attention.qkv.weight, 1)
        check(block.mlp[0].weight, 1)
        check(block.attention.proj.weight, 1 / math.sqrt(2 * depth))
        check(block.mlp[2].weight, 1 / math.sqrt(2 * depth))
        check(block.modulation.weight[:2 * D], 1e-3)
        check(block.modulation.weight[2 * D:], 0.5)
        assert torch.allclose(block.attention.log_scale.exp(), torch.tensor(4.0))
    for name, p in var.named_parameters():
        assert not name.endswith("bias") or not p.any(), name


@pytest.mark.parametrize("depth, gate", [(23, 1e-3), (24, 1e-4), (30, 1e-5), (36, 5e-6)])
@torch.no_grad()
def test_gates_of_deeper_models_start_closer_to_shut(depth, gate):
    torch.manual_seed(0)
    var = small(opened=False, depth=depth, width=36, heads=1, scales=(1,))
    std = math.sqrt(1 / (3 * 36))
    found = torch.cat([b.modulation.weight[:72].flatten() for b in var.blocks]).std()
    assert float(found) == pytest.approx(gate * std, rel=0.05)


def test_depth_alone_sets_width_and_heads():
    config = m4.VARConfig(depth=6)
    assert (config.width, config.heads) == (384, 6)
    assert (m4.VARConfig(depth=6, width=48).width, m4.VARConfig(depth=6, heads=3).heads) == (48, 3)


PUBLISHED = json.loads((Path(__file__).parent / "golden/released_keys.json").read_text())


@pytest.mark.parametrize("name, millions", [("d16", 310), ("d20", 601), ("d24", 1033),
                                            ("d30", 2010), ("d36", 2354)])
def test_parameter_counts_are_the_published_ones(name, millions):
    config = PUBLISHED[name]["config"]
    with torch.device("meta"):                        # sizes without memory
        var = m4.VAR(m4.VARConfig(
            num_classes=1000, scales=config["patch_nums"], vocab_size=4096, latent_dim=32,
            depth=config["depth"], shared_adaln=config["shared_aln"]))
    count = sum(p.numel() for p in var.parameters())
    assert count == PUBLISHED[name]["parameters"] and round(count / 1e6) == millions


def test_every_parameter_gets_a_gradient():
    for shared_adaln in (False, True):
        torch.manual_seed(0)
        var = small(shared_adaln=shared_adaln)
        var(*batch(var)).square().sum().backward()
        for name, p in var.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


# ---------------------------------------------------------------------------- attention


@torch.no_grad()
def test_temperature_stops_at_one_hundred():
    torch.manual_seed(0)
    var = small(dtype=torch.float64)
    labels, shown = batch(var)

    def logits(value):
        for block in var.blocks:
            block.attention.log_scale.fill_(value)
        return var(labels, shown), scale_by_scale(var, labels, shown)
    at_limit, beyond, below = logits(math.log(100)), logits(9.0), logits(math.log(50))
    for a, b, c in zip(at_limit, beyond, below):
        assert torch.allclose(a, b, atol=1e-12) and not torch.allclose(a, c, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_attention_equals_a_slow_loop(qk_norm):
    torch.manual_seed(0)
    layer = small((1, 2), qk_norm=qk_norm, dtype=torch.float64).blocks[0].attention
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    wq, wk, wv = layer.qkv.weight.chunk(3)            # 2 heads of 8
    out = torch.zeros(5, 16, dtype=torch.float64)
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        q = x[0] @ wq[rows].t() + layer.q_bias[rows]
        k, v = x[0] @ wk[rows].t(), x[0] @ wv[rows].t() + layer.v_bias[rows]
        if qk_norm:
            q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
            factor = float(layer.log_scale[0, head].exp())
        else:
            factor = 0.25 / math.sqrt(8)
        for i in range(5):
            seen = 1 if i == 0 else 5
            out[i, rows] = (factor * (k[:seen] @ q[i])).softmax(0) @ v[:seen]
    assert torch.allclose(layer(x)[0], out @ layer.proj.weight.t() + layer.proj.bias, atol=1e-10)


@settings(max_examples=10)
@given(scales=schedules, kind=kinds, seed=seeds)
@torch.no_grad()
def test_a_saved_transformer_gives_the_same_logits(scales, kind, seed):
    torch.manual_seed(seed)
    one, two = small(scales, **kind), small(scales, **kind)
    labels, shown = batch(one)
    assert not torch.allclose(one(labels, shown), two(labels, shown))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(labels, shown), two(labels, shown))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of heads"):
        m4.VARConfig(width=10, heads=3)
    with pytest.raises(TypeError):
        m4.VARConfig(dept=3)

"""Chapter 6: drawing tokens, guidance, likelihood, what editing may touch, the growing canvas."""
import math
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_models, seeded
from hypothesis import example, given
from hypothesis import settings as few
from hypothesis import strategies as st

from data import batches, shapes
from engine import BadInput
from report import command_line

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m6, editing = import_module("06_sample_and_edit"), import_module("experiments.editing")
NOBODY = 3                                                 # the row of "no class", after three


@pytest.fixture(scope="module")
def models():
    return random_models()


def noise_image(count=2, seed=0):
    return torch.rand(count, 3, 16, 16, generator=seeded(seed)) * 2 - 1


def random_maps(tokenizer, count, seed=0):
    V = tokenizer.config.vocab_size
    return [torch.randint(V, (count, s * s), generator=seeded(seed + s)) for s in tokenizer.scales]


# -- Drawing ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("use_k, use_p", [(1, 0), (0, 1), (1, 1), (0, 0)])
@given(row=st.lists(st.integers(-4, 4), min_size=1, max_size=8), k=st.integers(1, 8),
       p=st.sampled_from([1e-9, 1.0]) | st.floats(0.01, 0.99))
def test_top_k_then_top_p_keep_the_fewest_of_the_largest_even_among_equals(row, k, p, use_k, use_p):
    k, p = k * use_k, p * use_p
    logits = torch.tensor([row, row[::-1]], dtype=torch.float32)         # small integers: many ties
    before = logits.clone()
    kept = m6.keep_likely(logits, k, p)
    assert torch.equal(logits, before), "the input was changed"
    count = min(k, len(row)) or len(row)
    share = torch.tensor(sorted(row, reverse=True)[:count]).double().softmax(0).tolist()
    if 0 < p < 1:
        held = 0.0
        for count, part in enumerate(share, 1):            # one more until they hold enough
            held += part
            if held >= p - 1e-12:
                break
        if count > 1 and min(abs(held - p), abs(held - part - p)) < 1e-5:
            return                                         # a tie of sums: rounding decides
    for one, given_ in zip(kept, logits):
        stays = one > -torch.inf
        assert int(stays.sum()) == count and torch.equal(one[stays], given_[stays])
        assert stays.all() or given_[stays].min() >= given_[~stays].max()


@pytest.mark.parametrize("scales", [(1, 2, 4), (4,)])
def test_a_temperature_divides_the_logits_before_any_is_dropped(scales):
    """Guidance, top-k, top-p and seeds are the original's: see test_golden.py."""
    tokenizer, var = random_models(scales)
    labels, how = torch.tensor([0, 2, 1, NOBODY]), dict(cfg=1.5, top_k=12, top_p=0.8)
    hot = m6.generate(tokenizer, var, labels, temperature=2.0, **how, generator=seeded(5))
    plain = m6.generate(tokenizer, var, labels, **how, generator=seeded(5))
    var.head.weight.div_(2)
    var.head.bias.div_(2)
    halved = m6.generate(tokenizer, var, labels, **how, generator=seeded(5))
    assert torch.equal(hot, halved) and not torch.equal(hot, plain)


@torch.no_grad()
def slow_tokens(tokenizer, var, labels, t, seed):
    """Every scale asks the whole model twice, for the class and without one; nothing is cached."""
    generator, tokens, begin = seeded(seed), [], 0
    for k, side in enumerate(tokenizer.scales):
        finer = [torch.zeros(len(labels), s * s).long() for s in tokenizer.scales[k:]]
        inputs, end = tokenizer.teacher_inputs(tokens + finer), begin + side * side
        c, u = (var(who, inputs)[:, begin:end] for who in (labels, torch.full_like(labels, NOBODY)))
        tokens.append(m6.draw(c + t[k] * (c - u), generator))
        begin = end
    return tokens


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("t, doubled", [
    ([0, 0, 0], 0), ([3, 0, 0], 1), ([1, 4, 0], 2), ([0, 3, 0], 2), ([4, 0, 0.2], 3),
    ((0, 1, 2.5), 3), ([2], 1), ([0], 0)])
def test_guidance_that_ends_early_draws_the_same_tokens_with_half_the_work(t, doubled,
                                                                           shared_adaln):
    tokenizer, var = random_models((1, 2, 4)[-len(t):], shared_adaln=shared_adaln)
    labels, rows = torch.tensor([2, 0, 1, 1]), []
    wanted = slow_tokens(tokenizer, var, labels, t, seed=6)
    var.head.register_forward_hook(lambda layer, given, logits: rows.append(len(logits)))
    tokens = m6.sample_tokens(tokenizer, var, labels, cfg=t, generator=seeded(6))
    assert all(map(torch.equal, tokens, wanted))
    assert rows == [8] * doubled + [4] * (len(t) - doubled)


def test_a_number_is_a_ramp_and_strengths_that_make_no_sense_are_refused(models):
    assert m6.strengths(3.0, 4) == [0.0, 1.0, 2.0, 3.0] and m6.strengths(3.0, 1) == [0.0]
    assert m6.strengths(np.linspace(0, 3, 4), 4).tolist() == m6.strengths(np.float32(3), 4)
    image, keep, labels = noise_image(1), box(8, 0, 16, 16), torch.tensor([1])
    for way, *what in ((m6.generate, labels), (m6.edit, image, keep, labels),
                       (m6.outpaint, image, (0, 0, 8, 0), labels)):
        number, ramp, other = (way(*models, *what, cfg=cfg, generator=seeded(2))
                               for cfg in (3.0, [0.0, 1.5, 3.0], [0.0, 9.0, 0.0]))
        assert torch.equal(number, ramp) and not torch.equal(ramp, other)
    for cfg in ([1.0, 1.0], [1.0] * 4, [], [1.0, -0.1, 0.0], [math.nan, 1.0, 1.0],
                [0.0, 0.0, math.inf], -1.0, math.nan):
        with pytest.raises(BadInput, match="a number of at least 0, or a list of 3"):
            m6.generate(*models, labels, cfg=cfg)


def test_smooth_sampling_draws_mixtures_that_sharpen_with_the_scale(models):
    one, again, exact = (m6.generate(*models, torch.tensor([1]), smooth=smooth, generator=seeded(3))
                         for smooth in (True, True, False))
    assert torch.equal(one, again) and not torch.equal(one, exact)
    logits = torch.zeros(4000, 1, 16)
    logits[..., 5] = 2.0                                   # p = e^2 / (e^2 + 15) = 0.33
    early, late = (m6.soften(logits, progress, torch.eye(16), seeded(2)) for progress in (0., 1.))
    assert torch.allclose(early.sum(-1), torch.ones(4000, 1))
    assert late.max(-1).values.mean() > early.max(-1).values.mean()
    share = (early.argmax(-1) == 5).float().mean()
    assert abs(float(share) - 0.33) < 0.03, "Gumbel noise must draw from the softmax"


def test_given_tokens_are_replayed_where_kept_and_drawn_elsewhere(models, monkeypatch):
    maps, labels, seen = random_maps(models[0], 2), torch.tensor([1, 0]), []
    add = m2.MultiScaleVQVAE.next_input
    monkeypatch.setattr(m2.MultiScaleVQVAE, "next_input",
                        lambda self, k, f, t: seen.append(t) or add(self, k, f, t))
    half = [torch.arange(t.shape[1]) % 2 == 0 for t in maps]
    m6.generate(*models, labels, tokens=maps, keep=half, generator=seeded(1))
    for found, wanted, keep in zip(seen, maps, half, strict=True):
        assert torch.equal(found[:, keep], wanted[:, keep])
    assert not torch.equal(seen[-1][:, ~half[-1]], maps[-1][:, ~half[-1]])
    with pytest.raises(BadInput, match="together"):
        m6.generate(*models, labels, tokens=maps)


# -- How probable ----------------------------------------------------------------------------------

def test_tokens_are_drawn_as_often_as_the_likelihood_says():
    """Pearson's chi-square over all 32 images there are; rare ones share a bin."""
    tokenizer, var = random_models((1, 2), 2, noise=0.15)
    maps, count = torch.cartesian_prod(*[torch.arange(2)] * 5), 8_000
    place = 2 ** torch.arange(4, -1, -1)
    for label in (1, NOBODY):
        p = m6.log_likelihood(tokenizer, var, maps.split([1, 4], 1), torch.full((32,), label))
        # Summed over all that may follow, an image is as likely as its first token alone.
        assert torch.allclose(p.sum(1).view(2, 16).logsumexp(1), p[::16, 0], atol=1e-4)
        p = p.sum(1).exp() * count
        drawn = m6.sample_tokens(tokenizer, var, torch.full((count,), label), generator=seeded(9))
        seen = torch.bincount((torch.cat(drawn, 1) * place).sum(1), minlength=32).float()
        often = p >= 5
        assert often.sum() > 12, "too few images to tell"
        p, seen = (torch.cat([x[often], x[~often].sum()[None] + 1e-3]) for x in (p, seen))
        freedom = int(often.sum())
        assert float(((seen - p) ** 2 / p).sum()) < freedom + 4 * math.sqrt(2 * freedom)


def test_logits_of_a_transformer_in_bfloat16_become_float32(monkeypatch):
    """Before anything is made of them. And only guidance takes a batch twice as large."""
    tokenizer, var = random_models()
    labels, tokens = torch.tensor([0, 2]), random_maps(tokenizer, 2)
    exact = m6.log_likelihood(tokenizer, var, tokens, labels)
    var, sizes, dtypes, draw = var.bfloat16(), [], set(), m6.draw
    rough = m6.log_likelihood(tokenizer, var, tokens, labels)
    assert rough.dtype == torch.float32 and torch.allclose(rough, exact, rtol=0.03, atol=0.1)
    monkeypatch.setattr(m6, "draw", lambda logits, generator: dtypes.add(
        logits.dtype) or draw(logits, generator))
    var.head.register_forward_hook(lambda layer, given, logits: sizes.append(len(logits)))
    for cfg in (0.0, 2.0):
        m6.sample_tokens(tokenizer, var, labels, cfg=cfg, generator=seeded())
    assert sizes == [2] * 3 + [4] * 3 and dtypes == {torch.float32}


# -- What editing may touch ------------------------------------------------------------------------

def box(x0, y0, x1, y1, side=16):
    keep = torch.ones(side, side, dtype=torch.bool)
    keep[y0:y1, x0:x1] = False
    return keep


CORNERS = st.tuples(*[st.integers(0, 16)] * 4)
PIXELS = st.builds(lambda seed, density: torch.rand(16, 16, generator=seeded(seed)) < density,
                   st.integers(0, 999), st.sampled_from([0.05, 0.5, 0.95]))
MASKS = PIXELS | CORNERS.map(lambda at: box(*at)) | CORNERS.map(lambda at: ~box(*at))


def slow_fade(keep, soft):
    """Steps (diagonal ones count as one) to the nearest hidden pixel, up to soft + 1 of them."""
    every, hidden = torch.ones_like(keep).nonzero().float(), (~keep).nonzero().float()
    steps = torch.cdist(every, hidden, p=math.inf).clamp(max=soft + 1)       # all pairs
    steps = torch.cat([steps, torch.full((len(every), 1), soft + 1.0)], 1)   # none is hidden
    return (steps.amin(1) / (soft + 1)).view(keep.shape)


@given(height=st.integers(1, 19), width=st.integers(1, 19), seed=st.integers(0, 99),
       density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_hide_leaves_kept_pixels_and_fills_the_rest_from_them_alone(height, width, seed, density):
    image = torch.rand(2, 3, height, width, generator=seeded(seed)) * 2 - 1
    keep = torch.rand(height, width, generator=seeded(seed + 1)) < density
    filled = m6.hide(torch.where(keep, image, torch.nan), keep)
    assert filled.shape == image.shape and filled.isfinite().all()
    assert torch.allclose(filled[:, :, keep], image[:, :, keep], atol=1e-6)
    known = image[:, :, keep] if keep.any() else torch.zeros(2, 3, 1)    # middle grey
    assert (filled >= known.amin(-1)[..., None, None] - 1e-5).all()
    assert (filled <= known.amax(-1)[..., None, None] + 1e-5).all()


@few(max_examples=40)
@given(keep=MASKS, seed=st.integers(0, 9), label=st.integers(0, NOBODY),
       value=st.sampled_from([0.0, 1.0, -1.0, 1e30, math.nan, math.inf, -math.inf]),
       paint=st.integers(1, 3), settle=st.integers(0, 2), soft=st.none() | st.integers(0, 5))
def test_hidden_pixels_cannot_change_the_result(models, keep, seed, label, value, paint, settle,
                                                soft):
    image, labels = noise_image(count=1), torch.tensor([label])
    other = torch.where(keep, image, noise_image(count=1, seed=seed + 1) + value)
    one, two = (m6.edit(*models, x, keep, labels, generator=seeded(7), paint_passes=paint,
                        settle_passes=settle, soft=soft) for x in (image, other))
    assert torch.equal(one, two) and one.isfinite().all()
    if soft is not None:
        deep = slow_fade(keep, soft) == 1
        assert torch.equal(one[:, :, deep], ((image + 1) / 2)[:, :, deep])


@torch.no_grad()
def slow_edit(tokenizer, var, image, keep, labels, *, cfg, seed, paint_passes, settle_passes,
              soft):
    """The specification, for sides that halve from scale to scale: cells are squares of the last
    map, and what a token has to say is the mean of what is missing over the cells that count."""
    last, generator = tokenizer.scales[-1], seeded(seed)
    finest = keep.float().unflatten(0, (last, -1)).unflatten(2, (last, -1)).mean((1, 3)) >= 0.5
    composite = m6.hide(image, keep)
    for number in range(paint_passes + settle_passes):
        target = tokenizer.encode(composite)
        counts = finest if number == 0 else torch.ones_like(finest)

        def choose(k, drawn, f_hat):
            side, chosen = tokenizer.scales[k], drawn.clone()
            for y, x in product(range(side), repeat=2):
                w = last // side
                at = (slice(y * w, y * w + w), slice(x * w, x * w + w))
                if finest[at].float().mean() >= 0.5:
                    cells = (target - f_hat)[(..., *at)][:, :, counts[at]]      # (B, C, cells)
                    chosen[:, y * side + x] = tokenizer.quantizer.nearest(cells.mean(-1))
            return chosen
        if number < paint_passes:
            tokens = m6.sample_tokens(tokenizer, var, labels, cfg=cfg, choose=choose,
                                      generator=generator.manual_seed(seed))
        else:
            tokens = tokenizer.quantize(target)
        result = (tokenizer.tokens_to_image(tokens) + 1) / 2
        composite = torch.where(keep, image, 2 * result - 1)
    weight = 0 if soft is None else slow_fade(keep, soft)
    return weight * (composite + 1) / 2 + (1 - weight) * result


@pytest.mark.parametrize("keep", [box(8, 0, 16, 16), box(3, 5, 13, 11), box(0, 0, 16, 10)])
@pytest.mark.parametrize("paint, settle, soft", [(1, 0, None), (3, 0, 0), (2, 2, 3)])
def test_editing_equals_the_slow_loop(models, keep, paint, settle, soft):
    image, labels = noise_image(), torch.tensor([0, 2])
    how = dict(cfg=2.0, paint_passes=paint, settle_passes=settle, soft=soft)
    ours, other = (m6.edit(*models, image, keep, labels, generator=seeded(seed), **how)
                   for seed in (4, 5))
    assert torch.allclose(ours, slow_edit(*models, image, keep, labels, seed=4, **how), atol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-3), "the hidden part is drawn"


@pytest.mark.parametrize("scales", [(1, 2, 4), (4,)])
def test_keeping_everything_is_the_tokenizers_reconstruction_and_nothing_plain_sampling(scales):
    tokenizer, var = random_models(scales)
    image, labels, keep = noise_image(count=3), torch.tensor([0, 1, 2]), torch.ones(16, 16).bool()
    alone = (tokenizer.tokens_to_image(tokenizer.image_to_tokens(image)) + 1) / 2
    assert torch.allclose(m6.edit(tokenizer, var, image, keep, labels), alone, atol=1e-4)
    how = dict(cfg=2.0, top_k=9, top_p=0.8, temperature=0.7)
    edited = m6.edit(tokenizer, var, image, ~keep, labels, **how, generator=seeded(4))
    assert torch.equal(edited, m6.generate(tokenizer, var, labels, **how, generator=seeded(4)))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["right half", "middle", "off the grid"])
def test_the_kept_region_is_at_least_3_db_truer_than_when_tokens_are_replayed(mask):
    """The shipped model; painting and settling passes each take their share."""
    path = Path(m6.__file__).parent / "data" / "pretrained" / "shapes.pt"
    (tokenizer, _), (var, _) = m6.training.load_tokenizer(path), m6.training.load_transformer(path)
    image, labels = map(torch.from_numpy, shapes.draw(range(64), split="test"))
    image, keep = batches.to_float(image), command_line.outside(editing.MASKS[mask], 32)

    def db(way, **how):
        result = way(tokenizer, var, image, keep, labels, cfg=0.5, generator=seeded(), **how)
        return editing.kept_db(result, image, keep)
    replayed, once, often, ours = (db(editing.replay), db(m6.edit, **editing.ONE),
                                   db(m6.edit, **editing.SIX), db(m6.edit))
    assert ours > replayed + 3 and often > once + 1 and ours > often + 0.2


@pytest.mark.parametrize("labels", [[4], [-1], [0, 99], []])
def test_a_label_the_model_does_not_know_is_refused(models, labels):
    with pytest.raises(BadInput, match="0..2"):
        m6.generate(*models, torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("method, image, region", [
    (m6.edit, (16, 16), torch.ones(8, 8).bool()), (m6.edit, (16, 8), torch.ones(16, 16).bool()),
    (m6.outpaint, (32, 32), (1, 1, 1, 1))])
def test_images_and_masks_of_a_wrong_size_are_refused(models, method, image, region):
    with pytest.raises(BadInput, match="16x16"):
        method(*models, torch.zeros(1, 3, *image), region, torch.tensor([0]))


# -- The growing canvas ----------------------------------------------------------------------------

def slow_outpaint(models, image, grow, labels, *, soft, **how):
    """The specification, a loop over all windows at every turn. They lie whole steps (2 pixels)
    inwards from the rim, none nearer to the picture than a step, unless the rim is."""
    (left, top, right, bottom), S = grow, image.shape[-1]
    canvas = torch.zeros(len(image), 3, top + S + bottom, left + S + right)
    known = torch.zeros(canvas.shape[2:], dtype=torch.bool)
    inside = slice(top, top + S), slice(left, left + S)
    canvas[(..., *inside)], known[inside] = image, True

    def starts(before, after):
        rooms = [(abs(i - before), before if i < before else after, i)
                 for i in range(before + after + 1)]
        return [i for d, room, i in rooms if not d or d == room or d >= 2 and (room - d) % 2 == 0]
    ys, xs = starts(top, bottom), starts(left, right)
    while True:
        best, most = None, -1
        for y, x in product(ys, xs):
            count = int(known[y:y + S, x:x + S].sum())
            if most < count < S * S:
                best, most = (slice(y, y + S), slice(x, x + S)), count
        if best is None:
            return (canvas + 1) / 2
        seen = canvas[(..., *best)].clone()
        painted = m6.edit(*models, seen, known[best], labels, **how) * 2 - 1
        weight = slow_fade(known[best], soft)
        canvas[(..., *best)] = weight * seen + (1 - weight) * painted
        known[best] = True


@few(max_examples=12)
@given(grow=st.tuples(*[st.sampled_from([0, 0, 1, 2, 5])] * 4).filter(lambda grow: sum(grow) <= 7),
       soft=st.sampled_from([None, 0, 3]), seed=st.integers(0, 9))
@example(grow=(18, 0, 0, 0), soft=1, seed=0)
@example(grow=(0, 5, 4, 0), soft=None, seed=1)
def test_out_painting_equals_the_slow_loop_and_leaves_the_image_itself(grow, soft, seed):
    # 16 px in 8x8 cells: each step of the canvas, an eighth, is a cell that is drawn.
    fine = random_models((1, 8), multipliers=(1,))
    left, top, right, bottom = grow
    image, labels, how = noise_image(seed=seed), torch.tensor([2, seed % 4]), editing.ONE
    ours = m6.outpaint(*fine, image, grow, labels, soft=soft, generator=seeded(3), **how)
    assert torch.equal(image, noise_image(seed=seed)), "the input was changed"
    assert ours.shape == (2, 3, top + 16 + bottom, left + 16 + right)
    soft = 2 if soft is None else soft                     # 2: an eighth of the side
    slow = slow_outpaint(fine, image, grow, labels, soft=soft, generator=seeded(3), **how)
    assert torch.allclose(ours, slow, atol=1e-5)


@pytest.mark.parametrize("grow", [(4, 0, 0, 0), (8, 8, 8, 8)])
def test_what_is_added_is_drawn_on_coarse_maps_too(models, grow):
    """Steps smaller than a cell would leave every cell half known, and nothing to the model."""
    one, two = (m6.outpaint(*models, noise_image(count=1), grow, torch.tensor([1]), cfg=0.0, soft=0,
                            generator=seeded(seed), **editing.ONE) for seed in (1, 2))
    assert (one - two).abs().max() > 0.01

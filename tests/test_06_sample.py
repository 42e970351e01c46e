"""Chapter 6: drawing tokens, guidance, editing, released weights, the command line."""
import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from PIL import Image

from data import batches, shapes
from engine import BadInput
from report import judge, studio

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT = "06_sample_and_edit.py"
SHAPES = json.loads((Path(__file__).parent / "golden" / "tiny_keys.json").read_text())
SCALES = (1, 2, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_models(scales=SCALES, **options):
    """A tokenizer and a transformer with random weights; the gates are open, so that everything
    has an effect."""
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=4 * scales[-1], scales=scales, vocab_size=16, latent_dim=4, channels=8,
        multipliers=(1, 2), unshuffle=2, groups=4, **options))
    var = m4.VAR(m4.VARConfig(num_classes=3, scales=scales, vocab_size=16, latent_dim=4, depth=2,
                              width=16, heads=2))
    with torch.no_grad():
        for p in var.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return tokenizer.eval().requires_grad_(False), var.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def trained(tiny):
    """The models of the tiny run, and twelve pictures in [-1, 1]."""
    tokenizer, _ = m5.load_tokenizer(tiny.folder / "tokenizer.pt")
    var, _ = m5.load_transformer(tiny.folder / "transformer.pt")
    image = batches.to_float(torch.from_numpy(shapes.draw(range(12), size=16)[0]))
    return tokenizer, var, image


# -- Drawing ---------------------------------------------------------------------------------------

LOGITS = st.lists(st.integers(-4, 4), min_size=1, max_size=8)     # small integers: many ties


@given(row=LOGITS, k=st.integers(0, 10))
def test_top_k_keeps_exactly_k_of_the_largest_even_among_equals(row, k):
    logits = torch.tensor([row, row[::-1]], dtype=torch.float32)
    before = logits.clone()
    kept = m6.keep_likely(logits, top_k=k)
    assert torch.equal(logits, before), "the input was changed"
    for one, given_ in zip(kept, logits):
        stays = one > -torch.inf
        assert int(stays.sum()) == (min(k, len(row)) or len(row))
        assert torch.equal(one[stays], given_[stays])
        if not stays.all():
            assert given_[stays].min() >= given_[~stays].max()


@given(row=LOGITS, p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_hold_p(row, p):
    logits = torch.tensor([row], dtype=torch.float32)
    before = logits.clone()
    (kept,) = m6.keep_likely(logits, top_p=p)
    assert torch.equal(logits, before), "the input was changed"
    share = sorted(torch.tensor(row).double().softmax(0).tolist(), reverse=True)
    wanted, held = 0, 0.0
    while held < p - 1e-6:                                 # the slow way: one more until enough
        held += share[wanted]
        wanted += 1
    stays = kept > -torch.inf
    if abs(held - p) > 1e-5 and abs(held - share[wanted - 1] - p) > 1e-5:
        assert int(stays.sum()) == wanted
    assert stays.any() and torch.equal(kept[stays], logits[0][stays])
    if not stays.all():
        assert logits[0][stays].min() >= logits[0][~stays].max()


def test_top_k_comes_before_top_p_and_neither_changes_all_when_off():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = m6.keep_likely(logits, top_k=3, top_p=0.75)     # of 4/9 3/9 2/9: two hold 7/9
    assert (both > -torch.inf).tolist() == [[True, True, False, False]]
    assert (m6.keep_likely(logits, 0, 0.75) > -torch.inf).sum() == 3
    for off in (dict(), dict(top_k=4), dict(top_k=99), dict(top_p=1.0), dict(top_k=0, top_p=0.0)):
        assert torch.equal(m6.keep_likely(logits, **off), logits)
    many = torch.randn(2, 3, 5)
    assert m6.keep_likely(many, 2, 0.5).shape == many.shape


def test_tokens_are_drawn_as_often_as_their_probability():
    p = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    drawn = m6.draw(p.log().repeat(4000, 1, 1), seeded())
    assert drawn.shape == (4000, 2) and drawn.dtype == torch.int64
    for n in range(2):
        share = torch.bincount(drawn[:, n], minlength=3) / 4000
        assert torch.allclose(share, p[n], atol=0.03)
    assert (drawn[:, 1] < 2).all()


# -- Generating ------------------------------------------------------------------------------------

@torch.no_grad()
def slow_generate(tokenizer, var, labels, *, cfg, top_k, top_p, generator):
    """The specification: no cache, no halves. Every scale runs the whole masked model over what is
    known so far (what comes later cannot matter), once with the class and once without."""
    tokens, B, begin = [], len(labels), 0
    nobody = torch.full_like(labels, var.config.num_classes)
    for k, side in enumerate(tokenizer.scales):
        guess = tokens + [torch.zeros(B, s * s, dtype=torch.int64) for s in tokenizer.scales[k:]]
        inputs, rows = tokenizer.teacher_inputs(guess), slice(begin, begin + side * side)
        with_class, without = (var(who, inputs)[:, rows] for who in (labels, nobody))
        t = cfg * k / max(len(tokenizer.scales) - 1, 1)
        logits = m6.keep_likely((1 + t) * with_class - t * without, top_k, top_p)
        p = logits.softmax(-1).flatten(0, 1)
        tokens.append(torch.multinomial(p, 1, True, generator=generator).view(B, -1))
        begin += side * side
    return (tokenizer.tokens_to_image(tokens) + 1) / 2


@pytest.mark.parametrize("scales", [(1, 2, 4), (4,), (2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("cfg, top_k, top_p", [(0.0, 0, 0.0), (3.0, 0, 0.0), (2.0, 5, 0.9)])
def test_sampling_equals_the_slow_loop_without_a_cache(scales, cfg, top_k, top_p):
    tokenizer, var = make_models(scales)
    labels = torch.tensor([0, 2, 1, 3])
    ours = m6.generate(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p,
                       generator=seeded(5))
    slow = slow_generate(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p,
                         generator=seeded(5))
    assert ours.shape == (4, 3, 16, 16) and torch.allclose(ours, slow, atol=1e-4)
    assert ours.min() >= 0 and ours.max() <= 1


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(models):
    one, again, other = (m6.generate(*models, torch.tensor([1, 1]), generator=seeded(s))
                         for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1]), "two pictures of a batch are two draws"


def test_the_class_matters(models):
    one, other = (m6.generate(*models, torch.tensor([c]), generator=seeded()) for c in (0, 2))
    assert not torch.equal(one, other)


def test_guidance_uses_the_learnt_row_of_no_class_and_only_when_asked(models):
    tokenizer, _ = models
    _, var = make_models()
    labels = torch.tensor([0, 1, 2])

    def draw(cfg):
        return m6.generate(tokenizer, var, labels, cfg=cfg, generator=seeded())
    guided, plain = draw(4.0), draw(0.0)
    assert not torch.equal(guided, plain)
    var.class_embed.weight[3] += 3 * torch.randn(16, generator=seeded())
    assert torch.equal(draw(0.0), plain) and not torch.equal(draw(4.0), guided)


def test_without_guidance_the_second_half_is_never_computed(models, monkeypatch):
    sizes, step = [], m4.VAR.step

    def spy(self, k, inputs, conditioning, cache):
        sizes.append(len(conditioning[0]))
        return step(self, k, inputs, conditioning, cache)
    monkeypatch.setattr(m4.VAR, "step", spy)
    m6.generate(*models, torch.tensor([0, 1]), cfg=0.0)
    m6.generate(*models, torch.tensor([0, 1]), cfg=1.0)
    assert sizes == [2] * 3 + [4] * 3


class Stub:
    """Stands in for the transformer: class c likes token c, "no class" likes token 3, a little."""
    config = m4.VARConfig(num_classes=3, scales=SCALES, vocab_size=16, latent_dim=4, depth=1,
                          width=4)

    def conditioning(self, labels):
        return [labels[:, None, None].float()]

    def new_cache(self):
        return None

    def step(self, k, inputs, conditioning, cache):
        likes = F.one_hot(conditioning[0][:, 0, 0].long(), 16).float()
        return likes[:, None].repeat(1, SCALES[k] ** 2, 1)


def test_guidance_grows_with_the_scale_from_zero_to_cfg(models, monkeypatch):
    seen = []
    monkeypatch.setattr(m6, "keep_likely", lambda logits, *_: seen.append(logits) or logits)
    m6.generate(models[0], Stub(), torch.tensor([1]), cfg=3.0, generator=seeded())
    for logits, t in zip(seen, (0.0, 1.5, 3.0), strict=True):
        wanted = (1 + t) * F.one_hot(torch.tensor(1), 16) - t * F.one_hot(torch.tensor(3), 16)
        assert torch.allclose(logits, wanted.float().expand_as(logits))


@pytest.mark.parametrize("labels", [[4], [-1], [0, 99], []])
def test_a_label_the_model_does_not_know_is_refused(models, labels):
    with pytest.raises(BadInput, match="0..2"):
        m6.generate(*models, torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("labels", [[4], [-1], [0, 99]])
def test_a_label_the_model_does_not_know_is_refused_in_editing_too(models, labels):
    image, keep = torch.zeros(len(labels), 3, 16, 16), torch.ones(16, 16).bool()
    with pytest.raises(BadInput, match="0..2"):
        m6.edit(*models, image, keep, torch.tensor(labels))


def test_smooth_sampling_repeats_and_stays_in_range(models):
    one, again, other = (m6.generate(*models, torch.tensor([1]), smooth=True, generator=seeded(s))
                         for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.isfinite().all() and one.min() >= 0 and one.max() <= 1
    assert not torch.equal(one, m6.generate(*models, torch.tensor([1]), generator=seeded(3)))


def test_softened_tokens_are_mixtures_that_sharpen_with_the_scale():
    codebook, logits = torch.eye(16), torch.randn(200, 3, 16, generator=seeded())
    early, late = (m6.soften(logits, ratio, codebook, seeded(1)) for ratio in (0.0, 1.0))
    for mixture in (early, late):
        assert mixture.shape == (200, 3, 16) and torch.allclose(mixture.sum(-1), torch.ones(200, 3))
    assert late.max(-1).values.mean() > early.max(-1).values.mean()
    even = torch.zeros(4000, 1, 16)
    even[..., 5] = 2.0                                     # p = e^2 / (e^2 + 15) = 0.33
    share = (m6.soften(even, 0.0, codebook, seeded(2)).argmax(-1) == 5).float().mean()
    assert abs(float(share) - 0.33) < 0.03, "Gumbel noise must draw from the softmax"


def test_kept_tokens_are_replayed_exactly_and_the_others_drawn(trained, monkeypatch):
    tokenizer, var, image = trained
    tokens, labels = tokenizer.image_to_tokens(image[:4]), torch.tensor([0, 1, 2, 0])
    everything = [torch.ones(t.shape[1], dtype=torch.bool) for t in tokens]
    replayed = m6.generate(tokenizer, var, labels, tokens=tokens, keep=everything)
    assert torch.allclose(replayed, (tokenizer.tokens_to_image(tokens) + 1) / 2, atol=1e-5)
    nothing = [~k for k in everything]
    drawn = m6.generate(tokenizer, var, labels, tokens=tokens, keep=nothing, generator=seeded(1))
    assert torch.equal(drawn, m6.generate(tokenizer, var, labels, generator=seeded(1)))
    seen, add = [], m2.MultiScaleVQVAE.next_input
    monkeypatch.setattr(m2.MultiScaleVQVAE, "next_input",
                        lambda self, k, f, t: seen.append(t) or add(self, k, f, t))
    half = [torch.arange(t.shape[1]) % 2 == 0 for t in tokens]
    m6.generate(tokenizer, var, labels, tokens=tokens, keep=half, generator=seeded(1))
    for found, given_, keep in zip(seen, tokens, half, strict=True):
        assert torch.equal(found[:, keep], given_[:, keep])


# -- Editing ---------------------------------------------------------------------------------------

@st.composite
def masks(draw, side=16):
    """A random box, or random pixels, kept or hidden."""
    if draw(st.booleans()):
        keep = torch.rand(side, side, generator=seeded(draw(st.integers(0, 999)))) < \
            draw(st.sampled_from([0.05, 0.5, 0.95]))
    else:
        x0, x1 = sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2)))
        y0, y1 = sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2)))
        keep = torch.ones(side, side, dtype=torch.bool)
        keep[y0:y1, x0:x1] = False
    return keep if draw(st.booleans()) else ~keep


HIDDEN = st.sampled_from([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf"), -float("inf")])


@few(max_examples=40)
@given(keep=masks(), value=HIDDEN, noise=st.integers(0, 9), paste=st.booleans())
def test_hidden_pixels_cannot_change_the_result(trained, keep, value, noise, paste):
    tokenizer, var, image = trained
    image, labels = image[:2], torch.tensor([0, 2])
    other = torch.where(keep, image, torch.randn(image.shape, generator=seeded(noise)) + value)
    for a, b in ((image, other), (other, image)):
        results = [m6.edit(tokenizer, var, x, keep, labels, cfg=2.0, generator=seeded(7),
                           soft=0 if paste else None) for x in (a, b)]
        assert torch.equal(*results) and results[0].isfinite().all()
    if paste:
        assert torch.equal(results[0][:, :, keep], ((image + 1) / 2)[:, :, keep])


def test_keeping_everything_is_the_tokenizers_own_reconstruction(trained):
    tokenizer, var, image = trained
    result = m6.edit(tokenizer, var, image, torch.ones(16, 16).bool(), torch.zeros(12).long())
    assert torch.allclose(result, (tokenizer.tokens_to_image(
        tokenizer.image_to_tokens(image)) + 1) / 2, atol=1e-4)


@pytest.mark.parametrize("scales", [(1, 2, 4), (4,)])
def test_keeping_nothing_is_plain_sampling(scales):
    tokenizer, var = make_models(scales)
    image, labels = torch.rand(3, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2])
    edited = m6.edit(tokenizer, var, image, torch.zeros(16, 16).bool(), labels, cfg=2.0, top_k=9,
                     generator=seeded(4))
    assert torch.equal(edited, m6.generate(tokenizer, var, labels, cfg=2.0, top_k=9,
                                           generator=seeded(4)))


@pytest.mark.parametrize("columns", [8, 12])
def test_the_kept_part_is_truer_than_with_replayed_tokens(trained, columns, monkeypatch):
    """Replaying tokens adds codes that were right for another f_hat; rounding what is still missing
    puts right what the drawn tokens spill over the edge. Measured where tokens act: in f_hat."""
    tokenizer, var, image = trained
    seen, to_picture = [], m6.to_picture
    monkeypatch.setattr(m6, "to_picture", lambda model, f: seen.append(f) or to_picture(model, f))
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :columns] = True
    cells = F.adaptive_avg_pool2d(keep.float()[None, None], 4) == 1
    kept = [tokenizer.look_at(cells.float(), k)[0, :, 0] >= 0.5 for k in range(tokenizer.K)]
    target, labels = tokenizer.encode(m6.hide(image, keep)), torch.arange(12) % 3
    tokens = tokenizer.quantize(target)

    def error(_):
        return float((seen[-1] - target)[:, :, cells[0, 0]].square().mean())
    ours = [error(m6.edit(tokenizer, var, image, keep, labels, generator=seeded(seed),
                          paint_passes=1, settle_passes=0)) for seed in range(8)]
    replayed = [error(m6.generate(tokenizer, var, labels, tokens=tokens, keep=kept,
                                  generator=seeded(seed))) for seed in range(8)]
    assert np.mean(ours) < np.mean(replayed)


@pytest.fixture(scope="module")
def shipped():
    """The shipped models, and 20 held-out pictures in [-1, 1] with their labels."""
    path = Path(m6.__file__).parent / "data" / "pretrained" / "shapes.pt"
    tokenizer, _ = m6.training.load_tokenizer(path)
    var, _ = m6.training.load_transformer(path)
    images, labels = shapes.draw(range(20), split="test")
    return tokenizer, var, batches.to_float(torch.from_numpy(images)), torch.from_numpy(labels)


def kept_db(painted, image, keep):
    error = (painted - (image + 1) / 2).square()[:, :, keep].mean((1, 2))
    return float((-10 * error.log10()).mean())


@pytest.mark.parametrize("box", [(16, 0, 32, 32), (4, 4, 28, 28), (9, 7, 22, 21)])
def test_each_kind_of_pass_makes_the_kept_region_truer(shipped, box):
    tokenizer, var, image, labels = shipped
    keep = torch.ones(32, 32, dtype=torch.bool)
    keep[box[1]:box[3], box[0]:box[2]] = False

    def db(**how):
        return kept_db(m6.edit(tokenizer, var, image, keep, labels, generator=seeded(), **how),
                       image, keep)
    once, often, ours = (db(paint_passes=1, settle_passes=0), db(settle_passes=0), db())
    assert often > once + 1 and ours > often + 0.3


def test_the_label_changes_the_repainted_part_and_pasting_keeps_the_rest(models):
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:, :8] = True
    image = torch.rand(1, 3, 16, 16, generator=seeded()) * 2 - 1
    one, other = (m6.edit(*models, image, keep, torch.tensor([c]), cfg=3.0, generator=seeded(1),
                          soft=0) for c in (0, 2))
    change = (one - other).abs().mean((0, 1, 2))
    assert change[8:].min() > 0 and change[:8].max() == 0


@pytest.mark.parametrize("image, keep", [((16, 16), (8, 8)), ((8, 8), (8, 8)), ((16, 8), (16, 8)),
                                         ((8, 16), (8, 16)), ((16, 16), (16, 8)),
                                         ((32, 32), (32, 32))])
def test_pictures_and_masks_of_a_wrong_size_are_refused(models, image, keep):
    with pytest.raises(BadInput, match="16x16"):
        m6.edit(*models, torch.zeros(1, 3, *image), torch.ones(keep).bool(), torch.tensor([0]))


@given(height=st.integers(1, 19), width=st.integers(1, 19), seed=st.integers(0, 99),
       density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_hide_leaves_kept_pixels_and_fills_the_rest_from_them_alone(height, width, seed, density):
    image = torch.rand(2, 3, height, width, generator=seeded(seed)) * 2 - 1
    keep = torch.rand(height, width, generator=seeded(seed + 1)) < density
    filled = m6.hide(torch.where(keep, image, torch.nan), keep)
    assert filled.shape == image.shape and filled.isfinite().all()
    assert torch.allclose(filled[:, :, keep], image[:, :, keep], atol=1e-6)
    if keep.any():
        low, high = image[:, :, keep].amin(-1), image[:, :, keep].amax(-1)
        assert (filled >= low[..., None, None] - 1e-5).all()
        assert (filled <= high[..., None, None] + 1e-5).all()
    else:
        assert filled.abs().max() == 0, "nothing known: middle grey"


# -- The released weights --------------------------------------------------------------------------

def released(name="plain"):
    """Random state dicts in the released layout, and the scales they were made for."""
    torch.manual_seed(0)
    states = [{key: 0.1 * torch.randn(shape) for key, shape in SHAPES[name][part].items()}
              for part in ("vae", "var")]
    return (*states, tuple(SHAPES[name]["config"]["patch_nums"]))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_released_layouts_load_bare_or_nested_ready_to_sample(name):
    vae, var, scales = released(name)
    heads = SHAPES[name]["config"]["heads"]
    bare = m6.load_released(dict(vae), dict(var), scales, heads)
    nested = m6.load_released({"trainer": {"vae_local": dict(vae)}, "epoch": 3},
                              {"trainer": {"var_wo_ddp": dict(var)}}, scales, heads)
    for pair in zip(bare, nested):
        assert all(torch.equal(a, b) for a, b in zip(pair[0].state_dict().values(),
                                                     pair[1].state_dict().values()))
    for model in bare:
        assert not any(m.training for m in model.modules())
        everything = [*model.parameters(), *model.buffers()]
        assert not any(x.is_meta or x.requires_grad for x in everything)
    one = m6.generate(*bare, torch.tensor([0, 1]), cfg=1.0, generator=seeded())
    assert one.isfinite().all()
    assert torch.equal(one, m6.generate(*nested, torch.tensor([0, 1]), cfg=1.0,
                                        generator=seeded()))


def spoil(what):
    vae, var, scales = released()
    if what == "swapped":
        vae, var = var, vae
    elif what == "missing entry":
        del var["blocks.1.attn.proj.weight"]
    elif what == "missing tokenizer entry":
        del vae["decoder.conv_out.bias"]
    elif what == "extra entry":
        var["blocks.0.attn.surprise"] = torch.zeros(3)
    elif what == "wrong shape":
        var["blocks.1.attn.proj.weight"] = torch.zeros(3, 3)
    elif what == "flat class table":
        var["class_emb.weight"] = torch.zeros(7)
    elif what == "flat positions":
        var["pos_1LC"] = torch.zeros(30)
    elif what == "no tensor":
        var["pos_1LC"] = "thirty"
    elif what == "number for a name":
        var[5] = torch.zeros(1)
    elif what == "scales that do not fit":
        scales = (1, 2, 3)
    elif what == "scales unknown":
        scales = None
    elif what == "empty":
        vae, var = {}, {}
    elif what == "nested nonsense":
        vae = {"trainer": 5}
    elif what == "our own checkpoint":
        tokenizer, model = make_models()
        vae, var = tokenizer.state_dict(), model.state_dict()
    return vae, var, scales


@pytest.mark.parametrize("what", [
    "swapped", "missing entry", "missing tokenizer entry", "extra entry", "wrong shape",
    "flat class table", "flat positions", "no tensor", "number for a name", "empty",
    "scales that do not fit", "scales unknown", "nested nonsense", "our own checkpoint"])
def test_other_files_are_refused_in_one_line(what):
    with pytest.raises(BadInput) as error:
        m6.load_released(*spoil(what))
    assert "\n" not in str(error.value)


def test_released_files_load_from_the_command_line(refused, cli, tmp_path):
    vae, var, scales = released()
    for name, state in (("vae.pth", vae), ("var.pth", var)):
        torch.save(state, tmp_path / name)
    line = refused(SCRIPT, "--released", "d16", "--tokenizer-file", tmp_path / "vae.pth",
                   "--var-file", tmp_path / "var.pth", "--device", "cpu")
    assert "30 positions" in line                          # the scales of no published model
    refused(SCRIPT, "--released", "d16", "--tokenizer-file", tmp_path / "none.pth", "--var-file",
            tmp_path / "var.pth", "--device", "cpu")


# -- The command line ------------------------------------------------------------------------------

@pytest.fixture
def sampled(cli, tiny, tmp_path):
    """sampled(*options) runs chapter 6 on the tiny run, which must work. -> result, folder"""
    def call(*options, out="pictures"):
        result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--out", tmp_path / out,
                     *options)
        assert result.status == 0, result.err
        return result, tmp_path / out
    return call


def test_all_tasks_write_valid_pictures(sampled):
    result, out = sampled("--n", 2)
    cell, sheets = 96, {"samples": (3, 2), "coarse_to_fine": (3, 6), "guidance": (6, 8),
                        "entropy": (4, 3), "attention": (2, 4), "reconstruct": (4, 3),
                        "inpaint": (5, 3), "outpaint": (2, 3), "edit": (5, 3)}
    assert {p.name for p in out.iterdir()} == {f"{n}.png" for n in sheets} | {"coarse_to_fine.gif"}
    for name, (rows, columns) in sheets.items():
        with Image.open(out / f"{name}.png") as image:
            image.load()
            assert image.mode == "RGB" and rows * cell <= image.height < rows * (cell + 8) + 20
            assert columns * cell <= image.width < columns * (cell + 8) + 120
            assert len(set(image.resize((40, 40)).tobytes())) > 20, "an empty picture"
    with Image.open(out / "coarse_to_fine.gif") as gif:
        assert gif.n_frames >= 3 and gif.size == (6 * cell, cell)
    assert result.out.count(" dB") == 5 and "nan" not in result.out


def test_the_seed_decides_the_pictures(sampled):
    options = ("--task", "sample", "--n", 1)
    files = [sampled(*options, "--seed", seed, out=str(i))[1] / "samples.png"
             for i, seed in enumerate((3, 3, 4))]
    one, again, other = (path.read_bytes() for path in files)
    assert one == again and one != other


def test_classes_by_name_and_by_index(sampled, refused, tiny):
    files = [sampled("--task", "sample", "--n", 1, "--classes", *names, out=str(i))[1]
             for i, names in enumerate((("bee", "cat"), ("1", "2"), ("BEE", "2"), ("ant",)))]
    one, two, three, four = ((f / "samples.png").read_bytes() for f in files)
    assert one == two == three != four
    for unknown in ("dog", "3", "-1", "1.5"):
        line = refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", f"--classes={unknown}")
        assert unknown in line and "ant" in line


@pytest.mark.parametrize("options", [
    "--box 0 0 1 2", "--box 0.5 0 0.2 1", "--box 0 0 1", "--box a b c d", "--box nan 0 1 1",
    "--top-p 2", "--top-p nan", "--top-k -1", "--cfg -1", "--cfg inf", "--n 0", "--seed x",
    "--seed 36893488147419103232", "--task paint", "--image missing.png", "--image text.png",
    "--image .", "--image cut.png", "--image damaged.png", "--mask missing.png",
    "--mask text.png", "--mask cut.png", "--mask damaged.png", "--nonsense", "--run nowhere",
    "--run .", "--run text.png", "--released d17"])
def test_a_wrong_option_is_one_line_and_status_2(refused, tiny, tmp_path, options):
    (tmp_path / "text.png").write_text("this is no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "damaged.png").write_bytes(whole[:500] + b"damage" + whole[506:])
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "inpaint", *options.split())


@pytest.mark.parametrize("name", ["tokenizer.pt", "transformer.pt"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_damaged_runs_are_refused_and_named(refused, tiny, tmp_path, name, damage):
    shutil.copytree(tiny.folder, tmp_path / "run")
    path = tmp_path / "run" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif damage == "missing":
        path.unlink()
    else:
        shutil.copy(tiny.folder / ("transformer.pt" if name == "tokenizer.pt" else "tokenizer.pt"),
                    path)
    assert name in refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu")


def test_a_tokenizer_that_the_transformer_was_not_trained_on_is_refused(
        refused, cli, tiny, tmp_path):
    """Stage 1 trained anew, stage 2 not: the tokens mean something else now."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    assert cli("05_train.py", *tiny.options, "--stage", "tokenizer", "--tokenizer-steps", 1,
               "--vocab-size", 8, "--fresh", "--out", tmp_path / "run").status == 0
    refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "sample", "--n", 8)


def test_real_pictures_of_other_classes_are_matched_by_name_or_refused(monkeypatch):
    """A subset of ImageNet counts its labels 0, 1, 2: whoever took these for the model's would work
    on tench, goldfish and shark instead."""
    room = object.__new__(studio.Studio)
    room.dataset, room.side, room.names = "x", 8, ["ant", "crane", "bee", "crane", "cat"]
    room.args = SimpleNamespace(data_dir="")
    for names, wanted in ((["ant", "bee", "cat"], [0, 2, 2, 4]), (list(room.names), [0, 1, 1, 2]),
                          (["ant", "dog", "cat"], "'dog'"), (["ant", "crane", "cat"], "crane")):
        found = "pixels", np.array([0, 1, 1, 2]), names
        monkeypatch.setattr(studio, "load_data", lambda *_: found)
        if isinstance(wanted, list):
            assert room.load("test")[1].tolist() == wanted
        else:
            with pytest.raises(BadInput, match=wanted):
                room.load("test")


def test_pictures_the_model_draws_for_editing_share_no_random_numbers_with_the_edits(
        cli, tiny, tmp_path):
    """Else it would paint what was hidden as if by magic: seed 0 would draw the same again."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "transformer.pt", weights_only=True)
    torch.save({**state, "dataset": str(tmp_path / "gone")}, tmp_path / "run" / "transformer.pt")
    kept, save = [], studio.Studio.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio.Studio, "save",
                      lambda self, name, images, *rest, **more: kept.append(images)
                      or save(self, name, images, *rest, **more))
        result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "inpaint",
                     "--box", 0, 0, 1, 1, "--out", tmp_path / "made")
    assert result.status == 0
    original, _, *seeds = kept[0].split(3)
    assert all((original - painted).abs().max() > 0.01 for painted in seeds)


@pytest.mark.parametrize("options", [
    "--task inpaint --box 0.5 0.5 0.501 0.501", "--task outpaint --grow 0 0 0 0",
    "--task evaluate --classes ant", "--task sample --n 4000000000000000000"])
def test_what_asks_for_nothing_or_for_too_much_is_refused(refused, tiny, options):
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", *options.split())


def test_classes_named_twice_count_once(sampled):
    one, two = (sampled("--task", "sample", "--n", 2, "--classes", *names, out=str(i))[1]
                for i, names in enumerate((("bee", "ant"), ("bee", "1", "ant", "Bee"))))
    assert (one / "samples.png").read_bytes() == (two / "samples.png").read_bytes()


def test_nothing_to_sample_from_is_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(studio, "__file__", str(tmp_path / "studio.py"))   # nothing shipped either
    assert "05_train.py" in refused(SCRIPT, "--device", "cpu")


def test_the_newest_run_is_the_default(cli, tiny, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(tiny.folder, tmp_path / "out" / name)
        (tmp_path / "out" / name / "transformer.pt").touch()
    result = cli(SCRIPT, "--task", "sample", "--n", 1, "--device", "cpu")
    assert result.status == 0 and str(Path("out/newer")) in result.out


def test_image_box_mask_and_paste(sampled, tmp_path):
    """A mask that is white where the box lies gives the same picture as the box."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (33, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    white = np.zeros((16, 16), np.uint8)
    white[4:12, 8:16] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    options = ("--task", "inpaint", "--image", tmp_path / "photo.png", "--classes", "bee")
    by_box = sampled(*options, "--box", 0.5, 0.25, 1, 0.75, out="box")[1]
    by_mask = sampled(*options, "--mask", tmp_path / "mask.png", out="mask")[1]
    assert (by_box / "inpaint.png").read_bytes() == (by_mask / "inpaint.png").read_bytes()
    result, pasted = sampled(*options, "--box", 0.5, 0.25, 1, 0.75, "--paste", out="paste")
    assert (pasted / "inpaint.png").read_bytes() != (by_box / "inpaint.png").read_bytes()
    assert " dB" not in result.out, "pixels that were put back say nothing about the model"


def test_repainting_everything_reports_no_nan(sampled):
    result, _ = sampled("--task", "inpaint", "--box", 0, 0, 1, 1)
    assert "nan" not in result.out


def test_a_class_without_held_out_pictures_can_be_worked_on(cli, tiny, tmp_path):
    pictures = tmp_path / "some"
    shutil.copytree(tiny.pictures, pictures)
    for path in sorted((pictures / "bee").iterdir())[1:]:
        path.unlink()                                      # one is left: it is trained on
    assert cli("05_train.py", *tiny.options, "--dataset", pictures, "--steps", 1,
               "--tokenizer-steps", 1, "--out", tmp_path / "run").status == 0
    result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "inpaint",
                 "--classes", "bee", "--out", tmp_path / "made")
    assert result.status == 0 or result.status == 2 and result.err.count("\n") == 1


def test_held_out_pictures_that_are_gone_are_replaced_by_samples(cli, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "transformer.pt", weights_only=True)
    torch.save({**state, "dataset": str(tmp_path / "gone")}, tmp_path / "run" / "transformer.pt")
    result = cli(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "reconstruct",
                 "--out", tmp_path / "made")
    assert result.status == 0 and (tmp_path / "made" / "reconstruct.png").exists()


@pytest.mark.parametrize("n", [40, 2])
def test_evaluate_prints_its_table_or_one_line(cli, tiny, tmp_path, monkeypatch, n):
    """An untrained judge will do; with too few pictures there is nothing to compare."""
    torch.manual_seed(0)
    monkeypatch.setattr(judge, "load_or_train",
                        lambda *args, **kwargs: judge.Judge(3, 16).eval())
    result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "evaluate", "--n", n)
    if result.status == 0:
        for word in ("Frechet", "precision", "held-out pictures", "reconstructions", "samples"):
            assert word in result.out
    else:
        assert result.status == 2 and result.err.count("\n") == 1

"""Chapter 6: guidance, likelihood, what an edit may touch, odd inputs, and the script itself.

keep_likely, strengths and log_likelihood are also checked by the graders of the course."""
import math
import re
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_models, seeded, without_images
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from PIL import Image

from engine import BadInput, checkpoints
from report import gallery, plots

m2, m6 = import_module("02_multiscale_vqvae"), import_module("06_sample_and_edit")
SCRIPT, NO_CLASS = "06_sample_and_edit.py", 3              # the models here have three classes


@pytest.fixture(scope="module")
def models():
    return random_models()


def noise_image(count=2, seed=0):
    return torch.rand(count, 3, 16, 16, generator=seeded(seed)) * 2 - 1


def box(x0, y0, x1, y1):
    keep = torch.ones(16, 16, dtype=torch.bool)
    keep[y0:y1, x0:x1] = False
    return keep


RIGHT_HALF = box(8, 0, 16, 16)


# -- Drawing -------------------------------------------------------------------------------

@torch.no_grad()
def slow_tokens(tokenizer, var, labels, t, seed):
    """Every scale asks the whole model twice, for the class and without one. No cache."""
    generator, tokens, begin = seeded(seed), [], 0
    for k, side in enumerate(tokenizer.scales):
        finer = [torch.zeros(len(labels), s * s).long() for s in tokenizer.scales[k:]]
        inputs, end = tokenizer.teacher_inputs(tokens + finer), begin + side * side
        c, u = (var(given, inputs)[:, begin:end]
                for given in (labels, torch.full_like(labels, NO_CLASS)))
        tokens.append(m6.draw(c + t[k] * (c - u), generator))
        begin = end
    return tokens


@pytest.mark.parametrize("t", [[0, 0, 0], [3, 0, 0], [1, 4, 0], (0, 1, 2.5), [2]])
def test_guided_sampling_draws_the_tokens_of_the_slow_loop(t):
    tokenizer, var = random_models((1, 2, 4)[-len(t):])
    labels, rows = torch.tensor([2, 0, 1, 1]), []
    wanted = slow_tokens(tokenizer, var, labels, t, seed=6)
    var.head.register_forward_hook(lambda layer, given, logits: rows.append(len(logits)))
    tokens = m6.sample_tokens(tokenizer, var, labels, cfg=t, generator=seeded(6))
    assert all(map(torch.equal, tokens, wanted))
    assert rows == [8 if any(t) else 4] * len(t), "only guidance doubles the batch"


def test_a_temperature_divides_the_logits_before_any_is_dropped():
    tokenizer, var = random_models()
    labels, how = [0, 2, 1, NO_CLASS], dict(cfg=1.5, top_k=12, top_p=0.8)
    hot = m6.generate(tokenizer, var, labels, temperature=2.0, **how, generator=seeded(5))
    plain = m6.generate(tokenizer, var, labels, **how, generator=seeded(5))
    var.head.weight.div_(2)
    var.head.bias.div_(2)
    halved = m6.generate(tokenizer, var, labels, **how, generator=seeded(5))
    assert torch.equal(hot, halved) and not torch.equal(hot, plain)


def test_temperature_0_a_tiny_top_p_and_top_k_1_take_the_likeliest_tokens(models):
    labels = torch.tensor([0, 2, NO_CLASS])
    drawn = [m6.sample_tokens(*models, labels, cfg=2.0, generator=seeded(seed), **how)
             for seed, how in enumerate((dict(temperature=0), dict(top_k=1), dict(top_p=1e-9),
                                         dict(temperature=0, top_k=5, top_p=0.5)))]
    for other in drawn[1:]:
        assert all(map(torch.equal, drawn[0], other))
    everything, all_codes = (m6.generate(*models, labels, top_k=k, generator=seeded(1))
                             for k in (0, 999))
    assert torch.equal(everything, all_codes)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_seed_draws_the_same_image_alone_and_in_a_batch(models, smooth):
    """One generator per image. Only the rounding of a larger batch may differ."""
    labels, seeds = [0, 2, 1], [7, 8, 9]
    batch = m6.generate(*models, labels, smooth=smooth, generator=[*map(seeded, seeds)])
    alone = [m6.generate(*models, [label], smooth=smooth, generator=[seeded(seed)])
             for label, seed in zip(labels, seeds)]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-4)
    image = noise_image(3)
    batch = m6.edit(*models, image, RIGHT_HALF, labels, generator=[*map(seeded, seeds)])
    alone = m6.edit(*models, image[1:2], RIGHT_HALF, [2], generator=[seeded(8)])
    assert torch.allclose(batch[1:2], alone, atol=1e-4)
    with pytest.raises(ValueError):
        m6.generate(*models, labels, generator=[seeded()])


def test_smooth_sampling_draws_codes_in_proportion_and_sharper_at_later_scales():
    logits = torch.zeros(4000, 1, 16)
    logits[..., 5] = 2.0                                   # p = e^2 / (e^2 + 15) = 0.33
    early, late = (m6.soften(logits, k, torch.eye(16), seeded(2)) for k in (0.0, 1.0))
    assert torch.allclose(early.sum(-1), torch.ones(4000, 1))
    assert late.max(-1).values.mean() > early.max(-1).values.mean()
    assert abs(float((early.argmax(-1) == 5).float().mean()) - 0.33) < 0.03


def test_given_tokens_are_replayed_where_kept_and_drawn_elsewhere(models, monkeypatch):
    sizes = (1, 4, 16)
    maps = [torch.randint(16, (2, n), generator=seeded(n)) for n in sizes]
    half, seen = [torch.arange(n) % 2 == 0 for n in sizes], []
    monkeypatch.setattr(m6, "to_image", lambda tokenizer, var, tokens: seen.extend(tokens))
    m6.generate(*models, [1, 0], tokens=maps, keep=half, generator=seeded(1))
    for found, wanted, keep in zip(seen, maps, half, strict=True):
        assert torch.equal(found[:, keep], wanted[:, keep])
    assert not torch.equal(seen[-1], maps[-1])
    with pytest.raises(BadInput, match="together"):
        m6.generate(*models, [1], tokens=maps)


def test_tokens_are_drawn_as_often_as_the_likelihood_says():
    """Pearson's chi-square over all 32 images there are; rare ones share a bin."""
    tokenizer, var = random_models((1, 2), 2, noise=0.15)
    maps, count = torch.cartesian_prod(*[torch.arange(2)] * 5), 8_000
    for label in (1, NO_CLASS):
        p = m6.log_likelihood(tokenizer, var, maps.split([1, 4], 1), [label] * 32)
        p = p.sum(1).exp() * count
        drawn = m6.sample_tokens(tokenizer, var, [label] * count, generator=seeded(9))
        numbers = (torch.cat(drawn, 1) * torch.tensor([16, 8, 4, 2, 1])).sum(1)
        seen, often = torch.bincount(numbers, minlength=32).float(), p >= 5
        p, seen = (torch.cat([x[often], x[~often].sum()[None] + 1e-3]) for x in (p, seen))
        freedom = int(often.sum())
        assert float(((seen - p) ** 2 / p).sum()) < freedom + 4 * math.sqrt(2 * freedom)


def test_linear_layers_in_bfloat16_are_called_in_it_and_logits_are_float32(monkeypatch):
    tokenizer, var = random_models()
    tokens = [torch.randint(16, (2, n), generator=seeded(n)) for n in (1, 4, 16)]
    exact = m6.log_likelihood(tokenizer, var, tokens, [0, 2])
    m6.set_precision(var, "bfloat16", torch.device("cpu"))
    seen, draw = set(), m6.draw
    var.head.register_forward_hook(lambda layer, given, logits: seen.add(logits.dtype))
    rough = m6.log_likelihood(tokenizer, var, tokens, [0, 2])
    assert rough.dtype == torch.float32 and torch.allclose(rough, exact, rtol=0.03, atol=0.1)
    monkeypatch.setattr(m6, "draw", lambda logits, generator: seen.add(
        f"drawn from {logits.dtype}") or draw(logits, generator))
    m6.generate(tokenizer, var, [0, 2], generator=seeded())
    assert seen == {torch.bfloat16, "drawn from torch.float32"}


# -- Odd inputs ----------------------------------------------------------------------------

def test_labels_may_be_a_list_an_array_or_a_tensor_of_whole_numbers(models):
    wanted = m6.generate(*models, torch.tensor([0, 3]), generator=seeded(4))
    for labels in ([0, 3], (0, 3), np.array([0, 3], np.int32), torch.tensor([0, 3]).int(),
                   np.array([0, 3], np.uint8)):
        assert torch.equal(wanted, m6.generate(*models, labels, generator=seeded(4)))
    for labels in ([4], [-1], [0, 99], [], [0.5], [math.nan]):
        with pytest.raises(BadInput, match="0..2"):
            m6.generate(*models, labels)


def test_a_mask_may_be_of_any_type_that_holds_only_0_and_1(models):
    image = noise_image(1)
    wanted = m6.edit(*models, image, RIGHT_HALF, [1], generator=seeded(1))
    for mask in (RIGHT_HALF.float(), RIGHT_HALF.to(torch.uint8), RIGHT_HALF.numpy()):
        assert torch.equal(wanted, m6.edit(*models, image, mask, [1], generator=seeded(1)))
    for mask in (RIGHT_HALF.float() * 0.5, RIGHT_HALF.to(torch.uint8) * 255):
        with pytest.raises(BadInput, match="1 and 0"):
            m6.edit(*models, image, mask, [1])
    for shape, mask in (((16, 16), torch.ones(8, 8)), ((16, 8), RIGHT_HALF)):
        with pytest.raises(BadInput, match="16x16"):
            m6.edit(*models, torch.zeros(1, 3, *shape), mask, [0])


def test_keeping_everything_is_the_reconstruction_and_nothing_plain_sampling(models):
    tokenizer, var = models
    image, labels, keep = noise_image(count=3), [0, 1, 2], torch.ones(16, 16).bool()
    alone = (tokenizer.tokens_to_image(tokenizer.image_to_tokens(image)) + 1) / 2
    assert torch.allclose(m6.edit(tokenizer, var, image, keep, labels), alone, atol=1e-4)
    how = dict(cfg=2.0, top_k=9, top_p=0.8, temperature=0.7)
    edited = m6.edit(tokenizer, var, image, ~keep, labels, **how, generator=seeded(4))
    assert torch.equal(edited, m6.generate(tokenizer, var, labels, **how, generator=seeded(4)))


# -- What an edit may touch ----------------------------------------------------------------

CORNERS = st.tuples(*[st.integers(0, 16)] * 4)
PIXELS = st.builds(lambda seed, density: torch.rand(16, 16, generator=seeded(seed)) < density,
                   st.integers(0, 999), st.sampled_from([0.05, 0.5, 0.95]))
MASKS = PIXELS | CORNERS.map(lambda at: box(*at)) | CORNERS.map(lambda at: ~box(*at))


@given(height=st.integers(1, 19), width=st.integers(1, 19), seed=st.integers(0, 99),
       density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_hide_leaves_kept_pixels_and_fills_the_rest_from_them_alone(height, width, seed,
                                                                   density):
    image = torch.rand(2, 3, height, width, generator=seeded(seed)) * 2 - 1
    keep = torch.rand(height, width, generator=seeded(seed + 1)) < density
    filled = m6.hide(torch.where(keep, image, torch.nan), keep)
    assert filled.shape == image.shape and filled.isfinite().all()
    assert torch.allclose(filled[:, :, keep], image[:, :, keep], atol=1e-6)
    known = image[:, :, keep] if keep.any() else torch.zeros(2, 3, 1)    # middle grey
    assert (filled >= known.amin(-1)[..., None, None] - 1e-5).all()
    assert (filled <= known.amax(-1)[..., None, None] + 1e-5).all()


@few(max_examples=30)
@given(keep=MASKS, seed=st.integers(0, 9), label=st.integers(0, NO_CLASS),
       value=st.sampled_from([0.0, 1.0, 1e30, math.nan, math.inf, -math.inf]),
       paint=st.integers(1, 3), settle=st.integers(0, 2))
def test_hidden_pixels_cannot_change_the_result(models, keep, seed, label, value, paint,
                                                settle):
    image = noise_image(count=1)
    other = torch.where(keep, image, noise_image(count=1, seed=seed + 1) + value)
    one, two = (m6.edit(*models, x, keep, [label], generator=seeded(7), paint_passes=paint,
                        settle_passes=settle) for x in (image, other))
    assert torch.equal(one, two) and one.isfinite().all()


@torch.no_grad()
def slow_edit(tokenizer, var, image, keep, labels, *, cfg, seed, paint_passes, settle_passes):
    """The specification, for sides that halve from scale to scale: cells are squares of the last
    map, and a token is computed from the mean of what is missing over the cells that count."""
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
    return result


@pytest.mark.parametrize("keep", [RIGHT_HALF, box(3, 5, 13, 11), box(0, 0, 16, 10)])
@pytest.mark.parametrize("paint, settle", [(1, 0), (3, 0), (2, 2)])
def test_editing_equals_the_slow_loop(models, keep, paint, settle):
    image, labels = noise_image(), torch.tensor([0, 2])
    how = dict(cfg=2.0, paint_passes=paint, settle_passes=settle)
    ours, other = (m6.edit(*models, image, keep, labels, generator=seeded(seed), **how)
                   for seed in (4, 5))
    slow = slow_edit(*models, image, keep, labels, seed=4, **how)
    assert torch.allclose(ours, slow, atol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-3), "the hidden part is drawn"


# -- The script ----------------------------------------------------------------------------

@pytest.fixture
def sheets(monkeypatch):
    """name -> the rows of the sheet that was last saved under it, {text: images}"""
    found, save = {}, gallery.save
    monkeypatch.setattr(gallery, "save", lambda args, name, rows, **labels: found.update(
        {name: rows}) or save(args, name, rows, **labels))
    return found


@pytest.fixture
def run(cli, tiny):
    """run(*options) -> what chapter 6 prints on the tiny run (classes ant, bee, cat)"""
    def call(*options, run=tiny.folder):
        result = cli(SCRIPT, "--run", run, "--device", "cpu", "--out", "made", *options)
        assert result.status == 0, result.err
        return result.out
    return call


def test_all_tasks_write_sheets_and_say_what_an_edit_does_to_kept_pixels(run, sheets):
    out = run("--n", 2, "--classes", "cat", "bee")
    names = "samples coarse_to_fine guidance reconstruct inpaint outpaint edit"
    assert {path.name for path in Path("made").iterdir()} == {f"{x}.png" for x in names.split()}
    assert "changes the result by 0\n" in out and "nan" not in out
    assert list(sheets["samples"]) == ["cat", "bee"]
    original, shown, *rows = sheets["inpaint"].items()
    assert (shown[1][..., 8:] == 0.5).all(), "the right half is hidden"
    for text, row in rows:
        told = float(re.search(rf"inpaint.*?{text} +([\d.]+) dB", out, re.S)[1])
        error = (row - original[1])[..., :8].square().mean((1, 2, 3))
        assert abs(told - float((-10 * error.log10()).mean())) < 0.06
    shown = sheets["outpaint"]["kept (grey: hidden)"]
    assert (shown[..., 4:12, 4:12] != 0.5).any() and (shown[..., :4, :] == 0.5).all()


def test_editing_starts_without_a_class_then_takes_the_images_own_or_those_asked_for(
        run, monkeypatch):
    given, edit = [], m6.edit
    monkeypatch.setattr(m6, "edit", lambda *models, labels, **how: given.append(
        labels.tolist()) or edit(*models, labels=labels, **how))
    run("--task", "outpaint", "--classes", "cat", "bee")
    assert given == [[3, 3], [2, 1]], "one held-out image of each class"
    given.clear()
    run("--task", "edit", "--classes", "cat", "bee")
    assert given == [[2, 2], [1, 1]]


def test_images_of_the_command_line_are_drawn_from_the_seed_plus_their_index(run, sheets, tiny):
    run("--task", "sample", "--classes", "bee", "0", "--n", 3, "--seed", 5, "--cfg", 0)
    tokenizer, _ = m6.training.load_tokenizer(tiny.folder / "tokenizer.pt")
    var, _ = m6.training.load_transformer(tiny.folder / "transformer.pt")
    fifth = m6.generate(tokenizer, var, [0], cfg=0.0, generator=[seeded(5 + 4)])
    assert torch.allclose(sheets["samples"]["ant"][1:2], fifth, atol=1e-4)
    run("--task", "guidance", "--classes", "cat", "--seed", 3)
    wanted = m6.generate(tokenizer, var, [2] * 8, cfg=5.0, generator=[*map(seeded, range(3, 11))])
    assert torch.allclose(sheets["guidance"]["cfg 5"], wanted, atol=1e-4)


def test_an_image_and_a_mask_of_ones_own(run, sheets):
    """The mask is its own image, so what is bright in it must be hidden."""
    Path("made").mkdir()
    blocks = np.random.default_rng(1).integers(0, 2, (12, 12), np.uint8) * 255
    Image.fromarray(blocks).resize((33, 50)).save("mask.png")
    run("--task", "edit", "--classes", "ant", "cat", "--image", "mask.png", "--mask", "mask.png")
    original, shown, _, *results = sheets["edit"].values()
    bright = original.mean(1) > 0.5
    assert len(results) == 2 and bright.any()
    assert (shown[:, 0][bright] == 0.5).all() and (shown[:, 0][~bright] <= 0.5).all()
    out = run("--task", "density", "--image", "mask.png")
    assert "1 images" in out and re.search(r"p\(class \| tokens\): (ant|bee|cat) \d", out)


def test_without_images_the_model_draws_its_own_and_measures_ask_for_some(run, refused, tiny,
                                                                         tmp_path):
    folder = without_images(tiny.folder, tmp_path)
    assert "images that the model draws" in run("--task", "inpaint", run=folder)
    for options in (["--task", "density"], ["--task", "inpaint", "--data-dir", "nowhere"]):
        assert "gone" in refused(SCRIPT, "--run", folder, "--device", "cpu", *options)


def test_samples_for_another_evaluator_hold_the_pixels_of_a_png(run, sheets):
    run("--export-npz", "a.npz", "--n", 40, "--seed", 5)   # the classes take turns
    with np.load("a.npz") as file:
        exported = file["arr_0"].astype(int)
    for begin in (0, 105):                                 # 100 are drawn at once
        run("--task", "sample", "--n", 1, "--seed", 5 + begin)
        png = plots.to_uint8(torch.cat([*sheets["samples"].values()]))
        assert np.abs(exported[begin:begin + 3] - png).max() <= 1
    assert exported.shape == (120, 16, 16, 3)


def test_the_newest_run_is_the_default_and_else_the_shipped_shapes(cli, tiny, tmp_path):
    options = ("--device", "cpu", "--task", "sample", "--n", 1, "--out", "made")
    assert "shapes.pt" in cli(SCRIPT, *options).out
    for name in ("older", "newer"):
        for file in ("tokenizer.pt", "transformer.pt"):
            checkpoints.save_atomically(checkpoints.load_checkpoint(tiny.folder / file),
                                        tmp_path / "out" / name / file)
    result = cli(SCRIPT, *options)
    assert result.status == 0 and "out/newer" in result.out
    checkpoints.export(tiny.folder, "gift.pt")             # one file that holds both models
    assert cli(SCRIPT, "--run", "gift.pt", *options).status == 0


@pytest.mark.parametrize("options", [
    "--box 0 0 1 2", "--box 0.5 0 0.2 1", "--box 0 0 1", "--box nan 0 1 1", "--top-k -1",
    "--cfg -1", "--cfg inf", "--n 0", "--seed x", "--seed 36893488147419103232", "--task x",
    "--run nowhere", "--run text.png", "--released d17", "--image .", "--image text.png",
    "--image cut.png", "--mask missing.png", "--box 0.5 0.5 0.501 0.501", "--mask black.png",
    "--precision float8", "--tokenizer-file a.pth", "--classes dog", "--classes 3",
    "--export-npz .", "--export-npz missing/a.npz"])
def test_a_wrong_option_is_one_line_and_status_2(refused, tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(m6, "sample_tokens", lambda *_, **__: pytest.fail("sampled anyway"))
    (tmp_path / "text.png").write_text("this is no image")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "black.png").read_bytes()[:50])
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "inpaint",
            *options.split())

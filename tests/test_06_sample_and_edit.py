"""Chapter 6: sampling, what an edit may touch, odd inputs, and the script itself.

The graders of the course check keep_likely, guidance and log_likelihood; test_golden.py
compares guided samples with those of the original code."""
import math
import re
import shutil
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_models, same, seeded
from hypothesis import given, strategies as st
from PIL import Image

from engine import BadInput, checkpoints
from report import plots

m6 = import_module("06_sample_and_edit")
SCRIPT, NO_CLASS = "06_sample_and_edit.py", 3              # there are three classes


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

def test_temperature_divides_the_logits_and_0_takes_the_likeliest(models, monkeypatch):
    seen, keep = [], m6.keep_likely
    monkeypatch.setattr(m6, "keep_likely", lambda *args: seen.append(args) or keep(*args))
    for temperature in (1, 2, 0):                          # seen: three scales of each
        tokens = m6.sample_tokens(*models, [2, 0], temperature=temperature)
    assert torch.allclose(seen[3][0], seen[0][0] / 2)
    assert same(tokens, [logits.argmax(-1) for logits, *_ in seen[6:]])


def test_a_seed_draws_the_same_image_alone_and_in_a_batch(models):
    """One generator per image. Only the rounding of a larger batch may differ."""
    labels = torch.tensor([0, 2, 1])

    def edited(labels, **options):
        image = noise_image(3)[-len(labels):]
        return m6.edit(*models, image, RIGHT_HALF, labels, **options)
    for paint in (partial(m6.generate, *models), partial(m6.generate, *models, smooth=True),
                  edited):
        batch = paint(labels, generator=[seeded(7), seeded(8), seeded(9)])
        alone = paint(labels[-1:], generator=[seeded(9)])
        assert torch.allclose(batch[-1:], alone, atol=1e-4)


def test_given_tokens_are_replayed_where_kept_and_drawn_elsewhere(models, monkeypatch):
    maps = [torch.randint(16, (2, n), generator=seeded(n)) for n in (1, 4, 16)]
    half = [torch.arange(n) % 2 == 0 for n in (1, 4, 16)]
    monkeypatch.setattr(m6, "to_image", lambda tokenizer, var, tokens: tokens)
    seen = m6.generate(*models, [1, 0], tokens=maps, keep=half, generator=seeded(1))
    for found, wanted, keep in zip(seen, maps, half, strict=True):
        assert torch.equal(found[:, keep], wanted[:, keep])
    assert not torch.equal(seen[-1], maps[-1])
    with pytest.raises(BadInput, match="together"):
        m6.generate(*models, [1], tokens=maps)


@pytest.mark.parametrize("labels", [[4], [], [0.5]])
def test_labels_that_are_no_class_are_refused(models, labels):
    with pytest.raises(BadInput, match="0..2"):
        m6.generate(*models, labels)


# -- What an edit may touch ----------------------------------------------------------------

PIXELS = st.builds(lambda seed, share: torch.rand(16, 16, generator=seeded(seed)) < share,
                   st.integers(0, 999), st.sampled_from([0.0, 0.05, 0.5, 0.95]))
BOXES = st.builds(box, *[st.integers(0, 16)] * 4)
MASKS = PIXELS | BOXES | BOXES.map(torch.logical_not)


@given(keep=MASKS)
def test_hide_leaves_kept_pixels_and_fills_the_rest_from_them_alone(keep):
    image, keep = noise_image()[..., :13], keep[:, :13]    # 16 x 13: halves are cut off
    filled = m6.hide(torch.where(keep, image, torch.nan), keep)
    assert torch.allclose(filled[:, :, keep], image[:, :, keep], atol=1e-6)
    known = image[:, :, keep] if keep.any() else torch.zeros(2, 3, 1)    # middle grey
    low, high = (x[..., None, None] for x in known.aminmax(dim=-1))
    assert ((low - 1e-5 <= filled) & (filled <= high + 1e-5)).all()      # nan would fail


@given(keep=MASKS, label=st.integers(0, NO_CLASS), paint=st.integers(1, 3),
       value=st.sampled_from([0.0, 1e30, math.nan, math.inf]), settle=st.integers(0, 2))
def test_hidden_pixels_cannot_change_the_result(models, keep, label, value, paint, settle):
    image = noise_image(count=1)
    other = torch.where(keep, image, noise_image(count=1, seed=1) + value)
    one, two = (m6.edit(*models, x, keep, [label], generator=seeded(7), paint_passes=paint,
                        settle_passes=settle) for x in (image, other))
    assert torch.equal(one, two) and one.isfinite().all()


@torch.no_grad()
def slow_edit(tokenizer, var, image, keep, labels, *, seed, paint_passes, settle_passes):
    """The specification, for sides that halve from scale to scale: cells are squares of the
    last map, and a token is computed from the mean of what is missing over the cells that
    count."""
    last, generator = tokenizer.scales[-1], seeded(seed)
    share = keep.float().unflatten(0, (last, -1)).unflatten(2, (last, -1)).mean((1, 3))
    finest = share >= 0.5
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
                    missing = target - f_hat if tokenizer.config.residual else target
                    cells = missing[(..., *at)][:, :, counts[at]]            # (B, C, cells)
                    chosen[:, y * side + x] = tokenizer.quantizer.nearest(cells.mean(-1))
            return chosen
        if number < paint_passes:
            tokens = m6.sample_tokens(tokenizer, var, labels, cfg=1.5, choose=choose,
                                      generator=generator.manual_seed(seed))
        else:
            tokens = tokenizer.quantize(target)
        result = (tokenizer.tokens_to_image(tokens) + 1) / 2
        composite = torch.where(keep, image, 2 * result - 1)
    return result


@pytest.mark.parametrize("keep, paint, settle, residual", [
    (RIGHT_HALF, 1, 0, False), (box(3, 5, 13, 11), 3, 2, True)])
def test_editing_equals_the_slow_loop(keep, paint, settle, residual):
    models, image = random_models(residual=residual), noise_image()
    labels = torch.tensor([0, 2])
    with pytest.raises(BadInput, match="16x16"):
        m6.edit(*models, image, keep[:8], labels)
    passes = dict(paint_passes=paint, settle_passes=settle)
    ours, other = (m6.edit(*models, image, keep, labels, generator=seeded(seed), **passes)
                   for seed in (4, 5))
    assert torch.allclose(ours, slow_edit(*models, image, keep, labels, seed=4, **passes),
                          atol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-3), "the hidden part is drawn"


# -- The script ----------------------------------------------------------------------------

@pytest.fixture
def sheets(monkeypatch):
    """name -> the rows of the sheet that was last saved under it, {text: images}"""
    found, save = {}, plots.save_grid
    monkeypatch.setattr(plots, "save_grid", lambda path, rows, **how: (
        found.update({path.stem: rows}), save(path, rows, **how)))
    return found


@pytest.fixture
def run(cli, tiny):
    """run(*options) -> what chapter 6 prints on the tiny run (classes ant, bee, cat)"""
    def call(*options):
        result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--out", "made",
                     *options)
        assert result.status == 0, result.err
        return result.out
    return call


def test_all_tasks_write_sheets_and_say_what_an_edit_does(run, sheets, tiny, monkeypatch):
    labels, edit = [], m6.edit
    monkeypatch.setattr(m6, "edit", lambda *given, **how: labels.append(
        how["labels"].tolist()) or edit(*given, **how))
    out = run("--n", 2, "--classes", "cat", "bee", "--cfg", 0, "--seed", 5)
    made = " ".join(sorted(path.stem for path in Path("made").iterdir()))
    assert made == "coarse_to_fine edit guidance inpaint outpaint reconstruct samples"
    assert "changes the result by 0\n" in out
    original, *_, row = sheets["inpaint"].values()         # row: of their own class
    db = -10 * (row - original)[..., :8].square().mean((1, 2, 3)).log10().mean()
    assert re.search(rf"inpaint.*?own class +{db:.1f} dB", out, re.S)
    for task, hidden, kept in (("inpaint", slice(8, 16), slice(8)),
                               ("outpaint", slice(4), slice(4, 12))):
        shown = sheets[task]["kept (grey: hidden)"][..., 4:12, :]
        assert (shown[..., hidden] == 0.5).all() and (shown[..., kept] != 0.5).any()
    # One held-out image of each class: no leak; without a class, then its own; all as each.
    no_class, own = [NO_CLASS, NO_CLASS], [1, 2]
    assert labels == [[1], [1], no_class, own, no_class, own, [1, 1], [2, 2]]


def test_an_image_and_a_mask_of_ones_own(run, sheets):
    """The mask is its own image, so what is bright in it must be hidden. Without --classes,
    its class is unknown."""
    blocks = np.random.default_rng(1).integers(0, 2, (12, 12), np.uint8) * 255
    Image.fromarray(blocks).resize((33, 50)).save("mask.png")
    options = ("--image", "mask.png", "--mask", "mask.png", "--precision", "bfloat16")
    run("--task", "edit", "--classes", "ant", "cat", *options)
    original, shown, _, *results = sheets["edit"].values()
    bright = original.mean(1) > 0.5
    assert len(results) == 2 and bright.any()
    assert (shown[:, 0][bright] == 0.5).all() and (shown[:, 0][~bright] <= 0.5).all()
    assert "own class" not in run("--task", "inpaint", *options)


def test_samples_for_another_evaluator_hold_the_pixels_of_a_png(run, sheets):
    run("--export-npz", "a.npz", "--n", 40, "--seed", 5)   # the classes take turns
    run("--task", "sample", "--n", 1, "--seed", 5 + 105)   # 100 are drawn at once
    with np.load("a.npz") as file:
        exported = file["arr_0"].astype(int)
    png = plots.to_uint8(torch.cat([*sheets["samples"].values()]))
    assert exported.shape == (120, 16, 16, 3) and np.abs(exported[105:108] - png).max() <= 1


def test_the_newest_run_is_the_default_and_else_the_shipped_shapes(cli, tiny, tmp_path):
    options = ("--device", "cpu", "--task", "guidance", "--out", "made")
    assert "shapes.pt" in cli(SCRIPT, *options).out
    shutil.copytree(tiny.folder, tmp_path / "out" / "newest")
    assert "out/newest" in cli(SCRIPT, *options).out


@pytest.mark.parametrize("options", [
    "--box 0.5 0 0.2 1", "--cfg inf", "--n 0", "--run nowhere", "--run cut.png", "--run .",
    "--image cut.png", "--mask black.png", "--tokenizer-file a.pth", "--classes dog",
    "--export-npz missing/a.npz", "--export-npz a"])
def test_a_wrong_option_is_one_line(refused, tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(m6, "sample_tokens", lambda *_, **__: pytest.fail("sampled anyway"))
    for name in ("tokenizer.pt", "transformer.pt"):        # its data set is not here
        state = checkpoints.load_checkpoint(tiny.folder / name)
        torch.save(state | {"dataset": "gone"}, tmp_path / name)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "black.png").read_bytes()[:50])
    refused(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "inpaint",
            *options.split())

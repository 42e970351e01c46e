"""The tokenizer's health: usage, perplexity, energy left and PSNR of each scale, and warnings."""
import math
import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given
from hypothesis import strategies as st

from report import health, plots

m2, m5 = import_module("02_multiscale_vqvae"), import_module("05_train")
KINDS = dict(three={}, one={"scales": (4,)}, apart={"residual": False})


@given(seed=st.integers(0, 100), share=st.sampled_from([0.2, 0.6, 1.0]))
def test_psnr_is_that_of_the_definition_pixel_by_pixel(seed, share):
    a, b = torch.rand(2, 3, 3, 4, 4, generator=seeded(seed)) * 2 - 1
    keep = torch.rand(4, 4, generator=seeded(seed)) < share
    keep[0, 0] = True
    for mask, found in ((torch.ones(4, 4), health.psnr(a, b)), (keep, health.psnr(a, b, keep))):
        for x, y, db in zip(a, b, found.tolist()):
            error = [float(x[c, i, j] - y[c, i, j]) ** 2 / 4 for c, i, j in np.ndindex(3, 4, 4)
                     if mask[i, j]]
            assert db == pytest.approx(-10 * math.log10(sum(error) / len(error)), rel=1e-4)
    assert torch.equal(health.psnr(a, 3 * b), health.psnr(a, (3 * b).clamp(-1, 1))), "not shown"


def tokenizer_and_images(kind, n=11):
    """Images that differ in contrast, so that each weighs something else."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, scales=(1, 2, 4), vocab_size=16, latent_dim=4, channels=8, groups=4)
    model = m2.MultiScaleVQVAE(m2.TokenizerConfig(**{**sizes, **KINDS[kind]}))
    images = torch.rand(n, 3, 4, 4, generator=seeded()).repeat_interleave(4, 2)
    images = (2 * images.repeat_interleave(4, 3) - 1) * torch.linspace(0.05, 1, n).view(n, 1, 1, 1)
    return model.requires_grad_(False), images


def slow_examine(model, images):
    """Image by image, with what the model offers in public."""
    K, V = model.K, model.config.vocab_size
    tokens, missing, energy, db = [[] for _ in range(K)], np.zeros(K), 0, np.zeros(K)
    for image in images[:, None]:
        f = model.encode(image)
        found = model.quantize(f)
        energy += float((f ** 2).sum())
        for k, f_hat in enumerate(model.pyramid(found)):
            tokens[k] += found[k][0].tolist()
            missing[k] += float(((f - f_hat) ** 2).sum())
            error = (model.decode(f_hat).clamp(-1, 1) - image) / 2
            db[k] -= 10 * math.log10(float((error ** 2).mean())) / len(images)
    used, perplexity = [], []
    for codes in [*tokens, sum(tokens, [])]:               # every scale, then all together
        shares = [codes.count(code) / len(codes) for code in set(codes)]
        used.append(len(shares) / V)
        perplexity.append(math.prod(p ** -p for p in shares))
    return dict(used=used[:-1], perplexity=perplexity[:-1], used_overall=used[-1],
                perplexity_overall=perplexity[-1], left=missing / energy, psnr_after=db,
                psnr=db[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_examine_equals_a_slow_loop_however_the_set_is_cut_and_changes_nothing(kind):
    model, images = tokenizer_and_images(kind)
    before = [value.clone() for value in model.train().state_dict().values()]
    slow = slow_examine(model, images)
    for cut in (4, [1, 8, 2]):
        fast = health.examine(model, images.split(cut), torch.no_grad)
        for key, value in slow.items():
            assert fast[key] == pytest.approx(value, rel=1e-4), (key, cut)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(module.training for module in model.modules())


def test_the_table_and_the_log_line_hold_the_numbers_in_columns():
    numbers = dict(used=[0.0312, 1.0], used_overall=0.5, perplexity=[3.4, 16777216.0],
                   left=[0.713, 12.345], psnr_after=[14.25, 20.06])
    assert health.short((1, 16), numbers) == "used 50% (1: 3% 16: 100%)"
    lines = health.table((1, 16), numbers).splitlines()
    assert [line[16:].split() for line in lines] == [
        ["1x1", "16x16"], ["3%", "100%"], ["3", "16777216"], ["71.3%", "1234.5%"], ["14.2", "20.1"]]
    assert len({len(line) for line in lines}) == 1


def warned(used=(0.02, 0.1, 0.19, 0.2, 0.9), left=(0.9, 0.7, 0.709, 0.3, 0.1), seen=100, **config):
    config = m2.TokenizerConfig(**{**dict(scales=(1, 2, 4, 5, 8), vocab_size=64), **config})
    return health.warnings(SimpleNamespace(config=config), dict(used=used, left=left), seen)


def test_a_scale_that_collapsed_or_does_harm_is_named_with_a_setting_to_try(cli):
    assert warned() == [], "up to 4x4, few codes are normal"
    assert warned(used=[0.01] * 5, seen=3) == [], "64 codes were not seen four times over"
    assert warned(left=[0.1, 0.9, 0.2, 0.9, 0.2], residual=False) == [], "each scale stands alone"
    (few,) = warned(used=[0.02, 0.1, 0.19, 0.2, 0.19], seen=4)
    (middle,) = warned(used=[0.02, 0.1, 0.1, 0.19, 0.5])
    (worse,) = warned(left=[0.9, 0.7, 0.3, 0.312, 0.1])
    assert "8x8" in few and "19% of 64 codes" in few and "\n" not in few
    assert "5x5" in middle and "5x5" in worse and "worse" in worse and "30% -> 31%" in worse
    known = set(re.findall(r"--[a-z][a-z-]*", cli("05_train.py", "--help").out))
    for text in (few, middle, worse):
        assert {*re.findall(r"--[a-z][a-z-]*", text)} <= known
    m5.read_settings(["--device", "cpu", *re.search(r"--set \S+(?=,)", few)[0].split()])


def test_the_sheet_shows_every_scale_and_where_the_last_one_errs(monkeypatch):
    model, images = tokenizer_and_images("three", 3)
    monkeypatch.setattr(plots, "save_grid", lambda *args, **labels: shown.update(
        images=args[1].split(args[2]), **labels))
    graphs, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda x: graphs.append(encode(x)) or graphs[-1])
    shown = {}
    health.save_picture("x.png", model.requires_grad_(), images)
    assert not any(row.requires_grad for row in graphs), "gradients would take memory"
    model.requires_grad_(False)
    steps = model.pyramid(model.image_to_tokens(images))
    rows = [images, *(model.decode(f_hat).clamp(-1, 1) for f_hat in steps)]
    error = plots.heat_maps((rows[-1] - images).abs().mean(1) / 2, 0, 0.2)
    for found, wanted in zip(shown["images"], [*((x + 1) / 2 for x in rows), error], strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert shown["row_labels"][3] == f"after 4x4, {health.psnr(images, rows[-1]).mean():.1f} dB"

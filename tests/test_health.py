"""The tokenizer's health: usage, perplexity, energy left and PSNR of each scale, and warnings."""
import json
import math
import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import shapes
from report import health, plots

m2, m5 = import_module("02_multiscale_vqvae"), import_module("05_train")
KINDS = dict(three={}, one={"scales": (4,)}, apart={"residual": False}, signs={"quantizer": "lfq"})


def tokenizer_of(kind):
    torch.manual_seed(0)
    return m2.MultiScaleVQVAE(m2.TokenizerConfig(**{**dict(
        image_size=16, scales=(1, 2, 4), vocab_size=16, latent_dim=4, channels=8, groups=4),
        **KINDS[kind]}))


@given(seed=st.integers(0, 100))
def test_psnr_is_that_of_the_definition(seed):
    a, b = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    slow = [-10 * np.log10((((x + 1) / 2 - (y + 1) / 2) ** 2).mean().item()) for x, y in zip(a, b)]
    assert health.psnr(a, b).tolist() == pytest.approx(slow, rel=1e-4)
    assert torch.equal(health.psnr(a, 3 * b), health.psnr(a, (3 * b).clamp(-1, 1))), "not shown"


def slow_usage(tokens, V):                                 # list of ints -> (used, perplexity)
    shares = [tokens.count(code) / len(tokens) for code in sorted(set(tokens))]
    return len(shares) / V, math.prod(p ** -p for p in shares)


@given(V=st.integers(1, 12), K=st.integers(1, 3), B=st.integers(1, 4), seed=st.integers(0, 99))
def test_counts_and_usage_equal_a_slow_loop_and_two_batches_count_as_one(V, K, B, seed):
    one, two = (([torch.from_numpy(np.random.default_rng([seed, part, k]).integers(
        0, V, (B, k + 1))) for k in range(K)]) for part in (0, 1))
    counts = health.count_codes(one, V) + health.count_codes(two, V)
    both = [torch.cat(pair) for pair in zip(one, two)]
    assert torch.equal(counts, health.count_codes(both, V)) and counts.shape == (K, V)
    numbers, flat = health.usage(counts), [part.flatten().tolist() for part in both]
    assert counts.tolist() == [[part.count(code) for code in range(V)] for part in flat]
    used, perplexity = zip(*[slow_usage(part, V) for part in [*flat, sum(flat, [])]])
    assert [*numbers["used"], numbers["used_overall"]] == pytest.approx(used)
    assert [*numbers["perplexity"], numbers["perplexity_overall"]] == pytest.approx(perplexity)
    bounds = zip(numbers["used"], numbers["perplexity"])
    assert all(0.999 < many < share * V + 1e-3 and share <= 1 for share, many in bounds)


def test_perplexity_of_examples_worked_by_hand():
    even, collapsed, half = [7] * 8, [0, 0, 56, 0, 0, 0, 0, 0], [30, 10, 10, 10, 0, 0, 0, 0]
    numbers = health.usage(torch.tensor([even, collapsed, half, [1, 1, 0, 0, 0, 0, 0, 0]]))
    # Half on one code and half spread over n: entropy ln 2 + ln(n) / 2, perplexity 2 sqrt(n).
    assert numbers["perplexity"] == pytest.approx([8, 1, 2 * 3 ** 0.5, 2])
    assert numbers["used"] == [1, 1 / 8, 1 / 2, 1 / 4] and numbers["used_overall"] == 1


def set_of(n=11):
    """Pictures that differ in contrast, so that each weighs something else."""
    images = torch.from_numpy(shapes.load("train", size=16, count=n)[0]).permute(0, 3, 1, 2)
    return (images / 127.5 - 1) * torch.linspace(0.05, 1, n)[:, None, None, None]


def examined(model, images, cut):
    numbers = health.examine(model, images.split(cut), torch.no_grad)
    return {key: torch.tensor(value).double() for key, value in numbers.items()}


@torch.no_grad()
def slow_examine(model, images):
    """Picture by picture, with what the model offers in public."""
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
    used, perplexity = zip(*[slow_usage(part, V) for part in tokens])
    return dict(used=used, perplexity=perplexity, left=missing / energy, psnr_after=db, psnr=db[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_examine_equals_a_slow_loop_however_the_set_is_cut(kind):
    model, images = tokenizer_of(kind), set_of()
    slow = slow_examine(model, images)
    for cut in (1, 4, 11, [1, 8, 2]):
        fast = examined(model, images, cut)
        for key, value in slow.items():
            assert torch.allclose(fast[key], torch.tensor(value).double(), rtol=1e-4), (key, cut)


@pytest.mark.parametrize("training", [True, False])
def test_examine_leaves_the_model_as_it_was(training):
    model = tokenizer_of("three").train(training)
    before = [value.clone() for value in model.state_dict().values()]
    examined(model, set_of(), 4)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert {module.training for module in model.modules()} == {training}


def test_the_table_and_the_log_line_hold_the_numbers_in_columns():
    numbers = dict(used=[0.0312, 1.0], used_overall=0.5, perplexity=[3.4, 16777216.0],
                   left=[0.713, 12.345], psnr_after=[14.25, 20.06])
    assert health.short((1, 16), numbers) == "used 50% (1: 3% 16: 100%)"
    lines = health.table((1, 16), numbers).splitlines()
    assert [line[16:].split() for line in lines] == [
        ["1x1", "16x16"], ["3%", "100%"], ["3", "16777216"], ["71.3%", "1234.5%"], ["14.2", "20.1"]]
    ends = [[found.end() for found in re.finditer(r"\S+", line[16:])] for line in lines]
    assert ends == ends[:1] * 5 and len({len(line) for line in lines}) == 1


def warned(used=(0.02, 0.1, 0.19, 0.2, 0.9), left=(0.9, 0.7, 0.709, 0.3, 0.1), seen=100, **config):
    config = m2.TokenizerConfig(**{**dict(scales=(1, 2, 4, 5, 8), vocab_size=64), **config})
    return health.warnings(SimpleNamespace(config=config), dict(used=used, left=left), seen)


def test_a_tokenizer_that_is_well_is_not_warned_about():
    assert warned() == [], "up to 4x4, few codes are normal"
    assert warned(used=[0.01] * 5, seen=3) == [], "64 codes were not seen four times over"
    assert warned(left=[0.1, 0.9, 0.2, 0.9, 0.2], residual=False) == [], "each scale stands alone"


@pytest.mark.parametrize("config, cure", [
    ({}, "--tokenizer-lr"), (dict(learn="gradient"), "--set learn=ema"),
    (dict(quantizer="lfq", latent_dim=6), "--quantizer vq")])
def test_a_large_scale_that_uses_few_codes_is_named_with_a_setting_to_try(config, cure, cli):
    (few,) = warned(used=[0.02, 0.1, 0.19, 0.2, 0.19], seen=4, **config)
    (middle,) = warned(used=[0.02, 0.1, 0.1, 0.19, 0.5], **config)
    (worse,) = warned(left=[0.9, 0.7, 0.3, 0.312, 0.1], **config)
    assert "8x8" in few and "19% of 64 codes" in few and cure in few and "\n" not in few
    assert "5x5" in middle and "5x5" in worse and "worse" in worse and "30% -> 31%" in worse
    known = set(re.findall(r"--[a-z][a-z-]*", cli("05_train.py", "--help").out))
    for text in (few, middle, worse):
        named = re.findall(r"(--[a-z][a-z-]*)(?: (learn=ema|vq)\b)?", text)
        assert named and {option for option, _ in named} <= known
        assert all(m5.read_settings([option, value]) for option, value in named if value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_shows_every_scale_and_where_the_last_one_errs(kind, tmp_path):
    model, images = tokenizer_of(kind).requires_grad_(False), set_of(3)
    health.save_picture(tmp_path / "x.png", model, images)
    steps = model.pyramid(model.image_to_tokens(images))
    rebuilt = [model.decode(f_hat).clamp(-1, 1) for f_hat in steps]
    rows = [plots.to_uint8((row + 1) / 2) for row in (images, *rebuilt)]
    error = ((rebuilt[-1] - images).abs().mean(1) / 2).numpy()
    rows.append([plots.heat_map(part, 0, 0.2) for part in error])
    sheet = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert len(sheet) == 2 + (model.K + 2) * 98, "K + 2 rows of 16 pixels, six times as large"
    for r, row in enumerate(rows):
        shown = sheet[5 + 98 * r:98 + 98 * r:6, -3 * 98 + 3:]
        for c, image in enumerate(row):
            assert np.abs(shown[:, 98 * c:98 * c + 96:6].astype(int) - image).max() <= 1, (r, c)


def test_a_run_logs_the_health_of_every_scale(tiny):
    entries = map(json.loads, (tiny.folder / "log.jsonl").read_text().splitlines())
    entries = [entry for entry in entries if entry["stage"] == "tokenizer"]
    found = [entry["held_out"] for entry in entries if "held_out" in entry]
    assert len(found) == 4 and len(entries) == 4 + 24
    for numbers in found:
        for key in ("used", "perplexity", "left", "psnr_after"):
            assert len(numbers[key]) == 3 and all(map(math.isfinite, numbers[key])), key
        text = "\n".join([health.table((1, 2, 4), numbers), *numbers["warnings"]])
        assert numbers["psnr"] == numbers["psnr_after"][-1] and text in tiny.stdout
    for entry in entries:
        assert "held_out" in entry or len(entry["used"]) == len(entry["perplexity"]) == 3 and \
            health.short((1, 2, 4), entry) in tiny.stdout

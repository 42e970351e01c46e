"""Density: the tables and the chart, figure by figure against slow loops and hand-worked cases."""
import io
import math
import re
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import printed, seeded, without_images
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from PIL import Image

from report import density, plots

m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT, BIT = "06_sample_and_edit.py", math.log(2)         # a bit in nats


def rows_of_table(text):
    """Printed lines -> what stands in front of the figures (two spaces or more) -> the figures."""
    lines = [line.strip().partition("  ") for line in text.splitlines() if line.startswith("    ")]
    return {name: rest.split() for name, _, rest in lines if rest}


def shows(text, value):
    """Is `text` the number `value`, as exactly as its digits can say?"""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10 ** -digits + 1e-5 * max(1, abs(value))


@given(scales=st.lists(st.integers(1, 6), min_size=1, max_size=5), V=st.integers(2, 5000),
       count=st.integers(1, 4), side=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_equal_the_slow_loop(scales, V, count, side, seed):
    nats = -30 * torch.rand(2, count, len(scales), generator=seeded(seed))
    out = printed(density.bits_table, nats[0], nats[1], scales, V, side)
    table, means = rows_of_table(out), []
    for rows in nats:                                      # the class known, no class
        bits = [sum(float(row[k]) for row in rows) / count / -BIT for k in range(len(scales))]
        means.append([*bits, sum(bits)])
    tokens = [s * s for s in scales] + [sum(s * s for s in scales)]
    assert shows(re.search(r"costs (\S+) bits", out)[1], math.log2(V))
    assert list(map(int, table["tokens"])) == tokens
    assert ("more bits than" in out) == (means[0][-1] > math.log2(V) * tokens[-1])
    for name, values in (("bits, class known", means[0]), ("bits, no class", means[1]),
                         ("bits per token", [b / n for b, n in zip(means[0], tokens)]),
                         ("bits per pixel", [b / side ** 2 for b in means[0]])):
        assert len(table[name]) == len(values) and all(map(shows, table[name], values)), name


def test_bayes_and_the_posterior_of_hand_worked_cases():
    """Three scales, two classes, two images of class 0. Image 0: the first scale says class 1, by
    1; the second class 0, by 3. Image 1: class 0 by 2, class 1 by 1, class 1 by 5."""
    nats = torch.tensor([[[-4.0, -1, -2], [-3, -4, -2]], [[-1.0, -2, -6], [-3, -1, -1]]])
    out = printed(density.bayes, nats, torch.tensor([0, 0]), (1, 2, 3))
    assert "for 50.0% of 2 images (by chance 50.0%)" in out
    assert "1x1: 50.0%, 2x2: 100.0%, 3x3: 50.0%" in out
    nats = torch.tensor([[0.0, math.log(5)], [1, math.log(12) - 1], [math.log(3), 0]])
    out = printed(density.posterior, nats, ["ant", "bee", "cat"])        # 5, 12 and 3 of 20
    assert "bee 60.0%, ant 25.0%, cat 15.0%" in out


# -- Bytes -----------------------------------------------------------------------------------------

def scan_of(data):
    """The entropy-coded part of a JPEG file, found segment by segment from the front."""
    at, marker = 2, None
    while marker != 0xda:                                  # after its header the image begins
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], "big")
        at += 2 + length
    assert data.endswith(b"\xff\xd9"), "the end of the image"
    return data[at:-2]


@given(height=st.integers(1, 40), width=st.integers(1, 40), quality=st.integers(1, 100),
       options=st.sampled_from([dict(format="JPEG", subsampling=0), dict(format="WEBP", method=6),
                                dict(format="JPEG", subsampling=2)]))
def test_bare_bytes_are_the_scan_of_a_jpeg_and_the_one_chunk_of_a_webp(height, width, quality,
                                                                       options):
    picture, out = np.random.default_rng(quality).integers(
        0, 256, (height, width, 3), np.uint8), io.BytesIO()
    Image.fromarray(picture).save(out, quality=quality, **options)
    data, (size, bare, decoded) = out.getvalue(), density.file_bytes(
        picture, quality=quality, **options)
    if options["format"] == "JPEG":
        assert bare == len(scan_of(data)) > 0
    else:
        chunk = int.from_bytes(data[16:20], "little")      # chunks end at an even byte
        assert data[:4] + data[8:16] == b"RIFFWEBPVP8 " and bare == chunk + chunk % 2
    assert size == len(data) and (decoded == np.array(Image.open(out))).all()


POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@few(max_examples=100)
@given(points=POINTS, size=st.floats(0, 10))
def test_best_keeps_what_no_smaller_one_equals_and_at_size_lies_on_the_line(points, size):
    kept = density.best(iter(points))
    assert kept == sorted({(x, y) for x, y in points if not any(
        (a, b) != (x, y) and a <= x and b >= y for a, b in points)})
    found = density.at_size(kept, size)
    for (low, a), (high, b) in zip(kept, kept[1:]):
        if low <= size <= high:
            assert found == pytest.approx(a + (b - a) * (size - low) / (high - low), abs=1e-9)
    assert math.isnan(found) == (not kept[0][0] <= size <= kept[-1][0])


def test_two_codes_and_the_codecs_in_a_case_worked_by_hand(monkeypatch):
    """13 codes: 4 bits each. The ideal code: 30 bits and 1 for the class, then 64 more: 11.9 bytes.
    A made-up codec: quality q makes a file of 10 q bytes, q of them bare, of q/2 dB; WebP is twice
    as large."""
    image, series, seen = torch.linspace(-1, 1, 3 * 16).view(1, 3, 4, 4), {}, []

    def curve(images, *, quality, format, subsampling=0, method=0):
        seen.append(images)
        times, worse = 2 if format == "WEBP" else 1, subsampling         # 4:2:0 is never better
        return (quality / 2 - worse / 10, times * 10 * quality + worse,
                times * quality + worse / 10)
    monkeypatch.setattr(density, "codec_curve", curve)
    monkeypatch.setattr(plots, "save_curve", lambda path, lines, **_: series.update(lines))
    nats, db = -BIT * torch.tensor([[28.0, 60], [32, 68]]), torch.tensor([[4.0, 7], [6, 9]])
    images = image.repeat(2, 1, 1, 1)
    out = printed(density.rate_distortion, "", images, nats, db, (1, 2), 13, 2)
    assert rows_of_table(out)["1x1"] == ["0.5", "3.9", "5.0", "-", "1.9", "1.0"]
    assert rows_of_table(out)["2x2"] == ["2.5", "11.9", "8.0", "0.6", "5.9", "3.0"]
    for words in ("JPEG: from 10 bytes (0.5 dB) on; as good as all scales from 160 bytes on",
                  "JPEG, no headers: from 1 bytes (0.5 dB) on; 1.2 dB at 2 bytes; as good",
                  "WebP, no container: from 2 bytes (0.5 dB) on; 0.6 dB at 2 bytes; as good"):
        assert words in out
    assert series["JPEG, no headers"][:3] == [(1, 0.5), (3, 1.5), (6, 3.0)]
    assert series["tokens, fixed length"] == [(0.5, 5), (2.5, 8)]
    assert series["tokens, ideal code"] == [pytest.approx((31 / 8, 5)), pytest.approx((95 / 8, 8))]
    wanted = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert all(found.dtype == np.uint8 and (found == wanted).all() for found in seen)
    out = printed(density.rate_distortion, "", images, nats, db + 99, (1, 2), 13, 2)
    assert out.count("never as good as all scales") == 3


# -- The whole way, on a trained run ---------------------------------------------------------------

@torch.no_grad()
def slow_nats(tokenizer, var, picture, label):
    """ln p of the tokens of one image, scale by scale, token by token: every scale runs the whole
    masked model over what is known so far, the rest filled with token 0."""
    tokens, begin, nats = tokenizer.image_to_tokens(picture[None]), 0, []
    for k, side in enumerate(tokenizer.scales):
        known = [t if i < k else torch.zeros_like(t) for i, t in enumerate(tokens)]
        logits = var(torch.tensor([label]), tokenizer.teacher_inputs(known))[0]
        rows = logits[begin:begin + side * side].double().exp()
        nats.append(sum(math.log(row[token] / row.sum()) for row, token in zip(rows, tokens[k][0])))
        begin += side * side
    return nats


def test_likelihoods_of_a_run_equal_the_slow_loops_in_passes_of_any_size(tiny, monkeypatch):
    tokenizer, _ = m5.load_tokenizer(tiny.folder / "tokenizer.pt")
    var, _ = m5.load_transformer(tiny.folder / "transformer.pt")
    image = torch.rand(3, 3, 16, 16, generator=seeded()) * 2 - 1
    monkeypatch.setattr(density, "per_pass", lambda side: 2)
    nats, db = density.likelihoods(tokenizer, partial(m6.log_likelihood, tokenizer, var), image,
                                   [2, 0, 3])
    slow = [[slow_nats(tokenizer, var, x, c) for c in (2, 0, 3)] for x in image]
    assert torch.allclose(nats, torch.tensor(slow), atol=1e-3)
    for k, f_hat in enumerate(tokenizer.pyramid(tokenizer.image_to_tokens(image))):
        off = (tokenizer.decode(f_hat).clamp(-1, 1) - image) / 2
        assert torch.allclose(db[:, k], -10 * off.square().mean((1, 2, 3)).log10(), atol=1e-3)


def test_density_of_a_run_weighs_the_images_asked_for(cli, refused, tiny, tmp_path):
    """3 of the 60 images are held out, one of each class."""
    def weigh(*options):
        result = cli(SCRIPT, "--run", tiny.folder, "--device", "cpu", "--task", "density", "--out",
                     tmp_path / "made", *options)
        assert result.status == 0, result.err
        return result.out
    assert "3 image(s); without" in (out := weigh()) and "by chance 33.3%" in out
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["rate_distortion.png"]
    assert "2 image(s); without" in (out := weigh("--n", 2, "--classes", "cat", "bee", "ant"))
    assert "1 image(s); without" in (out := weigh("--classes", "cat")) and "Bayes" not in out
    image = next(tiny.pictures.rglob("*.png"))
    assert "p(class | tokens)" in (out := weigh("--image", image)) and "Bayes'" not in out
    assert "gone" in refused(SCRIPT, "--run", without_images(tiny.folder, tmp_path), "--device",
                             "cpu", "--task", "density")

"""Errors in the maps before: labels know of them, and training alone has them."""
import json
import math
import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_models, stage_of, table

from data.batches import to_float

correction = import_module("experiments.self_correction")


def changed_at(tokenizer, last):
    """A change of tokens: map `last` gets other codes, all others stay."""
    return lambda k, tokens: (tokens + 1) % tokenizer.config.vocab_size if k == last else tokens


@pytest.mark.parametrize("residual", (True, False))
def test_labels_are_before_an_error_and_correct_those_before_inputs_are_after_it(residual):
    tokenizer, _ = random_models(scales=(1, 2, 3, 4))
    tokenizer.config.residual = residual
    f, everything = torch.randn(3, 4, 4, 4), {}
    for last in (None, 0, 1, 2, 3):
        change = changed_at(tokenizer, last)
        labels, inputs = correction.requantize(tokenizer, f, change)
        shown = [change(k, tokens) for k, tokens in enumerate(labels)]
        assert torch.equal(inputs, tokenizer.teacher_inputs(shown))
        for k in range(4):                                 # what Algorithm 1 says of any prefix
            missing = f - tokenizer.features(shown[:k]) if k and residual else f
            nearest = tokenizer.quantizer.nearest(tokenizer.downsample_to(missing, k))
            assert torch.equal(labels[k], nearest)
        everything[last] = labels
    tokens = tokenizer.quantize(f)
    for last, labels in everything.items():
        same = [torch.equal(a, b) for a, b in zip(labels, tokens)]
        assert same == [not residual or last is None or k <= last for k in range(4)]
    labels, inputs = correction.keep_labels(tokenizer, f, changed_at(tokenizer, 1))
    wrong = [changed_at(tokenizer, 1)(k, part) for k, part in enumerate(tokens)]
    assert all(map(torch.equal, labels, tokens))
    assert torch.equal(inputs, tokenizer.teacher_inputs(wrong))


def test_later_maps_undo_much_of_an_error_if_they_know_of_it():
    tokenizer = import_module("05_train").load_tokenizer(ROOT / "data/pretrained/shapes.pt")[0]
    images = import_module("data.shapes").draw(range(20))[0]
    with torch.no_grad():
        f = tokenizer.float().encode(to_float(torch.from_numpy(images)))
    neighbours, errors = correction.neighbours_of(tokenizer.quantizer.codebook, 10), []
    for method in (correction.requantize, correction.keep_labels):
        torch.manual_seed(0)
        shown = []
        method(tokenizer, f, lambda k, tokens: shown.append(
            correction.exchange(tokens, 0.3, neighbours)) or shown[-1])
        errors.append((tokenizer.features(shown) - f).square().mean((1, 2, 3)))
    assert (errors[0] < errors[1]).all() and errors[0].mean() < 0.5 * errors[1].mean()


def test_tokens_are_exchanged_for_near_codes_at_the_rate_of_their_image():
    codes = torch.tensor([[0.0], [1], [3], [7]])
    assert correction.neighbours_of(codes, 1).tolist() == [[1], [0], [1], [2]]
    assert [set(row) for row in correction.neighbours_of(codes, 2).tolist()] == [
        {1, 2}, {0, 2}, {0, 1}, {1, 2}]
    torch.manual_seed(0)
    tokens, rate = torch.randint(4, (3, 5000)), torch.tensor([[0.0], [0.3], [1.0]])
    near = correction.neighbours_of(codes, 2)
    found = correction.exchange(tokens, rate, near)
    assert (found != tokens).float().mean(1).tolist() == pytest.approx([0, 0.3, 1], abs=0.02)
    seen = set(zip(tokens[2].tolist(), found[2].tolist()))
    assert seen == {(a, b) for a in range(4) for b in near[a].tolist()}


@pytest.mark.parametrize("correct", (True, False))
def test_a_corrupting_stage_trains_on_errors_and_is_evaluated_without(correct, monkeypatch):
    """Without errors its loss is chapter 5's. Every image has one rate of its own, in all maps."""
    torch.manual_seed(1)
    f, rates, stage = torch.randn(32, 4, 4, 4), [], stage_of("transformer", side_power=0.0)
    stage.model.eval()                                     # no dropout
    for p in stage.model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    before, classes = stage.evaluate()[1]["loss"], torch.arange(32) % 3
    tokens = torch.cat(stage.tokenizer.quantize(f), 1)
    plain = stage.per_token(stage.model, tokens, classes)[0].mean().item()
    monkeypatch.setattr(correction, "exchange", lambda tokens, rate, neighbours: (
        rates.append(rate) or (tokens + neighbours) % 16))
    found = {}
    for step in 0, 1:
        stage.__class__ = correction.corrupting(lambda: f, 0.3, correct, step)
        loss, (by_token, _) = stage.loss(stage.model, stage.rows("train", np.arange(32)), 0.5)
        assert stage.evaluate()[1]["loss"] == before and loss.requires_grad
        assert by_token.mean().item() == pytest.approx(loss.item())
        found[step] = loss.item()
    method = correction.requantize if correct else correction.keep_labels
    labels, inputs = method(stage.tokenizer, f, lambda k, tokens: (tokens + 1) % 16)
    logits, labels = stage.model(classes, inputs), torch.cat(labels, 1)
    expected = -logits.log_softmax(-1).gather(2, labels[..., None]).mean().item()
    assert found == pytest.approx({0: plain, 1: expected}) and abs(plain - expected) > 1e-4
    assert len(rates) == 6 and all(torch.equal(rate, rates[0]) for rate in rates[:3])
    assert rates[0].shape == (32, 1) and len(set(rates[0].flatten().tolist())) == 32
    assert 0 <= rates[0].min() < 0.1 and 0.2 < rates[0].max() <= 0.3


def test_features_are_in_the_order_of_the_token_cache(monkeypatch):
    tokenizer, n = random_models()[0], 6
    monkeypatch.setattr(import_module("data.views"), "per_pass", lambda side: 4)
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    trial = SimpleNamespace(settings=SimpleNamespace(views=3), data={"train": (images, None)},
                            precision="float32", processes=SimpleNamespace(device="cpu"))
    found = correction.features.__wrapped__(trial, tokenizer, "train")
    assert found.shape == (3 * n, 4, 4, 4)
    for row in range(3 * n):
        image = to_float(torch.from_numpy(images[[row % n]]))
        view = import_module("data.views").view_of(image, row // n, np.array([row % n]), n)
        assert torch.allclose(found[row], tokenizer.encode(view)[0], atol=1e-5)


def test_prefixes_without_an_error_cost_as_much_as_real_ones(monkeypatch):
    """Nothing is exchanged, and the model draws the real tokens."""
    tokenizer, var = random_models(noise=0.5)
    f, classes = torch.randn(5, 4, 4, 4), torch.arange(5) % 3
    neighbours = correction.neighbours_of(tokenizer.quantizer.codebook, 3)
    torch.manual_seed(0)
    found = correction.bits_by_prefix(tokenizer, var, f, classes, neighbours, 0.5)
    real = correction.drawing.log_likelihood(tokenizer, var, tokenizer.quantize(f), classes)
    assert torch.allclose(found["real"], -real / math.log(2), atol=1e-4)
    assert torch.equal(found["drawn"][:, 0], found["real"][:, 0])
    assert torch.equal(found["exchanged"][:, 0], found["real"][:, 0])
    for name in ("exchanged", "drawn", "own"):
        assert (found[name][:, 1:] != found["real"][:, 1:]).float().mean() > 0.5, name
    tokens = iter(tokenizer.quantize(f) * 2)
    monkeypatch.setattr(correction.drawing, "draw", lambda *_: next(tokens))
    found = correction.bits_by_prefix(tokenizer, var, f, classes, neighbours, 0)
    for name in ("exchanged", "drawn", "own"):
        assert torch.allclose(found[name], found["real"], atol=1e-4), name


@pytest.mark.slow
def test_self_correction_prints_a_row_for_each_training(cli, tmp_path):
    first, again = (cli("experiments.self_correction.py", "--quick", "--out", "o")
                    for _ in range(2))
    assert first.status == 0, first.err
    head, *found, floor = table(first.out)
    assert [row[0] for row in found] == list(correction.ROWS) and floor[1:5] == [""] * 4
    held_out = re.findall(r"held out at step 3: loss ([\d.]+)", first.out)
    assert len(held_out) == 4 and "held out" not in again.out
    assert table(again.out) == table(first.out)
    folder = tmp_path / "o/self_correction/shapes-quick"
    kept = [json.loads((folder / row / "0.json").read_text())["found"] for row in correction.ROWS]
    assert len({found["real"] for found in kept}) == 4, "no two trainings are alike"
    assert all(sum(found[f"{name} by map"]) == pytest.approx(found[name])
               for found in kept for name in correction.PREFIXES)
    assert (folder / "self_correction.png").exists()

"""What VQGAN adds to stage 1: LPIPS against a slow loop, the critic, and both in training."""
import os
import signal
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, log_of, same, stage_of
from hypothesis import given
from hypothesis import strategies as st

from engine import BadInput, checkpoints, files, perceptual

m5 = import_module("05_train")
SCRIPT = "05_train.py"
# Where torchvision's VGG-16 has its convolutions; LPIPS looks behind the last one of each group.
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
FULL = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
NARROW = ((4, 4), (8, 8), (8, 8, 8), (8, 8, 8), (8, 8, 8))


def random_weights(groups, seed=0):
    """State dicts as torchvision's VGG-16 and LPIPS have them, of these widths."""
    g, vgg, lpips, c_in = torch.Generator().manual_seed(seed), {}, {}, 3
    for k, (widths, numbers) in enumerate(zip(groups, CONVS, strict=True)):
        for c, n in zip(widths, numbers, strict=True):
            vgg[f"features.{n}.weight"] = torch.randn(c, c_in, 3, 3, generator=g) / (4 * c_in) ** .5
            vgg[f"features.{n}.bias"] = 0.1 * torch.randn(c, generator=g)
            c_in = c
        lpips[f"lin{k}.model.1.weight"] = torch.rand(1, c_in, 1, 1, generator=g)
    return vgg, lpips


def slow_lpips(vgg, lpips, x, y):
    """Zhang et al. 2018, equation 1, of two pictures (3, H, W), one position at a time, float64."""
    shift, scale = np.array([[-.030, -.088, -.188], [.458, .448, .450]])[:, :, None, None]
    far, both = 0.0, [torch.from_numpy((z.double().numpy() - shift) / scale) for z in (x, y)]
    for k, numbers in enumerate(CONVS):
        both = [F.max_pool2d(z, 2) if k else z for z in both]
        for n in numbers:
            weight, bias = (vgg[f"features.{n}.{kind}"].double() for kind in ("weight", "bias"))
            both = [F.conv2d(z, weight, bias, padding=1).clamp(min=0) for z in both]
        w, (_, height, width) = lpips[f"lin{k}.model.1.weight"].flatten().numpy(), both[0].shape
        for i, j in np.ndindex(height, width):
            a, b = (z[:, i, j].numpy() for z in both)
            a, b = (v / max(np.linalg.norm(v), 1e-10) for v in (a, b))
            far += sum(w * (a - b) ** 2) / (height * width)
    return far


def pictures(n, *size, seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def narrow(monkeypatch):
    """VGG-16 and LPIPS with a few channels only. -> their state dicts"""
    monkeypatch.setattr(perceptual, "GROUPS", NARROW)
    return list(random_weights(NARROW))


@pytest.fixture
def weight_files(narrow, tmp_path):
    """The narrow weights as files. -> the options that name them"""
    for name, state in zip(("vgg", "lpips"), narrow):
        torch.save(state, tmp_path / f"{name}.pth")
    return ["--vgg-file", tmp_path / "vgg.pth", "--lpips-file", tmp_path / "lpips.pth"]


@pytest.mark.parametrize("widths", [NARROW, pytest.param(FULL, marks=pytest.mark.slow)])
def test_lpips_is_equation_1_one_position_at_a_time(monkeypatch, widths):
    if widths is NARROW:                                   # else GROUPS must be those of VGG-16
        monkeypatch.setattr(perceptual, "GROUPS", widths)
    weights, x, y = random_weights(widths), pictures(2, 16, 32), pictures(2, 16, 32, seed=9)
    lpips = perceptual.Perceptual().load(*weights)
    slow = [slow_lpips(*weights, *pair) for pair in zip(x, y)]
    assert lpips(x, y).tolist() == pytest.approx(slow, rel=1e-4)
    assert torch.equal(lpips(y, x), lpips(x, y)) and (lpips(x, x) == 0).all()


@pytest.mark.parametrize("dead", [None, 2, 28])
def test_every_picture_has_a_finite_gradient_and_the_weights_have_none(narrow, dead):
    if dead:                                               # behind this ReLU all is 0: no length 1
        narrow[0][f"features.{dead}.bias"] -= 100
    lpips, noise = perceptual.Perceptual().load(*narrow), pictures(1, 16, 16)
    black = torch.full_like(noise, -1)
    for x, y in ((noise, black), (black, noise), (noise, noise), (black, black)):
        x = x.clone().requires_grad_()
        far = lpips(x, y)
        far.sum().backward()
        assert far.isfinite().all() and x.grad.isfinite().all()
        assert dead == 2 or (x.grad != 0).any() == (x.detach() != y).any()
    assert not any(p.requires_grad or p.grad is not None for p in lpips.parameters())


@pytest.mark.parametrize("part, name, value", [
    (0, "features.28.bias", None), (0, "features.0.weight", torch.zeros(4, 3, 5, 5)),
    (0, "features.2.bias", "text"), (1, "lin2.model.1.weight", torch.ones(1, 1, 1, 1))])
def test_weights_that_do_not_fit_are_refused_in_one_line(narrow, part, name, value):
    narrow[part] = {k: v for k, v in {**narrow[part], name: value}.items() if v is not None}
    with pytest.raises(BadInput, match="VGG-16") as error:
        perceptual.Perceptual().load(*narrow)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.floats(-3, 3))
def test_hinge_lifts_real_scores_up_to_1_and_lowers_the_others_down_to_minus_1(scores, other):
    slow = (sum(max(0, 1 - x) for x in scores) / len(scores) + max(0, 1 + other)) / 2
    loss = perceptual.hinge(torch.tensor(scores), torch.tensor([other]))
    assert loss.item() == pytest.approx(slow, rel=1e-5, abs=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_lengths_and_a_constant():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    long, short = 1.5 * w[0] ** 2 + w[1] ** 2, 0.5 * w[1] ** 2   # gradients (3, 4) and (0, 2)
    weight = perceptual.adaptive_weight(long, short, w)
    assert weight.item() == pytest.approx(5 / 2, rel=1e-3) and not weight.requires_grad
    assert w.grad is None and perceptual.adaptive_weight(long, 0 * short, w).item() == 1e4
    (long + weight * short).backward()                     # the graphs are still there
    assert w.grad.tolist() == pytest.approx([3, 4 + 2.5 * 2], rel=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_critic_learns_from_the_hinge_alone_and_the_tokenizer_pleases_it(parts):
    """Of a batch in two parts, each gives it half of its gradient."""
    stage = stage_of("tokenizer", adversarial=0.5, accumulate=parts)
    image, critic, last = pictures(4, 16, 16), stage.modules["critic"], stage.model.decoder.conv_out
    rebuilt, _, losses = stage.model(image)
    real, fake, picture = critic(image), critic(rebuilt), losses["reconstruction"]
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    wanted = torch.autograd.grad(hinge, list(critic.parameters()), retain_graph=True)
    long, short = (torch.autograd.grad(value, last.weight, retain_graph=True)[0].norm()
                   for value in (picture, fake.mean()))
    added = stage.critic.loss(image, rebuilt, picture)
    assert all(p.grad is None for p in stage.model.parameters()), "a lesson for the critic only"
    assert added.item() == pytest.approx(-(long / (short + 1e-4) * fake.mean()).item(), rel=1e-4)
    (picture + added).backward()
    for p, grad in zip(critic.parameters(), wanted, strict=True):
        assert p.requires_grad and torch.allclose(p.grad * parts, grad, rtol=1e-4, atol=1e-7)


def test_without_weights_a_run_is_refused_in_one_line_but_a_finished_tokenizer_needs_none(
        cli, refused, monkeypatch, picture_folder, weight_files, tmp_path):
    def fail(url, path, sha256):
        asked.append((url, sha256))
        raise BadInput("no route")
    asked, options = [], ["--dataset", picture_folder, *TINY, "--stage", "tokenizer",
                          "--perceptual", 1, "--tokenizer-steps", 2, "--out", tmp_path / "run"]
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(files, "download", fail)
    for files_given, word in (((), "--perceptual 0"), (weight_files[:2], "no route"),
                        (["--vgg-file", "nowhere.pth"], "nowhere.pth"),
                        ([*weight_files[:3], weight_files[1]], "VGG-16")):
        assert word in refused(SCRIPT, *options, *files_given)
    assert asked == [perceptual.VGG, perceptual.LPIPS]
    for files_given, word in ((weight_files, "to 2 in"), ([], "trained for 2 steps")):
        result = cli(SCRIPT, *options, *files_given)
        assert result.status == 0 and word in result.out, result


@pytest.mark.slow
def test_a_run_with_all_terms_that_was_stopped_goes_on_bit_for_bit_and_gives_away_no_critic(
        cli, picture_folder, weight_files, monkeypatch, tmp_path):
    def train(name, *more, status=0):
        result = cli(SCRIPT, "--dataset", picture_folder, *TINY, "--tokenizer-steps", 8, "--steps",
                     1, "--adversarial", 0.5, "--perceptual", 1, "--flip", "--accumulate", 2,
                     *weight_files, "--set", "picture_loss=l1", "--out", tmp_path / name, *more)
        assert result.status == status, result.err
        return checkpoints.load_checkpoint(tmp_path / name / "tokenizer.pt")
    summary, calls = m5.TokenizerStage.summary, []

    def stop(self, *of_steps):                             # it is called at every step here
        calls.append(len(calls))
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return summary(self, *of_steps)
    straight = train("straight", "--export", tmp_path / "both.pt")
    with monkeypatch.context() as patch:
        patch.setattr(m5.TokenizerStage, "summary", stop)
        assert train("run", status=143)["step"] == 5
    assert same(train("run"), straight) and "critic" in straight
    assert log_of(tmp_path / "run") == log_of(tmp_path / "straight")
    assert not {"critic", "optimizers"} & checkpoints.load_checkpoint(
        tmp_path / "both.pt")["tokenizer"].keys()
    for path in (tmp_path / "run" / "tokenizer.pt", tmp_path / "both.pt"):
        model, about = m5.load_tokenizer(path)
        assert "critic" not in about and about["step"] == 8
        assert model.tokens_to_image(model.image_to_tokens(pictures(1, 16, 16))).isfinite().all()

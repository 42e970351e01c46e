"""Errors in one line, processes, optimizers, LPIPS and the critic, released weights."""
import re
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import layout, random_models, same, seeded
from hypothesis import given
from hypothesis import strategies as st

from engine import (BadInput, checkpoints, distributed, optimizers, options, perceptual,
                    released)

m6 = import_module("06_sample_and_edit")


@pytest.mark.parametrize("error, status, words", [
    (BadInput("trace\nno luck"), 2, "no luck"), (OSError(28, "No space"), 2, "No space"),
    (torch.OutOfMemoryError("a\nb"), 2, "--accumulate"), (KeyboardInterrupt(), 130, ""),
    (RuntimeError("DataLoader worker (pid 7) is killed"), 2, "--workers"),
    (ConnectionResetError(104, "reset"), 2, "--workers")])
def test_a_mistake_of_the_user_is_one_line_and_a_status(capsys, error, status, words):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        options.run_main(main)
    line = capsys.readouterr().err
    assert end.value.code == status and words in line and line.count("\n") == (status == 2)


@given(n=st.integers(0, 40), world=st.integers(1, 5))
def test_the_shares_of_all_processes_are_the_batch_and_means_are_over_all(n, world):
    """Each of the other processes holds the same number as this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: world)
        patch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(world))
        number, shares = torch.tensor(3.0), []
        assert distributed.mean(number) == 3 and distributed.total(number) == 3 * world
        for rank in range(world):
            patch.setattr(distributed, "rank", partial(int, rank))
            shares += list(distributed.share(np.arange(n)))
    assert sorted(shares) == list(range(n)) and number == 3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("part", [0, 1])
def test_matrices_decay_those_inside_blocks_go_to_muon_all_are_scheduled(kind, part):
    model = random_models()[part]
    made = optimizers.make_optimizers(model, 1e-3, 0.05, kind)
    optimizers.set_schedule(made, 0.5, 0.7, 0.3)           # nothing depends on the past
    optimizers.set_schedule(made, 0.25, 0.1, 0.08)
    owner = {id(p): (optimizer, group) for optimizer in made
             for group in optimizer.param_groups for p in group["params"]}
    inside = r"blocks\.\d\.(attention|mlp)|(encoder|decoder)\.(levels|middle)"
    for name, p in model.named_parameters():
        optimizer, group = owner[id(p)]
        table = name in ("class_embed.weight", "scale_embed.weight")
        matrix = p.ndim >= 2 and name.endswith("weight") and not table
        by_muon = kind == "muon" and matrix and bool(re.match(inside, name))
        assert isinstance(optimizer, optimizers.Muon) == by_muon, name
        decay = 0.08 - 0.03 * (0.5 + 0.5 ** 1.5) if matrix else 0.0      # half a cosine
        assert group["weight_decay"] == pytest.approx(decay), name
        assert group["lr"] == pytest.approx(0.1 * (0.02 if by_muon else 1e-3))


def slow_orthogonal(g):
    """Five Newton-Schulz steps on one matrix, in float64."""
    if len(g) > g[0].numel():
        return slow_orthogonal(g.t()).t()
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.t()
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ a @ x)
    return x


def test_muon_equals_a_slow_loop_also_for_convolutions():
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((6, 4), (4, 6), (6, 4), (6, 2, 3, 3), (2, 2, 1, 1))]
    params = [torch.nn.Parameter(x.clone()) for x in start]
    muon = optimizers.Muon(params, lr=0.1, momentum=0.9, weight_decay=0.2)
    slow, momentum = [x.double() for x in start], [0 * x.double() for x in start]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.9 * momentum[i] + 0.1 * p.grad
            step = slow_orthogonal((0.1 * p.grad + 0.9 * momentum[i]).flatten(1)).view_as(p)
            size = 0.1 * max(1, len(p) / p[0].numel()) ** 0.5
            slow[i] = slow[i] * (1 - 0.1 * 0.2) - size * step
        muon.step()
    assert all(torch.allclose(p.double(), x, atol=1e-3) for p, x in zip(params, slow))


# Where torchvision's VGG-16 has its convolutions; LPIPS reads the last of each group.
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
NARROW = ((4, 4), (8, 8), (8, 8, 8), (8, 8, 8), (8, 8, 8))


def slow_lpips(vgg, lpips, x, y):
    """Zhang et al. 2018, equation 1, for two images (3, H, W), in float64."""
    distance, shift = 0, torch.tensor([-.030, -.088, -.188])[:, None, None]
    both = [(z.double() - shift) / torch.tensor([.458, .448, .450])[:, None, None]
            for z in (x, y)]
    for k, numbers in enumerate(CONVS):
        both = [F.max_pool2d(z, 2) if k else z for z in both]
        for n in numbers:
            weight, bias = (vgg[f"features.{n}.{x}"].double() for x in ("weight", "bias"))
            both = [F.conv2d(z, weight, bias, padding=1).relu() for z in both]
        a, b = (z / z.norm(dim=0).clamp(min=1e-10) for z in both)
        distance += (lpips[f"lin{k}.model.1.weight"][0] * (a - b) ** 2).sum(0).mean().item()
    return distance


def test_lpips_is_equation_1_with_finite_gradients(monkeypatch, tmp_path):
    monkeypatch.setattr(perceptual, "GROUPS", NARROW)
    monkeypatch.setattr(perceptual, "DOWNLOADS", tmp_path)
    convs = perceptual.Perceptual().features.named_parameters()       # with random weights
    vgg = {f"features.{name}": p.data for name, p in convs}
    weights = {f"lin{k}.model.1.weight": torch.rand(1, group[-1], 1, 1)
               for k, group in enumerate(NARROW)}
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(weights, tmp_path / "lpips_vgg.pth")
    x, y = torch.rand(2, 2, 3, 16, 32, generator=seeded()) * 2 - 1
    lpips = perceptual.load_perceptual()
    slow = [slow_lpips(vgg, weights, *pair) for pair in zip(x, y)]
    assert lpips(x, y).tolist() == pytest.approx(slow, rel=1e-4)
    black = torch.full_like(x, -1).requires_grad_()
    (lpips(black, y) + lpips(black, black.detach())).sum().backward()
    assert black.grad.isfinite().all() and black.grad.any()
    assert not any(p.requires_grad for p in lpips.parameters())


def test_the_critic_learns_from_the_hinge_alone_and_the_generator_from_weighted_scores():
    torch.manual_seed(0)
    critic, generator = perceptual.Discriminator(16), torch.nn.Conv2d(3, 3, 3, padding=1)
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    decoded = generator(image)
    error, last = F.mse_loss(decoded, image), generator.weight
    losses = perceptual.adversarial_losses(critic, image, decoded, error, last)
    real, fake = critic(image), critic(decoded.detach())
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    wanted = torch.autograd.grad(hinge, list(critic.parameters()))
    scores = -critic(decoded).mean()
    weight = perceptual.adaptive_weight(error, scores, last)
    short = torch.autograd.grad(scores, last, retain_graph=True)[0]
    sum(losses).backward()
    assert torch.allclose(last.grad, weight * short, rtol=1e-3, atol=1e-6)
    for p, gradient in zip(critic.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_released_weights_load_bare_or_wrapped_in_half_precision_too():
    """As training scripts, DDP and torch.compile wrap them."""
    vae, var, scales = layout()
    bare = m6.load_released(vae, var, scales)
    wrapped = {"trainer": {"vae_local": vae}}, {"trainer": {"var_wo_ddp": var}, "epoch": 3}
    prefixed = ({"state_dict": {"module." + key: x for key, x in vae.items()}},
                {"model": {"_orig_mod.module." + key: x.clone() for key, x in var.items()}})
    for states in (wrapped, prefixed):
        for one, other in zip(bare, m6.load_released(*states, scales)):
            assert same(one.state_dict(), other.state_dict())
    half = [{key: x.half() for key, x in state.items()} for state in (vae, var)]
    assert m6.load_released(*half, scales)[1].head.weight.dtype == torch.float32


def test_other_files_are_refused_in_one_line():
    vae, var, scales = layout()
    wrong = [(var, vae, scales), ({}, {}, scales), (vae, var, (1, 2, 3)), (vae, var, None),
             ({"trainer": 5}, var, scales), (vae | {"more": torch.zeros(1)}, var, scales),
             (vae, var | {"class_emb.weight": torch.zeros(7)}, scales),
             (vae, var | {"blocks.1.attn.proj.weight": "seven"}, scales)]
    for states in wrong:
        with pytest.raises(BadInput, match=r"\A.*\Z"):
            m6.load_released(*states)


def test_a_download_gets_its_name_only_when_complete_and_right_and_is_made_once(
        monkeypatch, tmp_path):
    path, offered = tmp_path / "new" / "a.pth", tmp_path / "a.pth"
    torch.save({"weight": torch.ones(9)}, offered)
    monkeypatch.setattr(released, "DOWNLOADS", path.parent)
    monkeypatch.setattr(released, "URL", f"{tmp_path.as_uri()}/")
    for name, sha256 in (("b.pth", ""), ("a.pth", "0" * 64)):
        with pytest.raises(BadInput, match=rf"\A.*/{name}.*{path}\Z"):
            checkpoints.download(released.URL + name, path, sha256)
        assert not list(path.parent.iterdir())
    first = released.fetch("a.pth")
    offered.unlink()
    assert same(first, released.fetch("a.pth")) and list(path.parent.iterdir()) == [path]

"""Optimizers and schedule: which weights decay, and Muon against a slow loop and torch's own."""
import re
from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import same, stage_of
from hypothesis import given
from hypothesis import strategies as st

from engine import optimizers

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5 = import_module("05_train")


def made(model, kind):
    """-> optimizers, {name of a parameter: its group}, names of those that decay, of Muon's"""
    settings = m5.Settings(optimizer=kind, precision="float32", muon_lr=0.03)
    found = optimizers.make_optimizers(model, 1e-3, 0.05, settings)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for optimizer in found for group in optimizer.param_groups]
    owner = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sorted(owner) == sorted(names.values()) and len(found) == (1 if kind == "adamw" else 2)
    inside = {name for name in owner for optimizer in found[1:]
              if owner[name] in optimizer.param_groups}
    return found, owner, {name for name in owner if owner[name]["weight_decay"] > 0}, inside


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_decays_what_goes_to_muon_and_the_bytes_they_keep(kind, shared):
    model = m4.VAR(m4.VARConfig(depth=2, width=32, heads=2, shared_adaln=shared))
    found, owner, decayed, inside = made(model, kind)
    for name in owner:
        small = name.endswith("bias") or any(word in name for word in (
            "embed", "position", "start", "log_scale", "offset")) and "word_embed.w" not in name
        assert (name in decayed) == (not small), name
    assert inside == {name for name in decayed if kind == "muon" and re.match(
        r"blocks\.\d\.(attention|mlp)", name)} and len(inside) in (0, 8)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in found:
        optimizer.step()
    kept = sum(value.nbytes for optimizer in found for state in optimizer.state.values()
               for name, value in state.items() if name != "step")
    assert optimizers.optimizer_bytes(model, kind) == kept


def test_convolutions_of_the_tokenizers_blocks_go_to_muon_and_the_codebook_does_not_decay():
    model = m2.MultiScaleVQVAE(m2.TokenizerConfig(multipliers=(1, 2), image_size=64,
                                                  learn="gradient", attention=True))
    _, owner, decayed, inside = made(model, "muon")
    assert inside == {name for name, p in model.named_parameters() if p.ndim == 4 and re.match(
        r"(encoder|decoder)\.(levels|middle)\.", name)}
    assert any("qkv" in name for name in inside) and any("shortcut" in name for name in inside)
    assert "quantizer.codebook" in owner and "quantizer.codebook" not in decayed


@pytest.mark.parametrize("progress, share, decay", [
    (0, 0.005, 0.05), (0.01, 0.5025, None), (0.02, 1, None), (0.05, 1, None), (1, 0.1, 0.08),
    (0.25, 1 - 0.9 * 0.2 / 0.95, 0.08 - 0.03 * (0.5 + 0.5 ** 1.5)), (0.525, 0.55, None),
    (0.5, 1 - 0.9 * 0.45 / 0.95, 0.065)])
def test_the_learning_rate_warms_up_stays_and_falls_and_the_decay_follows_half_a_cosine(
        progress, share, decay):
    """As the original's lr_wd_annealing; without a last value the decay stays what it is."""
    found, owner, decayed, inside = made(stage_of("transformer").model, "muon")
    optimizers.set_schedule(found, 0.7, 0.3)               # nothing depends on the past
    optimizers.set_schedule(found, progress, 0.1, decay and 0.08)
    for name, group in owner.items():
        assert group["weight_decay"] == pytest.approx((decay or 0.05) * (name in decayed))
        assert group["lr"] == pytest.approx(share * (0.03 if name in inside else 1e-3))


def slow_orthogonal(g):
    """Five Newton-Schulz steps on one matrix, in float64."""
    x = g.double() if g.shape[0] <= g.shape[1] else g.double().t()
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.t()
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ a @ x)
    return x if g.shape[0] <= g.shape[1] else x.t()


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), n=st.integers(1, 3),
       seed=st.integers(0, 99))
def test_stacked_matrices_are_orthogonalised_as_one_at_a_time(rows, columns, n, seed):
    g = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    found = optimizers.orthogonal(g)
    assert found.shape == g.shape and ((found * g).sum((1, 2)) > 0).all(), "along the gradient"
    for one, matrix in zip(found, g):
        assert torch.allclose(one.double(), slow_orthogonal(matrix), atol=1e-3)
    if max(rows, columns) >= 2 * min(rows, columns):       # others have singular values near 0
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_equals_a_slow_loop_and_torchs_own():
    """A slow loop for matrices and convolutions; torch's takes matrices only, in bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((6, 4), (4, 6), (6, 4), (5, 5), (6, 2, 3, 3), (2, 2, 1, 1))]
    params = [[torch.nn.Parameter(x.clone()) for x in start[:n]] for n in (6, 4, 4)]
    how = dict(lr=0.1, momentum=0.9, weight_decay=0.2)
    made = (optimizers.Muon(params[0], **how), torch.optim.Muon(params[2], **how),
            optimizers.Muon(params[1], **how, dtype=torch.bfloat16))
    slow, momentum = [x.double() for x in start], [torch.zeros_like(x).double() for x in start]
    for _ in range(3):
        for i, x in enumerate(start):
            gradient = torch.randn_like(x)
            for p in (p for group in params for p in group[i:i + 1]):
                p.grad = gradient.clone()
            momentum[i] = 0.9 * momentum[i] + 0.1 * gradient
            step = slow_orthogonal((0.1 * gradient + 0.9 * momentum[i]).flatten(1)).view_as(x)
            size = 0.1 * max(1, x.shape[0] / x[0].numel()) ** 0.5
            slow[i] = slow[i] * (1 - 0.1 * 0.2) - size * step
        for optimizer in made:
            optimizer.step()
    assert all(torch.allclose(p.double(), x, atol=1e-3) for p, x in zip(params[0], slow))
    assert all((p - q).abs().max() < 0.02 for p, q in zip(params[1], params[2], strict=True))


@pytest.mark.parametrize("make", [optimizers.Muon, partial(torch.optim.AdamW, fused=True)])
def test_an_optimizer_that_is_told_of_infinities_changes_nothing_at_all(make):
    """Neither weights nor moments, though the gradient is nan; the next good step is as if the bad
    one had never been."""
    torch.manual_seed(0)
    (start, good), left = torch.randn(2, 6, 4), []
    for told in ([0, 0], [0, 1, 0], [1, 0, 1, 0]):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=0.1, weight_decay=0.2)
        for bad in told:
            p.grad = torch.full_like(p, torch.nan) if bad else good.clone()
            before = p.detach().clone()
            optimizer.found_inf = torch.tensor(float(bad))
            optimizer.step()
            assert torch.equal(before, p) == bool(bad)
        left.append([p.detach(), optimizer.state_dict()["state"]])
    assert same(left[0], left[1]) and same(left[0], left[2])


def test_a_new_optimizer_is_one_line_in_the_table(monkeypatch):
    """It gets the weights inside the blocks, its bytes count, and it decides about shards."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "plain", optimizers.Kind(
        lambda weights, decay, settings: torch.optim.SGD(weights, settings.lr, weight_decay=decay),
        bytes=0, works_on_shards=True))
    model = m4.VAR(m4.VARConfig(depth=2, width=32, heads=2))
    found, *_, inside = made(model, "plain")
    assert isinstance(found[1], torch.optim.SGD) and inside == made(model, "muon")[-1]
    whole, some = (optimizers.optimizer_bytes(model, kind) for kind in ("adamw", "plain"))
    assert whole - some == 8 * sum(p.numel() for p in found[1].param_groups[0]["params"])
    m5.check_settings(m5.Settings(optimizer="plain", shard=True, gpus=2), 32)

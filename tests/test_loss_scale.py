"""Training in float16: the factor on the loss, and that it is part of a run."""
import shutil
from importlib import import_module

import pytest
import torch
from conftest import same, stage_of
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints import load_checkpoint, resume, save
from engine.loss_scale import LossScale
from engine.optimizers import orthogonal

m5 = import_module("05_train")


@given(bad=st.lists(st.booleans(), max_size=20), interval=st.integers(1, 4),
       start=st.sampled_from([2.0, 2.0 ** 11]))
def test_the_factor_is_that_of_torchs_own_scaler(bad, interval, start):
    ours = LossScale("float16", interval)
    ours.factor.fill_(start)
    theirs = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=interval)
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, loss = torch.optim.SGD([q]), torch.tensor(3.0)
    for overflow in bad:
        assert ours.scale(loss) == theirs.scale(loss)
        p.grad = torch.tensor([1.0, torch.inf if overflow else 2.0])
        q.grad = p.grad.clone()
        ours.unscale([torch.nn.ParameterList([p])])
        theirs.unscale_(optimizer)
        assert torch.equal(p.grad, q.grad)
        ours.update(skipped=torch.tensor(overflow))
        theirs.update()
        assert ours.factor == max(theirs.get_scale(), 1)
        if theirs.get_scale() < 1:                         # ours stops there
            return


@pytest.mark.parametrize("size", [2e-7, 1e6])
def test_muons_products_in_float16_do_not_depend_on_the_size_of_the_gradient(size):
    torch.manual_seed(0)
    g = torch.randn(2, 30, 100)
    assert torch.allclose(orthogonal(size * g, torch.float16), orthogonal(g), atol=0.02)


def gradient(kind, precision, factor=1.0):
    """Of a step whose loss is 10,000 times smaller than usual. -> of the model, of a critic"""
    stage, found = stage_of(kind, precision=precision, clip=1e9, adversarial=1.0), []
    if precision == "float16":
        stage.loss_scale.factor.fill_(factor)
    loss = stage.loss
    stage.loss = lambda *given: (lambda value, metrics: (1e-4 * value, metrics))(*loss(*given))
    stage.optimizers[0].step = lambda: found.extend(
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for module in (stage.model, stage.modules.get("critic")) if module)
    torch.manual_seed(0)
    m5.train_step(stage, stage.model.train(), next(stage.batches(0)), 0.9)
    return found


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_small_gradients_survive_float16(kind):
    wanted = gradient(kind, "float32")
    for ours, theirs in zip(gradient(kind, "float16", 2 ** 11), wanted, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    lost = gradient(kind, "float16", 1)[0]
    assert (lost - wanted[0]).norm() > 0.9 * wanted[0].norm()


@pytest.mark.parametrize("kind", ["transformer",
                                  pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_the_factor_is_saved_and_a_resumed_run_goes_on_to_the_last_bit(kind, tmp_path):
    """Steps with which it doubles, overflows and is halved lie before and after the checkpoint."""
    def train(start, end):
        stage = stage_of(kind, precision="float16", adversarial=1.0, steps=9, tokenizer_steps=9)
        stage.loss_scale.interval, skipped = 2, []
        assert resume(tmp_path / "a.pt", stage) == start
        for step, batch in zip(range(start, end), stage.batches(start)):
            m5.seed_step(0, stage.name, step, 0)
            if step in (3, 6):
                stage.loss_scale.factor.mul_(2 ** 30)
            skipped.append(bool(m5.train_step(stage, stage.model.train(), batch, 0.9).skipped))
        save(tmp_path / "a.pt", stage, end)
        return load_checkpoint(tmp_path / "a.pt"), skipped
    straight, skipped = train(0, 9)
    assert skipped[3] and skipped[6] and not all(skipped)
    assert straight["loss_scale"]["factor"] > 2 ** 40
    (tmp_path / "a.pt").rename(tmp_path / "straight.pt")
    train(0, 5)
    assert same(train(5, 9)[0], straight)


def test_a_factor_that_is_far_too_large_skips_many_steps_but_ends_no_run(
        cli, refused, tiny, tmp_path, monkeypatch):
    """Nor does it go on for ever where the loss itself is not finite."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    real, loss = m5.LossScale, m5.TransformerStage.loss
    command = ["05_train.py", *tiny.options, "--stage", "transformer", "--fresh", "--steps", 50,
               "--precision", "float16", "--out", tmp_path / "run"]

    def large(precision):
        loss_scale = real(precision)
        loss_scale.factor.fill_(2.0 ** 50)
        return loss_scale
    with monkeypatch.context() as patch:
        patch.setattr(m5, "LossScale", large)
        result = cli(*command)
    assert result.status == 0, result.err
    skipped = [" | skipped 1 | " in line for line in result.out.splitlines()
               if line.startswith("transformer ")]
    first = skipped.index(False)
    assert len(skipped) == 50 and first > 15 and sum(skipped[first:]) < 5
    monkeypatch.setattr(m5.TransformerStage, "loss", lambda *given: (
        lambda value, metrics: (value * torch.nan, metrics))(*loss(*given)))
    assert "no finite loss or gradient in 10 steps, last at step 19" in refused(*command)

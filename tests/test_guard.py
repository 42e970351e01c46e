"""Steps that are not finite: a run with them is the run without them."""
import copy
import itertools
import shutil
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import log_of, same, stage_of

from engine import BadInput
from engine.guard import SkippedInARow, clip_gradients

m5 = import_module("05_train")


def state_of(stage):
    """A copy of all that a checkpoint would hold."""
    return copy.deepcopy([[part.state_dict() for part in stage.modules.values()],
                          [optimizer.state_dict() for optimizer in stage.optimizers]])


def take(stage, batch, seed, spoilt=False):
    """One step at the end of the training. -> was it skipped?"""
    torch.manual_seed(seed)
    real = stage.loss
    if spoilt:
        stage.loss = lambda *args: (lambda loss, kept: (loss * torch.nan, kept))(*real(*args))
    result = m5.train_step(stage, stage.model.train(), batch, 1.0)
    stage.loss = real
    return bool(result.skipped)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, learn", [("tokenizer", "gradient"), ("tokenizer", "ema"),
                                         ("transformer", "ema")])
def test_a_run_with_skipped_steps_is_the_run_without_them_to_the_last_bit(optimizer, kind, learn):
    """Weights, codes, moments, and the counts of steps that correct the moments; the first bad step
    is the first of all, where optimizers have no state yet."""
    ends = []
    for spoil in (True, False):
        stage = stage_of(kind, learn=learn, optimizer=optimizer)
        for step, batch in enumerate(itertools.islice(stage.batches(0), 3)):
            if spoil and step in (0, 2):
                assert take(stage, batch, 9, spoilt=True)
                if kind == "tokenizer" and step == 0:      # its codes are placed again
                    stage.model.quantizer.initialised.fill_(False)
            earlier = state_of(stage)
            assert not take(stage, batch, step) and not same(earlier, state_of(stage))
        ends.append(state_of(stage))
    assert same(*ends)


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_a_gradient_is_scaled_down_to_the_limit_and_never_up(limit):
    layer = torch.nn.Linear(3, 4)
    (layer.weight.sum() + 2 * layer.bias.sum()).backward()               # 12 + 4 * 4
    assert float(clip_gradients(layer, limit)) == pytest.approx(28 ** 0.5)
    norm = float(torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm())
    assert norm == pytest.approx(min(limit, 28 ** 0.5), rel=1e-4)


def test_a_nan_in_the_critics_gradient_alone_skips_the_step_for_all():
    stage = stage_of("tokenizer", adversarial=1.0, optimizer="muon")
    batch = next(stage.batches(0))
    assert not take(stage, batch, 0)
    for nan in (True, False):
        earlier = state_of(stage)
        hook = next(stage.modules["critic"].parameters()).register_hook(
            lambda grad: grad * (torch.nan if nan else 1))
        assert take(stage, batch, 1) == nan
        hook.remove()
        now = state_of(stage)
        assert same([*now[0][1].values(), *(o["state"] for o in now[1])],
                    [*earlier[0][1].values(), *(o["state"] for o in earlier[1])]) == nan


def test_the_log_counts_skipped_steps_and_means_the_others(cli, tiny, tmp_path, monkeypatch):
    entries, loss = {}, m5.TransformerStage.loss

    def spoil(self, model, batch, progress):
        value, kept = loss(self, model, batch, progress)
        return value * (torch.nan if round(24 * progress) in (2, 4, 5) else 1), kept
    monkeypatch.setattr(m5.TransformerStage, "loss", spoil)
    for often in (1, 4):
        shutil.copytree(tiny.folder, folder := tmp_path / str(often))
        result = cli("05_train.py", *tiny.options, "--stage", "transformer", "--fresh",
                     "--log-every", often, "--out", folder)
        assert result.status == 0, result.err
        entries[often] = {e["step"]: e for e in log_of(folder)
                          if "lr" in e and e["stage"] == "transformer"}
    assert {step: e["skipped"] for step, e in entries[4].items() if "skipped" in e} == {4: 1, 8: 2}
    assert "| skipped 2 | lr" in result.out and result.out.count("| skipped ") == 2
    for step, entry in entries[4].items():
        good = [e for e in map(entries[1].get, range(step - 3, step + 1)) if "skipped" not in e]
        assert entry["loss"] == pytest.approx(np.mean([e["loss"] for e in good]), rel=1e-5)
        assert entry["grad"] == good[-1]["grad"] and np.isfinite(entry["grad"])


def test_ten_skipped_steps_in_a_row_end_the_stage_and_scattered_ones_do_not():
    def ends_at(bad):
        skipped = SkippedInARow("tokenizer", torch.device("cpu"))
        for step in range(1, 31):
            try:
                skipped.add(step, torch.tensor(step in bad))
            except BadInput as error:
                assert "tokenizer" in str(error) and "--fresh" in str(error)
                return step
    assert ends_at(range(4, 14)) == 13 and ends_at(range(4, 13)) is None
    assert ends_at(set(range(1, 31)) - {10, 20, 30}) is None

"""What depends on the device: which one, in which precision, what is compiled and what is not."""
import os
from functools import partial
from importlib import import_module

import pytest
import torch
from test_nothing_lost import stage_of

from engine import checkpoints

m5 = import_module("05_train")


# -- torch.compile ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_critics_weight_does_not_go_backward_through_the_whole_compiled_model(monkeypatch):
    """Its two gradients end at the decoder's last layer: compiled or not, as many convolutions are
    differentiated. (A compiled graph always computes all its gradients.)"""
    monkeypatch.setattr(import_module("torch._functorch.config"), "donated_buffer", False)
    counts = []
    for compiled in (lambda model: model, partial(torch.compile, backend="aot_eager")):
        run, stage = stage_of("tokenizer", adversarial=1.0, learn="ema")
        model, batches = compiled(stage.model.train()), stage.batches(0)
        stage.critic = compiled(stage.critic)
        for _ in range(2):                                 # the first places the codes
            m5.take_step(run, stage, model, next(batches), 0.9)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            m5.take_step(run, stage, model, next(batches), 0.9)
        counts += [e.count for e in found.key_averages() if "convolution_backward" in e.key]
    assert len(counts) == 2 and counts[0] == counts[1] > 20


# -- Memory ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux about memory")
def test_a_checkpoint_is_read_from_the_disk_when_and_where_it_is_used(tmp_path):
    """Eight processes that resume would else hold eight copies of weights and optimizer."""
    def own():
        lines = dict(line.split(":") for line in open("/proc/self/status"))
        return int(lines["RssAnon"].split()[0]) * 1024
    wanted = torch.arange(2e7)                             # 80 MB
    torch.save({"model": wanted}, tmp_path / "model.pt")
    before = own()
    state = checkpoints.load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(state["model"], wanted) and own() - before < 8e6

"""One process or many: the same numbers, one voice, and nothing left behind."""
import gc
import subprocess
import weakref
from importlib import import_module

import pytest
import torch

from engine.options import one_line

m5 = import_module("05_train")


@pytest.mark.parametrize("status", [0, 3])
def test_chapter_6_starts_when_the_training_is_out_of_the_way_and_its_status_counts(
        status, tiny, tmp_path, monkeypatch):
    """Both models share a GPU with it otherwise. Weak references tell whether they are gone."""
    models, alive, released = [], [], []
    for stage in (m5.TokenizerStage, m5.TransformerStage):
        def init(self, *args, real=stage.__init__, **options):
            real(self, *args, **options)
            gc.collect()
            alive.append(sum(model() is not None for model in models))
            models.append(weakref.ref(self.model))
        monkeypatch.setattr(stage, "__init__", init)

    def call(command, **_):
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        released.append(torch.distributed.is_initialized())
        return status
    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr("sys.argv", ["05_train.py", *tiny.options, "--tokenizer-steps", "1",
                                     "--steps", "1", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        one_line(m5.main)
    assert (stop.value.code or 0) == status
    assert alive == [0, 0, 0] and not any(released)

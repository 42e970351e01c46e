"""Checkpoints: whole or not at all, read without trusting them, laid out as the weights are."""
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import same

from engine import BadInput, checkpoints

SCRIPT = "05_train.py"


def test_a_failing_save_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save_atomically({"step": 1}, path)

    def fail(value, file, *args, **kwargs):
        file.write(b"half a fi")
        raise OSError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save_atomically({"step": 2}, path)
    assert checkpoints.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_is_no_checkpoint_is_refused_and_code_in_it_never_runs(tmp_path):
    victim, path = tmp_path / "ran", tmp_path / "model.pt"
    torch.save({"model": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    torch.save({"model": Hostile(victim)}, path)
    zipped = path.read_bytes()
    torch.save([1, 2], path)
    contents = [b"", zipped, b"hello", whole[:len(whole) // 2], path.read_bytes(),
                pickle.dumps(Hostile(victim)), "text é".encode()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(BadInput) as error:
            checkpoints.load_checkpoint(path)
        assert "\n" not in str(error.value) and "model.pt" in str(error.value)
    assert not victim.exists(), "loading ran code from the file"
    with pytest.raises(BadInput, match="no such"):
        checkpoints.load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(BadInput):
        checkpoints.load_checkpoint(tmp_path)


def test_a_truncated_checkpoint_is_refused_in_one_line(refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert "tokenizer.pt" in refused(SCRIPT, *tiny.options, "--out", tmp_path / "run")


def test_a_checkpoint_of_another_kind_is_refused_in_a_short_line(refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "transformer.pt", tmp_path / "run" / "tokenizer.pt")
    assert len(refused("05_train.py", *tiny.options, "--out", tmp_path / "run")) < 250


def test_optimizer_states_of_another_memory_layout_go_on_as_they_were():
    """Weights of convolutions lie channels last; states that were saved otherwise must not be
    walked through side by side with them."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    saved = {"exp_avg": torch.randn(4, 8, 3, 3), "step": torch.tensor(3.0), "name": "x"}
    laid = {key: checkpoints.spread(value, model.weight) for key, value in saved.items()}
    assert same(laid, saved) and laid["exp_avg"].stride() == model.weight.stride()
    assert saved["exp_avg"].stride() != model.weight.stride()

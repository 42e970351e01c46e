"""Checkpoints: whole or not at all, read without trusting them, laid out as the weights are."""
import fnmatch
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import is_the_same_run, same

from engine import BadInput, checkpoints

def test_a_failing_save_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "model.pt"
    checkpoints.save_atomically({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):         # some of the file is written by then
        checkpoints.save_atomically({"step": 2, "model": lambda: None}, path)
    assert checkpoints.load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_is_no_checkpoint_is_refused_and_code_in_it_never_runs(tmp_path):
    victim, path = tmp_path / "ran", tmp_path / "model.pt"

    def saved(value):
        torch.save(value, path)
        return path.read_bytes()
    whole = saved({"model": torch.zeros(1000)})
    for content in (b"", whole[:len(whole) // 2], "text é".encode(), pickle.dumps(Hostile(victim)),
                    saved({"model": Hostile(victim)}), saved([1, 2])):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="model.pt: .*$"):
            checkpoints.load_checkpoint(path)
    assert not victim.exists(), "loading ran code from the file"
    for path, why in ((tmp_path / "missing.pt", "no such"), (tmp_path, "not a readable")):
        with pytest.raises(BadInput, match=why):
            checkpoints.load_checkpoint(path)


def test_a_truncated_checkpoint_or_one_of_the_other_stage_is_refused_in_a_short_line(
        refused, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.pt"
    for content in (path.read_bytes()[:5000], path.with_name("transformer.pt").read_bytes()):
        path.write_bytes(content)
        line = refused("05_train.py", *tiny.options, "--out", path.parent)
        assert "tokenizer.pt" in line and len(line) < 250


def test_optimizer_states_of_another_memory_layout_go_on_as_they_were():
    """Weights of convolutions lie channels last; states that were saved otherwise must not be
    walked through side by side with them."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    saved = {"exp_avg": torch.randn(4, 8, 3, 3), "step": torch.tensor(3.0), "name": "x"}
    laid = {key: checkpoints.spread(value, model.weight) for key, value in saved.items()}
    assert same(laid, saved) and laid["exp_avg"].stride() == model.weight.stride()
    assert saved["exp_avg"].stride() != model.weight.stride()


TOKENS = "import_module('02_multiscale_vqvae').MultiScaleVQVAE, 'image_to_tokens'"


@pytest.mark.slow
def test_a_run_killed_at_one_moment_after_the_other_still_ends_bit_for_bit(
        under_fire, tiny, tmp_path):
    """Each process resumes what the one before it has saved; calls are counted anew in each."""
    command = [*tiny.options, "--out", tmp_path / "run"]
    for moment, only, left in [
            ("1, os, 'replace'", "tokenizer.pt", {"settings.json", "tokenizer.pt.*.tmp"}),
            ("13, m5, 'train_step'", "", {"tokenizer.pt"}),
            ("2, os, 'replace'", "tokenizer.pt", {"tokenizer.pt", "tokenizer.pt.*.tmp"}),
            ("3, " + TOKENS, "", {"tokens_train.npy.tmp", "tokens_train.npy.json.tmp"}),
            ("2, os, 'replace'", "tokens_train", {"tokens_train.npy", "tokens_train.npy.json.tmp"}),
            ("8, m5, 'train_step'", "", {"tokens_test.json", "transformer.pt"}),
            ("1, os, 'replace'", "log.jsonl", {"log.jsonl", "log.jsonl.*.tmp"})]:
        mishap = f"before({moment}, lambda: send('SIGKILL'), {only!r})"
        result = under_fire(mishap, *command)
        assert (result.status, result.err) == (-9, ""), (moment, result)
        files = {path.name for path in (tmp_path / "run").iterdir()}
        assert all(fnmatch.filter(files, name) for name in left), (moment, files)
    result = under_fire("", *command)
    assert (result.status, result.err) == (0, ""), result
    assert is_the_same_run(tmp_path / "run", tiny.folder)


@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_file_and_nothing_is_lost(
        under_fire, tiny, tmp_path):
    """From some call on, no file can grow beyond so many bytes."""
    command, run = [*tiny.options, "--out", tmp_path / "run"], tmp_path / "run"
    for moment, size, file, saved in [
            ("8, m5, 'train_step'", "20_000", "tokenizer.pt", {"tokenizer": 5}),
            ("27, m5, 'train_step'", "30_000", "transformer.pt", {"transformer": 5}),
            ("8, m5, 'report'", "os.path.getsize('run/log.jsonl') + 9", "log.jsonl",
             {"tokenizer": 24, "transformer": 10})]:
        result = under_fire("import resource\n" f"before({moment}, lambda: resource.setrlimit("
                            f"resource.RLIMIT_FSIZE, ({size}, -1)))", *command)
        assert result.status == 2 and result.err.count("\n") == 1, result
        assert result.err.startswith("under_fire.py: ") and file in result.err, result.err
        for name, step in saved.items():
            assert checkpoints.load_checkpoint(run / f"{name}.pt")["step"] == step
        assert not list(run.glob("*.tmp"))
    result = under_fire("", *command)
    assert (result.status, result.err) == (0, ""), result
    assert is_the_same_run(run, tiny.folder)

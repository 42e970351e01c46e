"""Runs that are stopped, killed, resumed or shared by two processes; the files of a run."""
import inspect
import os
import pickle
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, random_models, same, start

from data.batches import to_float, view_of
from engine import BadInput, checkpoints

m2, m5 = map(import_module, ("02_multiscale_vqvae", "05_train"))
SCRIPT = "05_train.py"


def before(count, owner, name, then, replace=setattr):
    """then() before the count-th call of owner.name"""
    real, calls = getattr(owner, name), []

    def spy(*args):
        calls.append(name)
        if len(calls) == count:
            then()
        return real(*args)
    replace(owner, name, spy)


def last_entries(folder):
    """What was logged. A step that was logged, lost and taken again counts once."""
    return {(e["stage"], e["step"], "held_out" in e): e for e in log_of(folder)}


def assert_same_run(a, b):
    """Every bit: weights, optimizers, steps, settings, tokens, what was logged."""
    for name in ("tokenizer.pt", "transformer.pt"):
        states = [checkpoints.load_checkpoint(folder / name) for folder in (a, b)]
        assert same(*states), name
    assert last_entries(a) == last_entries(b)
    caches = [{path.name: path.read_bytes() for path in x.glob("*.npy")} for x in (a, b)]
    assert caches[0] == caches[1] and len(caches[0]) == 3


def test_a_signal_is_obeyed_after_the_step_and_the_same_command_resumes(
        cli, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for name, function, count, words in [
            ("SIGTERM", "take_step", 13, "and saved at step 13 of the tokenizer"),
            ("SIGINT", "view_batches", 2, "while tokenizing"),
            ("SIGHUP", "take_step", 8, "and saved at step 8 of the transformer")]:
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_DFL)              # `nohup pytest &` ignores some
        with monkeypatch.context() as patch:
            before(count, m5, function, partial(os.kill, os.getpid(), number),
                   replace=patch.setattr)
            result = cli(SCRIPT, *tiny.options, "--out", out)
        assert (result.status, result.err) == (128 + number, "")
        assert result.out.splitlines()[-1].startswith(f"stopped {words}; the same command")
        assert not result.started
    result = cli(SCRIPT, *tiny.options, "--out", out)
    assert "tokenizer: resuming at step 24" in result.out
    assert "transformer: resuming at step 8" in result.out
    assert_same_run(out, tiny.folder)
    command = result.started[0]                            # chapter 6 draws samples
    assert command[1].endswith("06_sample_and_edit.py") and str(out) in command


# 05_train.py, which kills itself.
KILLED = f"""
import os, signal, sys
from importlib import import_module
sys.path.insert(0, {str(ROOT)!r})
m5 = import_module("05_train")
{inspect.getsource(before)}
before(MOMENT, lambda: os.kill(os.getpid(), signal.SIGKILL))
m5.run_main(m5.main)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit(cli, tiny, tmp_path):
    """Each process resumes what the one before it has saved and counts calls anew."""
    run, script = tmp_path / "run", tmp_path / "killed.py"
    for moment, left in [("13, m5, 'take_step'", "tokenizer.pt"),
                         ("2, os, 'replace'", "tokenizer.pt.*.tmp"),
                         ("2, m5, 'view_batches'", "tokens_train_*_1.tmp"),
                         ("8, m5, 'take_step'", "transformer.pt"),
                         ("4, os, 'replace'", "transformer.pt.*.tmp")]:
        script.write_text(KILLED.replace("MOMENT", moment))
        process = start(script, *tiny.options, "--out", run, cwd=tmp_path)
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (-9, ""), moment
        assert list(run.glob(left)), (moment, sorted(run.iterdir()))
    assert cli(SCRIPT, *tiny.options, "--out", run).status == 0
    assert_same_run(run, tiny.folder)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves(refused, tiny, tmp_path):
    """A terminal, SLURM and systemd signal every process, also those that decode images,
    which the step still needs. Until then no other run may have the folder."""
    path = tmp_path / "run" / "tokenizer.pt"
    words = "--tokenizer-steps 9999 --save-every 20 --out run --workers 1 --gpus 2".split()
    process = start(SCRIPT, *tiny.options, *words, cwd=tmp_path)
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    assert "in use by another run" in refused(SCRIPT, *tiny.options, "--out", "run")
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    step = checkpoints.load_checkpoint(path)["step"]
    assert out.splitlines()[-1] == (
        f"stopped and saved at step {step} of the tokenizer; the same command, without "
        "--fresh, resumes"), (out, err)
    assert checkpoints.claim(path.parent)


@pytest.mark.slow
@pytest.mark.parametrize("stage, step, optimizer", [
    ("tokenizer", 18, "muon"), ("transformer", 24, "adamw")])
def test_two_processes_train_as_one(cli, tiny, tmp_path, stage, step, optimizer):
    """Without what processes do not share: their random numbers (stage 1 resumes, because
    new codes are drawn) and, over many steps, the rounding of Muon."""
    one, two = tmp_path / "one", tmp_path / "two"
    state = checkpoints.load_checkpoint(tiny.folder / "tokenizer.pt")
    for folder in (one, two):
        folder.mkdir()
        torch.save(state | {"step": step}, folder / "tokenizer.pt")
    alike = [*tiny.options, "--stage", stage, "--optimizer", optimizer, *"--steps 14 "
             "--label-dropout 0 --drop-path 0 --accumulate 2".split()]
    assert cli(SCRIPT, *alike, "--out", one).status == 0
    process = start(SCRIPT, *alike, "--out", two, "--gpus", 2, "--activation-checkpointing",
                    cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "2 process(es)" in out, err
    for path in one.glob("*.npy"):
        assert path.read_bytes() == (two / path.name).read_bytes()
    logs = last_entries(one), last_entries(two)
    assert logs[0].keys() == logs[1].keys() and len(logs[0]) >= 6 + 1
    for key, x in logs[0].items():
        x, y = (entry.get("held_out", entry) for entry in (x, logs[1][key]))
        for number in {"loss", "psnr", "per_scale", "right", "grad"} & x.keys():
            assert x[number] == pytest.approx(y[number], rel=2e-4, abs=1e-5), (key, number)
    weights = [checkpoints.load_checkpoint(x / f"{stage}.pt")["model"] for x in (one, two)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name


def test_the_cache_holds_every_view_of_these_images_alone(monkeypatch, tmp_path):
    tokenizer, _ = random_models()
    images = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    settings = m5.Settings(out=str(tmp_path), views=3, precision="float32", workers=0)
    encoded, tokenize = [], m2.MultiScaleVQVAE.image_to_tokens
    monkeypatch.setattr(m5, "per_pass", lambda side: 4)
    monkeypatch.setattr(m2.MultiScaleVQVAE, "image_to_tokens",
                        lambda self, image: encoded.append(image) or tokenize(self, image))

    def views(split="train"):
        encoded.clear()
        return m5.encode_once(settings, tokenizer, images, split, torch.device("cpu"))
    found = views()
    assert len(found) == 3 and len(encoded) == 3 * 5
    for view, cache in enumerate(found):
        image = view_of(to_float(torch.from_numpy(images)), view, np.arange(20), 20)
        assert np.array_equal(cache, torch.cat(tokenize(tokenizer, image), 1))
        assert isinstance(cache, np.memmap) and not cache.flags.writeable
    assert all(map(np.array_equal, found, views())) and not encoded
    images[19, 15, 15, 2] ^= 1
    assert views() and len(encoded) == 15
    tokenizer.quant_conv.weight.data += 1e-3
    assert views() and len(encoded) == 15
    assert len(views("test")) == 1


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save_atomically({"step": 1}, path)

    def full_disk(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"cannot write {path}.*No space left"):
        checkpoints.save_atomically("new", path)
    assert checkpoints.load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Using a non-tuple")
def test_whatever_is_no_checkpoint_is_refused_and_code_in_it_never_runs(tiny, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    contents = [b"", (tiny.folder / "tokenizer.pt").read_bytes()[:-99],
                pickle.dumps(Hostile())]
    for value in ({"model": Hostile()}, [1], {}, {"tokenizer": torch.zeros(3)},
                  {"config": {"V": 1}}, {"config": {}, "model": {}}):
        torch.save(value, tmp_path / "model.pt")
        contents.append((tmp_path / "model.pt").read_bytes())
    for content in contents:
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(BadInput, match=r"\A.*model.pt: (not a|does not hold a).*\Z"):
            m5.load_tokenizer(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists(), "loading ran code from the file"

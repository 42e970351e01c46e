"""Runs that are stopped, killed, resumed or shared by two processes; the files of a run."""
import inspect
import os
import pickle
import shutil
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, random_models, same, start

from data.batches import to_float, view_of
from engine import BadInput, checkpoints

m2, m4, m5 = map(import_module, ("02_multiscale_vqvae", "04_var_transformer", "05_train"))
SCRIPT = "05_train.py"


def before(count, owner, name, then, only="", replace=setattr):
    """then() before the count-th call of owner.name whose first argument holds `only`"""
    real, calls = getattr(owner, name), []

    def spy(*args):
        if only in str(args[0]):
            calls.append(name)
            if len(calls) == count:
                then()
        return real(*args)
    replace(owner, name, spy)


# 05_train.py with a mishap. torchrun starts the same file again in every process.
MISHAP = f"""
import multiprocessing, os, signal, sys, time
from importlib import import_module
sys.path.insert(0, {str(ROOT)!r})
import torch
m5 = import_module("05_train")
from engine import distributed
RANK = int(os.environ.get("RANK", -1))               # -1: one process, or the launcher
m5.subprocess.call = lambda command: 0               # do not draw samples
{inspect.getsource(before)}
"""


@pytest.fixture
def with_mishap(tmp_path):
    """with_mishap(code, *options): 05_train.py in a process of its own, which runs the code first.
    meanwhile(process) is called while it runs. -> .status .out .err"""
    def call(code, *options, meanwhile=lambda process: None):
        script = tmp_path / "mishap.py"
        script.write_text(f"{MISHAP}\n{code}\nm5.run_main(m5.main)\n")
        process = start(script, *options, cwd=tmp_path)
        meanwhile(process)
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(status=process.returncode, out=out, err=err)
    return call


def last_entries(folder):
    """What was logged. A step that was logged, lost and taken again counts once."""
    return {(e["stage"], e["step"], "held_out" in e): e for e in log_of(folder)}


def assert_same_run(a, b):
    """Every bit: weights, optimizers, steps, settings, tokens, what was logged."""
    for name in ("tokenizer.pt", "transformer.pt"):
        assert same(*[checkpoints.load_checkpoint(folder / name) for folder in (a, b)]), name
    assert last_entries(a) == last_entries(b)
    caches = sorted(path.name for path in b.glob("*.npy"))
    assert sorted(path.name for path in a.glob("*.npy")) == caches and len(caches) == 3
    for name in caches:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# -- Stopped and killed ----------------------------------------------------------------------------

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


@pytest.mark.slow
def test_a_run_killed_at_one_moment_after_the_other_still_ends_bit_for_bit(
        with_mishap, tiny, tmp_path):
    """Each process resumes what the one before it has saved; calls are counted anew in each."""
    run = tmp_path / "run"
    for moment, only, left in [
            ("13, m5, 'take_step'", "", "tokenizer.pt"),
            ("1, os, 'replace'", "tokenizer.pt", "tokenizer.pt.*.tmp"),
            ("2, m5, 'view_batches'", "", "tokens_train_*_1.tmp"),
            ("8, m5, 'take_step'", "", "transformer.pt"),
            ("2, os, 'replace'", "transformer.pt", "transformer.pt.*.tmp")]:
        kill = f"before({moment}, lambda: os.kill(os.getpid(), signal.SIGKILL), {only!r})"
        result = with_mishap(kill, *tiny.options, "--out", run)
        assert (result.status, result.err) == (-9, ""), (moment, result)
        assert list(run.glob(left)), (moment, sorted(run.iterdir()))
    result = with_mishap("", *tiny.options, "--out", run)
    assert (result.status, result.err) == (0, ""), result
    assert_same_run(run, tiny.folder)


@pytest.mark.slow
def test_a_killed_loading_worker_is_one_line(with_mishap, tiny, tmp_path):
    kill = ("before(8, m5, 'take_step', "
            "lambda: [worker.kill() for worker in multiprocessing.active_children()])")
    result = with_mishap(kill, *tiny.options, "--workers", 1, "--out", tmp_path / "run")
    last = result.err.splitlines()[-1]                     # torch may have reported the kill, too
    assert result.status == 2 and last.startswith("mishap.py: ") and "--workers" in last, result
    assert checkpoints.load_checkpoint(tmp_path / "run" / "tokenizer.pt")["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_signal_to_the_whole_group_spares_loading_workers_and_saves_one_codebook(
        with_mishap, refused, tiny, tmp_path, gpus):
    """A terminal, SLURM and systemd signal every process, also those that decode images. Until
    then no other run may have the folder. Codes that are soon forgotten fall out of use, so they
    are revived, alike in all processes."""
    path = tmp_path / "run" / "tokenizer.pt"
    options = [*tiny.options, *"--tokenizer-steps 100000 --save-every 20 --vocab-size 64 --out "
               f"run --workers 1 --gpus {gpus}".split()]
    note = """
real = m5.train_tokenizer
def train(settings, tokenizer, *args):
    quantizer, drawn = tokenizer.quantizer, []
    quantizer.decay, draw = 0.7, quantizer.draw_vectors
    quantizer.draw_vectors = lambda x, *how: drawn.append(x) or draw(x, *how)
    try:
        real(settings, tokenizer, *args)
    finally:
        torch.save([tokenizer.state_dict(), drawn], f"{max(RANK, 0)}.pt")
m5.train_tokenizer = train
"""

    def signal_all(process):
        while not path.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        line = refused(SCRIPT, *tiny.options, "--out", "run")
        assert "run is in use by another run" in line and "--out" in line
        os.killpg(process.pid, signal.SIGTERM)
    result = with_mishap(note, *options, meanwhile=signal_all)
    step = checkpoints.load_checkpoint(path)["step"]
    assert result.out.splitlines()[-1] == (
        f"stopped and saved at step {step} of the tokenizer; the same command, without --fresh, "
        "resumes"), result
    assert gpus > 1 or (result.status, result.err) == (128 + signal.SIGTERM, "")
    (one, drawn), (other, drawn_there) = (torch.load(tmp_path / f"{rank}.pt")
                                          for rank in (0, gpus - 1))
    assert same(one, other) and len(drawn) > 3, "they were revived"
    assert gpus == 1 or not same(drawn, drawn_there), "from different images"
    assert checkpoints.claim(path.parent)


@pytest.mark.slow
def test_two_processes_train_as_one_and_all_save_when_their_launcher_gets_a_signal(
        cli, with_mishap, tiny, tmp_path):
    """Tokens, what is logged, and the weights, which differ by little of what training changed."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        shutil.copy(tiny.folder / "tokenizer.pt", folder)
    # Without what differs between processes: their random numbers, and Muon's rounding.
    alike = [*tiny.options, *"--stage transformer --label-dropout 0 --drop-path 0 --optimizer "
             "adamw --steps 14 --save-every 4".split()]
    assert cli(SCRIPT, *alike, "--out", one).status == 0
    words = [*alike, *"--out two --gpus 2 --accumulate 2 --activation-checkpointing".split()]
    wait = """
def stop():
    if RANK == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    while not distributed.stop_requested():
        time.sleep(0.01)
if RANK >= 0:
    before(7, m5, "take_step", stop)
"""
    result = with_mishap(wait, *words)
    assert result.status != 0, result
    assert "\nstopped and saved at step 10 of the transformer; the same" in result.out
    result = with_mishap("", *words)
    assert result.status == 0 and "resuming at step 10" in result.out, result

    for path in one.glob("*.npy"):
        assert path.read_bytes() == (two / path.name).read_bytes()
    logs = last_entries(one), last_entries(two)
    assert logs[0].keys() == logs[1].keys() and len(logs[0]) == 14 + 4
    for key, x in logs[0].items():
        x, y = (entry.get("held_out", entry) for entry in (x, logs[1][key]))
        for number in {"loss", "per_scale", "right", "grad"} & x.keys():
            assert x[number] == pytest.approx(y[number], rel=2e-4, abs=1e-5), (key, number)
    states = [checkpoints.load_checkpoint(folder / "transformer.pt") for folder in (one, two)]
    torch.manual_seed(0)
    begin = m4.VAR(m4.VARConfig(**states[0]["config"])).state_dict()
    for name, weight in states[0]["model"].items():
        moved = (weight - begin[name]).norm()
        assert (states[1]["model"][name] - weight).norm() < 0.01 * moved + 1e-5, name
    assert moved > 0 and states[1]["step"] == 14


# -- The token cache -------------------------------------------------------------------------------

def test_the_cache_holds_the_tokens_of_every_view_is_made_once_and_only_for_these_images(
        monkeypatch, tmp_path):
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
    found, rows = views(), np.arange(20)
    assert len(found) == 3 and len(encoded) == 3 * 5
    for view, cache in enumerate(found):
        image = view_of(to_float(torch.from_numpy(images)), view, rows, 20)
        tokens = [torch.cat(tokenize(tokenizer, part), 1) for part in image.split(4)]
        assert np.array_equal(cache, torch.cat(tokens))
        assert isinstance(cache, np.memmap) and not cache.flags.writeable
    again = views()
    assert not encoded and all(map(np.array_equal, found, again))
    images[19, 15, 15, 2] ^= 1
    assert views() and len(encoded) == 15
    tokenizer.quant_conv.weight.data += 1e-3
    assert views() and len(encoded) == 15
    assert not list(tmp_path.glob("*.tmp")) and len(views("test")) == 1


# -- Files -----------------------------------------------------------------------------------------

def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save_atomically({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):         # some of the file is written by then
        checkpoints.save_atomically({"step": 2, "model": lambda: None}, path)

    def full_disk(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"cannot write {path}.*No space left"):
        checkpoints.save_atomically("new", path)
    assert checkpoints.load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Using a non-tuple")
def test_whatever_is_no_checkpoint_is_refused_and_code_in_it_never_runs(tmp_path):
    victim, path = tmp_path / "ran", tmp_path / "model.pt"
    with pytest.raises(BadInput, match="no such"):
        checkpoints.load_checkpoint(path)
    for content in (b"", "text é".encode(), pickle.dumps(Hostile(victim))):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="model.pt: not a readable checkpoint"):
            checkpoints.load_checkpoint(path)
    for value in ({"model": Hostile(victim)}, [1], {}, {"tokenizer": torch.zeros(3)},
                  {"tokenizer": {"config": {"V": 1}}}, {"config": {}, "model": {}}):
        torch.save(value, path)
        with pytest.raises(BadInput, match=r"model.pt: (not a|does not hold a tokenizer)"):
            m5.load_tokenizer(path)
    assert not victim.exists(), "loading ran code from the file"

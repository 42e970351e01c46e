"""A run that is asked to stop saves, says so in one line, and the same command resumes it."""
import os
import signal
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
from conftest import ROOT, is_the_same_run, start

from engine import BadInput, stop
from engine.checkpoints import load_checkpoint
from engine.processes import Processes

m2, m5 = import_module("02_multiscale_vqvae"), import_module("05_train")


def test_a_signal_is_obeyed_after_the_step_and_a_line_says_how_to_resume(
        cli, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for name, owner, function, count, words in [
            ("SIGTERM", m5, "train_step", 13, "and saved at step 13 of the tokenizer"),
            ("SIGINT", m2.MultiScaleVQVAE, "image_to_tokens", 3, "at 50% of the tokens"),
            ("SIGINT", m5, "train_step", 8, "and saved at step 8 of the transformer")]:
        real, calls = getattr(owner, function), []

        def spy(*args, real=real, calls=calls, count=count, name=name):
            calls.append(name)
            if len(calls) == count:
                os.kill(os.getpid(), getattr(signal, name))
            return real(*args)
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, spy)
            result = cli("05_train.py", *tiny.options, "--out", out)
        assert (result.status, result.err) == (128 + getattr(signal, name), ""), words
        assert result.out.splitlines()[-1] == (
            f"stopped {words}: the same command resumes from there")
    assert cli("05_train.py", *tiny.options, "--out", out).status == 0
    assert is_the_same_run(out, tiny.folder)


def test_a_second_signal_ends_at_once_unless_it_is_the_first_that_arrived_twice(
        monkeypatch, capsys):
    """A terminal sends Ctrl-C to all processes, and the launcher passes it on to them."""
    clock = iter((10.0, 10.9, 11.1))
    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    asked = stop.StopSignal(Processes("cpu"))
    for _ in range(2):
        asked.receive(signal.SIGINT, None)
    assert asked.asked() == signal.SIGINT == asked.agreed(7)
    with pytest.raises(SystemExit) as end:
        asked.receive(signal.SIGINT, None)
    assert end.value.code == 130
    assert capsys.readouterr().out == "stopping after this step; once more to stop at once\n"


def test_handlers_come_back_nohup_holds_and_a_forked_worker_stays_silent(capsys):
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    assert before[0] == signal.default_int_handler
    old = [signal.signal(name, signal.SIG_IGN) for name in (signal.SIGHUP, signal.SIGINT)][0]
    try:
        with stop.StopSignal(Processes("cpu")) as asked:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == asked.receive
            asked.pid += 1                                 # as in a process that was forked
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.asked() == 0 and capsys.readouterr().out == ""
    finally:
        signal.signal(signal.SIGHUP, old)
    assert before == [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]


def two(rank=0, theirs=0, orphan=False):
    """Two processes, of which the other one has received the signal `theirs`."""
    return SimpleNamespace(rank=rank, world=2, largest=lambda mine: max(mine, theirs),
                           launcher_is_gone=lambda: orphan, say=print)


def test_processes_agree_in_every_tenth_step_and_an_orphan_stops():
    asked = stop.StopSignal(two(theirs=signal.SIGTERM))
    assert [asked.agreed(step) for step in (5, 9, 10)] == [0, 0, signal.SIGTERM]
    with pytest.raises(SystemExit) as end:
        asked.leave("at step 10")
    assert end.value.code == 143, "although no signal came to this process"
    assert stop.StopSignal(two(orphan=True)).asked() == signal.SIGTERM
    assert stop.StopSignal(two()).agreed(10) == 0


@pytest.mark.parametrize("rank, number, error, silent", [
    (1, signal.SIGTERM, BadInput("x"), True), (0, signal.SIGTERM, BadInput("x"), False),
    (1, signal.SIGTERM, OSError("x"), True), (1, 0, BadInput("x"), False),
    (0, signal.SIGTERM, RuntimeError("[gloo] Connection closed by peer"), True),
    (0, 0, RuntimeError("[gloo] Connection closed by peer"), False),
    (1, signal.SIGTERM, RuntimeError("shapes differ"), False),
    (1, signal.SIGTERM, ZeroDivisionError(), False)])
def test_who_was_told_to_stop_says_nothing_about_what_follows_from_it(rank, number, error, silent):
    with pytest.raises(SystemExit if silent else type(error)) as end:
        with stop.StopSignal(two(rank)) as asked:
            asked.number = number
            raise error
    assert not silent or end.value.code == 128 + number


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


@pytest.mark.slow
@pytest.mark.parametrize("name, launcher, options", [
    ("SIGTERM", [], []), ("SIGINT", [], []), ("SIGTERM", TORCHRUN, []),
    ("SIGINT", [], ["--gpus", 2])])
def test_a_signal_to_the_whole_group_spares_the_loading_workers_and_the_run_saves(
        name, launcher, options, tiny, tmp_path):
    """A terminal, SLURM and systemd signal every process, also those that decode images."""
    path, number = tmp_path / "run" / "tokenizer.pt", getattr(signal, name)
    process = start(*launcher, ROOT / "05_train.py", *tiny.options, "--workers", 2,
                    "--tokenizer-steps", 100_000, "--out", tmp_path / "run", *options, cwd=tmp_path)
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=100)
    assert out.splitlines()[-1] == (
        f"stopped and saved at step {load_checkpoint(path)['step']} of the tokenizer: the same "
        "command resumes from there"), (out, err)
    assert out.count("once more to stop at once") == 1
    if not launcher:                                       # torchrun adds a traceback of its own
        assert (process.returncode, err) == (128 + number, "")


@pytest.mark.slow
@pytest.mark.parametrize("who, status, options", [
    ("send('SIGTERM', os.getppid())", 143, ["--shard"]), ("os.killpg(0, signal.SIGINT)", 130, []),
    ("send('SIGKILL', os.getppid())", -signal.SIGKILL, [])])
def test_all_processes_save_at_the_same_step(under_fire, stage_2, alone, who, status, options):
    """SIGTERM to the launcher; Ctrl-C as a terminal sends it, to all; and if the launcher is killed
    the others notice that they are alone."""
    command = [*stage_2.options, "--gpus", 2, *options]
    result = under_fire(f"RANK == 0 and before(7, m5, 'train_step', lambda: all_hear("
                        f"lambda: {who}))", *command)
    assert (result.status, result.err) == (status, ""), result
    assert "\nstopped and saved at step 10 of the transformer: the same" in result.out
    assert load_checkpoint(stage_2.folder / "transformer.pt")["step"] == 10
    result = under_fire("", *command)
    assert (result.status, result.err) == (0, "") and "resuming at step 10\n" in result.out, result
    assert alone.agrees(stage_2.folder)

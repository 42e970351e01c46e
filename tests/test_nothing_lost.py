"""Chapter 5 under fire: killed, interrupted, out of disk, not finite. Whatever happens, the same
command again goes on, and ends as if nothing had happened.

`run` starts the script in a real process that can be killed; it is forked from a server that has
torch already imported, as importing it takes longer than a tiny run."""
import copy
import fnmatch
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import fields
from functools import partial
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, same, stage_of

from data import batches
from engine import checkpoints
from engine import stop as engine_stop
from engine.options import one_line

resource = pytest.importorskip("resource")                 # not on Windows
m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
m5 = import_module("05_train")
SCRIPT = str(ROOT / "05_train.py")


# -- Processes -------------------------------------------------------------------------------------

def enter(argv, env, patch):
    """What `python argv` does, in this process, after patch(). Never returns."""
    try:
        os.environ.clear()
        os.environ.update(env)
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(300)                                  # processes that wait for each other
        warnings.simplefilter("ignore")                    # as conftest's start does

        def fork(process, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
            """In place of Popen's own: what it starts is forked, too."""
            process._child_created, process.pid = True, os.fork()
            if process.pid == 0:
                enter(args[1:], env or os.environ.copy(), patch)
        subprocess.Popen._execute_child = fork
        subprocess.call = lambda command: 0                # chapter 6's pictures: not of interest
        sys.argv = argv
        patch()
        one_line(import_module(Path(argv[0]).stem).main)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def live(out, err, cwd, *rest):
    """The forked process: a session of its own, as in a terminal of its own."""
    os.setsid()
    for connection, descriptor in ((out, 1), (err, 2)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    os.chdir(cwd)
    enter(*rest)


def nothing():
    """No patch."""


@pytest.fixture(scope="session")
def server():
    """Imports all once; every process below is a copy of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "test_nothing_lost",
                                    "test_many_processes"])        # optimizers import dynamo
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        forkserver.ensure_running()
    return context


def forked(server, cwd, *options, patch=nothing):
    """05_train.py after patch(), a function of a test module. -> .process, .end() -> .status .out
    .err; .end waits until all its processes have closed their output."""
    (out, out_), (err, err_) = (server.Pipe(duplex=False) for _ in range(2))
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env.update(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONWARNINGS="ignore")
    process = server.Process(target=live, args=(
        out_, err_, cwd, [SCRIPT, *map(str, options)], env, patch))
    process.start()
    out_.close(), err_.close()

    def end():
        said = [os.fdopen(os.dup(pipe.fileno())).read() for pipe in (out, err)]
        process.join()
        return SimpleNamespace(status=process.exitcode, out=said[0], err=said[1])
    return SimpleNamespace(process=process, end=end)


@pytest.fixture
def run(server, tmp_path):
    """run(*options, patch=f): 05_train.py after f(), until it ends. -> .status .out .err"""
    started = []

    def call(*options, patch=nothing):
        started.append(forked(server, tmp_path, *options, patch=patch))
        return started[-1].end()
    yield call
    for process in (s.process for s in started if s.process.exitcode is None):
        os.killpg(process.pid, signal.SIGKILL)             # a test that was interrupted


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def is_the_same_run(a, b):
    """Every bit: weights, optimizers, steps, settings, what was logged, the tokens."""
    for name in ("tokenizer.pt", "transformer.pt"):
        assert same(checkpoints.load_checkpoint(a / name), checkpoints.load_checkpoint(b / name))
    for name in ("log.jsonl", "tokens_train.npy", "tokens_train.json", "tokens_test.npy",
                 "tokens_test.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert not list(a.glob("*.tmp")), "half a file was left behind"
    return True


def goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, out):
    result = run(*command)
    assert (result.status, result.err) == (0, ""), result
    return is_the_same_run(out, tiny.folder)


@pytest.fixture
def command(tiny, tmp_path):
    """The options of the tiny run, in the folder tmp_path / "run"."""
    return [*tiny.options, "--out", tmp_path / "run"]


# -- Killed ----------------------------------------------------------------------------------------

def before(count, owner, name, then, only=""):
    """Before the count-th call of owner.name, then() is called. owner: a module's name, or a
    class; only: what the first argument must hold to count."""
    owner = import_module(owner) if isinstance(owner, str) else owner
    real, calls = getattr(owner, name), []

    def spy(*args, **options):
        calls.extend([name] * (only in str(args[0])))
        if len(calls) == count and only in str(args[0]):
            then(*args)
        return real(*args, **options)
    setattr(owner, name, spy)


def stop_myself(*_, name=signal.SIGKILL):
    os.kill(os.getpid(), name)


def stopped(count, what, name=signal.SIGKILL):
    """A signal from the sky before the count-th step, batch of tokens, or renaming of a file."""
    batches.per_pass = lambda side: 4
    owner = {"train_step": "05_train", "image_to_tokens": m2.MultiScaleVQVAE, "replace": "os"}[what]
    only = "tokens_train" if what == "replace" else ""
    before(count, owner, what, partial(stop_myself, name=name), only)


def stopped_while_saving(count, save=torch.save):
    """Half of the count-th checkpoint is on the disk."""
    def half(state, path):
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        stop_myself()
    before(count, "torch", "save", half)


def test_killed_at_one_moment_after_the_other_a_run_still_ends_bit_for_bit(
        run, command, tiny, tmp_path):
    """Counts are those of each process: it goes on where the one before it was killed."""
    for moment, left in [
            (partial(stopped_while_saving, 1), {"settings.json", "tokenizer.pt.*.tmp"}),
            (partial(stopped, 13, "train_step"), {"tokenizer.pt"}),
            (partial(stopped_while_saving, 2), {"tokenizer.pt", "tokenizer.pt.*.tmp"}),
            (partial(stopped, 2 + 9, "image_to_tokens"), {"tokens_train.npy.tmp",
                                                          "tokens_train.npy.json.tmp"}),
            (partial(stopped, 1, "replace"), {"tokens_train.npy.tmp", "tokens_train.npy.json.tmp"}),
            (partial(stopped, 2, "replace"), {"tokens_train.npy", "tokens_train.npy.json.tmp"}),
            (partial(stopped, 8, "train_step"), {"tokens_test.json", "transformer.pt"}),
            (partial(stopped_while_saving, 2), {"transformer.pt", "transformer.pt.*.tmp"})]:
        result = run(*command, patch=moment)
        assert (result.status, result.err) == (-signal.SIGKILL, ""), (moment, result)
        files = {path.name for path in (tmp_path / "run").iterdir()}
        assert all(fnmatch.filter(files, name) for name in left), (moment, files)
    assert goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, tmp_path / "run")


def stopped_at_a_file(count):
    """Killed when it is about to open, make, rename or remove the count-th file of the run."""
    seen = []

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and "/run/" in str(args[0]):
            seen.append(str(args[0]))
            if len(seen) == count:
                stop_myself()
    sys.addaudithook(hook)


def test_a_run_that_is_killed_at_one_file_after_the_other_ends_bit_for_bit(
        run, command, tiny, tmp_path):
    draw, killed = random.Random(0), 0
    while (result := run(*command, patch=partial(stopped_at_a_file, draw.randint(15, 50)))).status:
        assert (result.status, result.err) == (-signal.SIGKILL, "") and killed < 30, result
        killed += 1
    assert killed >= 5 and is_the_same_run(tmp_path / "run", tiny.folder)


def test_killed_twice_the_second_time_while_it_drops_lines_of_the_log(run, command, tiny, tmp_path):
    """Those after the last checkpoint must go, those before it must stay."""
    stop = partial(before, 2, "os", "replace", stop_myself, "log.jsonl")
    assert run(*command, patch=partial(stopped, 24 + 8, "train_step")).status == -signal.SIGKILL
    assert run(*command, patch=stop).status == -signal.SIGKILL
    assert goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, tmp_path / "run")


# -- Asked to stop ---------------------------------------------------------------------------------

def test_a_signal_is_obeyed_after_the_step_and_a_line_says_how_to_go_on(
        run, command, tiny, tmp_path):
    for name, count, what, words in [
            (signal.SIGTERM, 13, "train_step", "and saved at step 13 of the tokenizer"),
            (signal.SIGINT, 2 + 9, "image_to_tokens", "at 30% of the tokens"),
            (signal.SIGINT, 8, "train_step", "and saved at step 8 of the transformer")]:
        result = run(*command, patch=partial(stopped, count, what, name))
        assert (result.status, result.err) == (128 + name, "")
        line = result.out.splitlines()[-1]
        assert line == f"stopped {words}: the same command resumes from there"
    assert goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, tmp_path / "run")


def asked_twice(seconds, owner, name, count):
    """Two Ctrl-C, so many seconds apart by this process's clock."""
    clock = iter((0, seconds))
    engine_stop.time = SimpleNamespace(monotonic=lambda: next(clock))

    def ask(*_):
        stop_myself(name=signal.SIGINT)
        stop_myself(name=signal.SIGINT)
    before(count, owner, name, ask)


def test_a_second_signal_ends_at_once_unless_it_is_the_first_that_arrived_twice(
        run, command, tiny, tmp_path):
    """A terminal sends Ctrl-C to all processes, and the launcher passes it on to them."""
    for seconds, owner, name, count, step in [
            (0.9, "05_train", "train_step", 6, 6), (1.1, "05_train", "train_step", 7, 10),
            (0.9, "torch", "save", 1, 16), (1.1, "torch", "save", 1, 16)]:
        result = run(*command, patch=partial(asked_twice, seconds, owner, name, count))
        assert (result.status, result.err) == (130, ""), result
        assert result.out.count("once more to stop at once") == 1
        assert result.out.count("stopped and saved") == (seconds < 1)
        assert checkpoints.load_checkpoint(tmp_path / "run" / "tokenizer.pt")["step"] == step
        assert not list((tmp_path / "run").glob("*.tmp"))
    assert goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, tmp_path / "run")


# -- No room on the disk ---------------------------------------------------------------------------

def full_disk(count, owner, name, size):
    """From the count-th call of owner.name on, no file can grow beyond so many bytes."""
    def fill(*_):
        os.system("cp -r run kept")
        limit = size if size > 0 else os.path.getsize("run/log.jsonl") - size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    before(count, owner, name, fill)


def test_a_full_disk_is_one_line_that_names_the_file_and_nothing_is_lost(
        run, command, tiny, tmp_path):
    for count, owner, name, size, file, step in [
            (8, "05_train", "train_step", 20_000, "tokenizer.pt", 5),
            (1, "engine.token_cache", "fill", 4000, "tokens_train.npy", 24),
            (8, "05_train", "train_step", 30_000, "transformer.pt", 5),
            (8, "05_train", "report", -9, "log.jsonl", 10)]:
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        result = run(*command, patch=partial(full_disk, count, owner, name, size))
        assert result.status == 2 and result.err.count("\n") == 1, result
        assert result.err.startswith("05_train.py: ") and file in result.err, result.err
        for path in (tmp_path / "kept").glob("*.pt"):      # as they were when the disk was full
            assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()
            last = checkpoints.load_checkpoint(path)["step"]
        assert last == step and not list((tmp_path / "run").glob("*.tmp"))
    assert goes_on_and_ends_as_if_nothing_had_happened(run, command, tiny, tmp_path / "run")


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(refused, tiny, tmp_path, below):
    (tmp_path / "note.txt").write_text("no folder")
    line = refused("05_train.py", *tiny.options, "--out", tmp_path / "note.txt" / below)
    assert "note.txt" in line and (tmp_path / "note.txt").read_text() == "no folder"


# -- Other settings on the way ---------------------------------------------------------------------

FREE = ("--log-every 3 --save-every 7 --activation-checkpointing --set held_out=2 "
        "--workers 1 --set cfg=3 top_k=5 top_p=0.5").split()
NOT_OF_A_RUN = set("data_dir out stage device gpus compile fresh export vgg_file lpips_file shard "
                   "dry_run gpu_tflops mfu".split())


def test_what_changes_nothing_that_is_learned_may_change_on_the_way(run, command, tmp_path):
    folder = tmp_path / "run"
    assert run(*command, patch=partial(stopped, 7, "train_step", signal.SIGTERM)).status == 143
    changed = run(*command, *FREE, patch=partial(stopped, 17 + 8, "train_step", signal.SIGTERM))
    assert "tokenizer: resuming at step 7\n" in changed.out and changed.status == 143, changed
    result = run(*command)
    assert "transformer: resuming at step 8\n" in result.out and result.status == 0, result
    fixed = [checkpoints.load_checkpoint(folder / f"{name}.pt")["settings"].keys()
             for name in ("tokenizer", "transformer")]
    free = {word[2:].replace("-", "_") for word in FREE if word.startswith("--")}
    every = {f.name for f in fields(m5.Settings)}
    assert every - NOT_OF_A_RUN - free == every & {key for keys in fixed for key in keys}


# -- Steps that are not finite ---------------------------------------------------------------------

def test_the_log_counts_skipped_steps_and_means_the_others(cli, tiny, tmp_path, monkeypatch):
    entries, loss = {}, m5.TransformerStage.loss

    def spoil(self, model, batch, progress):
        value, memory = loss(self, model, batch, progress)
        return (value * torch.nan if round(24 * progress) in (2, 4, 5) else value), memory
    monkeypatch.setattr(m5.TransformerStage, "loss", spoil)
    for often in (1, 4):
        shutil.copytree(tiny.folder, folder := tmp_path / str(often))
        result = cli("05_train.py", *tiny.options, "--stage", "transformer", "--fresh",
                     "--log-every", often, "--out", folder)
        assert result.status == 0, result.err
        entries[often] = {e["step"]: e for e in log_of(folder)
                          if "lr" in e and e["stage"] == "transformer"}
    assert {step: e["skipped"] for step, e in entries[4].items() if "skipped" in e} == {4: 1, 8: 2}
    assert [line.split()[1] for line in result.out.splitlines() if "| skipped " in line] == [
        "4/24", "8/24"] and "| skipped 2 | lr" in result.out
    for step, entry in entries[4].items():
        good = [e for e in map(entries[1].get, range(step - 3, step + 1)) if "skipped" not in e]
        assert entry["loss"] == pytest.approx(np.mean([e["loss"] for e in good]), rel=1e-5)
        assert entry["grad"] == good[-1]["grad"] and np.isfinite(entry["grad"])


def state_of(stage):
    """A copy of all that a checkpoint would hold."""
    return copy.deepcopy([[part.state_dict() for part in stage.parts.values()],
                          [optimizer.state_dict() for optimizer in stage.optimizers]])


def take(stage, batch, seed, spoilt=False):
    """One step at the end of the training. -> was it skipped?"""
    torch.manual_seed(seed)
    real = stage.loss
    if spoilt:
        stage.loss = lambda *args: (lambda loss, memory: (loss * torch.nan, memory))(*real(*args))
    taken = m5.train_step(stage, stage.model.train(), batch, 1.0)
    stage.loss = real
    return bool(taken.skipped)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, learn", [("tokenizer", "ema"), ("tokenizer", "gradient"),
                                         ("transformer", "ema")])
def test_a_run_with_skipped_steps_is_the_run_without_them_to_the_last_bit(optimizer, kind, learn):
    """Weights, codes, moments, and the counts of steps that correct the moments; the first bad step
    is the first of all, where optimizers have no state yet and codes no place."""
    ends = []
    for spoil in (True, False):
        stage = stage_of(kind, learn, optimizer=optimizer)
        for step, batch in enumerate(itertools.islice(stage.batches(0), 3)):
            if spoil and step in (0, 2):
                assert take(stage, batch, 9, spoilt=True)
            earlier = state_of(stage)
            assert not take(stage, batch, step) and not same(earlier, state_of(stage))
        ends.append(state_of(stage))
    assert same(*ends)


def test_a_nan_in_the_critics_gradient_alone_skips_the_step_for_all():
    stage = stage_of("tokenizer", adversarial=1.0, optimizer="muon")
    batch = next(stage.batches(0))
    assert not take(stage, batch, 0)
    weights = [list(part.parameters()) for part in (stage.model, stage.parts["critic"])]
    for nan in (True, False):
        earlier = copy.deepcopy(weights), state_of(stage)[1]
        hook = weights[1][0].register_hook(lambda grad: grad * (torch.nan if nan else 1))
        assert take(stage, batch, 1) == nan
        hook.remove()
        for model, copied in zip(weights, earlier[0]):
            assert all(map(torch.equal, model, copied)) == nan
        for optimizer, old in zip(stage.optimizers, earlier[1], strict=True):
            assert same(optimizer.state_dict()["state"], old["state"]) == nan

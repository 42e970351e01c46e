"""Chapter 5 in several processes, in parts, and computing things twice: the numbers stay those of
one process, one mistake is one line, and whoever is asked to stop saves first.

The processes are real and 05_train.py's own launcher starts them, but forked: see `forked`."""
import json
import os
import re
import shutil
import signal
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import same, stage_of
from hypothesis import given
from hypothesis import strategies as st
from test_nothing_lost import (before, forked, log_of, run, server,  # noqa: F401  (fixtures)
                               stop_myself)

from engine import BadInput, checkpoints

m4, m5 = import_module("04_var_transformer"), import_module("05_train")
SCRIPT = "05_train.py"
PLAIN = ("--stage transformer --set label_dropout=0 drop_path=0 --optimizer adamw --steps 14 "
         "--save-every 4").split()
CACHE = [f"tokens_{split}.{end}" for split in ("train", "test") for end in ("npy", "json")]


def rank():
    """Of this process; -1 is the launcher, or one process alone."""
    return int(os.environ.get("RANK", -1))


# -- The same numbers ------------------------------------------------------------------------------

@pytest.fixture
def stage_2(tiny, tmp_path):
    """The options of a run of stage 2 in tmp_path / "run", with the tiny run's tokens."""
    (tmp_path / "run").mkdir()
    for name in ("tokenizer.pt", *CACHE):
        shutil.copy(tiny.folder / name, tmp_path / "run")
    return [*tiny.options, *PLAIN, "--out", tmp_path / "run"]


@pytest.fixture(scope="session")
def alone(tiny, tmp_path_factory, server):                 # noqa: F811
    """The folder of that run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("tokenizer.pt", *CACHE):
        shutil.copy(tiny.folder / name, folder)
    result = forked(server, folder, *tiny.options, *PLAIN, "--out", folder).end()
    assert result.status == 0, result
    return folder


def agrees(folder, alone):
    """What was logged, and the weights: they differ by little of what training changed."""
    one, two = (log_of(f) for f in (alone, folder))
    assert [e["step"] for e in one] == [e["step"] for e in two] and len(one) == 14 + 4
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        x, y = x.get("held_out", x), y.get("held_out", y)
        for key in {"loss", "per_scale", "right", "grad"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=2e-4, abs=1e-5), (key, x, y)
    (model, about), (other, _) = (m5.load_transformer(f / "transformer.pt")
                                  for f in (folder, alone))
    torch.manual_seed(0)
    begin = m4.VAR(model.config).state_dict()
    for name, weight in other.state_dict().items():
        moved = (weight - begin[name]).norm()
        assert (model.state_dict()[name] - weight).norm() < 0.01 * moved + 1e-5, name
    assert moved > 0 and about["step"] == 14 and not list(folder.glob("*.tmp"))
    return True


def note_shares():
    """Every process notes how many numbers it holds: of weights, and of weights in whole."""
    make = m5.TransformerStage.__init__

    def init(self, *args):
        make(self, *args)
        weights = list(self.model.parameters())
        held = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
        with open(f"{rank()}.json", "w") as file:
            json.dump([sum(w.numel() for w in part) for part in (held, weights)], file)
    m5.TransformerStage.__init__ = init


@pytest.mark.parametrize("options", [
    "", "--accumulate 2", "--shard", "--shard --activation-checkpointing --accumulate 2"])
def test_two_processes_train_as_one_however_they_share_the_work(
        run, stage_2, alone, tmp_path, options):           # noqa: F811
    result = run(*stage_2, "--gpus", 2, *options.split(), patch=note_shares)
    assert (result.status, result.err) == (0, ""), result
    assert agrees(tmp_path / "run", alone)
    shares = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    for held, whole in shares:
        assert held <= 0.55 * whole if "shard" in options else held == whole
    assert sum(held for held, _ in shares) >= shares[0][1]
    state, one = (checkpoints.load_checkpoint(folder / "transformer.pt")
                  for folder in (tmp_path / "run", alone))
    for key, value in one["model"].items():
        assert type(state["model"][key]) is torch.Tensor
        assert state["model"][key].shape == value.shape
    for a, b in zip(state["optimizers"][0]["state"].values(),
                    one["optimizers"][0]["state"].values(), strict=True):
        assert [(k, type(v), v.shape) for k, v in a.items()] == [
            (k, type(v), v.shape) for k, v in b.items()], "an optimizer of this share only"


def stop_the_launcher(name, whom=os.kill):
    """Before its seventh step the first process sends a signal to the one that started it."""
    if rank() == 0:
        before(7, "05_train", "train_step",
               lambda *_: whom(os.getppid() if whom is os.kill else 0, name))


@pytest.mark.parametrize("first, then", [
    (["--gpus", 2, "--shard"], []), ([], ["--gpus", 2, "--shard", "--accumulate", 2])])
def test_what_sharded_processes_saved_one_process_goes_on_with_and_vice_versa(
        run, stage_2, alone, tmp_path, first, then):       # noqa: F811
    """The first run is killed, its last checkpoint is that of step 8."""
    result = run(*stage_2, *first, patch=partial(killed, -1 if not first else 1, 11))
    assert result.status == (2 if first else -signal.SIGKILL)
    result = run(*stage_2, *then)
    assert (result.status, result.err) == (0, "") and "resuming at step 8\n" in result.out, result
    assert agrees(tmp_path / "run", alone)


def killed(who, step):
    if rank() == who:
        before(step, "05_train", "train_step", stop_myself)


# -- In parts, and computed twice ------------------------------------------------------------------

def gradients_of(kind, accumulate, **settings):
    """Of one train_step with 16 pictures. -> {part: [its gradients]}, loss, norm"""
    stage = stage_of(kind, accumulate=accumulate, clip=1e9, **settings)   # noqa: F811
    if kind == "transformer":
        stage.model.double(), stage.tokenizer.double()
    found = {}

    def look():
        found.update({name: [p.grad for p in part.parameters()]
                      for name, part in stage.parts.items()})
    stage.optimizers[0].step = look
    taken = m5.train_step(stage, stage.model.eval(), next(stage.batches(0)), 1.0)
    assert not taken.skipped and len(taken.metrics) == accumulate
    return found, taken


@given(accumulate=st.sampled_from([2, 4, 8, 16]))
@pytest.mark.parametrize("kind, part, settings", [
    ("tokenizer", "model", {}), ("transformer", "model", {}),
    ("tokenizer", "critic", dict(adversarial=1.0))])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(kind, part, settings, accumulate):
    (found, parts), (wanted, whole) = (gradients_of(kind, n, **settings) for n in (accumulate, 1))
    for ours, grad in zip(found[part], wanted[part], strict=True):
        assert (grad is None) == (ours is None)            # a phi that serves no scale
        assert grad is None or (ours - grad).norm() <= 2e-5 * grad.norm() + 1e-9
    if part == "model":
        assert parts.norm.item() == pytest.approx(whole.norm.item(), rel=1e-5)
        assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


@given(seed=st.integers(0, 99), depth=st.integers(1, 4), batch=st.integers(1, 3),
       shared=st.booleans())
def test_computing_blocks_twice_gives_the_same_gradients_and_keeps_less(
        seed, depth, batch, shared):
    """To the last bit, with the same branches dropped and the same labels hidden."""
    torch.manual_seed(seed)
    model = m4.VAR(m4.VARConfig(num_classes=3, scales=(1, 2, 4), vocab_size=16, latent_dim=4,
                                depth=depth, width=16, heads=2, drop_path=0.5, label_dropout=0.5,
                                shared_adaln=shared)).train()
    labels, inputs = torch.randint(3, (batch,)), torch.randn(batch, 20, 4)
    found, kept = [], []
    for twice in (False, True):
        model.activation_checkpointing, storages = twice, {}
        torch.manual_seed(seed)

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(labels, inputs).square().sum()
        loss.backward()
        found.append([loss, *[p.grad.clone() for p in model.parameters()]])
        kept.append(sum(s.nbytes() for s in storages.values()))
        model.zero_grad()
    assert same(*found) and any(grad.any() for grad in found[0][1:])
    assert kept[1] < (0.9 if depth == 1 else 0.7) * kept[0]


# -- One of them fails -----------------------------------------------------------------------------

def refuse(*_):
    raise BadInput("no luck")


def stumble(*_):
    raise ZeroDivisionError("no luck")


def fails(who, how):
    if rank() == who:
        before(7, "05_train", "train_step", how)


@pytest.mark.parametrize("who", [0, 1])
def test_a_mistake_that_one_process_notices_is_the_only_line(run, stage_2, who):   # noqa: F811
    result = run(*stage_2, "--gpus", 2, patch=partial(fails, who, refuse))
    assert (result.status, result.err) == (2, "05_train.py: no luck\n")


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_is_the_only_traceback(run, stage_2, who):         # noqa: F811
    result = run(*stage_2, "--gpus", 2, patch=partial(fails, who, stumble))
    assert result.status == 1 and result.err.startswith("Traceback")
    assert result.err.endswith("ZeroDivisionError: no luck\n")
    assert result.err.count("Traceback") == 1 and "gloo" not in result.err, result.err


@pytest.mark.parametrize("who", [0, 1])
def test_if_one_process_is_killed_a_line_says_so_and_the_same_command_goes_on(
        run, stage_2, alone, tmp_path, who):               # noqa: F811
    result = run(*stage_2, "--gpus", 2, patch=partial(fails, who, stop_myself))
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert result.err.startswith(f"05_train.py: process {who} of 2 was killed by signal 9")
    assert "the same command goes on" in result.err
    result = run(*stage_2, "--gpus", 2)
    assert (result.status, result.err) == (0, "") and "resuming at step 4\n" in result.out, result
    assert agrees(tmp_path / "run", alone)


def test_a_mistake_of_all_is_one_line(run, stage_2, alone, tmp_path):              # noqa: F811
    shutil.copy(alone / "transformer.pt", tmp_path / "run")
    result = run(*stage_2, "--gpus", 2, "--lr", 0.5)
    assert result.status == 2 and result.err.count("\n") == 1 and "lr 0.0015 -> 0.5" in result.err
    kept = tmp_path / "run" / "transformer.pt"
    assert kept.read_bytes() == (alone / "transformer.pt").read_bytes()


@pytest.mark.parametrize("options, words", [
    ("--gpus 3 --batch-size 4 --tokenizer-batch-size 6", "--batch-size 4 .*3 processes"),
    ("--gpus 3 --batch-size 6 --tokenizer-batch-size 4", "--tokenizer-batch-size 4 .*3 processes"),
    ("--gpus 2 --accumulate 4", "4 .*2 processes, 4 parts"),
    ("--shard --optimizer adamw", "--shard .*--gpus 2"),
    ("--shard --gpus 2", "--shard .*--optimizer adamw")])
def test_processes_that_cannot_share_the_work_are_not_started(
        refused, tiny, tmp_path, options, words):
    line = refused(SCRIPT, *tiny.options, *options.split(), "--out", tmp_path / "run")
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


# -- Asked to stop ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, whom, status, options", [
    (signal.SIGTERM, os.kill, 143, ["--shard"]), (signal.SIGINT, os.killpg, 130, []),
    (signal.SIGKILL, os.kill, -signal.SIGKILL, [])])
def test_asked_to_stop_all_processes_save_at_the_same_step_and_the_same_command_goes_on(
        run, stage_2, alone, tmp_path, name, whom, status, options):               # noqa: F811
    """SIGTERM to the launcher; Ctrl-C as a terminal sends it, to all; and if the launcher is killed
    the others notice that they are alone. Processes agree in every tenth step."""
    command = [*stage_2, "--gpus", 2, *options]
    result = run(*command, patch=partial(stop_the_launcher, name, whom))
    assert (result.status, result.err) == (status, ""), result
    assert "\nstopped and saved at step 10 of the transformer: the same" in result.out
    path = tmp_path / "run" / "transformer.pt"
    assert checkpoints.load_checkpoint(path)["step"] == 10
    result = run(*command)
    assert (result.status, result.err) == (0, "") and "resuming at step 10\n" in result.out, result
    assert agrees(tmp_path / "run", alone)


# -- Who writes ------------------------------------------------------------------------------------

def note_files(folder):
    """Every process notes which files of the run it opens to write, makes, renames or removes."""
    notes, own = open(f"{folder}/noted.{rank()}", "w", buffering=1), rank()

    def hook(event, args):
        if rank() != own:                                  # a fork of the launcher has two hooks
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            if f"{folder}/run" in str(args[0]):
                notes.write(f"{event} {args[0]}\n")
    sys.addaudithook(hook)
    before(1, "torch", "save", lambda _, path: rank() == own and notes.write(
        f"torch.save {path}\n"))


def test_only_the_first_process_writes_but_for_rows_of_the_token_cache(
        run, tiny, tmp_path):                              # noqa: F811
    result = run(*tiny.options, "--tokenizer-steps", 2, "--steps", 2, "--gpus", 2, "--out",
                 tmp_path / "run", patch=partial(note_files, str(tmp_path)))
    assert (result.status, result.err) == (0, ""), result
    first, second, launcher = ((tmp_path / f"noted.{r}").read_text() for r in (0, 1, -1))
    for words in ("torch.save", "log.jsonl", "settings.json", "os.rename", "os.mkdir", ".png"):
        assert words in first, "the notes would miss it"
    assert {line.removeprefix(f"open {tmp_path}/run/") for line in second.splitlines()} == {
        "tokens_train.npy.tmp", "tokens_test.npy.tmp"} and launcher == ""

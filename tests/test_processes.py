"""One process or many: the same numbers, one voice, and nothing left behind."""
import gc
import itertools
import json
import re
import subprocess
import weakref
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import stage_of

from engine.checkpoints import load_checkpoint
from engine.options import one_line
from engine.processes import first_that_failed

m5 = import_module("05_train")


def test_chapter_6_starts_when_the_training_is_out_of_the_way_and_its_status_counts(
        tiny, tmp_path, monkeypatch):
    """Both models share a GPU with it otherwise. Weak references tell whether they are gone. The
    peak of memory is that of each stage."""
    models, alive, memory = [], [], []
    for name, result in (("reset_peak_memory", None), ("peak_memory", "")):
        monkeypatch.setattr(m5, name, lambda device, name=name, result=result:
                            memory.append(name) or result)
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
        return 3
    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr("sys.argv", ["05_train.py", *tiny.options, "--tokenizer-steps", "1",
                                     "--steps", "1", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        one_line(m5.main)
    assert end.value.code == 3 and alive == [0, 0, 0]
    assert memory == 2 * ["reset_peak_memory", "peak_memory"]


def gradients_of(kind, accumulate, **settings):
    """Of one training step with 16 images. -> {part: [its gradients]}, StepResult"""
    stage = stage_of(kind, accumulate=accumulate, **settings)
    stage.settings.clip, found = 1e9, {}
    if kind == "transformer":
        stage.model.double(), stage.tokenizer.double()
    stage.step_without_gradients = lambda accepted: None   # nothing was observed in eval mode

    def look():
        found.update({name: [p.grad for p in part.parameters()]
                      for name, part in stage.modules.items()})
    stage.optimizers[0].step = look
    result = m5.train_step(stage, stage.model.eval(), next(stage.batches(0)), 1.0)
    assert not result.skipped and len(result.metrics) == accumulate
    return found, result


@pytest.mark.parametrize("accumulate", [2, 16])
@pytest.mark.parametrize("kind, part, settings", [
    ("transformer", "model", {}), ("tokenizer", "model", {}),
    ("tokenizer", "critic", dict(adversarial=1.0))])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(kind, part, settings, accumulate):
    (found, parts), (wanted, whole) = (gradients_of(kind, n, **settings) for n in (accumulate, 1))
    for ours, grad in zip(found[part], wanted[part], strict=True):
        assert (grad is None) == (ours is None)            # a phi that serves no scale
        assert grad is None or (ours - grad).norm() <= 2e-4 * grad.norm() + 1e-9
    if part == "model":
        assert parts.norm.item() == pytest.approx(whole.norm.item(), rel=1e-5)
        assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_every_step_of_every_stage_and_process_draws_its_own_numbers_again_and_again():
    def draw(*which):
        m5.seed_step(*which)
        return float(torch.rand(()))
    every = list(itertools.product((0, 1), ("tokenizer", "transformer"), (0, 1, 2), (0, 1)))
    drawn = [draw(*which) for which in every]
    assert len(set(drawn)) == len(every) and drawn == [draw(*which) for which in every]


NOTE_SHARES = """
real = m5.TransformerStage.__init__
def init(self, *args):
    real(self, *args)
    weights = list(self.model.parameters())
    held = sum((w.to_local() if hasattr(w, "to_local") else w).numel() for w in weights)
    Path(f"{RANK}.json").write_text(f"[{held}, {sum(w.numel() for w in weights)}]")
m5.TransformerStage.__init__ = init
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--shard --activation-checkpointing --accumulate 2"])
def test_two_processes_train_as_one_however_they_share_the_work(
        under_fire, stage_2, alone, tmp_path, options):
    result = under_fire(NOTE_SHARES, *stage_2.options, "--gpus", 2, *options.split())
    assert (result.status, result.err) == (0, ""), result
    assert alone.agrees(stage_2.folder)
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for held, whole in shares:
        assert held <= 0.55 * whole if "shard" in options else held == whole
    assert sum(held for held, _ in shares) >= shares[0][1]
    state, one = (load_checkpoint(folder / "transformer.pt")
                  for folder in (stage_2.folder, alone.folder))
    for a, b in zip(state["optimizers"][0]["state"].values(),
                    one["optimizers"][0]["state"].values(), strict=True):
        assert [(k, type(v), v.shape) for k, v in a.items()] == [
            (k, type(v), v.shape) for k, v in b.items()], "an optimizer of this share only"


@pytest.mark.slow
def test_sharded_processes_train_in_half_precision_and_log_the_attentions_factor(
        under_fire, stage_2):
    """Of two processes one holds all of a factor per head, the other nothing."""
    result = under_fire("", *stage_2.options, "--gpus", 2, "--shard", "--precision", "bfloat16")
    assert (result.status, result.err) == (0, ""), result
    entries = map(json.loads, (stage_2.folder / "log.jsonl").read_text().splitlines())
    assert [entry["qk_factor"] for entry in entries if "loss" in entry
            and entry["stage"] == "transformer"][-1] == pytest.approx(4, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [
    (["--gpus", 2, "--shard"], []), ([], ["--gpus", 2, "--shard", "--accumulate", 2])])
def test_what_sharded_processes_saved_one_process_resumes_and_vice_versa(
        under_fire, stage_2, alone, first, then):
    """The first run is killed, its last checkpoint is that of step 8."""
    rank = 1 if first else -1
    result = under_fire(f"RANK == {rank} and before(11, m5, 'train_step', lambda: send('SIGKILL'))",
                        *stage_2.options, *first)
    assert result.status == (2 if first else -9)
    result = under_fire("", *stage_2.options, *then)
    assert (result.status, result.err) == (0, "") and "resuming at step 8\n" in result.out, result
    assert alone.agrees(stage_2.folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank, how, status, first, last", [
    (0, "fail(m5.BadInput('no luck'))", 2, "", "under_fire.py: no luck\n"),
    (1, "fail(m5.BadInput('no luck'))", 2, "", "under_fire.py: no luck\n"),
    (1, "1 / 0", 1, "[rank1]: Traceback", "ZeroDivisionError: division by zero\n"),
    (1, "time.sleep(1) or 1 / 0", 1, "[rank1]: Traceback",
     "ZeroDivisionError: division by zero\n"),
    (0, "send('SIGKILL')", 2, "under_fire.py: process 0 of 2 was killed by signal 9",
     "resumes from the last checkpoint\n")])
def test_the_first_process_that_fails_is_the_only_one_that_is_heard(
        under_fire, stage_2, rank, how, status, first, last):
    """A process that has lost another may abort before that one has ended, which `sleep` shows."""
    mishap = f"RANK == {rank} and before(7, m5, 'train_step', lambda: {how})"
    if "sleep" in how:
        mishap += "; RANK == 0 and before(7, m5, 'train_step', lambda: send('SIGABRT'))"
    result = under_fire(mishap, *stage_2.options, "--gpus", 2)
    # C++ may say what it aborted for.
    err = re.sub(r"terminate called.*\n|  what\(\):.*\n", "", result.err)
    assert result.status == status and err.startswith(first), result
    assert err.endswith(last) and "gloo" not in err, result.err
    assert err.count("Traceback") == (status == 1)
    assert status == 1 or err.count("\n") == 1
    assert load_checkpoint(stage_2.folder / "transformer.pt")["step"] == 4


@pytest.mark.parametrize("ends, first", [
    ([-6, None], 0), ([-6, -6], 0), ([-6, 0], 0), ([-6, 2], 1), ([0, -9], 1), ([0, 0], None)])
def test_one_that_aborts_is_named_if_no_other_fails_and_nobody_waits_for_ever(ends, first):
    started = [SimpleNamespace(returncode=end, poll=lambda end=end: end) for end in ends]
    failed = first_that_failed(started, patience=0.2)
    assert failed is (None if first is None else started[first])


NOTE_FILES = """
notes = open(f"noted.{RANK}", "w", buffering=1)
def hook(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
        if "/run/" in str(args[0]) or str(args[0]).endswith("/run"):
            notes.write(f"{event} {Path(str(args[0])).name}\\n")
sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_only_the_first_process_writes_but_for_rows_of_the_token_cache(
        under_fire, tiny, tmp_path):
    result = under_fire(NOTE_FILES, *tiny.options, "--tokenizer-steps", 2, "--steps", 2, "--gpus",
                        2, "--out", tmp_path / "run")
    assert (result.status, result.err) == (0, ""), result
    first, second, launcher = ((tmp_path / f"noted.{r}").read_text() for r in (0, 1, -1))
    for words in ("tokenizer.pt", "log.jsonl", "settings.json", "os.rename", "os.mkdir", ".png"):
        assert words in first, "the notes would miss it"
    assert set(second.splitlines()) == {"open tokens_train.npy.tmp", "open tokens_test.npy.tmp"}
    assert launcher == ""

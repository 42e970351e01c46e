"""A run's folder belongs to one run at a time, and its log to the steps that were saved."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from engine import BadInput
from engine.checkpoints import load_checkpoint
from engine.run_folder import RunFolder

SCRIPT = "05_train.py"
HOLD = """
import os, sys, time
from engine.run_folder import RunFolder
with RunFolder(sys.argv[1]):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no such lock")
def test_a_folder_belongs_to_one_run_until_it_ends_however_it_ends(refused, tiny, tmp_path):
    """Also after `kill -9`, while a loading worker that was forked from it still lives."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT,
                              text=True, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        line = refused(SCRIPT, *tiny.options, "--out", tmp_path / "run")
        assert f"{tmp_path / 'run'} is in use by another run" in line
        with RunFolder(tmp_path / "run", writes=False):    # another process of the same run
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunFolder(tmp_path / "run") as folder:
            assert folder.path.is_dir()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_refused_command_leaves_no_new_folder_and_an_old_one_as_it_was(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("keep")
    for name in ("new/below", "old", "old/below"):
        with pytest.raises(BadInput):
            with RunFolder(tmp_path / name):
                raise BadInput("no")
    assert not (tmp_path / "new").exists() and not (tmp_path / "old" / "below").exists()
    assert (tmp_path / "old" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(refused, tiny, tmp_path, below):
    (tmp_path / "note.txt").write_text("no folder")
    line = refused(SCRIPT, *tiny.options, "--out", tmp_path / "note.txt" / below)
    assert "note.txt" in line and (tmp_path / "note.txt").read_text() == "no folder"


@given(entries=st.lists(st.tuples(st.sampled_from(["tokenizer", "transformer"]), st.integers(1, 9)),
                        max_size=8),
       cut=st.integers(0, 20), stage=st.sampled_from(["tokenizer", "transformer"]),
       step=st.integers(0, 9))
def test_a_stage_that_begins_anew_drops_what_was_logged_later_and_what_a_crash_left(
        entries, cut, stage, step):
    lines = [dict(stage=s, step=n) for s, n in entries]
    with tempfile.TemporaryDirectory() as path, RunFolder(path) as folder:
        for entry in lines:
            folder.log(entry)
        with open(folder.path / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(stage=stage, step=0))[:cut])         # cut short by a crash
        for half in ("tokenizer.pt.17.tmp", "settings.json.17.tmp", "log.jsonl.17.tmp"):
            (folder.path / half).write_text("half")
        (folder.path / "tokens_train.npy.tmp").write_text("whole rows, to be resumed")
        folder.begin(stage, step, dict(seed=step))
        kept = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
        assert kept == [e for e in lines if e["stage"] != stage or e["step"] <= step]
        assert folder.settings() == dict(seed=step)
        assert [p.name for p in Path(path).glob("*.tmp")] == ["tokens_train.npy.tmp"]


def content(folder):
    """What must not change when a command is refused."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.suffix in (".pt", ".npy", ".json", ".jsonl")}


@pytest.mark.parametrize("options", [
    ["--views", 3], ["--views", 3, "--stage", "transformer"],
    ["--stage", "transformer", "--tokenizer-file", "other.pt"],
    ["--stage", "transformer", "--tokenizer-file", "other.pt", "--fresh"]])
def test_a_refused_command_changes_nothing_not_even_the_token_cache(
        refused, tiny, tmp_path, options):
    """Neither are tokens made again for a transformer that is then refused, nor is a tokenizer that
    was trained here replaced."""
    shutil.copytree(tiny.folder, run := tmp_path / "run")
    other = load_checkpoint(run / "tokenizer.pt")
    other["model"]["quant_conv.bias"] = other["model"]["quant_conv.bias"] + 1
    torch.save(other, tmp_path / "other.pt")
    before = content(run)
    line = refused(SCRIPT, *tiny.options, *options, "--out", run)
    assert "views" in line or "--out" in line
    assert {k: v for k, v in content(run).items() if k != "settings.json"} == {
        k: v for k, v in before.items() if k != "settings.json"}


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_what_fresh_began_and_lost_is_not_taken_for_finished(cli, tiny, tmp_path, stage):
    """Stopped before its first checkpoint, a fresh stage begins anew, whatever was there before."""
    shutil.copytree(tiny.folder, run := tmp_path / "run")
    training = import_module("05_train")

    def stop(*_):
        raise BadInput("stopped")
    options = [*tiny.options, "--stage", stage, "--out", run]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", stop)
        assert cli(SCRIPT, *options, "--fresh").status == 2
    result = cli(SCRIPT, *options)
    assert result.status == 0 and f"{stage}: steps 0 to 24" in result.out, result

"""A run that is asked to stop: it saves, says so in one line, and the same command resumes."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from engine.checkpoints import load_checkpoint

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("launcher, options", [([], []), (TORCHRUN, []), ([], ["--gpus", "2"])])
def test_a_signal_to_the_whole_group_spares_the_loading_workers_and_the_run_saves(
        name, launcher, options, tiny, tmp_path):
    """A terminal, SLURM and systemd signal every process, also those that decode pictures."""
    path = tmp_path / "run" / "tokenizer.pt"
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "05_train.py"), *tiny.options, "--workers", "2",
         "--tokenizer-steps", "100000", "--out", str(tmp_path / "run"), *options],
        env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=100)
    last = out.splitlines()[-1]
    assert last == (f"stopped and saved at step {load_checkpoint(path)['step']} of the tokenizer: "
                    "the same command resumes from there"), (out, err)
    assert out.count("once more to stop at once") == 1
    if not launcher:                                       # torchrun adds a traceback of its own
        assert (process.returncode, err) == (128 + getattr(signal, name), "")

"""A run's folder belongs to one run at a time, and its log to the steps that were saved."""
import os
import signal
import time

import pytest

SCRIPT = "05_train.py"


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(
        refused, cli, tiny, tmp_path):
    """Also at once after `kill -9`, while the dead run's loading workers still live."""
    path = tmp_path / "run" / "tokenizer.pt"
    options = [*tiny.options, "--workers", 2, "--out", tmp_path / "run"]
    first = tiny.start(SCRIPT, *options, "--tokenizer-steps", 100_000, cwd=tmp_path)
    while not path.exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    line = refused(SCRIPT, *options, "--tokenizer-steps", 100_000)
    assert str(tmp_path / "run") in line and "another run" in line
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    line = refused(SCRIPT, *options)                       # fewer steps than it was started with
    assert "other settings" in line
    assert cli(SCRIPT, *options, "--fresh", "--stage", "tokenizer").status == 0
    first.communicate()

"""05_train.py with a mishap: the code in the environment variable MISHAP runs first, in every
process of the run and in its launcher. It may use the names below."""
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
m5 = import_module("05_train")
RANK = int(os.environ.get("RANK", -1))                     # -1: the launcher, or one process alone


def before(count, owner, name, then, only=""):
    """then() before the count-th call of owner.name whose first argument holds `only`."""
    real, calls = getattr(owner, name), []

    def spy(*args, **options):
        calls.extend([name] * (only in str(args[0])))
        if len(calls) == count and only in str(args[0]):
            then()
        return real(*args, **options)
    setattr(owner, name, spy)


def send(name, pid=None):
    os.kill(pid or os.getpid(), getattr(signal, name))


def all_hear(tell):
    """tell() sends a signal to the whole run or to its launcher. Wait until it has arrived here, or
    until this process is an orphan: the next steps would not wait for it."""
    arrived, parent = [], os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *args, handler=signal.getsignal(number): arrived.append(args)
                      or handler(*args))
    tell()
    while not arrived and os.getppid() == parent:
        time.sleep(0.01)


def fail(error):
    raise error


if __name__ == "__main__":
    # Chapter 6's images are of no interest, but it starts when the process group is gone.
    m5.draw_samples = lambda settings: int(torch.distributed.is_initialized())
    exec(os.environ["MISHAP"])
    m5.one_line(m5.main)

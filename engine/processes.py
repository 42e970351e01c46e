"""One process or many: which one this is, what they exchange, and how they are launched."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine import BadInput
from engine.devices import pick_device


class Processes:
    """This process and the others of its run, started by torchrun or by `launch`.

        with Processes("auto") as processes:
            ...

    rank: number of this process, 0 to world - 1; rank 0 prints and writes. world: how many there
    are; device: that of this process."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.launcher = int(os.environ.get("LAUNCHER_PID", os.getppid()))
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True              # sizes repeat: find their best kernels
        self.makes_group = self.world > 1 and not dist.is_initialized()
        if self.makes_group:
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            # Rank 0 may download, list or encode a million files while the others wait.
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1),
                                    device_id=self.device if cuda else None)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.makes_group and not error:                 # others may wait where this one failed
            dist.destroy_process_group()

    def say(self, line):
        """Print a line, once."""
        if self.rank == 0:
            print(line, flush=True)

    def share(self, indices):
        """This process's part of a batch or of a data set."""
        return indices[self.rank::self.world]

    def total(self, value):
        """Sum over the processes. value: tensor of any shape"""
        if self.world > 1:
            dist.all_reduce(value := value.clone())
        return value

    def mean(self, value):
        """Average over the processes. value: tensor of any shape"""
        return self.total(value) / self.world

    def any(self, flag):
        """Is it true in any process? flag: bool tensor -> bool tensor, on the device"""
        return self.total(flag.float()) > 0

    def largest(self, number):
        """The largest of the processes' integers, for all of them."""
        if self.world == 1:
            return number
        dist.all_reduce(value := torch.tensor(number, device=self.device), dist.ReduceOp.MAX)
        return int(value)

    def of_first(self, number):
        """The integer of rank 0, for all of them."""
        return self.largest(number if self.rank == 0 else -1)

    def barrier(self):
        """Wait until every process has reached this line."""
        if self.world > 1:
            dist.barrier()

    def first_alone(self, load):
        """What load() returns, called in rank 0 before the others: one download, not N at once."""
        first = load() if self.rank == 0 else None
        self.barrier()
        return first or load()

    def launcher_is_gone(self):
        """Has the process that started these processes died?"""
        return self.world > 1 and os.getppid() != self.launcher

    def wrap(self, model, compile=False):
        """The model to call in training: compiled if asked; with several processes its backward
        pass averages the gradients."""
        if compile:
            import torch._functorch.config as functorch
            # The adaptive weight of the critic runs backward twice more through the same graph.
            functorch.donated_buffer = False
            model = torch.compile(model)
        if self.world > 1 and not is_sharded(model):
            # Buffers need no copy from rank 0, because the quantizer keeps them equal. torch 2.13
            # has a new name for this option, which torch 2.9 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            model = DistributedDataParallel(model, broadcast_buffers=False,
                                            gradient_as_bucket_view=True)
        return model

    def shard(self, model, precision):
        """Shard the model (ZeRO 3, FSDP): each process keeps a part of every weight, and each
        matrix of its blocks is gathered only while it is used.
        precision: of the matrices' products; gradients are averaged in float32 in any case. What is
        left in a block is small and stays float32: 7 bits would not do for attention's factor."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # torch warns of changing in place what a module returns. This code never does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh, policy = init_device_mesh(self.device.type, (self.world,)), MixedPrecisionPolicy()
        if precision != "float32":                         # or autocast would keep whole copies
            policy = MixedPrecisionPolicy(getattr(torch, precision), torch.float32)
        for layer in model.blocks.modules():
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)               # what is left: the residual stream's


def is_sharded(model):
    return hasattr(model, "set_requires_gradient_sync")


def sync_gradients(model, now):
    """A context for a backward pass: with several processes, average the gradients now, or only
    add them up. Sharded models always average, because no process has room for whole gradients."""
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def lost_connection(error):
    """Is this the error that torch raises when another process has ended?"""
    return isinstance(error, RuntimeError) and re.search(
        "gloo|nccl|socket|connection", str(error).lower()) is not None


def relaunch(count, device):
    """Start this command `count` times, once per GPU (on a CPU: processes over gloo). -> status"""
    gpus = torch.cuda.device_count() if pick_device(device).type == "cuda" else 0
    if count > gpus and device != "cpu":
        raise BadInput(f"--gpus {count}: torch finds {gpus} CUDA GPUs here; with --device cpu as "
                       "many processes share the CPU")
    return launch(count)


def launch(count):
    """Run this command in `count` processes on this machine, as `torchrun --standalone` does.
    -> the exit status of the first process that failed, else 0

    Unlike torchrun, it passes a signal on and lets the processes save, and when one process fails,
    the last line printed is that of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count),
               LOCAL_WORLD_SIZE=str(count), LAUNCHER_PID=str(os.getpid()),
               OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    passed_on = []

    def pass_on(number, frame):
        passed_on.append(number)
        for process in processes:
            with contextlib.suppress(ValueError):          # Windows has no such signal
                process.send_signal(number)                # does nothing if it has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # inherited, until StopSignal listens
    processes = [subprocess.Popen([sys.executable, *sys.argv],
                                  env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)))
                 for rank in range(count)]
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, pass_on)
    failed = first_that_failed(processes)
    if not failed:
        return 0
    status = failed.returncode
    end = time.monotonic() + (60 if passed_on or status in (129, 130, 143) else 0.5)
    for process in processes:
        try:                                               # after a signal they save and end
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()                                 # it waits for the one that failed
    if status < 0 and not passed_on:                       # a killed process prints nothing
        raise BadInput(f"process {processes.index(failed)} of {count} was killed by signal "
                       f"{-status} (9: out of memory?); the same command, without "
                       "--fresh, resumes from the last checkpoint")
    return 128 + passed_on[0] if status < 0 else status


def first_that_failed(processes, patience=5):
    """Wait until one has failed or all have ended well. -> subprocess.Popen, or None

    A process that has lost another may abort before that other one has ended. So if one aborts,
    another one may fail for `patience` seconds more, and is then the one that failed first."""
    patient_until = None
    while not all(process.poll() == 0 for process in processes):
        failed = [process for process in processes if process.poll() not in (None, 0)]
        others = [process for process in failed if process.returncode != -signal.SIGABRT]
        if failed and patient_until is None:
            patient_until = time.monotonic() + patience
        if others or failed and time.monotonic() > patient_until:
            return (others or failed)[0]
        time.sleep(0.1)

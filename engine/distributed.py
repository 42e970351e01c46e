"""One process or several, started by torchrun. The functions also work in a single process."""
import gc
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine import BadInput
from engine.device import pick_device

_signals = []                             # signals that asked this process to stop


def launch(gpus, device):
    """Replace this process by torchrun, which runs the same command in `gpus` processes, one per
    GPU (with --device cpu they share the CPU). Raises BadInput if there are too few GPUs."""
    if gpus > torch.cuda.device_count() and device != "cpu":
        raise BadInput(f"--gpus {gpus}: torch finds {torch.cuda.device_count()} CUDA GPUs here; "
                       f"with --device cpu {gpus} processes share the CPU")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc-per-node={gpus}", *sys.argv])


def start(device):
    """Join the other processes if torchrun started this one. device: "auto", "cpu" or "cuda"
    -> torch.device of this process"""
    device = pick_device(device)
    torch.backends.cudnn.benchmark = True                  # sizes repeat: find the fastest kernels
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Rank 0 may download or list a million files while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    """Print a line, in rank 0 only."""
    if rank() == 0:
        print(line, flush=True)


def share(indices):
    """This process's part of a batch."""
    return indices[rank()::world()]


def total(tensor):
    """The sum of a tensor over all processes."""
    tensor = tensor.clone()
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor):
    """The average of a tensor over all processes."""
    return total(tensor) / world()


def agreed(value):
    """Rank 0's value, any plain Python object, in all processes."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def barrier():
    """Wait until every process has reached this line."""
    if world() > 1:
        dist.barrier()


def data_parallel(model, compiled=False):
    """The model to call in training: compiled if asked, and with several processes its backward
    pass averages the gradients."""
    if compiled:
        model = torch.compile(model)
    return DistributedDataParallel(model) if world() > 1 else model


def average_gradients(model):
    """For a model that data_parallel() does not wrap."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad = mean(p.grad)


def listen_for_signals():
    """From now on Ctrl-C, SIGTERM and a closed terminal only ask the run to stop."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)               # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:    # `nohup` ignores SIGHUP
            signal.signal(number, lambda number, frame: _signals.append(number))


def stop_requested(step=None):
    """-> the number of the signal that asked for a stop, or 0. With a step, all processes get the
    same answer, which they agree on in every tenth step."""
    number = _signals[0] if _signals else 0
    if step is None or world() == 1:
        return number
    if step % 10:
        return 0
    number = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def finish():
    """Leave the other processes, and let Ctrl-C and SIGTERM end this one again."""
    if dist.is_initialized():
        gc.collect()                      # DistributedDataParallel must go before its group
        dist.destroy_process_group()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave_if(number, where):
    """End this process if a signal asked for it. Its exit status tells which signal."""
    if number:
        say(f"stopped {where}; the same command, without --fresh, resumes")
        sys.exit(128 + number)

"""The folder, the processes and the signals of a run."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine import BadInput
from engine.devices import fast_bfloat16, pick_device
from engine.files import write_atomically


class Run:
    """One folder in out/: settings, log, checkpoints, pictures; and which process this is."""

    def __init__(self, settings):
        self.settings, self.folder = settings, Path(settings.out)
        self.asked, self.parent = 0.0, int(os.environ.get("LAUNCHER_PID", os.getppid()))
        self.again = "the same command" + " without --fresh" * settings.fresh
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.world > 1 and not dist.is_initialized():
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            # Whoever lists a million files, or encodes more of them, lets the others wait long.
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1),
                                    device_id=self.device if cuda else None)
        if settings.precision == "auto":
            settings.precision = self.choose_precision()
        self.stop = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):       # a terminal that closes sends the last
            if name != "SIGHUP" or signal.getsignal(getattr(signal, name, 0)) == signal.SIG_DFL:
                signal.signal(getattr(signal, name), self.ask_to_stop)

    def choose_precision(self):
        """What this run used before, else bfloat16 where it is fast; one answer for all."""
        fast = torch.tensor(float(fast_bfloat16(self.device)), device=self.device)
        if not self.settings.fresh:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                before = json.loads((self.folder / "settings.json").read_text())
                fast.fill_(before["precision"] == "bfloat16")
        if self.world > 1:
            dist.broadcast(fast, 0)
        return "bfloat16" if fast else "float32"

    def remember_settings(self):
        """Once a stage has accepted them: a refused command must leave no trace."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for half in [*self.folder.glob("*.pt.*.tmp"), *self.folder.glob("*.json*.*.tmp")]:
                half.unlink()                              # was killed while it wrote them
            write_atomically(json.dumps(self.everything, indent=1), self.folder / "settings.json")

    def ask_to_stop(self, number, frame):
        if self.stop:                                      # asked twice: do not wait for the step;
            if time.monotonic() - self.asked > 1:          # but one Ctrl-C may arrive twice, from
                sys.exit(128 + number)                     # the terminal and from the launcher
            return
        self.stop, self.asked = number, time.monotonic()
        when = "this step" if self.world == 1 else "the next tenth step"
        self.say(f"stopping after {when}; once more to stop at once")

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def log(self, entry):
        path = self.folder / "log.jsonl"
        try:
            if self.rank == 0:
                with open(path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
        except OSError as error:                           # when writing fails it names no file
            raise OSError(f"cannot write {path}: {error.strerror}") from None

    def forget_log_after(self, stage, step):
        """On resume: drop what was logged after the checkpoint, it will be logged again."""
        path = self.folder / "log.jsonl"
        if self.rank == 0 and path.exists():
            lines = []
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):   # cut short by a crash
                    entry = json.loads(line)
                    if entry["stage"] != stage or entry["step"] <= step:
                        lines.append(line + "\n")
            write_atomically("".join(lines), path)

    def seed(self, stage, step):
        """All randomness of one step, of one process."""
        parts = [self.settings.seed, ["tokenizer", "transformer"].index(stage), step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))

    def autocast(self):
        if self.settings.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def share(self, indices):
        """This process's part of a batch or of a data set."""
        return indices[self.rank::self.world]

    def asked_to_stop(self):
        """The signal that came, or SIGTERM if whoever started many processes is gone; 0: go on."""
        if self.world > 1 and os.getppid() != self.parent:
            self.stop = self.stop or signal.SIGTERM
        return self.stop

    def stopping(self, step):
        """The signal that asked us to stop, or 0; all processes agree on the step (every tenth)."""
        self.asked_to_stop()
        if self.world == 1 or step % 10:
            return self.stop if self.world == 1 else 0
        flag = torch.tensor(self.stop, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def total(self, value):
        """Sum over the processes. value: tensor of any shape"""
        if self.world > 1:
            dist.all_reduce(value := value.clone())
        return value

    def mean(self, value):
        """Average over the processes, once. value: tensor of any shape"""
        return self.total(value) / self.world

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def to_device(self, tensor):
        """Without waiting for the GPU to finish what it is doing."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def peak_memory(self):
        """The most that was in use on a GPU so far, as text."""
        if self.device.type != "cuda":
            return ""
        return f", {torch.cuda.max_memory_allocated(self.device) / 1e9:.2f} GB of the GPU at most"

    def hold(self, *arrays):
        """Arrays that fit beside a model (1 GB) go to the GPU once, as tensors; others stay where
        they are: in memory, or in a file."""
        in_memory = all(isinstance(array, np.ndarray) for array in arrays)
        if self.device.type != "cuda" or not in_memory or sum(a.nbytes for a in arrays) > 2 ** 30:
            return arrays
        signed = [a.astype(np.int32) if a.dtype == np.uint16 else a for a in arrays]
        return tuple(torch.from_numpy(array).to(self.device) for array in signed)

    def place(self, model, parts):
        """The model on this process's device; with --shard, a share of all its weights: each of
        `parts` is put together when it is needed and forgotten again (ZeRO 3, FSDP)."""
        if not self.settings.shard:
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # Nobody changes what a part returns in place, which is what torch warns of.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh, policy = init_device_mesh(self.device.type, (self.world,)), MixedPrecisionPolicy()
        if self.settings.precision == "bfloat16":          # or autocast would keep whole copies
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for part in parts:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)               # what is left, the residual stream's

    def wrap(self, model):
        """The model to train through: compiled if asked, averaged over processes if many."""
        if self.settings.compile:
            import torch._functorch.config as functorch
            functorch.donated_buffer = False               # an adaptive weight goes back twice more
            model = torch.compile(model)
        if self.world > 1 and not is_sharded(model):
            # Buffers are not copied from rank 0: the quantizer keeps them equal by itself. (The
            # option has a new name in torch 2.13, which torch 2.9 does not know.)
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            model = DistributedDataParallel(model, broadcast_buffers=False,
                                            gradient_as_bucket_view=True)
        return model

    def exchange(self, wrapped, now):
        """A context: do the processes average the gradients of this part of a batch, or later?
        With --shard always now, as nobody has room for whole gradients."""
        if isinstance(wrapped, DistributedDataParallel) and not now:
            return wrapped.no_sync()
        return contextlib.nullcontext()


def is_sharded(model):
    return hasattr(model, "set_requires_gradient_sync")


def launch(count):
    """This command in `count` processes on this machine, as `torchrun --standalone` would start
    it. -> the exit status of the first that failed, else 0

    Unlike torchrun, a signal is passed on and then waited for, however long saving takes; when one
    process fails, its own last line is the last."""
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
                process.send_signal(number)                # to one that has ended: does nothing
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # theirs too, until Run listens
    processes = [subprocess.Popen([sys.executable, *sys.argv],
                                  env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)))
                 for rank in range(count)]
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, pass_on)
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(0.1)
    failed = next(p for p in processes if p.poll() not in (None, 0))
    status = failed.returncode
    end = time.monotonic() + (60 if passed_on or status in (129, 130, 143) else 0.5)
    for process in processes:
        try:                                               # stopped on request: all save and end
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()                                 # it waits for one that is gone
    if status < 0 and not passed_on:                       # say it for one that could not
        raise BadInput(f"process {processes.index(failed)} of {count} was killed by signal "
                       f"{-status} (9: out of memory?); the same command goes on from the last "
                       "checkpoint, without --fresh")
    return 128 + passed_on[0] if status < 0 else status

"""What every script needs and no chapter explains: options, one-line errors, devices, files, and
the folder, the processes and the signals of a run."""
import argparse
import contextlib
import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import BadInput


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def number(kind, low):
    """argparse type: an int or float that is finite, at least `low` and no larger than 64 bits."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2 ** 63:                     # nan is neither
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {what} of {low} or more that "
                                             "fits in 64 bits")
        return value
    return parse


def whole_numbers(text):
    """argparse type: '1,2,3' -> (1, 2, 3)"""
    return tuple(number(int, 1)(part) for part in text.split(","))


def add_options(parser, classes, choices, zero_is_fine, left_out):
    """One --option per dataclass field; its help is the comment beside the field.

    choices: name -> allowed values; zero_is_fine: whole numbers that may be 0, the others start at
    1; left_out: fields that are no options."""
    done = set(left_out)
    for cls in classes:
        comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
        for f in fields(cls):
            if f.name in done:
                continue
            done.add(f.name)
            kind = {int: number(int, 0 if f.name in zero_is_fine else 1), tuple: whole_numbers,
                    float: number(float, -1 if f.name == "drop_path" else 0)}.get(f.type, f.type)
            how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
                   else dict(type=kind, choices=choices.get(f.name),
                             metavar={int: "N", float: "X", tuple: "N,N"}.get(f.type)))
            default = ",".join(map(str, f.default)) if f.type is tuple else f.default
            note = "" if default == "" else f" [{default}]"
            parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=(comments[f.name] + note).replace("%", "%%"), **how)


def one_line(main):
    """Run a script's main(); a user's mistake ends in one line and exit status 2. Of many processes
    the first to fail speaks: the others wait, and whoever started them ends them meanwhile."""
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        status = main()
    except (BadInput, OSError) as error:
        if os.environ.get("RANK", "0") != "0":             # rank 0 may be about to say the same
            give_way(3)
        line = (str(error) or type(error).__name__).splitlines()[-1]
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except torch.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: the GPU's memory is full ({str(error).splitlines()[0]}) "
              "use smaller batches, or in training --accumulate 2, --activation-checkpointing, "
              "--shard", file=sys.stderr)
        status = 2
    except RuntimeError as error:                          # a lost connection is no news: another
        if many and re.search("gloo|nccl|ncclcomm|socket|connection", str(error).lower()):
            give_way(10)                                   # process failed first, let it be heard
        raise
    if dist.is_initialized() and not status:               # others may wait where this one failed
        dist.destroy_process_group()
    sys.exit(status)


def give_way(seconds):
    """Time for another process to speak, and for the launcher to end this one."""
    run = getattr(signal.signal(signal.SIGTERM, signal.SIG_DFL), "__self__", None)
    time.sleep(0 if run and run.stop else seconds)
    if run and run.stop:                                   # it has been told to already
        sys.exit(128 + run.stop)


def clock(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} m" if seconds < 5400 \
        else f"{seconds / 3600:.1f} h"


def progress(parts, total, what="pictures", size=len):
    """Hand on `parts`, a generator or a list; `size` says how many things one holds. Whenever more
    than 3 s have passed since the start or the last line, say how far it is."""
    done, begin = 0, time.monotonic()
    said = begin
    for part in parts:
        yield part
        done, now = done + size(part), time.monotonic()
        if now - said > 3 and done < total:
            said, eta = now, clock((now - begin) / done * (total - done))
            print(f"  {done:,} of {total:,} {what} | eta {eta}", flush=True)


def pick_device(name, rank=0):
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no CUDA GPU that torch can use; try cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device mps: this machine has no Apple GPU; try cpu")
    torch.backends.cudnn.allow_tf32 = False                # float32 means float32
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def fast_bfloat16(device):
    """Does bfloat16 pay here? GPUs: ask. CPUs: some have units for it, others emulate it ten times
    slower, so time one small product of each kind."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, tries = torch.randn(256, 256).to(dtype), []
        for _ in range(5):
            begin = time.perf_counter()
            a @ a
            tries.append(time.perf_counter() - begin)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


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


def write_atomically(text, path):
    """Whoever reads `path` sees the old text or the new, never half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())                        # on the disk before the name is
        os.replace(temporary, path)
    except OSError as error:                               # a full disk names no file
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)

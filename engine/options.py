"""Options of the command line made from dataclasses, and one-line errors."""
import argparse
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from engine import BadInput


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

"""Command-line options made from a dataclass, and errors in one line."""
import argparse
import math
import sys
from dataclasses import field, fields
from pathlib import Path

import torch

from engine import BadInput


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a BadInput and whose options cannot be abbreviated."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def number(kind, low=0):
    """An argparse type: an int or a float that is finite and at least `low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2 ** 63:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} of at least {low}")
        return value
    return parse


def whole_numbers(text):
    """An argparse type: "1,2,3" -> (1, 2, 3)"""
    return tuple(number(int, 1)(part) for part in text.split(","))


def option(default, help, low=None, **how):
    """A dataclass field that is also a command-line option. low: the smallest number allowed (if
    None, 1 for an int and 0 for a float); `choices`, `nargs` and `metavar` are argparse's."""
    kind = type(default)
    if kind is bool:
        how["action"] = "store_true"
    elif kind in (int, float):
        low = int(kind is int) if low is None else low
        how.update(type=number(kind, low), metavar="N" if kind is int else "X")
    elif kind is tuple and "nargs" not in how:
        how.update(type=whole_numbers, metavar="N,N,...")
    shown = f" [{default}]" if default else ""
    how["help"] = (help + shown).replace("%", "%%")
    return field(default=default, metadata=how)


def read_options(argv, description, settings_class):
    """Parse a command line with an option for each field of a dataclass. -> {field: value} of the
    options that were typed"""
    parser = Parser(description)
    for f in fields(settings_class):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, **f.metadata)
    return vars(parser.parse_args(argv))


def run_main(main):
    """Run a script's main() and exit with its status. A user's mistake becomes one line and the
    exit status 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        line = ("the GPU's memory is full: use a smaller --batch-size, or in training "
                "--accumulate 2 or --activation-checkpointing")
    except (RuntimeError, ConnectionResetError) as error:  # the latter: killed while sending
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        line = ("a process that loads images was killed, perhaps because memory ran out: use "
                "fewer --workers; the same command resumes from the last checkpoint")
    except (BadInput, OSError) as error:
        line = (str(error) or type(error).__name__).splitlines()[-1]
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)

"""Options of the command line made from dataclasses, and one-line errors."""
import argparse
import difflib
import math
import os
import sys
import time
from dataclasses import field, fields
from pathlib import Path
from typing import get_args

import torch

from engine import BadInput
from engine.processes import lost_connection


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


def one_of(values):
    """argparse type: one of a few words. values: {word: what it means}"""
    def parse(text):
        if text not in values:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not one of {', '.join(values)}")
        return values[text]
    return parse


def option(default, help, **more):
    """A dataclass field that is also an option of the command line. `more` may hold `low`, the
    smallest number allowed, or `choices`; `nargs` and `metavar` are argparse's."""
    return field(default=default, metadata=dict(help=help, **more))


def plain_type(f):
    """The type of a field's values: int for `int` and for `int | None`."""
    return next((kind for kind in get_args(f.type) if kind is not type(None)), f.type)


def value_of(f):
    """Field of a dataclass -> the argparse type that reads its value."""
    kind, choices = plain_type(f), f.metadata.get("choices")
    if choices:
        return one_of({word: word for word in choices})
    if kind in (int, float):
        return number(kind, f.metadata.get("low", 1 if kind is int else 0))
    return {bool: one_of({"true": True, "false": False}), tuple: whole_numbers}.get(kind, kind)


def add_options(parser, cls, helps):
    """One --option per field of a dataclass that was made with `option` or has a text in `helps`.
    An option that was not typed is missing in the result."""
    for f in fields(cls):
        text = helps.get(f.name, f.metadata.get("help"))
        if text is None:
            continue
        kind = dict(action=argparse.BooleanOptionalAction)
        if f.type is not bool:
            words = ",".join(f.metadata.get("choices", ()))
            kind = dict(type=value_of(f), metavar=f"{{{words}}}" if words else
                        {int: "N", float: "X"}.get(plain_type(f)))
        kind |= {k: f.metadata[k] for k in ("nargs", "metavar") if k in f.metadata}
        note = "" if f.default in ("", None, False, ()) else f" [{f.default}]"
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(text + note).replace("%", "%%"), **kind)


def assignment(*classes):
    """argparse type: 'name=value' -> (name, value), for any field of these dataclasses."""
    known = {f.name: f for cls in classes for f in fields(cls)}

    def parse(text):
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name[:40], known, n=5, cutoff=0)
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not NAME=VALUE with the name of a "
                                             f"setting; the nearest are {', '.join(near)}")
        read = value_of(known[name])
        if "nargs" in known[name].metadata:                # of several words
            return name, tuple(map(read, value.split(",")))
        return name, read(value)
    return parse


def read_options(argv, description, classes):
    """The command line -> {field: value} of what was typed. classes: {dataclass: help texts of its
    fields that are options although they were not made with `option`}"""
    parser = OneLineParser(description=f"{description} Defaults in brackets; "
                           "engine/presets.py holds those of each data set.", allow_abbrev=False)
    for cls, helps in classes.items():
        add_options(parser, cls, helps)
    parser.add_argument("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
                        type=assignment(*classes), help="any other field of "
                        + ", ".join(cls.__name__ for cls in classes))
    typed = vars(parser.parse_args(argv))
    typed.update(typed.pop("set"))
    return typed


def one_line(main):
    """Run a script's main(). A user's mistake ends in one line and exit status 2. Of several
    processes only the first to fail prints; the others wait for the launcher to end them."""
    name, rank = Path(sys.argv[0]).name, int(os.environ.get("RANK", 0))
    try:
        status = main()
    except (BadInput, OSError) as error:
        if rank:                                           # rank 0 may be about to say the same
            time.sleep(3)
        line = (str(error) or type(error).__name__).splitlines()[-1]
        print(f"{name}: {line}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except torch.OutOfMemoryError as error:
        print(f"{name}: the GPU's memory is full ({str(error).splitlines()[0]}) "
              "use smaller batches, or in training --accumulate 2, --activation-checkpointing, "
              "--shard", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        # A lost connection is no news: another process failed first and is to be heard.
        if "RANK" in os.environ and lost_connection(error):
            time.sleep(10)
        raise
    sys.exit(status)

"""How far is it? Work that takes long says so, always with the time that is left."""
import contextlib
import time
from functools import partial


def clock(seconds):
    """-> "80 s", "12 m" or "3.4 h" """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} m" if seconds < 5400 \
        else f"{seconds / 3600:.1f} h"


def progress(parts, total, what="images", size=len, say=partial(print, flush=True)):
    """Yield the `parts` of a generator or a list, and say how far it is when more than 3 s have
    passed since the start or the last line. total: number of things in all parts; size(part): how
    many one part holds; say(line): prints it"""
    done, begin = 0, time.monotonic()
    said = begin
    for part in parts:
        yield part
        done, now = done + size(part), time.monotonic()
        if now - said > 3 and done < total:
            said, eta = now, clock((now - begin) / done * (total - done))
            say(f"  {done:,} of {total:,} {what} | eta {eta}")


class Stopwatch:
    """Counts the seconds since it was made, except those of its pauses."""

    def __init__(self):
        self.begin = time.monotonic()

    def seconds(self):
        return time.monotonic() - self.begin

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count."""
        since = time.monotonic()
        yield
        self.begin += time.monotonic() - since

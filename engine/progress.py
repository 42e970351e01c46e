"""How far is it? Lines for work that takes long, always with the time that is left."""
import contextlib
import time


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


class Stopwatch:
    """Seconds since it was made, less those of its pauses."""

    def __init__(self):
        self.begin = time.monotonic()

    def seconds(self):
        return time.monotonic() - self.begin

    @contextlib.contextmanager
    def paused(self):
        since = time.monotonic()
        yield
        self.begin += time.monotonic() - since

"""Progress lines with an ETA for slow loops."""
import time

from engine.distributed import say


def clock(seconds):
    """-> "80 s", "12 m" or "3.4 h" """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} m" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(parts, total, what="images", size=len):
    """Yield the parts of an iterable, and print a line every three seconds. total: number of things
    in all parts; size(part): how many one part holds"""
    done, begin = 0, time.monotonic()
    said = begin
    for part in parts:
        yield part
        done += size(part)
        now = time.monotonic()
        if now - said > 3 and done < total:
            said = now
            eta = clock((now - begin) / done * (total - done))
            say(f"  {done:,} of {total:,} {what} | eta {eta}")

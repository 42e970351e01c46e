"""Ctrl-C and SIGTERM ask a run to save and end; the same command then resumes it."""
import os
import signal
import sys
import time

from engine import BadInput
from engine.processes import lost_connection


class StopSignal:
    """Remembers that SIGINT, SIGTERM or SIGHUP (a terminal that closes) has come.

        with StopSignal(processes) as stop:
            ...
            if stop.agreed(step): save, then stop.leave(...)

    The former handlers come back at the end. again: what resumes the run."""

    def __init__(self, processes, again="the same command"):
        self.processes, self.again = processes, again
        self.number, self.since = 0, 0.0                   # the signal, and when it came
        self.former, self.pid = {}, os.getpid()

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)           # Windows has no SIGHUP
            # `nohup` ignores SIGHUP, and then so do we.
            if number and (name != "SIGHUP" or signal.getsignal(number) == signal.SIG_DFL):
                self.former[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.former.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.former.get(signal.SIGINT) == signal.SIG_IGN:         # as `launch` has started us
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Processes that were told to stop end at different times. An error that follows from this
        # is no news, and a mistake that all of them notice is reported by rank 0.
        rank = self.processes.rank
        if self.number and (lost_connection(error)
                            or rank and isinstance(error, (BadInput, OSError))):
            sys.exit(128 + self.number)

    def receive(self, number, frame):
        """The handler. A second signal ends the process at once; but the same Ctrl-C may arrive
        twice, from the terminal and from the launcher."""
        if os.getpid() != self.pid:                        # a worker that was forked a moment ago
            return
        if not self.number:
            self.number, self.since = number, time.monotonic()
            when = "this step" if self.processes.world == 1 else "the next tenth step"
            self.processes.say(f"stopping after {when}; once more to stop at once")
        elif time.monotonic() - self.since > 1:
            sys.exit(128 + number)

    def asked(self):
        """The number of the signal that came, else 0. A launcher that has died counts as SIGTERM:
        nobody else would tell its processes."""
        if self.processes.launcher_is_gone():
            self.number = self.number or signal.SIGTERM
        return self.number

    def agreed(self, step):
        """The same, but all processes get the same answer. They ask each other every tenth step."""
        if self.processes.world == 1:
            return self.asked()
        if step % 10:
            return 0
        self.number = self.processes.largest(self.asked())
        return self.number

    def leave(self, where):
        """End this process. where: what was reached, such as "at step 7" """
        self.processes.say(f"stopped {where}: {self.again} resumes from there")
        sys.exit(128 + self.number)

"""Ctrl-C and SIGTERM ask a run to save and to end. The same command then resumes it."""
import os
import signal
import sys
import time

from engine import BadInput
from engine.processes import lost_connection


class StopSignal:
    """Remembers that SIGINT, SIGTERM or SIGHUP (the terminal was closed) has arrived.

        with StopSignal(processes) as stop:
            ...
            if stop.agreed(step): save, then stop.leave(...)

    The former handlers are restored at the end. again: the command that resumes the run."""

    def __init__(self, processes, again="the same command"):
        self.processes, self.again = processes, again
        self.number, self.since = 0, 0.0                   # the signal, and when it arrived
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
        # Processes that were told to stop do not end at the same moment, and the last ones lose
        # their connection. Mistakes that all processes notice are reported by rank 0 alone.
        rank = self.processes.rank
        if self.number and (lost_connection(error)
                            or rank and isinstance(error, (BadInput, OSError))):
            sys.exit(128 + self.number)

    def receive(self, number, frame):
        """The handler. A second signal ends the process at once, unless it arrives within a second:
        the terminal and the launcher both deliver the same Ctrl-C."""
        if os.getpid() != self.pid:                        # a loading worker that was just forked
            return
        if not self.number:
            self.number, self.since = number, time.monotonic()
            when = "this step" if self.processes.world == 1 else "the next tenth step"
            self.processes.say(f"stopping after {when}; once more to stop at once")
        elif time.monotonic() - self.since > 1:
            sys.exit(128 + number)

    def asked(self):
        """-> number of the signal that arrived, 0 if none did. A launcher that has died counts as
        SIGTERM, since it can no longer pass signals on."""
        if self.processes.launcher_is_gone():
            self.number = self.number or signal.SIGTERM
        return self.number

    def agreed(self, step):
        """The same, with one answer for all processes. They exchange it in every tenth step."""
        if self.processes.world == 1:
            return self.asked()
        if step % 10:
            return 0
        self.number = self.processes.largest(self.asked())
        return self.number

    def leave(self, reached):
        """Exit with the status of the signal. reached: such as "at step 7" """
        self.processes.say(f"stopped {reached}: {self.again} resumes from there")
        sys.exit(128 + self.number)

"""The folder of a run: its settings, its log, its checkpoints, and a lock."""
import contextlib
import json
from pathlib import Path

from engine import BadInput
from engine.files import write_atomically


class RunFolder:
    """Used as `with RunFolder(path) as folder:`. A folder belongs to one run at a time, and a
    command that is refused leaves no new folder behind.

    writes: may this process write? With several processes only rank 0 does; in the others every
    method that writes does nothing. Raises BadInput if another run uses the folder."""

    def __init__(self, path, writes=True):
        self.path, self.writes, self.lock = Path(path), writes, None

    def __enter__(self):
        if self.writes:
            self.made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")
            self.take_lock()
        return self

    def __exit__(self, *error):
        if self.writes:
            self.lock.close()
            if self.made and [path.name for path in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                with contextlib.suppress(OSError):         # another run may have come into out/
                    for path in self.made:
                        path.rmdir()

    def take_lock(self):
        """The operating system releases the lock when this process ends, also when it is killed.
        Loading workers may live longer, but this kind of lock is not inherited by forks."""
        try:
            import fcntl
        except ImportError:                                # Windows: a second run is not noticed
            return
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.lock.close()
            raise BadInput(f"{self.path} is in use by another run; wait until it ends or stop it, "
                           "or give another folder with --out") from None
        except OSError:                                    # a network disk without locks
            return

    def checkpoint(self, stage):
        """-> path of the checkpoint of the stage "tokenizer" or "transformer\""""
        return self.path / f"{stage}.pt"

    def settings(self):
        """-> dict of the settings of the last run, empty if there was none"""
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((self.path / "settings.json").read_text())
            return settings if isinstance(settings, dict) else {}
        return {}

    def begin(self, stage, step, settings):
        """Prepare the folder for a stage that begins at `step`: write settings.json, remove files
        that a killed process left half written, and drop the log lines of later steps, because
        these steps will be logged again."""
        if not self.writes:
            return
        for half in [*self.path.glob("*.pt.*.tmp"), *self.path.glob("*.json*.*.tmp")]:
            half.unlink()
        write_atomically(json.dumps(settings, indent=1), self.path / "settings.json")
        log = self.path / "log.jsonl"
        if log.exists():
            kept = [line for line in log.read_text().splitlines() if keeps(line, stage, step)]
            write_atomically("".join(line + "\n" for line in kept), log)

    def log(self, entry):
        """Append a dict to log.jsonl."""
        path = self.path / "log.jsonl"
        try:
            if self.writes:
                with open(path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
        except OSError as error:                           # when writing fails it names no file
            raise OSError(f"cannot write {path}: {error.strerror}") from None

    def remove(self, name):
        """Remove a file, if it is there."""
        if self.writes:
            (self.path / name).unlink(missing_ok=True)


def keeps(line, stage, step):
    """Does this line of the log stay when `stage` begins at `step`? A line that a crash cut short
    does not."""
    try:
        entry = json.loads(line)
        return entry["stage"] != stage or entry["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False

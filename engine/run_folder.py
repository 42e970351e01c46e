"""The folder of a run: its settings, its log, its checkpoints, and a lock."""
import contextlib
import json
from pathlib import Path

from engine import BadInput
from engine.files import write_atomically


class RunFolder:
    """Used as `with RunFolder(path) as folder:`. It belongs to one run at a time, and a command
    that is refused leaves no new folder behind.

    path: Path of the folder; writes: False in every process but one, whose methods that write then
    do nothing. Raises BadInput if another run holds the folder."""

    def __init__(self, path, writes=True):
        self.path, self.writes, self.lock = Path(path), writes, None

    def __enter__(self):
        if self.writes:
            self.is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")
            self.take_lock()
        return self

    def __exit__(self, *error):
        if self.writes:
            self.lock.close()
            if self.is_new and [path.name for path in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def take_lock(self):
        """The system lets go of the lock when this process ends, however it ends. The lock is of
        the kind that forked loading workers do not inherit: they may live longer."""
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
        except OSError:                                    # a network disk that knows no locks
            return

    def checkpoint(self, stage):
        """Stage "tokenizer" or "transformer" -> the path of its checkpoint."""
        return self.path / f"{stage}.pt"

    def settings(self):
        """What this folder was last used with: a dict, empty if there is none."""
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((self.path / "settings.json").read_text())
            return settings if isinstance(settings, dict) else {}
        return {}

    def begin(self, stage, step, settings):
        """A command was accepted and starts `stage` at `step`. Writes settings.json, removes files
        that a killed process left half written, and drops log lines of later steps, which will be
        logged again."""
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
    """Is this line of the log of another stage, or of a step up to `step`? A line that a crash cut
    short is not kept."""
    try:
        entry = json.loads(line)
        return entry["stage"] != stage or entry["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False

"""Files that are written whole or not at all."""
import os
from pathlib import Path


def write_atomically(text, path):
    """Whoever reads `path` sees the old text or the new, never half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())                        # on the disk before the name is
        os.replace(temporary, path)
    except OSError as error:                               # a full disk names no file
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)

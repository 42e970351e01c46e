"""Files that are written whole or not at all, and files that are fetched from the network once."""
import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from engine import BadInput
from engine.progress import progress

DOWNLOADS = Path(__file__).resolve().parents[1] / "data" / "downloads"


@contextlib.contextmanager
def written_whole(path):
    """A file open for writing bytes. A reader of `path` sees the old bytes or all of the new ones.
    Raises OSError that names `path`: that of a full disk names no file."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # the bytes must be on the disk before the name is
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(text, path):
    with written_whole(path) as file:
        file.write(text.encode())


def download(url, path, sha256=""):
    """Fetch url -> path, with progress. `path` appears only when it is whole and has this sha256.
    An interrupted download leaves path.part, from which the next one goes on. Of several processes
    one downloads and the others wait. Raises BadInput."""
    lock = Path(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            with contextlib.suppress(ImportError, OSError):     # Windows; some network disks
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)        # gone when the process ends, however
            if not path.exists():               # another process may have fetched it meanwhile
                receive(url, path, sha256)
        lock.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:       # URLError is an OSError
        raise BadInput(f"could not download {url} ({error or type(error).__name__}): run the "
                       f"same command again, or put the file at {path}") from None


def receive(url, path, sha256):
    """Append to path.part what it lacks, then give it its name."""
    part = Path(f"{path}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()                           # nothing follows these bytes: are they of another?
        return receive(url, path, sha256)
    with answer, open(part, "ab") as file:
        if answer.status != 206:                # the server sends all of it
            file.truncate(have := 0)
        if "Content-Length" not in answer.headers:
            raise OSError("the server does not say how long it is")
        total = have + int(answer.headers["Content-Length"])
        print(f"downloading {url} to {path}, {total / 1e6:.0f} MB"
              + f", {have / 1e6:.0f} MB of it are here" * (have > 0), flush=True)
        for chunk in progress(iter(lambda: answer.read(1 << 20), b""), total - have, "bytes"):
            file.write(chunk)
    if (size := part.stat().st_size) != total:
        raise OSError(f"broke off after {size} of {total} bytes")
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise OSError(f"removed, because its sha256 is {found}, not {sha256}")
    os.replace(part, path)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

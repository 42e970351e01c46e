"""Files that are written whole or not at all, and files that are fetched from the network once."""
import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import zipfile
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
    """Fetch url -> path, with progress. `path` appears only when it is whole and has this sha256,
    or the one that the server tells. An interrupted download leaves path.part, from which the next
    one goes on. Of several processes one downloads and the others wait. Raises BadInput."""
    part, lock = Path(f"{path}.part"), Path(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            with contextlib.suppress(ImportError, OSError):     # Windows; some network disks
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)        # gone when the process ends, however
            if not path.exists():               # another process may have fetched it meanwhile
                told = receive(url, part)
                if reason := damage(part, sha256 or told):
                    part.unlink()
                    raise OSError(f"{reason}; it was removed")
                os.replace(part, path)
        lock.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:       # URLError is an OSError
        raise BadInput(f"could not download {url} ({error or type(error).__name__}): the same "
                       f"command goes on from there, or put the file at {path}") from None


class Redirects(urllib.request.HTTPRedirectHandler):
    """Hugging Face tells a file's sha256 in the answer that names the server which holds it."""
    sha256 = ""

    def redirect_request(self, request, file, code, message, headers, url):
        if found := re.fullmatch('"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", "")):
            self.sha256 = found[1]
        return super().redirect_request(request, file, code, message, headers, url)


def receive(url, part):
    """Append to `part` what it lacks. -> the sha256 that the server tells, or "" """
    have, redirects = part.stat().st_size if part.exists() else 0, Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:                   # 416: nothing comes after these bytes ...
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()                       # ... because they are of another file
            return receive(url, part)
        return redirects.sha256
    with answer, open(part, "ab") as out:
        begins = f"bytes {have}-"
        if answer.status != 206:                # no part yet, or the server sends all of it
            out.truncate(have := 0)
        elif not answer.headers.get("Content-Range", begins).startswith(begins):
            raise OSError(f"the server sent {answer.headers['Content-Range']}, not from {have} on")
        if "Content-Length" not in answer.headers:
            raise OSError("the server does not say how long it is")
        total = have + int(answer.headers["Content-Length"])
        print(f"downloading {url} to {part.with_suffix('')}, {total / 1e6:.0f} MB"
              + f", {have / 1e6:.0f} MB of it are here" * (have > 0), flush=True)
        for chunk in progress(iter(lambda: answer.read(1 << 20), b""), total - have, "bytes"):
            out.write(chunk)
    if part.stat().st_size != total:
        raise OSError(f"broke off after {part.stat().st_size} of {total} bytes")
    return redirects.sha256


def damage(path, sha256=""):
    """What is wrong with a file, as text, or "". A checkpoint is a zip file with checksums of its
    own, which torch ignores: they are checked where no sha256 is known."""
    if sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            return f"damaged: its sha256 is {digest.hexdigest()}, not {sha256}"
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if name := archive.testzip():
                    return f"damaged in its part {name}"
        except Exception as error:              # damaged archives raise nearly anything
            return f"damaged: {error}"
    return ""

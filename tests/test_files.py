"""Files are written whole or not at all; downloads go on where they stopped, are checked, and are
made by one process at a time."""
import contextlib
import errno
import hashlib
import http.server
import io
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import BadInput, files, released


STARTS_ANEW = ("no ranges", "no length", "from the start")


class Hub(http.server.ThreadingHTTPServer):
    """A web server on this machine. .files: name -> bytes; .seen: (name, Range or None) of every
    request; .sent: bytes; .mode: how it answers; .cut: how many bytes it sends before it hangs up;
    .tells: the sha256 that it tells in a redirection, as Hugging Face does."""

    daemon_threads = False               # closing it waits until the last answer has been counted

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.files, self.seen, self.sent = {}, [], 0
        self.mode, self.cut, self.tells = "ranges", None, None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, name, wanted = self.server, self.path[1:], self.headers.get("Range")
        if hub.tells and not name.startswith("cdn/"):
            return self.start(302, ("Location", f"/cdn/{name}"),
                              ("X-Linked-Etag", f'"{hub.tells}"'), ("Content-Length", 0))
        name = name.removeprefix("cdn/")
        hub.seen.append((name, wanted))
        body = hub.files.get(name, b"")
        begin = int(wanted[6:-1]) if wanted and hub.mode not in STARTS_ANEW else 0
        if name not in hub.files:
            return self.start(404, ("Content-Length", 0))
        if wanted and begin >= len(body):
            whole = 1 if hub.mode == "another file" else begin
            return self.start(416, ("Content-Range", f"bytes */{whole}"), ("Content-Length", 0))
        headers = [] if hub.mode == "no length" else [("Content-Length", len(body) - begin)]
        if wanted and hub.mode != "no ranges":
            headers.append(("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}"))
        self.start(206 if len(headers) > 1 else 200, *headers)
        with contextlib.suppress(OSError):                 # the other side may hang up
            hub.sent += self.wfile.write(body[begin:][:hub.cut])

    def start(self, status, *headers):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and an empty folder for downloads, hub.folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    with Hub() as hub:
        hub.folder = files.DOWNLOADS
        yield hub
        hub.shutdown()


def some_bytes(size):
    return np.random.default_rng(0).bytes(size)


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def refused(*arguments):
    """download() raises BadInput in one line that names the address and the file. -> the line"""
    with pytest.raises(BadInput) as error:
        files.download(*arguments)
    line = str(error.value)
    assert "\n" not in line and arguments[0] in line and str(arguments[1]) in line
    return line


@given(size=st.integers(0, 3000), shares=st.lists(st.floats(0, 0.99), max_size=3))
def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path_factory, size, shares):
    path = tmp_path_factory.mktemp("download") / "new" / "a.pth"
    part, wanted, body = path.with_name("a.pth.part"), [None], some_bytes(size)
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        patch.setenv("no_proxy", "127.0.0.1")
        hub.files["a.pth"] = body
        for share in shares if size else ():
            have = part.stat().st_size if part.exists() else 0
            hub.cut = int((size - have) * share)
            assert "broke off" in refused(hub.url + "a.pth", path) and not path.exists()
            wanted.append(f"bytes={have + hub.cut}-" if have + hub.cut else None)
        hub.cut = None
        files.download(hub.url + "a.pth", path)
        hub.shutdown()
    assert path.read_bytes() == body and list(path.parent.iterdir()) == [path]
    assert hub.seen == [("a.pth", header) for header in wanted]
    assert hub.sent == size, "no byte was sent twice"


OUT = io.BytesIO()
with zipfile.ZipFile(OUT, "w") as archive:
    archive.writestr("weights", some_bytes(1000))
PLAIN, ZIP = some_bytes(1000), OUT.getvalue()


@pytest.mark.parametrize("mode, body, part, reason, requests", [
    ("ranges", PLAIN, PLAIN[:400], None, 1),               # goes on
    ("no ranges", PLAIN, PLAIN[:400], None, 1),            # sends all of it again
    ("ranges", PLAIN, PLAIN, None, 1),                     # 416: nothing is missing
    ("another file", PLAIN, PLAIN + b"more", None, 2),     # 416: what is here is of another file
    ("ranges", ZIP, ZIP[:400] + bytes(99), "damaged", 1),
    ("caller's sha256", PLAIN, bytes(400), "damaged", 1),
    ("server's sha256", PLAIN, bytes(400), "damaged", 1),
    ("no length", PLAIN, b"", "how long it is", 1),
    ("from the start", PLAIN, PLAIN[:400], "bytes 0-999", 1)])    # 206, but of the wrong bytes
def test_every_answer_ends_in_the_right_file_or_in_a_line(hub, mode, body, part, reason, requests):
    hub.files["a.pth"], hub.mode, path = body, mode, hub.folder / "a.pth"
    hub.tells = sha256(body) if "server" in mode else None
    arguments = hub.url + "a.pth", path, sha256(body) if "caller" in mode else ""
    path.parent.mkdir()
    path.with_name("a.pth.part").write_bytes(part)
    if reason:
        assert reason in refused(*arguments) and not path.exists()
    if reason in (None, "damaged"):                        # then the second attempt is right
        files.download(*arguments)
        assert path.read_bytes() == body and list(path.parent.iterdir()) == [path]
    assert len(hub.seen) == requests + (reason == "damaged")
    assert hub.seen[0][1] == (f"bytes={len(part)}-" if part else None)


def test_a_failed_download_says_where_to_put_the_file(hub):
    assert "404" in refused(hub.url + "a.pth", hub.folder / "a.pth")
    assert "refused" in refused("http://127.0.0.1:9/a.pth", hub.folder / "a.pth")
    (hub.folder / "file").write_text("a file")
    assert "File exists" in refused(hub.url + "a.pth", hub.folder / "file" / "a.pth")


def test_released_weights_are_fetched_once_and_what_does_not_load_is_refused(hub, monkeypatch):
    monkeypatch.setattr(released, "URL", hub.url)
    out = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, out)
    hub.files["var_d16.pth"] = out.getvalue()
    for _ in range(2):
        assert released.fetch("var_d16.pth")["weight"].sum() == 2 and len(hub.seen) == 1
    (hub.folder / "var_d16.pth").write_bytes(b"no weights")
    with pytest.raises(BadInput, match="var_d16.pth.*remove it to download it again"):
        released.fetch("var_d16.pth")


def test_two_that_fetch_a_file_at_once_send_for_it_once(hub):
    """Both would append to the same part. A lock is of an open file, not of a process."""
    hub.files["a.pth"], path = some_bytes(1 << 20), hub.folder / "a.pth"
    together = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: together.wait() + 1 and files.download(hub.url + "a.pth", path),
                      range(2)))
    assert path.read_bytes() == some_bytes(1 << 20) and list(path.parent.iterdir()) == [path]
    assert len(hub.seen) == 1


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomically("old", path)
    with pytest.raises(ZeroDivisionError), files.written_whole(path) as file:
        file.write(b"half of the n")
        1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def full_disk(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
        files.write_atomically("new", path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

"""Files are written whole or not at all; downloads go on where they stopped, are checked, and are
made by one process at a time."""
import contextlib
import errno
import hashlib
import http.server
import io
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import BadInput, files, released


class Hub(http.server.ThreadingHTTPServer):
    """A web server on this machine. .files: name -> bytes; .seen: (name, Range or None) of every
    request; .sent: bytes; .ranges: does it know them? .tells: does it tell a length? .cut: how many
    bytes it sends before it hangs up."""

    daemon_threads = False               # closing it waits until the last answer has been counted

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.files, self.seen, self.sent, self.ranges, self.cut = {}, [], 0, True, None
        self.tells = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, name, wanted = self.server, self.path[1:], self.headers.get("Range")
        hub.seen.append((name, wanted))
        body = hub.files.get(name, b"")
        begin = int(wanted[6:-1]) if wanted and hub.ranges else 0
        status = 404 if name not in hub.files else 200
        if begin:
            status = 206 if begin < len(body) else 416
        self.send_response(status)
        if hub.tells:
            self.send_header("Content-Length", str(max(0, len(body) - begin)))
        self.end_headers()
        with contextlib.suppress(OSError):                 # the other side may hang up
            hub.sent += self.wfile.write(body[begin:][:hub.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and an empty folder for downloads, hub.folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    with Hub() as hub:
        hub.folder = files.DOWNLOADS
        hub.folder.mkdir()
        yield hub
        hub.shutdown()


def some_bytes(size):
    return np.random.default_rng(0).bytes(size)


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


@pytest.mark.parametrize("ranges, part, damaged, requests", [
    (True, 400, False, 1), (False, 400, False, 1),         # without ranges all of it comes again
    (True, 1009, False, 2),                                # more than there is: of another file
    (True, -400, True, 2)])                                # 400 wrong bytes
def test_every_answer_ends_in_the_right_file(hub, ranges, part, damaged, requests):
    hub.files["a.pth"], hub.ranges, path = some_bytes(1000), ranges, hub.folder / "a.pth"
    arguments = hub.url + "a.pth", path, hashlib.sha256(some_bytes(1000)).hexdigest()
    path.with_name("a.pth.part").write_bytes(bytes(400) if part < 0 else some_bytes(part))
    if damaged:
        assert "sha256" in refused(*arguments) and not list(hub.folder.glob("*.part"))
    files.download(*arguments)
    assert path.read_bytes() == some_bytes(1000) and list(hub.folder.iterdir()) == [path]
    assert len(hub.seen) == requests and hub.seen[0][1] == f"bytes={abs(part)}-"


def test_a_failed_download_says_where_to_put_the_file(hub):
    assert "404" in refused(hub.url + "a.pth", hub.folder / "a.pth")
    hub.files["a.pth"], hub.tells = some_bytes(1000), False
    assert "how long" in refused(hub.url + "a.pth", hub.folder / "a.pth")
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


def test_a_process_waits_while_another_fetches_the_file_and_takes_what_it_fetched(hub):
    """Both would append to the same part. A lock is of an open file, not of a process."""
    fcntl = pytest.importorskip("fcntl")
    hub.files["a.pth"], path = b"from the net", hub.folder / "a.pth"
    second = threading.Thread(target=files.download, args=(hub.url + "a.pth", path))
    with open(hub.folder / "a.pth.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        time.sleep(0.3)                                    # it would ask for the file meanwhile
        path.write_bytes(b"from the first")
    second.join()
    assert path.read_bytes() == b"from the first" and hub.seen == []


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

"""Files are written whole or not at all; downloads go on where they stopped, are checked, and are
made by one process at a time."""
import contextlib
import errno
import hashlib
import http.server
import io
import multiprocessing
import os
import threading
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import BadInput, files


class Hub:
    """A web server on this machine. .files: name -> bytes; .seen: (name, Range or None) of every
    request; .mode: how it answers; .cut: how many bytes it sends before it hangs up; .tells: the
    sha256 that it tells on the way, as Hugging Face does; .halfway(): called inside a file."""

    def __init__(self):
        self.files, self.seen, self.sent = {}, [], 0
        self.mode, self.cut, self.tells, self.halfway = "ranges", None, None, lambda: None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        name, wanted = request.path[1:], request.headers.get("Range")
        if self.tells and not name.startswith("cdn/"):
            request.send_response(302)
            for header in (("Location", f"/cdn/{name}"), ("X-Linked-Etag", f'"{self.tells}"'),
                           ("Content-Length", "0")):
                request.send_header(*header)
            return request.end_headers()
        name = name.removeprefix("cdn/")
        self.seen.append((name, wanted))
        body = self.files.get(name, b"")
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        headers, status = {}, 206 if wanted else 200
        if self.mode in ("no ranges", "from the start"):
            begin, status = 0, 200 if self.mode == "no ranges" else 206
        if name not in self.files:
            status = 404
        elif begin >= len(body) and wanted and status == 206:
            status, body = 416, b""
            headers["Content-Range"] = f"bytes */{1 if self.mode == 'another file' else begin}"
        request.send_response(status)
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        if self.mode != "no length":
            headers["Content-Length"] = len(body) - begin if status < 300 else 0
        for header in headers.items():
            request.send_header(*map(str, header))
        request.end_headers()
        if status < 300:
            self.send(request, body[begin:])

    def send(self, request, body):
        cut, half = len(body) if self.cut is None else self.cut, len(body) // 2
        with contextlib.suppress(OSError):                 # the other side may hang up
            for part in (body[:cut][:half], body[:cut][half:]):
                request.wfile.write(part)
                request.wfile.flush()
                self.sent += len(part)
                self.halfway()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and an empty folder for downloads, hub.folder."""
    hub = Hub()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    hub.folder = files.DOWNLOADS
    yield hub
    hub.close()


def some_bytes(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def refused(*arguments):
    """download() raises BadInput in one line that names the address. -> the line"""
    with pytest.raises(BadInput) as error:
        files.download(*arguments)
    assert "\n" not in str(error.value) and arguments[0] in str(error.value)
    return str(error.value)


@given(size=st.integers(0, 3000), shares=st.lists(st.floats(0, 0.99), max_size=3),
       told=st.sampled_from(["", "by the caller", "by the server"]))
def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path_factory, size, shares, told):
    hub, path = Hub(), tmp_path_factory.mktemp("download") / "new" / "a.pth"
    part, wanted = path.with_name("a.pth.part"), [None]
    hub.files["a.pth"] = body = some_bytes(size)
    hub.tells = sha256(body) if "server" in told else None
    arguments = hub.url + "a.pth", path, sha256(body) if "caller" in told else ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        for share in shares if size else ():
            have = part.stat().st_size if part.exists() else 0
            hub.cut = int((size - have) * share)
            assert "the same command goes on" in refused(*arguments) and not path.exists()
            wanted.append(f"bytes={have + hub.cut}-" if have + hub.cut else None)
        hub.cut = None
        files.download(*arguments)
    hub.close()
    assert path.read_bytes() == body and list(path.parent.iterdir()) == [path]
    assert hub.seen == [("a.pth", header) for header in wanted]
    assert hub.sent == size, "no byte was sent twice"


@pytest.mark.parametrize("mode, left, requests", [
    ("ranges", b"half", 1),                                # goes on
    ("no ranges", b"wrong", 1),                            # sends all of it again
    ("ranges", b"whole", 1),                               # 416: nothing is missing
    ("another file", b"whole file and more", 2),           # 416: what is here is of another file
    ("ranges", b"", 1)])
def test_every_answer_to_what_is_already_here_ends_in_the_same_file(
        hub, tmp_path, mode, left, requests):
    hub.files["a.pth"] = body = some_bytes(1000)
    hub.mode, path = mode, tmp_path / "a.pth"
    left = {b"half": body[:400], b"whole": body}.get(left, 200 * left)
    (tmp_path / "a.pth.part").write_bytes(left)
    files.download(hub.url + "a.pth", path)
    assert path.read_bytes() == body and list(tmp_path.iterdir()) == [path]
    assert len(hub.seen) == requests and hub.seen[0][1] == (f"bytes={len(left)}-" if left else None)


@pytest.mark.parametrize("known", ["by the caller", "by the server", "no, but it is a zip file"])
def test_a_damaged_part_of_the_right_length_is_refused_and_fetched_again(hub, tmp_path, known):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("weights", some_bytes(1000))
    hub.files["a.pth"], path = out.getvalue(), tmp_path / "a.pth"
    hub.tells = sha256(out.getvalue()) if "server" in known else None
    arguments = hub.url + "a.pth", path, sha256(out.getvalue()) if "caller" in known else ""
    (tmp_path / "a.pth.part").write_bytes(some_bytes(500))
    if "zip" in known:
        (tmp_path / "a.pth.part").write_bytes(out.getvalue()[:400] + bytes(100))
    line = refused(*arguments)
    assert "damaged" in line and not path.exists() and len(hub.seen) == 1
    files.download(*arguments)
    assert path.read_bytes() == out.getvalue() and list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_it_is_whole(hub, tmp_path, capsys):
    hub.files["a.pth"] = body = some_bytes(5 << 20)
    path, seen = tmp_path / "a.pth", []
    (tmp_path / "a.pth.part").write_bytes(body[:1 << 20])
    hub.halfway = lambda: seen.append(path.exists())
    files.download(hub.url + "a.pth", path)
    assert seen[:1] == [False] and path.read_bytes() == body
    out = capsys.readouterr().out
    assert hub.url + "a.pth" in out and "5 MB, 1 MB of it are here" in out


@pytest.mark.parametrize("wrong", ["404", "no length", "from the start", "refused", "no folder"])
def test_a_failed_download_is_one_line_that_says_where_to_put_the_file(hub, tmp_path, wrong):
    path, url = tmp_path / "new" / "a.pth", hub.url + "a.pth"
    hub.mode = wrong
    if wrong == "404":
        hub.files.clear()
    else:
        hub.files["a.pth"] = some_bytes(1000)
    if wrong == "refused":
        url = "http://127.0.0.1:9/a.pth"
    elif wrong == "no folder":
        path.parent.write_text("a file")
    elif wrong == "from the start":      # 206, but of the wrong bytes: appended they would not fit
        path.parent.mkdir()
        path.with_name("a.pth.part").write_bytes(hub.files["a.pth"][:400])
        wrong = "bytes 0-999"
    reason = {"no length": "how long it is", "no folder": "exists"}.get(wrong, wrong)
    line = refused(url, path)
    assert str(path) in line and reason in line.lower() and not path.exists(), line


def fetch_at_once(url, path, start):
    start.wait()
    files.download(url, path)


def test_two_processes_fetch_a_file_once(hub, tmp_path):
    """Both would append to the same part."""
    hub.files["a.pth"] = body = some_bytes(1 << 20)
    context, path = multiprocessing.get_context("fork"), tmp_path / "a.pth"
    start = context.Barrier(2)
    processes = [context.Process(target=fetch_at_once, args=(hub.url + "a.pth", path, start))
                 for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert path.read_bytes() == body and list(tmp_path.iterdir()) == [path]
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

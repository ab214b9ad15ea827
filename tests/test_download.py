"""`calrec download` against a local server that stalls, cuts off, errs, ignores ranges and serves wrong bytes."""

import gzip
import hashlib
import http.server
import json
import os
import re
import threading
import time

import pytest

from calrec_jax import cli
from calrec_jax.data.download import Patience, download
from calrec_jax.data.published import RELEASES, SUBSETS
from calrec_jax.errors import CalrecError

REVIEWS = gzip.compress(os.urandom(200_000), mtime=0)
METADATA = gzip.compress(b'{"asin": "i1"}\n', mtime=0)
FILES = {"/m/categoryFilesSmall/Toys_5.json.gz": REVIEWS, "/m/metaFiles2/meta_Toys.json.gz": METADATA}


class Server(http.server.ThreadingHTTPServer):
    """Answers from `files`; `script` holds, for a path, what to do with its next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.script, self.seen = dict(FILES), {}, []
        self.release = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the client hangs up on purpose


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        wanted = self.headers.get("Range")
        server.seen.append((path, wanted))
        steps = server.script.get(path, [])
        step = steps.pop(0) if steps else {}
        data = step.get("data", server.files.get(path))
        if data is None or "status" in step:
            self.answer(step.get("status", 404), b"no", step.get("headers", {}))
            return
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        ranged = wanted and not step.get("ignore_range") and self.headers.get("If-Range") == etag
        if ranged and begin >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        headers = {"ETag": etag, **step.get("headers", {})}
        if ranged:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:] if ranged else data
        self.answer(206 if ranged else 200, body, headers, step.get("cut"), step.get("stall"))

    def answer(self, status, body, headers, cut=None, stall=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if stall:
            self.wfile.flush()
            self.server.release.wait(20)
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


REVIEWS_PATH, METADATA_PATH = FILES


def fetch(server, folder, *, mirrors=("m",), tries=3, **settings):
    waits = []
    patience = Patience(tries=tries, timeout=0.5, wait=1.0, sleep=waits.append)
    urls = [mirror if "://" in mirror else f"{server.url}/{mirror}" for mirror in mirrors]
    files = download(folder, "2018", ["Toys"], mirrors=urls, patience=patience, **settings)
    assert [path.name for path in files] == ["Toys_5.json.gz", "meta_Toys.json.gz"]
    assert files[0].read_bytes() == REVIEWS and files[1].read_bytes() == METADATA
    assert not list(folder.glob("*.part*"))
    return waits


def test_files_arrive_are_recorded_and_checked_again(server, tmp_path, capsys):
    assert fetch(server, tmp_path) == []
    record = json.loads((tmp_path / "Toys_5.json.gz.download.json").read_text())
    assert record["sha256"] == hashlib.sha256(REVIEWS).hexdigest() and record["bytes"] == len(REVIEWS)
    assert record["url"] == f"{server.url}{REVIEWS_PATH}"
    assert RELEASES["2018"].page in capsys.readouterr().out
    fetch(server, tmp_path)
    assert len(server.seen) == 2 and "its checksum is right" in capsys.readouterr().out
    (tmp_path / "Toys_5.json.gz").write_bytes(b"changed")
    with pytest.raises(
        CalrecError, match=r"Toys_5\.json\.gz is not what was downloaded.*Delete it to download it again"
    ):
        fetch(server, tmp_path)


def test_a_file_of_ones_own_is_left_alone(server, tmp_path, capsys):
    (tmp_path / "Toys_5.json.gz").write_bytes(REVIEWS)
    fetch(server, tmp_path)
    assert [path for path, _ in server.seen] == [METADATA_PATH] and "left alone" in capsys.readouterr().out


def test_a_transfer_that_is_cut_off_goes_on_where_it_stopped(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"cut": 50_000}, {"cut": 30_000}]
    assert len(fetch(server, tmp_path)) == 2
    ranges = [wanted for path, wanted in server.seen if path == REVIEWS_PATH]
    assert ranges == [None, "bytes=50000-", "bytes=80000-"]


def test_a_server_that_stalls_is_given_up_and_resumed(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"cut": 70_000, "stall": True}]
    begin = time.monotonic()
    assert len(fetch(server, tmp_path)) == 1
    assert time.monotonic() - begin < 15
    assert server.seen[1] == (REVIEWS_PATH, "bytes=70000-")


def test_an_interrupted_command_goes_on(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"cut": 60_000}, {"status": 503}, {"status": 503}]
    with pytest.raises(CalrecError, match=r"answered 503, tried 2 times\. Run the same command again to go on"):
        fetch(server, tmp_path, tries=2)
    assert (tmp_path / "Toys_5.json.gz.part").stat().st_size == 60_000
    server.seen.clear()
    fetch(server, tmp_path)
    assert server.seen[0] == (REVIEWS_PATH, "bytes=60000-")


def test_a_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"cut": 50_000}, {"ignore_range": True}]
    fetch(server, tmp_path)
    assert server.seen[1] == (REVIEWS_PATH, "bytes=50000-")


def test_a_file_that_changed_meanwhile_is_not_patched_together(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"cut": 50_000, "data": gzip.compress(os.urandom(100_000))}]
    fetch(server, tmp_path)  # If-Range does not hold, so the whole new file comes


def test_retry_after_is_honoured_and_waits_grow(server, tmp_path):
    server.script[REVIEWS_PATH] = [{"status": 503, "headers": {"Retry-After": "7"}}, {"status": 429}]
    first, second = fetch(server, tmp_path)
    assert first == 7.0 and 2.0 <= second <= 2.5
    server.script[METADATA_PATH] = [{"status": 503, "headers": {"Retry-After": "3600"}}]
    (tmp_path / "meta_Toys.json.gz").unlink()
    with pytest.raises(CalrecError, match=r"asks to come back in 3600 s"):
        fetch(server, tmp_path)


def test_a_mirror_stands_in(server, tmp_path):
    mirrored = {path.replace("/m/", "/n/"): data for path, data in FILES.items()}
    server.files = mirrored
    fetch(server, tmp_path, mirrors=("m", "n"))  # 404 at the first
    server.files = {**FILES, **mirrored}
    for step in ({"data": REVIEWS[:-9]}, {"data": b"<html>Sign in</html>"}, {"data": b"other"}, {"status": 403}):
        (tmp_path / "Toys_5.json.gz").unlink()
        server.script[REVIEWS_PATH] = [step]
        fetch(server, tmp_path, mirrors=("m", "n"))
    dead = "http://127.0.0.1:9"
    (tmp_path / "Toys_5.json.gz").unlink()
    fetch(server, tmp_path, mirrors=(dead, "m"))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"status": 404}, "answered 404"),
        ({"status": 403}, "answered 403: not open to everybody"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "answered with a web page"),
        ({"data": b"<!doctype html>"}, "gave a web page"),
        ({"data": REVIEWS[:100] + b"\0\0\0\0" + REVIEWS[104:]}, "gave a damaged gzip"),
        ({"data": b""}, "gave nothing"),
    ],
)
def test_what_no_mirror_has_is_said_with_the_way_out(server, tmp_path, step, reason):
    server.script[REVIEWS_PATH] = [step]
    page = re.escape(RELEASES["2018"].page)
    with pytest.raises(
        CalrecError, match=rf"Toys_5\.json\.gz cannot be downloaded .*{reason}.*licence.*{page}.*category"
    ):
        fetch(server, tmp_path)
    assert not (tmp_path / "Toys_5.json.gz").exists()


def test_names_of_each_release_are_those_that_prepare_looks_for():
    from calrec_jax.data.readers import LAYOUTS

    for name, release in RELEASES.items():
        layout = LAYOUTS[name]
        assert release.metadata.rsplit("/", 1)[-1] == layout.metadata
        first = next(iter(release.reviews.values()))
        assert first[0].rsplit("/", 1)[-1] == layout.reviews
        assert set(release.reviews) <= set(SUBSETS)
        assert all(mirror.startswith("https://") for mirror in release.mirrors)


def test_the_command(server, tmp_path, capsys):
    flags = ["--layout=2018", "--category=Toys", f"--data_dir={tmp_path}", f"--mirror={server.url}/m"]
    assert cli.main(["download", *flags]) == 0
    assert (tmp_path / "Toys_5.json.gz").read_bytes() == REVIEWS
    assert cli.main(["download"]) == 1
    assert "--category is missing, for example: calrec download" in capsys.readouterr().err
    assert cli.main(["download", "--layout=2023", "--subset=5core", "--category=Toys"]) == 1
    assert "the release of 2023 has full, ratings, benchmark" in capsys.readouterr().err
    assert cli.main(["download", "--category=../x"]) == 1
    assert "--category=../x: a name as the release writes it" in capsys.readouterr().err

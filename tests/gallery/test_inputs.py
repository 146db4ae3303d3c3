"""Resolve files, folders and URLs, and download."""

import http.server
import os
import threading
import time

import pytest

from timm_coda.gallery import inputs
from timm_coda.gallery.inputs import InputError, fetched, find_sources


def test_names_of_results_never_collide(tmp_path):
    for name in ("a.png", "a.jpg", "A.gif", "a-2.png", "sub/a.png", "sub/b.2021.png", ".hidden.png", ".dir/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "a.png").touch()
    words = [str(tmp_path / "in"), str(tmp_path / "a.png"), "https://example.org/pictures/a.png?size=3"]
    stems = [source.stem for source in find_sources(words, tmp_path / "out")]
    assert sorted(stems) == sorted(["A", "a-2", "a-3", "a-4", "sub/a", "sub/b.2021", "a-5", "a-6"])


def test_names_of_links_are_safe(tmp_path):
    for word in ("https://example.org/", "https://example.org/..", "http://example.org/%2e%2e%2f%2e%2e%2fetc%2fpasswd"):
        stem = find_sources([word], tmp_path)[0].stem
        assert "/" not in stem and ".." not in stem and stem
    source = find_sources(["https://example.org/a%00b%0ac.png"], tmp_path)[0]
    assert source.stem == "a_b_c"


def test_linked_folders_are_followed_without_loops(tmp_path):
    for name in ("in/b/1.png", "in/z.png", "elsewhere/deep/2.png", "elsewhere/.hidden/3.png", "in/out/old.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (("in/a", "../elsewhere"), ("in/c", "b"), ("in/loop", "."), ("elsewhere/back", "../in")):
        os.symlink(target, tmp_path / link)
    os.symlink("../in/z.png", tmp_path / "in/file.png")
    stems = [source.stem for source in find_sources([str(tmp_path / "in")], tmp_path / "in/out")]
    assert stems == ["a/deep/2", "b/1", "file", "z"]


def test_names_that_cannot_be_printed(tmp_path):
    (tmp_path / "bell\x07.png").touch()
    source = find_sources([str(tmp_path)], tmp_path / "out")[0]
    assert source.name.endswith("/bell?.png")
    assert source.stem == "bell_"
    with fetched(source) as path:
        assert path.exists()


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/none.png":
            self.send_error(404)
            return
        if self.path == "/elsewhere.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        if self.path == "/large":
            self.send_header("Content-Length", "2000")
        elif self.path == "/broken.png":
            self.send_header("Content-Length", "50")
        self.end_headers()
        try:
            if self.path == "/drip":
                for _ in range(200):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            elif self.path == "/silent":
                time.sleep(2)
            else:
                self.wfile.write(b"x" * (5000 if self.path == "/endless" else 20))
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_links_are_downloaded_and_gone_afterwards(server, tmp_path):
    for place, ending in (("/cat.JPG", ".jpg"), ("/picture?id=3", ".png")):
        source = find_sources([server + place], tmp_path)[0]
        with fetched(source) as path:
            assert path.read_bytes() == b"x" * 20
            assert path.suffix == ending
        assert not path.parent.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/none.png", "HTTP Error 404"),
        ("/elsewhere.png", "Redirection to url .* is not allowed"),
        ("/large", "2,000 bytes, the limit is 1,000"),
        ("/endless", "more than 1,000 bytes"),
        ("/broken.png", "the connection broke after 20 of 50 bytes"),
        ("/silent", "timed out"),
        ("/drip", "too slow"),
    ],
)
def test_links_that_cannot_be_had(server, tmp_path, monkeypatch, place, message):
    monkeypatch.setattr(inputs, "MAX_DOWNLOAD", 1000)
    monkeypatch.setattr(inputs, "MAX_WAIT", 0.5)
    monkeypatch.setattr(inputs, "MAX_SECONDS", 0.5)
    source = find_sources([server + place], tmp_path)[0]
    with pytest.raises(InputError, match=message), fetched(source):
        raise AssertionError("it was downloaded")


def test_no_connection(tmp_path):
    source = find_sources(["http://127.0.0.1:9/x.png"], tmp_path)[0]
    with pytest.raises(InputError, match="cannot be downloaded"), fetched(source):
        raise AssertionError("it was downloaded")

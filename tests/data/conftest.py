"""What the data tests share: a private environment, the shared data, and a server to download from."""

import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SHARED = os.environ.get("BITFRONT_DATA")


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, and none reaches beyond this machine."""
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITFRONT_OPENML_URL", "http://127.0.0.1:9/closed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("BITFRONT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shared_file():
    """(name) -> path of a file of the shared data, or the test is skipped."""

    def find(name: str) -> Path:
        if not SHARED or not (Path(SHARED) / name).is_file():
            pytest.skip(f"needs {name}: set BITFRONT_DATA to the folder that holds it")
        return Path(SHARED) / name

    return functools.cache(find)


@dataclass
class Server:
    """Serves `files`; `faults` are taken one per request: a status, ("cut", bytes) or ("redirect", address)."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[object] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    serves_ranges: bool = True


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            fault = state.faults.pop(0) if state.faults else None
            body = state.files.get(self.path)
            if isinstance(fault, int) or body is None:
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            if isinstance(fault, tuple) and fault[0] == "redirect":
                self.send_response(302)
                self.send_header("Location", str(fault[1]))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.serves_ranges else 0
            if start and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            sent = body[start:]
            self.wfile.write(sent[: int(fault[1])] if isinstance(fault, tuple) else sent)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join(timeout=5)

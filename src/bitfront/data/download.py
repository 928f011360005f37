"""Fetches one file over http(s): resumes after a cut, checks the sum, and appears under its name only when
whole.

The bytes go to ``NAME.part`` beside the target. A cut connection is continued where it stopped (HTTP Range);
a file left by an earlier process is continued only where a checksum will prove the result. Two processes that
want the same file take turns (a lock file), and the second finds it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from bitfront.errors import DataError, DownloadError, one_of

Progress = Callable[[int, int | None], None]

SCHEMES = ("http", "https")
CHUNK_BYTES = 1 << 18
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses worth another try


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        tries: attempts in all; an attempt that brought bytes and was cut does not count against the next
            ones.
        backoff_s: wait before the second attempt, doubled each time.
        timeout_s: of connecting, and of each read.
    """

    tries: int = 4
    backoff_s: float = 1.0
    timeout_s: float = 30.0


def download(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    progress: Progress | None = None,
    advice: str = "",
    patience: Patience | None = None,
) -> Path:
    """Fetch `url` into `target`, unless it is there already. Returns `target`.

    Args:
        checksum: ``"md5:HEX"`` or ``"sha256:HEX"``.
        progress: called with (bytes done, bytes in all or None).
        advice: what to do without a network; ends every message of a failure.

    Raises:
        DownloadError: no network, a refusal of the server, a wrong checksum, an address that is not http(s).
        DataError: the folder of `target` cannot be written.
    """
    _check_scheme(url)
    patience = patience or Patience()
    _writable(target.parent)
    with _only_one(target):
        if target.exists():
            return target
        part = target.with_name(target.name + ".part")
        if checksum is None:
            part.unlink(missing_ok=True)
        resumed = part.exists()
        _fetch(url, part, progress, advice, patience)
        found = None if checksum is None else _sum(part, checksum)
        if found != checksum and resumed:
            # The old half may have been of another file: once more, from nothing.
            part.unlink()
            _fetch(url, part, progress, advice, patience)
            found = None if checksum is None else _sum(part, checksum)
        if found != checksum:
            part.unlink()
            raise DownloadError(
                f"{url} arrived whole but is not the file expected: its checksum is {found}, expected was "
                f"{checksum}; "
                f"it was thrown away. {advice}".strip()
            )
        part.replace(target)  # atomic: nobody ever sees half a file under this name
    return target


def fetch_json(url: str, *, advice: str = "", patience: Patience | None = None) -> dict[str, Any]:
    """The JSON object at `url`.

    Raises:
        DownloadError: as :func:`download`, or what arrives is not a JSON object.
    """
    _check_scheme(url)
    body = bytearray()

    def read(response: http.client.HTTPResponse, _: int) -> None:
        body[:] = response.read(1 << 24)

    _attempts(url, read, lambda: 0, advice, patience or Patience())
    try:
        value = json.loads(body)
    except ValueError as error:
        raise DownloadError(f"{url} did not answer with JSON but with {bytes(body[:60])!r}. {advice}") from error
    if not isinstance(value, dict):
        raise DownloadError(f"{url} answered with a {type(value).__name__}; needed is an object. {advice}")
    return value


def _fetch(url: str, part: Path, progress: Progress | None, advice: str, patience: Patience) -> None:
    version: str | None = None  # what the server calls this state of the file: a resume needs the same

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    def read(response: http.client.HTTPResponse, start: int) -> None:
        nonlocal version
        if start and version is not None and _version(response.headers) != version:
            part.unlink()
            raise ConnectionError("the file changed on the server; starting again")
        version = _version(response.headers)
        start, total = _extent(response, start)
        with _opened(part, "ab" if start else "wb") as out:
            done = start
            if progress is not None:
                progress(done, total)
            while chunk := response.read(CHUNK_BYTES):
                _write(out, chunk, part)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        if total is not None and done != total:
            raise ConnectionError(f"the connection was cut at {done:,} of {total:,} bytes")

    _attempts(url, read, size, advice, patience)


def _attempts(
    url: str,
    read: Callable[[http.client.HTTPResponse, int], None],
    size: Callable[[], int],
    advice: str,
    patience: Patience,
) -> None:
    """Call `read(response, offset)` until it succeeds, asking for the bytes from `size()` on."""
    opener = urllib.request.build_opener(_HttpOnly())
    failures, wait = 0, patience.backoff_s
    while True:
        start = size()
        headers = {"User-Agent": "bitfront", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=patience.timeout_s) as response:
                return read(response, start)
        except urllib.error.HTTPError as error:
            status, total = error.code, _total(error.headers)
            error.close()
            if status == 416 and start and total == start:
                return None  # nothing after the last byte: an earlier process had it whole
            if status == 416 and start:
                raise DownloadError(
                    f"{url} has {total} bytes, yet {start:,} were here already: another file of that name. "
                    "Delete the "
                    f".part file and try again. {advice}".strip()
                ) from error
            reason, hopeless = f"the server answered {status} {error.reason}", status not in PASSING
        except (OSError, http.client.HTTPException) as error:
            reason, hopeless = str(getattr(error, "reason", "")) or str(error) or type(error).__name__, False
        if size() > start:  # it moved: be as patient as at the beginning
            failures, wait = 0, patience.backoff_s
        failures += 1
        if hopeless or failures >= patience.tries:
            tried = "" if hopeless else f" ({failures} attempts)"
            raise DownloadError(f"cannot download {url}: {reason}{tried}. {advice}".strip())
        time.sleep(wait)
        wait *= 2


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never out of http(s)."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _check_scheme(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme.lower() not in SCHEMES:
        raise DownloadError(f"{url!r} is not an address to download from; {one_of(f'{s}://' for s in SCHEMES)}")


def _extent(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """(offset of the first byte that follows, size of the whole file)."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return 0, int(length) if length and length.isdigit() else None  # the server ignores ranges: from the beginning
    sent = response.headers.get("Content-Range", "")
    if not sent.startswith(f"bytes {start}-"):
        raise ConnectionError(f"asked for the bytes from {start}, got {sent!r}")
    return start, _total(response.headers)


def _total(headers: Message) -> int | None:
    total = str(headers.get("Content-Range", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _version(headers: Message) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _sum(path: Path, checksum: str) -> str:
    kind = checksum.partition(":")[0]
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(place: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {place}: {error.strerror or error}; set BITFRONT_CACHE to a folder with room that "
        "you may "
        "write to"
    )


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return part.open(mode)
    except OSError as error:
        raise _unwritable(part, error) from error


def _write(out: IO[bytes], chunk: bytes, part: Path) -> None:
    try:
        out.write(chunk)
    except OSError as error:  # a full disk is not the network's fault, and no retry helps
        raise _unwritable(part, error) from error


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Holds ``TARGET.lock``: of several processes, one downloads and the others wait for it."""
    from filelock import FileLock  # here, because most runs download nothing

    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire()
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        yield
    finally:
        lock.release()

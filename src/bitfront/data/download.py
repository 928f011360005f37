"""Downloads one file over http(s): continues after a lost connection and verifies the checksum.

The bytes go to ``NAME.part`` beside the target, which gets its name only when it is complete. A lost connection
is continued where it stopped (HTTP Range). A part left by an earlier process is continued only if there is a
checksum to verify the result. Two processes that want the same file take turns (a lock file), and the second
one finds it complete.
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
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try, and how long to wait.

    Attributes:
        attempts: the most failures in a row; an attempt that brought bytes starts the count again.
        backoff_s: seconds to wait before the second attempt, doubled each time.
        timeout_s: seconds, for connecting and for each read.
    """

    attempts: int = 4
    backoff_s: float = 1.0
    timeout_s: float = 30.0


def download(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    progress: Progress | None = None,
    advice: str = "",
    retry: RetryPolicy | None = None,
) -> Path:
    """Download `url` to `target`, unless that file exists. Returns `target`.

    Args:
        checksum: ``"md5:HEX"`` or ``"sha256:HEX"``; None to accept any content.
        progress: called with (bytes done, total bytes or None).
        advice: what to do without a network; the last sentence of every message.
        retry: how often to try; the defaults of :class:`RetryPolicy` where None.

    Raises:
        DownloadError: there is no network, the server refuses, the checksum differs, or `url` is not http(s).
        DataError: the folder of `target` cannot be written.
    """
    _check_scheme(url)
    retry = retry or RetryPolicy()
    _make_folder(target.parent)
    with _exclusive(target):
        if target.exists():
            return target
        part = target.with_name(target.name + ".part")
        if checksum is None:
            part.unlink(missing_ok=True)
        resumed = part.exists()
        _fetch(url, part, progress, advice, retry)
        actual = None if checksum is None else _checksum(part, checksum)
        if actual != checksum and resumed:
            # The part may be of another file: download all of it again.
            part.unlink()
            _fetch(url, part, progress, advice, retry)
            actual = None if checksum is None else _checksum(part, checksum)
        if actual != checksum:
            part.unlink()
            raise DownloadError(
                f"{url} was downloaded completely, but it is another file: its checksum is {actual}, expected was "
                f"{checksum}; it was deleted. {advice}".strip()
            )
        part.replace(target)  # atomic: no other process sees an incomplete file under this name
    return target


def fetch_json(url: str, *, advice: str = "", retry: RetryPolicy | None = None) -> dict[str, Any]:
    """The JSON object at `url`.

    Raises:
        DownloadError: as :func:`download`, or the answer is not a JSON object.
    """
    _check_scheme(url)
    body = bytearray()

    def read(response: http.client.HTTPResponse, _: int) -> None:
        body[:] = response.read(1 << 24)

    _with_retries(url, read, lambda: 0, advice, retry or RetryPolicy())
    try:
        value = json.loads(body)
    except ValueError as error:
        raise DownloadError(f"{url} did not answer with JSON but with {bytes(body[:60])!r}. {advice}") from error
    if not isinstance(value, dict):
        raise DownloadError(f"{url} answered with a {type(value).__name__}; needed is an object. {advice}")
    return value


def _fetch(url: str, part: Path, progress: Progress | None, advice: str, retry: RetryPolicy) -> None:
    version: str | None = None  # the server's mark for this version of the file; a resumed download needs the same

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    def read(response: http.client.HTTPResponse, start: int) -> None:
        nonlocal version
        if start and version is not None and _entity_tag(response.headers) != version:
            part.unlink()
            raise ConnectionError("the file changed on the server; starting again")
        version = _entity_tag(response.headers)
        start, total = _start_and_total(response, start)
        with _opened(part, "ab" if start else "wb") as out:
            done = start
            if progress is not None:
                progress(done, total)
            while chunk := response.read(CHUNK_BYTES):
                _append(out, chunk, part)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        if total is not None and done != total:
            raise ConnectionError(f"the connection was lost after {done:,} of {total:,} bytes")

    _with_retries(url, read, size, advice, retry)


def _with_retries(
    url: str,
    read: Callable[[http.client.HTTPResponse, int], None],
    size: Callable[[], int],
    advice: str,
    retry: RetryPolicy,
) -> None:
    """Call `read(response, offset)` until it succeeds, requesting the bytes from `size()` on."""
    opener = urllib.request.build_opener(_HttpOnly())
    failures, wait = 0, retry.backoff_s
    while True:
        start = size()
        headers = {"User-Agent": "bitfront", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=retry.timeout_s) as response:
                return read(response, start)
        except urllib.error.HTTPError as error:
            status, total = error.code, _total_bytes(error.headers)
            error.close()
            if status == 416 and start and total == start:
                return None  # no byte is missing: an earlier process has downloaded all of them
            if status == 416 and start:
                raise DownloadError(
                    f"{url} has {total} bytes, but {start:,} were downloaded earlier, so they are of another file. "
                    f"Delete the .part file and try again. {advice}".strip()
                ) from error
            reason, final = f"the server answered {status} {error.reason}", status not in TEMPORARY
        except (OSError, http.client.HTTPException) as error:
            reason, final = str(getattr(error, "reason", "")) or str(error) or type(error).__name__, False
        if size() > start:  # bytes arrived, so the attempts count from the beginning
            failures, wait = 0, retry.backoff_s
        failures += 1
        if final or failures >= retry.attempts:
            attempts = "" if final else f" ({failures} attempts)"
            raise DownloadError(f"cannot download {url}: {reason}{attempts}. {advice}".strip())
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


def _start_and_total(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """(offset of the first byte in the response, size of the whole file in bytes)."""
    length = response.headers.get("Content-Length")
    if response.status != 206:  # the server ignores ranges and sends the whole file
        return 0, int(length) if length and length.isdigit() else None
    sent = response.headers.get("Content-Range", "")
    if not sent.startswith(f"bytes {start}-"):
        raise ConnectionError(f"asked for the bytes from {start}, got {sent!r}")
    return start, _total_bytes(response.headers)


def _total_bytes(headers: Message) -> int | None:
    total = str(headers.get("Content-Range", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _entity_tag(headers: Message) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _checksum(path: Path, expected: str) -> str:
    """The checksum of the file at `path`, of the same kind as `expected`."""
    kind = expected.partition(":")[0]
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(place: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {place}: {error.strerror or error}; set BITFRONT_CACHE to a folder with enough room that you "
        "may write to"
    )


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return part.open(mode)
    except OSError as error:
        raise _unwritable(part, error) from error


def _append(out: IO[bytes], chunk: bytes, part: Path) -> None:
    try:
        out.write(chunk)
    except OSError as error:  # the disk is full: not an error of the network, and another attempt does not help
        raise _unwritable(part, error) from error


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
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

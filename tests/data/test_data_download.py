"""Downloads: continued after a loss, verified, and complete or absent; from a server on this machine."""

import hashlib
import multiprocessing
import socket
from pathlib import Path

import pytest

from bitfront.cache import cache_dir
from bitfront.data.download import RetryPolicy, download, fetch_json
from bitfront.errors import DataError, DownloadError

BODY = bytes(range(256)) * 4000  # 1 MB: several reads
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()
QUICK = RetryPolicy(attempts=3, backoff_s=0.01, timeout_s=5)
ADVICE = "Put it at /there instead"


def get(server, **options):
    return download(f"{server.address}/file", Path("got/file"), retry=QUICK, advice=ADVICE, **options)


def test_a_file_arrives_whole_and_only_under_its_name(server):
    server.files["/file"] = BODY
    steps = []
    path = get(server, checksum=MD5, progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == BODY
    assert sorted(p.name for p in path.parent.iterdir()) == ["file", "file.lock"]
    assert steps[0] == (0, len(BODY))
    assert steps[-1] == (len(BODY), len(BODY))
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)


def test_a_file_that_is_there_is_not_fetched(server):
    server.files["/file"] = BODY
    get(server)
    get(server)
    assert len(server.ranges) == 1


def test_a_cut_connection_is_resumed(server):
    server.files["/file"] = BODY
    server.faults = [("cut", 300_000), ("cut", 400_000)]
    assert get(server, checksum="sha256:" + hashlib.sha256(BODY).hexdigest()).read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-", "bytes=700000-"]


def test_a_server_without_ranges_starts_again(server):
    server.files["/file"] = BODY
    server.serves_ranges = False
    server.faults = [("cut", 300_000)]
    assert get(server, checksum=MD5).read_bytes() == BODY


def test_what_an_earlier_process_left_is_resumed_under_a_checksum_alone(server):
    server.files["/file"] = BODY
    part = Path("got/file.part")
    part.parent.mkdir()
    part.write_bytes(BODY[:1000])
    assert get(server, checksum=MD5).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]
    Path("got/file").unlink()
    part.write_bytes(b"anything")
    assert get(server).read_bytes() == BODY
    assert server.ranges[-1] is None


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(BODY)], ids=["another file's half", "another whole"])
def test_a_part_of_another_file_is_thrown_away(server, left):
    server.files["/file"] = BODY
    part = Path("got/file.part")
    part.parent.mkdir()
    part.write_bytes(left)
    assert get(server, checksum=MD5).read_bytes() == BODY


def test_a_complete_part_is_used(server):
    server.files["/file"] = BODY
    part = Path("got/file.part")
    part.parent.mkdir()
    part.write_bytes(BODY)
    assert get(server, checksum=MD5).read_bytes() == BODY


def test_a_wrong_checksum_leaves_nothing(server):
    server.files["/file"] = b"an error page"
    with pytest.raises(DownloadError, match=rf"its checksum is md5:\w+, expected was {MD5}; .*{ADVICE}"):
        get(server, checksum=MD5)
    assert sorted(p.name for p in Path("got").iterdir()) == ["file.lock"]


def test_a_missing_file_is_not_asked_for_twice(server):
    with pytest.raises(
        DownloadError, match=rf"cannot download http.*/file: the server answered 404 Not Found. {ADVICE}"
    ):
        get(server)
    assert len(server.ranges) == 1


def test_a_busy_server_is_asked_again(server):
    server.files["/file"] = BODY
    server.faults = [503, 429]
    assert get(server).read_bytes() == BODY
    server.faults = [503] * 5
    Path("got/file").unlink()
    with pytest.raises(DownloadError, match=r"503 Service Unavailable \(3 attempts\)"):
        get(server)


def test_no_network_says_what_to_do_instead():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(DownloadError, match=rf"127.0.0.1:{port}/file: .*refused \(3 attempts\). {ADVICE}"):
            download(f"http://127.0.0.1:{port}/file", Path("file"), retry=QUICK, advice=ADVICE)


def test_a_silent_server_runs_into_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        retry = RetryPolicy(attempts=2, backoff_s=0.01, timeout_s=0.2)
        with pytest.raises(DownloadError, match=r"timed out \(2 attempts\)"):
            download(f"http://127.0.0.1:{silent.getsockname()[1]}/f", Path("file"), retry=retry)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "data:,x", "/etc/passwd"])
def test_only_http(url):
    with pytest.raises(DownloadError, match="is not an address to download from; allowed: http://, https://"):
        download(url, Path("file"))
    with pytest.raises(DownloadError):
        fetch_json(url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_does_not_leave_http(server, url):
    server.files["/file"] = b"x"
    server.faults = [("redirect", url)]
    with pytest.raises(DownloadError, match=r"not an address to download from|redirection to url .* not allowed|302"):
        get(server)


def test_a_redirect_is_followed(server):
    server.files |= {"/file": b"", "/other": BODY}
    server.faults = [("redirect", f"{server.address}/other")]
    assert get(server).read_bytes() == BODY


def test_json(server):
    server.files |= {"/good": b'{"a": 1}', "/list": b"[1]", "/page": b"<html>"}
    assert fetch_json(f"{server.address}/good") == {"a": 1}
    with pytest.raises(DownloadError, match="answered with a list"):
        fetch_json(f"{server.address}/list")
    with pytest.raises(DownloadError, match="did not answer with JSON but with b'<html>'"):
        fetch_json(f"{server.address}/page")


def _one_of_two(address, folder, results):
    try:
        results.put(download(f"{address}/file", Path(folder) / "file", checksum=MD5, retry=QUICK).read_bytes() == BODY)
    except Exception as error:  # the parent asserts on it
        results.put(error)


@pytest.mark.slow
def test_two_processes_get_one_whole_file(server, tmp_path):
    server.files["/file"] = BODY
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_one_of_two, args=(server.address, tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join(timeout=10)
    assert len(server.ranges) == 1


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("BITFRONT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/bitfront")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/bitfront")


def test_a_folder_that_cannot_be_written(server):
    server.files["/file"] = BODY
    Path("blocked").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write to blocked.*set BITFRONT_CACHE"):
        download(f"{server.address}/file", Path("blocked/file"), retry=QUICK)

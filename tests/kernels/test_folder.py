"""Where compiled kernels come from: never from a folder or file that somebody else can write."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bitfront
from bitfront.errors import UserError
from bitfront.kernels import folder, native

NAME = "kernels-0123.so"
STRANGER = 54321


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path / "cache"))
    folder.private_folder.cache_clear()
    yield tmp_path / "cache"
    folder.private_folder.cache_clear()


def owned_by(monkeypatch, path, owner=None, mode=0):
    """What `path` looks like where `owner` owns it, and `mode` is added to its permissions."""
    real = folder.owner_and_mode

    def pretended(asked):
        uid, bits = real(asked)
        return (uid if owner is None else owner, bits | mode) if asked == path else (uid, bits)

    monkeypatch.setattr(folder, "owner_and_mode", pretended)


def refused(monkeypatch, path):
    with pytest.warns(RuntimeWarning, match=r"another user owns it or can write it.*BITFRONT_CACHE") as said:
        place = folder.library_path(NAME)
    assert str(said[0].message).startswith(f"{path}: ")
    assert place.parent == folder.private_folder()
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_the_folder_of_the_user_is_used(cache):
    assert folder.library_path(NAME) == cache.resolve() / NAME
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_refused(cache, monkeypatch, bits):
    cache.mkdir()
    cache.chmod(bits)
    refused(monkeypatch, cache.resolve())


@pytest.mark.parametrize("bits", [0o660, 0o602])
def test_a_file_that_others_can_write_is_refused(cache, monkeypatch, bits):
    cache.mkdir()
    (cache / NAME).write_bytes(b"not a library")
    (cache / NAME).chmod(bits)
    refused(monkeypatch, cache.resolve() / NAME)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_another_user_owns_is_refused(cache, monkeypatch, what):
    cache.mkdir()
    (cache / NAME).write_bytes(b"not a library")
    path = cache if what == "folder" else cache / NAME
    if os.getuid() == folder.ROOT:
        os.chown(path, STRANGER, STRANGER)
    else:
        owned_by(monkeypatch, path.resolve(), owner=STRANGER)
    refused(monkeypatch, path.resolve())


def test_links_are_followed_before_the_owner_is_looked_at(cache, monkeypatch, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    cache.symlink_to(shared)
    refused(monkeypatch, shared.resolve())
    cache.unlink()
    cache.mkdir()
    (shared / "planted.so").write_bytes(b"not a library")
    (cache / NAME).symlink_to(shared / "planted.so")
    refused(monkeypatch, shared.resolve())


def test_a_planted_library_is_not_loaded(cache, monkeypatch):
    """Whatever is in it: the kernels that are loaded were compiled by this process."""
    loaded = []
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: loaded.append(Path(path)) or (_ for _ in ()).throw(OSError))
    monkeypatch.setattr(native, "_compile", lambda *given: given[-1].write_bytes(b""))
    monkeypatch.setattr(native, "_compiler", lambda: sys.executable)
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="another user"):
        assert native._load_library("kernels.cpp", "-ffp-contract=off", {}) is None
    assert [path.parent for path in loaded] == [folder.private_folder()]


@pytest.mark.parametrize("home", [None, "/proc/nowhere"], ids=["no home", "a home that cannot be created"])
def test_without_a_home_the_kernels_are_in_a_private_folder(cache, monkeypatch, home):
    monkeypatch.delenv("BITFRONT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is None:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # the system does not know this user
        with pytest.raises(UserError, match=r"no home directory.*BITFRONT_CACHE"):
            folder.cache_dir()
    else:
        monkeypatch.setenv("HOME", home)
    assert folder.library_path(NAME).parent == folder.private_folder()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user that the system does not know")
@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_a_user_that_the_system_does_not_know():
    """The kernels are compiled, work, and leave nothing behind."""
    if not all(above.stat().st_mode & stat.S_IXOTH for above in Path(bitfront.__file__).resolve().parents):
        pytest.skip("another user cannot read the package here")
    program = (
        "import os; from bitfront.kernels import folder, native; "
        f"os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER}); "
        "print(native.library() is not None, str(folder.private_folder()).startswith(folder.tempfile.gettempdir()))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "BITFRONT_CACHE", "XDG_CACHE_HOME")}
    with tempfile.TemporaryDirectory() as temp:  # pytest's folders are closed to other users
        Path(temp).chmod(0o777)
        env |= {"PYTHONPATH": str(Path(bitfront.__file__).parents[1]), "TMPDIR": temp}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, cwd="/", capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.stdout == "True True\n", done.stderr
        assert list(Path(temp).iterdir()) == []

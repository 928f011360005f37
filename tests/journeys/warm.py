"""Processes of the command that need not import torch first, which is most of what a small command does.

A process that has imported the package, and has done nothing else, waits for commands; for each it forks, and the fork
goes on as ``python -m bitfront`` would after its imports: with its own arguments, folder, environment, session and
output, and ended like any program. So it can be killed, interrupted and timed out, and its workers are processes of
their own. What a fork shares with its siblings is the seed of Python's hashes and what is imported; journeys that are
about these ask for a cold start.
"""

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Started:
    """A forked command, by the names of ``subprocess.Popen``."""

    def __init__(self, args: list[str], pid: int, out: int, err: int, status: int):
        self.args, self.pid, self.returncode = args, pid, None
        self._pipes, self._status = {out: b"", err: b""}, status
        self._open = [out, err]

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(standard output, standard error), once nobody writes to them any more."""
        end = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for pipe in self._open:
                selector.register(pipe, selectors.EVENT_READ)
            while self._open:
                left = None if end is None else end - time.monotonic()
                ready = selector.select(left) if left is None or left > 0 else []
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in ready:
                    part = os.read(key.fd, 65536)
                    self._pipes[key.fd] += part
                    if not part:
                        selector.unregister(key.fd)
                        self._open.remove(key.fd)
                        os.close(key.fd)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        out, err = (text.decode() for text in self._pipes.values())
        return out, err

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            told = os.read(self._status, 16)
            os.close(self._status)
            assert told, "the process that forks commands has gone"
            self.returncode = int(told)
        return self.returncode


class Warm:
    """The process that forks, as its user sees it."""

    def __init__(self, env: dict[str, str]):
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            command = [sys.executable, str(Path(__file__)), str(other.fileno())]
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[other.fileno()]
            )

    def start(self, words: list[str], folder: Path, env: dict[str, str]) -> Started:
        """Type ``bitfront *words`` in that folder."""
        pipes = [os.pipe() for _ in range(3)]
        message = json.dumps([words, str(folder), env]).encode()
        socket.send_fds(self._channel, [message], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        pid = int(self._channel.recv(16))
        return Started([sys.executable, "-m", "bitfront", *words], pid, *(read for read, _ in pipes))

    def end(self) -> None:
        """End the process that forks; its forks have ended before."""
        self._channel.close()
        self._process.wait()


def serve(channel: socket.socket) -> list[str]:
    """Forks for every message; returns in the fork, with the words of the command, and never before."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                        os.write(running[pid], str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(running.pop(pid))
        if channel not in ready:
            continue
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            os._exit(0)
        out, err, status = files
        begun, begin = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(begin, b".")
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(out, 1)
            os.dup2(err, 2)
            for unused in (out, err, status, begun, begin, woken, wake, *running.values()):
                os.close(unused)
            channel.close()
            return as_typed(*json.loads(message))
        os.read(begun, 1)
        for used in (out, err, begun, begin):
            os.close(used)
        running[pid] = status
        channel.send(str(pid).encode())


def as_typed(words: list[str], folder: str, env: dict[str, str]) -> list[str]:
    """Make this process what ``python -m bitfront`` would be."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = folder
    return words


def main() -> Any:
    import bitfront.__main__ as program
    from bitfront import api, cli, config, template, tomlfile  # noqa: F401
    from bitfront.engine import analysis, rebuild  # noqa: F401
    from bitfront.engine.search import weights  # noqa: F401
    from bitfront.report import live, tables  # noqa: F401

    channel = socket.socket(fileno=int(sys.argv[1]))
    # More threads than this one would be missing in the forks.
    assert not Path("/proc/self/task").exists() or len(list(Path("/proc/self/task").iterdir())) == 1
    words = serve(channel)
    program.warm = sys.modules["__main__"]  # kept, as this is its code
    sys.modules["__main__"] = program
    sys.argv = [str(program.__file__), *words]
    return cli.main


if __name__ == "__main__":
    main()()

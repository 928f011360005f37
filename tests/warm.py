"""Processes of Python that need not import torch first, which is most of what a small command does.

A process that has imported every module of the package, and has done nothing else, waits for commands. For each it forks,
and the fork goes on as ``python -m bitfront`` or ``python -c PROGRAM`` would after the imports: with the arguments,
folder, environment, session and output that were asked for. So it can be killed, interrupted and timed out, and its
workers are separate processes. What a fork shares with its siblings is the seed of Python's hashes and what is imported.
Tests that are about these ask for a cold start.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Bytes that a command may take, with its environment.
LARGEST = 1 << 17


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
            status = os.read(self._status, 16)
            os.close(self._status)
            assert status, "the process that forks commands has gone"
            self.returncode = int(status)
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

    def start(self, arguments: list[str], folder: Path, env: dict[str, str], merged: bool = False) -> Started:
        """Start ``python *arguments`` in that folder; they are as in ``accepted``.

        Args:
            merged: standard error goes where standard output goes.
        """
        pipes = [os.pipe() for _ in range(3)]
        message = json.dumps([arguments, str(folder), env, merged]).encode()
        assert len(message) < LARGEST, "a command of this length does not fit into one message"
        socket.send_fds(self._channel, [message], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        pid = int(self._channel.recv(16))
        return Started([sys.executable, *arguments], pid, *(read for read, _ in pipes))

    def end(self) -> None:
        """End the process that forks; its forks have ended before."""
        self._channel.close()
        self._process.wait()


def serve(channel: socket.socket) -> Callable[[], Any]:
    """Forks for every message; returns in the fork, with what it is to run, and never before."""
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
        message, files, _, _ = socket.recv_fds(channel, LARGEST, 3)
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
            *command, merged = json.loads(message)
            os.dup2(out, 1)
            os.dup2(out if merged else err, 2)
            for unused in (out, err, status, begun, begin, woken, wake, *running.values()):
                os.close(unused)
            channel.close()
            return accepted(*command)
        os.read(begun, 1)
        for used in (out, err, begun, begin):
            os.close(used)
        running[pid] = status
        channel.send(str(pid).encode())


def accepted(arguments: list[str], folder: str, env: dict[str, str]) -> Callable[[], Any]:
    """Make this process what ``python *arguments`` would be: ``[-W error] -m bitfront WORDS`` or ``-c PROGRAM WORDS``."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = folder
    if arguments[:2] == ["-W", "error"]:
        arguments = arguments[2:]
        warnings.simplefilter("error")
        sys.warnoptions.append("error")
    how, what, *words = arguments
    if how == "-m" and what == "bitfront":
        import bitfront.__main__ as program
        from bitfront.cli import main as run

        sys.argv = [str(program.__file__), *words]
    elif how == "-c":
        program = types.ModuleType("__main__")
        sys.argv = ["-c", *words]
        run = functools.partial(exec, compile(what, "<string>", "exec"), program.__dict__)
    else:
        raise ValueError(f"python {arguments} is not possible without a cold start")
    program.warm = sys.modules["__main__"]  # kept, as this is its code
    sys.modules["__main__"] = program
    return run


#: What the package imports where it is used, and takes a tenth of a second or more.
LATER = (
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.figure", "jinja2"),
    *("scipy.optimize", "scipy.sparse", "optuna.samplers"),
)


def import_all() -> None:
    """Every module of the package, and what it imports later."""
    import bitfront
    import bitfront.__main__

    for module in pkgutil.walk_packages(bitfront.__path__, "bitfront."):
        if not module.name.startswith("bitfront.testing"):
            importlib.import_module(module.name)
    for name in LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def end_as_a_program(run: Callable[[], Any]) -> None:
    """Run it and end the process with the exit code and output of any program, but without taking torch to pieces."""
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def main() -> None:
    import_all()
    # More threads than this one would be missing in the forks.
    assert not Path("/proc/self/task").exists() or len(list(Path("/proc/self/task").iterdir())) == 1
    # A collection in a fork would write to all that is imported, and so copy it.
    gc.collect()
    gc.freeze()
    end_as_a_program(serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()

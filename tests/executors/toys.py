"""Work for crews in tests: numbers that are squared, and some that end their worker."""

import os
import random
import threading
import time
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass

from bitfront.executors.base import Launched, Launcher, LauncherSettings
from bitfront.executors.crew import Work


@dataclass(eq=False)
class Numbers(Work):
    """Squares numbers; a negative one ends its worker."""

    argument: list
    method: str = "squared"

    def cut(self):
        half = len(self.argument) // 2
        return [Numbers(part) for part in (self.argument[:half], self.argument[half:])] if half else []


class Squares:
    """What the workers share."""

    def __init__(self, content):
        self.content = content

    def squared(self, numbers):
        if any(n < 0 for n in numbers):
            os.kill(os.getpid(), 9)
        return [n * n for n in numbers]

    def slow(self, seconds):
        time.sleep(seconds)
        return os.getpid()


def opened(content):
    assert content == b"shared"
    return Squares(content)


OPENER = f"{__name__}:opened"


class HostileExecutor(Executor):
    """Threads that lose calls, break, are slow, answer in any order, and never answer; negative numbers always break it.

    Args:
        seed: of what happens.
        breaks: the share of calls with which the whole executor breaks, and every call that is out is lost.
        loses: the share of calls that are lost alone.
        hangs: the share of calls that are never answered.
    """

    def __init__(self, seed, breaks=0.1, loses=0.1, hangs=0.0):
        self.random, self.shares = random.Random(seed), (breaks, loses, hangs)
        self.out, self.broken, self.lock = set(), False, threading.Lock()

    def submit(self, function, call):
        if self.broken:
            raise BrokenExecutor("broken before")
        future = Future()
        with self.lock:
            self.out.add(future)
            chance, wait = self.random.random(), self.random.random() / 200
        threading.Timer(wait, self._end, (future, function, call, chance)).start()
        return future

    def _end(self, future, function, call, chance):
        breaks, loses, hangs = self.shares
        bad = isinstance(call.argument, list) and any(n < 0 for n in call.argument)
        if bad or chance < breaks:
            self.broken = True
            with self.lock:
                lost, self.out = self.out, set()
            for other in lost:
                settle(other, BrokenExecutor("everybody died"))
        elif chance < breaks + loses:
            settle(future, CancelledError("lost"))
        elif chance >= breaks + loses + hangs:
            try:
                value = function(call)
            except Exception as error:
                settle(future, error)
            else:
                if not future.done():
                    future.set_result(value)
        with self.lock:
            self.out.discard(future)


def settle(future, error):
    try:
        future.set_exception(error)
    except Exception:
        assert future.done()


class Hostile(Launcher):
    """Launches hostile executors, another one after each that broke."""

    title = "hostile"

    def __init__(self, seed=0, settings=None, **shares):
        super().__init__(settings or LauncherSettings())
        self.seed, self.shares, self.launches = seed, shares, 0

    def launch(self, workers, prepare=None):
        self.launches += 1
        executor = HostileExecutor(self.seed + self.launches, **self.shares)
        return Launched(executor, lambda: workers, lambda: "", lambda: None)

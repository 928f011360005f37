"""An executor that does its worst."""

import random
import threading
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future

from bitfront.executors.base import Launched, Launcher, LauncherSettings


class HostileExecutor(Executor):
    """Threads that lose calls, break, are slow, answer in any order, and never answer; negative numbers always break it.

    Args:
        seed: of what happens.
        hit: calls that were lost by chance before, which does not happen to the same numbers twice.
        breaks: the share of calls with which the whole executor breaks, and every call that is out is lost.
        loses: the share of calls that are lost alone.
        hangs: the share of calls that are never answered.
    """

    def __init__(self, seed, hit, breaks=0.1, loses=0.1, hangs=0.0):
        self.hit = hit
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
        name = repr(call.argument)
        if max(breaks, hangs) < 1 and name in self.hit:
            chance = 1.0
        elif chance < breaks + loses + hangs:
            self.hit.add(name)
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
        self.seed, self.shares, self.launches, self.hit = seed, shares, 0, set()

    def launch(self, workers, prepare=None):
        self.launches += 1
        executor = HostileExecutor(self.seed + self.launches, self.hit, **self.shares)
        return Launched(executor, lambda: workers, lambda: "", lambda: None)

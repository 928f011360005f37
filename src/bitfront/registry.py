"""Name → implementation, for every extension point.

A room (``bitfront.formats``, ``bitfront.models`` ...) holds one file per member; importing the room's files is what
registers them, and that happens on the first look-up, not on import. Third parties join by an entry point in the
group of the same name, e.g. ``[project.entry-points."bitfront.formats"] posit = "my_package.posit"``.

Names are forgiving: ``brute_force``, ``brute-force`` and ``BruteForce`` are one name. What is nobody's name but has a
colon is the user's own, ``package.module:name``; :func:`import_object` finds it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from bitfront.errors import ConfigError, UnknownNameError, nearest, one_of

T = TypeVar("T")


def canonical(name: str) -> str:
    """The form in which two spellings of a name are compared: lower case, without ``-``, ``_`` and blanks."""
    return "".join(c for c in name.lower() if c not in "-_ ")


class Registry(Generic[T]):
    """The members of one room, by name.

    Args:
        kind: what a member is called in messages, e.g. ``"format"``.
        room: the package whose modules hold the members, which is also the entry-point group.
    """

    def __init__(self, kind: str, room: str) -> None:
        self.kind, self.room = kind, room
        self._members: dict[str, tuple[str, T]] = {}
        self._aliases: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._loaded = False
        #: Grows whenever a member joins or is replaced: for whoever keeps something that depends on all of them.
        self.version = 0

    def register(self, name: str, *aliases: str, file: str = "") -> Callable[[T], T]:
        """Decorator: put the decorated object under `name` and `aliases`.

        Args:
            file: where the object is made; needed for one that is no class or function.

        Raises:
            ValueError: the name is taken by another file; both files are named.
        """

        def add(member: T) -> T:
            key = canonical(name)
            for spelling in (name, *aliases):
                taken = self._aliases.get(canonical(spelling))
                if (taken is not None and taken != key) or (taken == key and key in self._members):
                    raise ValueError(
                        f"two {self.kind}s are called {spelling!r}: in {self._files[taken]} "
                        f"and in {file or _file(member)}"
                    )
                self._aliases[canonical(spelling)] = key
            self._members[key] = (name, member)
            self._files[key] = file or _file(member)
            self.version += 1
            return member

        return add

    def replace(self, name: str, member: T) -> T:
        """Put `member` in the place of the one called `name`. Raises like :meth:`get`."""
        key = self._key(name)
        self._members[key] = (self._members[key][0], member)
        self.version += 1
        return member

    def get(self, name: str) -> T:
        """The member called `name`.

        Raises:
            UnknownNameError: nobody registered that name; the message lists the names and the nearest one.
        """
        return self._members[self._key(name)][1]

    def official(self, name: str) -> str:
        """The official spelling of `name`. Raises like :meth:`get`."""
        return self._members[self._key(name)][0]

    def name_of(self, member: T) -> str:
        """The official name of `member`: what a file says of it, so that :meth:`get` finds it again.

        Raises:
            UnknownNameError: it is registered under no name.
        """
        self.load()
        for name, each in self._members.values():
            if each is member:
                return name
        raise UnknownNameError(
            f"the {self.kind} {getattr(member, '__qualname__', member)!r} ({_file(member)}) is registered under no "
            f"name; decorate it with the register() of {self.room}"
        )

    def __contains__(self, name: object) -> bool:
        self.load()
        return isinstance(name, str) and canonical(name) in self._aliases

    def names(self) -> list[str]:
        """All official names, sorted."""
        self.load()
        return sorted(name for name, _ in self._members.values())

    def described(self) -> list[tuple[str, str]]:
        """(name, first line of its docstring) of every member, sorted by name."""
        self.load()
        return sorted((name, (inspect.getdoc(m) or "").split("\n")[0]) for name, m in self._members.values())

    def _key(self, name: str) -> str:
        self.load()
        key = self._aliases.get(canonical(name))
        if key is None:
            raise UnknownNameError(
                f"there is no {self.kind} called {name!r}; {one_of(self.names())}.{nearest(name, self.names())}"
            )
        return key

    def load(self) -> None:
        """Import all members, once."""
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.room)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.room}.{module.name}")
        for entry in importlib.metadata.entry_points(group=self.room):
            entry.load()


def names_in_source(room: str) -> list[str]:
    """The official names in a room, sorted, read off its files without importing them; packages that joined it by an
    entry point are known by the name of that."""
    package = importlib.util.find_spec(room)
    folders = package.submodule_search_locations if package else None
    found = {entry.name for entry in importlib.metadata.entry_points(group=room)}
    for path in (path for folder in folders or () for path in Path(folder).glob("*.py")):
        found.update(re.findall(r'^@[A-Z]+\.register\("([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(found)


def _file(member: object) -> str:
    try:
        return inspect.getfile(member)  # type: ignore[arg-type]
    except TypeError:
        return inspect.getfile(type(member))


def import_object(spec: str, key: str) -> object:
    """The object that `spec`, written ``package.module:name``, refers to. `key` is the key of
    the configuration it came from.

    The working directory joins ``sys.path`` and stays there, as under ``python -m``: the module may import
    its neighbours later, when its object is called.

    Raises:
        ConfigError: the spelling is wrong, the module is not found or fails on import, or lacks the name.
    """
    module_name, _, attribute = spec.partition(":")
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:
        dotted = ".".join(Path(module_name.replace("\\", "/")).with_suffix("").parts).strip("./")
        raise ConfigError(f"{spec!r} names a file; write the module: {f'{dotted}:{attribute}'!r}", key=(key,))
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ConfigError(f"{spec!r} is not of the form 'package.module:name'", key=(key,))

    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and _within(module_name, error.name):
            raise ConfigError(
                f"{spec!r}: there is no module {error.name!r}, neither in the working directory ({here}) nor among "
                "the installed packages. Run the command from the folder that holds it, or install it.",
                key=(key,),
            ) from error
        raise ConfigError(f"{spec!r}: importing {module_name} failed: {one_line(error)}", key=(key,)) from error

    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise ConfigError(
                f"{spec!r}: {module_name} has no {attribute!r}; "
                f"{one_of(names) if names else 'it defines nothing callable'}.{nearest(part, names)}",
                key=(key,),
            )
        found = getattr(found, part)
    return found


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def one_line(error: BaseException) -> str:
    """What went wrong in somebody's own code, and in which line of it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"

"""Name → implementation, for every extension point.

A package (``bitfront.formats``, ``bitfront.models`` ...) holds one file per member. Importing these files registers the
members; that happens at the first look-up. Third parties add members by an entry point in the group of the same name,
e.g. ``[project.entry-points."bitfront.formats"] posit = "my_package.posit"``.

Spellings of a name are equal up to case, ``-`` and ``_``: ``brute_force``, ``brute-force`` and ``BruteForce`` are one
name. A name with a colon, ``package.module:name``, is an object of the user; :func:`import_object` imports it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from bitfront.errors import ConfigError, UnknownNameError, nearest, one_of

T = TypeVar("T")


def canonical(name: str) -> str:
    """The form in which two spellings of a name are compared: lower case, without ``-``, ``_`` and blanks."""
    return "".join(c for c in name.lower() if c not in "-_ ")


class Registry(Generic[T]):
    """The members of one kind, by name.

    Args:
        kind: what messages call a member, e.g. ``"format"``.
        package: the package whose modules hold the members; also the name of the entry-point group.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._members: dict[str, tuple[str, T]] = {}
        self._aliases: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._loaded = False
        #: Grows whenever a member is added or replaced, so that a cache that depends on all members can be renewed.
        self.version = 0

    def register(self, name: str, *aliases: str, file: str = "", **facts: Any) -> Callable[[T], T]:
        """Decorator that registers an object under `name` and `aliases`.

        Args:
            name: the official name.
            aliases: other names of the same object.
            file: where the object is defined; needed for an object that is not a class or function.
            facts: what else is known of it before it is used; see :meth:`facts`.

        Raises:
            ValueError: the name is registered already; the message names both files.
        """

        def add(member: T) -> T:
            key = canonical(name)
            for spelling in (name, *aliases):
                registered = self._aliases.get(canonical(spelling))
                if (registered is not None and registered != key) or (registered == key and key in self._members):
                    raise ValueError(
                        f"two {self.kind}s are called {spelling!r}: in {self._files[registered]} and in "
                        f"{file or _defining_file(member)}; rename one of them"
                    )
                self._aliases[canonical(spelling)] = key
            self._members[key] = (name, member)
            self._files[key] = file or _defining_file(member)
            self._facts[key] = facts
            self.version += 1
            return member

        return add

    def replace(self, name: str, member: T) -> T:
        """Register `member` in place of the one called `name`. Raises like :meth:`get`."""
        key = self._key(name)
        self._members[key] = (self._members[key][0], member)
        self.version += 1
        return member

    def get(self, name: str) -> T:
        """The member called `name`.

        Raises:
            UnknownNameError: the name is not registered; the message lists the names and the closest one.
        """
        return self._members[self._key(name)][1]

    def facts(self, name: str) -> Mapping[str, Any]:
        """What was registered with `name` beside the object. Raises like :meth:`get`."""
        return self._facts.get(self._key(name), {})

    def official(self, name: str) -> str:
        """The official spelling of `name`. Raises like :meth:`get`."""
        return self._members[self._key(name)][0]

    def name_of(self, member: T) -> str:
        """The official name of `member`. Files store it, and :meth:`get` returns the member for it.

        Raises:
            UnknownNameError: the member is not registered.
        """
        self.load()
        for name, registered in self._members.values():
            if registered is member:
                return name
        raise UnknownNameError(
            f"the {self.kind} {getattr(member, '__qualname__', member)!r} ({_defining_file(member)}) is not "
            f"registered; decorate it with the register() of {self.package}"
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
        members = self._members.values()
        return sorted((name, (inspect.getdoc(member) or "").split("\n")[0]) for name, member in members)

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
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in entry_points(self.package):
            entry.load()


def entry_points(group: str) -> importlib.metadata.EntryPoints:
    """What installed packages offer in a group."""
    found: importlib.metadata.EntryPoints = _every_entry_point(tuple(sys.path)).select(group=group)
    return found


@functools.cache
def _every_entry_point(path: tuple[str, ...]) -> Any:  # its class depends on Python's version
    """Read once for all groups, as it opens a file of every package on the `path`."""
    del path
    return importlib.metadata.entry_points()


def names_in_source(package: str) -> list[str]:
    """The official names of a package's members, sorted, read from its source files without importing them.

    Members of other packages are listed by the names of their entry points.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    names = {entry.name for entry in entry_points(package)}
    for path in (path for folder in folders or () for path in Path(folder).glob("*.py")):
        names.update(re.findall(r'^@[A-Z]+\.register\("([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(names)


def fact_in_source(package: str, name: str, fact: str) -> str:
    """A text that a member of a package is registered with, read from its source without importing it; empty if none.

    Args:
        package: the package, e.g. ``bitfront.models``.
        name: the member, in any spelling.
        fact: the name of the fact.
    """
    spec = importlib.util.find_spec(package)
    pattern = re.compile(rf'^@[A-Z]+\.register\("([^"]+)".*\b{fact}="([^"]+)"', re.MULTILINE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in Path(folder).glob("*.py"):
            for member, value in pattern.findall(path.read_text(encoding="utf-8")):
                if canonical(member) == canonical(name):
                    return str(value)
    return ""


def _defining_file(member: object) -> str:
    try:
        return inspect.getfile(member)  # type: ignore[arg-type]
    except TypeError:
        return inspect.getfile(type(member))


def import_object(spec: str, key: str) -> object:
    """The object that `spec`, written ``package.module:name``, refers to.

    The working directory is added to ``sys.path`` and stays there, as under ``python -m``, because the module may
    import other modules later, when its object is called.

    Args:
        spec: the module and the name in it; the name may have dots.
        key: the key of the configuration that holds `spec`, for messages.

    Raises:
        ConfigError: `spec` is malformed, there is no such module, or it fails on import, or it lacks the name.
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
        target: object = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and _within(module_name, error.name):
            raise ConfigError(
                f"{spec!r}: there is no module {error.name!r}, neither in the working directory ({here}) nor among "
                "the installed packages. Run the command from the folder that holds it, or install it.",
                key=(key,),
            ) from error
        raise ConfigError(f"{spec!r}: importing {module_name} failed: {one_line(error)}", key=(key,)) from error

    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n in dir(target) if not n.startswith("_") and callable(getattr(target, n))]
            raise ConfigError(
                f"{spec!r}: {module_name} has no {attribute!r}; "
                f"{one_of(names) if names else 'it defines nothing callable'}.{nearest(part, names)}",
                key=(key,),
            )
        target = getattr(target, part)
    return target


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def one_line(error: BaseException) -> str:
    """The type and text of an error in the user's code, and the file and line that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"

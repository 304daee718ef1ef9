"""Old names, kept for one version: each works as before, with a DeprecationWarning that says the new name."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn the caller's caller that `old` is called `new` now."""
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.3", DeprecationWarning, stacklevel=stacklevel)


def renamed_attributes(module: str, names: Mapping[str, Callable[[], tuple[str, Any]]]) -> Callable[[str], Any]:
    """A module's `__getattr__` for old names. names: old name to a function that returns (new name, value)."""

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, value = names[name]()
        warn_renamed(f"{module}.{name}", f"{module}.{new}")
        return value

    return look_up


def renamed_arguments(names: Mapping[str, str], what: str = "") -> Callable[[Callable], Callable]:
    """A decorator of functions whose arguments were renamed, old name to new. what: the function's name in warnings."""

    def change(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                if names[old] in kwargs:
                    raise TypeError(f"{what or function.__name__}: got {old} and {names[old]}, expected one of the two")
                warn_renamed(f"{what or function.__name__}({old}=...)", names[old])
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return change


def renamed_fields(names: Mapping[str, str]) -> Callable[[Kind], Kind]:
    """A decorator of dataclasses: the old names (old to new) are still taken as arguments and read as attributes."""

    def change(kind: Kind) -> Kind:
        kind.__init__ = renamed_arguments(names, kind.__name__)(kind.__init__)  # type: ignore[misc]
        for old, new in names.items():
            setattr(kind, old, property(functools.partial(_read, old=old, new=new)))
        return kind

    return change


def _read(self: Any, old: str, new: str) -> Any:
    warn_renamed(f"{type(self).__name__}.{old}", new)
    return getattr(self, new)


def callable_module(module: str, name: str) -> None:
    """Make a module that a function of its own name hid until now callable as that function was."""

    class ModuleLikeFunction(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            warn_renamed(f"{module}(...)", f"{module}.{name}")
            return getattr(self, name)(*args, **kwargs)

    sys.modules[module].__class__ = ModuleLikeFunction

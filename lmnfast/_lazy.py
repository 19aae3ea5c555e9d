"""Packages whose names are imported at their first use (PEP 562): ``lmnfast --help`` does not wait for torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy(
    namespace: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package.

    The first use of a name imports all names, so that the package then is what it would be with plain imports. A module of the
    package is imported when it is used as an attribute.

    Args:
        namespace: the ``globals()`` of the package.
        homes: the modules of the package, each with the names in it, separated by blanks.
    """
    package = namespace["__name__"]
    names = {name for each in homes.values() for name in each.split()}

    def getattr_(name: str) -> Any:
        if name in names:
            for home, each in homes.items():
                module = import_module(f"{package}.{home}")
                namespace.update({one: getattr(module, one) for one in each.split()})
            return namespace[name]
        # Python itself asks for names with two underscores, such as __path__, which are never those of a module.
        if not name.startswith("__") and name.isidentifier() and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_, lambda: sorted({*namespace, *namespace["__all__"]})

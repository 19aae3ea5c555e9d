"""Packages that an extra of lmnfast installs."""

import importlib
from types import ModuleType


def required(names: str | tuple[str, ...], extra: str) -> ModuleType:
    """The first of these modules that is installed.

    Args:
        names: one or several module names.
        extra: the extra of lmnfast that installs the module.

    Raises:
        ImportError: no module is installed; the message says how to install it. A module that is installed and fails to
            import raises its own error.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        package = name.partition(".")[0]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # torch.utils.tensorboard exists without tensorboard, and then fails because tensorboard is missing.
            if error.name is None or error.name.partition(".")[0] not in {package, extra}:
                raise
    raise ImportError(f"{names[0]}: not installed; pip install lmnfast[{extra}]")

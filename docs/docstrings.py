"""What griffe, which reads the docstrings for the API pages, does to them: an example becomes a block of code, a role as
``:func:`measure` `` becomes a link, and arguments that share an entry get one each."""

import pkgutil
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth):`(?:lmnfast\.)?([\w.]+)`")
# Where a name is looked for that stands alone, as the modules of the package import it.
HOMES = ("lmnfast", "lmnfast.quadrature", "lmnfast.reference", "lmnfast.ops")


class Docstrings(griffe.Extension):
    """Loaded by mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        home = obj.path if obj.is_module else obj.path.rpartition(".")[0]
        obj.docstring.value = ROLE.sub(lambda role: _link(role[1], home), _arguments_apart(text))


def _arguments_apart(text: str) -> str:
    """Gives each argument an entry of its own where several share one, ``points, rule: as in ...``."""

    def apart(entry: re.Match[str]) -> str:
        return "".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))

    head, mark, rest = text.partition("\nArgs:\n")
    section, blank, after = rest.partition("\n\n")
    section = re.sub(
        r"^( {4})(\w+(?:, \w+)+): ((?:.*\n?)(?: {5,}.*\n?)*)", apart, f"{section}\n", flags=re.MULTILINE
    )
    return head + mark + (section.rstrip("\n") if mark else "") + blank + after


def _link(name: str, home: str) -> str:
    """A link to a name as the docstrings of the module `home` say it; only the name if it is nothing public."""
    own = [place for place in HOMES if f"{home}.".startswith(f"{place}.")][-1:]
    for place in (*own, *HOMES):
        try:
            pkgutil.resolve_name(f"{place}.{name}")
        except (ImportError, AttributeError):
            continue
        op = f".{name}" if place == "lmnfast.ops" else ""  # the module of an op has the op's name
        return f"[`{name}`][{place}.{name}{op}]"
    return f"`{name}`"

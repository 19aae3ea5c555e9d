"""What mkdocs does to pages: CONTRIBUTING.md and CHANGELOG.md of the checkout become pages, and links to the checkout's files
outside docs/ become names, because the site does not have these files. {{help COMMAND}} becomes the text of that command."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INCLUDED = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}  # pages that are files of the checkout
PAGES = {
    "README.md": "index.md",
    **{file: page for page, file in INCLUDED.items()},
}  # where links to such files lead


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    source = Path(page.file.src_uri)
    if included := INCLUDED.get(page.file.src_uri):
        source, markdown = Path("..", included), (ROOT / included).read_text()
    markdown = re.sub(r"{{help (\w+)}}", lambda command: _help(command[1]), markdown)
    return re.sub(
        r"\[([^\]]*)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", lambda link: _link(link, source, page), markdown
    )


def _help(command: str) -> str:
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from lmnfast.cli import main; sys.exit(main())",
            command,
            "--help",
        ],
        env={**os.environ, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return f"```text\n{shown}```"


def _link(link: re.Match[str], source: Path, page: Any) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    place = (ROOT / "docs" / source.parent / target).resolve()
    if place.is_relative_to(ROOT / "docs"):
        uri = place.relative_to(ROOT / "docs")
    elif (name := str(place.relative_to(ROOT))) in PAGES:
        uri = Path(PAGES[name])
    else:
        return f"{text} (`{name}`)"
    up = "../" * page.file.src_uri.count("/")
    return f"[{text}]({up}{uri}{anchor})"

"""Figures as files."""

import io
from pathlib import Path
from typing import Any

from .._files import write_file


def save(figure: Any, path: Path, dpi: int = 200, colours: int | None = None) -> Path:
    """Writes a matplotlib figure as .png. The file is written whole or not at all.

    Args:
        figure: a matplotlib figure.
        path: the file.
        dpi: dots per inch.
        colours: the number of colours in the file, None for all. A file with 256 colours has a third of the bytes.

    Returns:
        The path.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    if colours is not None:
        from PIL import Image  # always there: matplotlib needs it

        picture = Image.open(image).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        image = io.BytesIO()
        picture.save(image, format="png", optimize=True)
    write_file(path, image.getvalue())
    return path

"""Matrices in .npy files that carry facts and a checksum behind their numbers, and are written whole."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._files import write_file

# The end of a file: the facts as JSON, their length, the checksum of all before it, and this word. numpy reads none of it.
END = struct.Struct("<II8s")
MAGIC = b"lmnfast1"
CHUNK = 2**24


def write_matrix(
    path: Path, parts: Iterable[np.ndarray], shape: tuple[int, int], dtype: str, about: Mapping[str, Any]
) -> None:
    """Writes a matrix, given as runs of rows. The file is written whole or not at all.

    Args:
        path: the file; numpy.load reads the matrix from it.
        parts: (rows, columns) each, together of the shape.
        dtype: "float32" or "float64".
        about: facts that JSON can hold.

    Raises:
        OSError: the file cannot be written; the message names it.
    """

    def write(file: BinaryIO) -> None:
        summed = _Summed(file)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(summed, header)
        for part in parts:
            summed.write(np.ascontiguousarray(part, dtype=dtype).reshape(-1).view(np.uint8).data)
        facts = json.dumps(dict(about)).encode()
        summed.write(facts)
        file.write(END.pack(len(facts), summed.sum, MAGIC))

    try:
        write_file(path, write)
    except OSError as error:
        raise OSError(f"out: cannot write {path}: {error.strerror or error}") from error


class _Summed:
    """A file with the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)


def read_about(path: Path) -> dict[str, Any]:
    """The facts of an intact file of `write_matrix`. Reads the whole file, a piece at a time.

    Raises:
        ValueError: the file is damaged, or another; the message is the reason.
        FileNotFoundError: there is no file.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < END.size:
            raise ValueError("it is cut off")
        file.seek(size - END.size)
        length, expected, magic = END.unpack(file.read(END.size))
        if magic != MAGIC or length > size - END.size:
            raise ValueError("it is cut off, or another file")
        file.seek(0)
        left, found = size - END.size, 0
        while left:
            piece = file.read(min(CHUNK, left))
            found, left = zlib.crc32(piece, found), left - len(piece)
        if found != expected:
            raise ValueError("its checksum is wrong")
        file.seek(size - END.size - length)
        about = json.loads(file.read(length))
        if not isinstance(about, dict):
            raise ValueError("it has other facts")
        return about


def mapped(path: Path) -> np.ndarray:
    """The matrix of a file, read where it is used. What is written to it stays in memory."""
    return np.lib.format.open_memmap(path, mode="c")


def check_matrix(path: Path, shape: tuple[int, int], dtype: str) -> None:
    """Raises ValueError if the matrix of a file has another shape or dtype; the message is the reason."""
    matrix = mapped(path)
    if (matrix.shape, matrix.dtype, matrix.flags.c_contiguous) != (shape, np.dtype(dtype), True):
        order = "" if matrix.flags.c_contiguous else ", column by column"
        raise ValueError(f"it holds {matrix.dtype} of shape {matrix.shape}{order}, not {dtype} of {shape}")

"""Stage 6: a stack file's header, read and checked without loading a tensor. Light: lists and tabs
read it too.

    <name>.concepts.safetensors          the version in use
    <name>.concepts.history/7.stack      an earlier version, or one that was undone (`versions`)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from .files import check_regular, real_file
from .stackschema import checked, damaged, refuse_number, unique_pairs, unreadable
from .stacktensors import BYTES, Shape

_MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
_MOST_VALUES = 4_000_000  # in the header, which takes up to a hundred bytes of memory for each


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a stack file. Errors: as `read_shapes`."""
    return read_shapes(path)[0]


def read_shapes(path: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """The checked header of a stack file, and its tensors' shapes. Errors: as `opened`."""
    with opened(path) as (_, header, shapes):
        return header, shapes


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], dict[str, Any], dict[str, Shape]]]:
    """A stack file, open, with its checked header and its tensors' shapes.

    Everything read through it is from one version, even if another program replaces the file.
    Errors: StackError for a file that is missing, damaged, foreign, tampered with or newer than
    this program.
    """
    try:
        real = real_file(path)
        check_regular(real)
        with real.open("rb") as file:
            metadata, shapes = _content(path, file)
            yield file, checked(path, metadata, shapes), shapes
    except OSError as error:
        raise unreadable(path, error) from None


def _content(path: Path, file: IO[bytes]) -> tuple[dict[str, str], dict[str, Shape]]:
    """The metadata and the tensors' shapes of a safetensors file.

    Errors: StackError for a damaged one.
    """
    try:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MOST_HEADER:
            raise ValueError("it has no header")
        text = _whole(file.read(length), length)
        if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
            raise ValueError("its header is absurdly long")
        content = json.loads(
            text,
            parse_constant=refuse_number,
            object_pairs_hook=unique_pairs,
        )
        if not isinstance(content, dict):
            raise ValueError("its header is not an object")
        metadata = content.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("its metadata is not text")
        return metadata, _shapes(content, 8 + length, file.seek(0, 2))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error)) from None


def _whole(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise ValueError("it is truncated")
    return data


def _shapes(entries: Mapping[str, Any], first: int, end_of_file: int) -> dict[str, Shape]:
    """The tensors, which have to fill the file from byte `first` on without gap or overlap.

    Errors: ValueError.
    """
    shapes: dict[str, Shape] = {}
    spans = []
    for name, one in entries.items():
        dtype, sizes, (start, end) = one["dtype"], one["shape"], one["data_offsets"]
        if not isinstance(dtype, str) or not all(
            type(n) is int and 0 <= n < 2**40 for n in (*sizes, start, end)
        ):
            raise ValueError(f"its tensor {name} has an invalid size")
        shapes[name] = Shape(dtype, tuple(sizes), first + start)
        spans.append((start, end))
        if dtype in BYTES and end - start != BYTES[dtype] * math.prod(sizes):
            raise ValueError(f"its tensor {name} has {end - start} bytes, not as many as its shape")
    size = end_of_file - first
    spans = sorted([(0, 0), *spans, (size, size)])
    if any(a[1] != b[0] for a, b in pairwise(spans)):
        raise ValueError("it is truncated, or its tensors overlap")
    return shapes

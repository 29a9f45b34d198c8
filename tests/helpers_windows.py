"""What Windows does to files, on Linux: a file that this process has open or memory-mapped can't be
replaced, renamed or removed, and no rename replaces a file.

Other processes' files are not looked at. Locks are left to filelock, which unlocks before it removes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from comfy_continual_lora import files

NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped"
)


def in_use(path: Any, at: int | None = None) -> str:
    """How this process uses a file: "mapped", "open", or not at all; `at`: the folder of a relative
    path, as `dir_fd`.
    """
    try:
        found = os.stat(path, dir_fd=at, follow_symlinks=False)
    except OSError:
        return ""
    if os.path.isdir(path) or str(path).endswith(".lock"):
        return ""
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, _, device, inode, *_ = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        if (os.makedev(major, minor), int(inode)) == (found.st_dev, found.st_ino):
            return "mapped"
    for name in os.listdir("/proc/self/fd"):
        try:
            one = os.fstat(int(name))
        except OSError:  # the listing's own
            continue
        if (one.st_dev, one.st_ino) == (found.st_dev, found.st_ino):
            return "open"
    return ""


class Windows:
    """What was asked for, and what was refused."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.refused: list[str] = []

    def _check(self, work: str, path: Any, at: int | None) -> None:
        if use := in_use(path, at):
            self.refused.append(f"{work} {path}, which is {use}")
            raise PermissionError(13, "The process cannot access the file", str(path))

    def moving(self, work: str, move: Callable[..., None], replaces: bool) -> Callable[..., None]:
        def moved(source: Any, target: Any, **rest: Any) -> None:
            self._check(work, source, rest.get("src_dir_fd"))
            self._check(work, target, rest.get("dst_dir_fd"))
            if not replaces and os.path.lexists(target):
                self.refused.append(f"{work} {target}, which exists")
                raise FileExistsError(17, "The file exists", str(target))
            self.done.append(f"{work} {target}")
            move(source, target, **rest)

        return moved

    def removing(self, work: str, remove: Callable[..., None]) -> Callable[..., None]:
        def removed(path: Any, **rest: Any) -> None:
            self._check(work, path, rest.get("dir_fd"))
            self.done.append(f"{work} {path}")
            remove(path, **rest)

        return removed


@contextmanager
def as_on_windows() -> Iterator[Windows]:
    """Inside the block files are as on Windows, and there is no fcntl."""
    system = Windows()
    with (
        mock.patch.object(os, "replace", system.moving("replace", os.replace, True)),
        mock.patch.object(os, "rename", system.moving("rename", os.rename, False)),
        mock.patch.object(os, "unlink", system.removing("unlink", os.unlink)),
        mock.patch.object(os, "remove", system.removing("remove", os.remove)),
        mock.patch.object(files, "WINDOWS", True),
        mock.patch.object(files, "fcntl", None),
        mock.patch.object(files, "_PATIENCE", 0.2),
    ):
        yield system

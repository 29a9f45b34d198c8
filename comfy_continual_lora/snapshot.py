"""Stage 3: snapshots - the state of an unfinished run, in a file beside the stack; the same request
resumes from it.

    <stack>.<token>.<run>.snapshot         while learning
    <stack>.<token>.<run>.dsc.snapshot     while consolidating

<run> is the start of the run's identity, so no run overwrites another's file. Tensors are the
trained values and the optimizer's state; the header holds identity, step, losses, the request, and a
checksum of everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import excerpt
from .files import write_whole

_SOURCES = {
    "noun": "the class noun",
    "pictures": "the pictures, captions or masks",
    "start": "the stack it started from",
    "checkpoint": "the checkpoint",
}


class DamagedSnapshot(Exception):
    """The message says what is wrong with a snapshot's file."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step."""

    identity: str  # of the run
    step: int
    losses: list[float]
    asked: dict[str, Any]  # the request: settings by name, and hashes of the rest
    tensors: dict[str, Tensor]


def identity(asked: Mapping[str, Any]) -> str:
    """A hash of everything in the request that decides how a run goes.

    Computed numbers are not part of it: their last digits depend on the number of threads.
    """
    return hashlib.sha256(json.dumps(dict(asked), sort_keys=True).encode()).hexdigest()


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Errors: OSError."""
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    header = {
        "identity": snapshot.identity,
        "step": str(snapshot.step),
        "losses": json.dumps(snapshot.losses),
        "asked": json.dumps(snapshot.asked),
    }
    write_whole(path, save(tensors, {**header, "checksum": _checksum(tensors, header)}))


def read_snapshot(path: Path) -> Snapshot:
    """Errors: OSError for a file that can't be read; DamagedSnapshot for invalid content."""
    try:
        data = path.read_bytes()
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))
    except (SafetensorError, struct.error) as error:
        raise DamagedSnapshot(str(error)) from None
    checksum = header.pop("checksum", None)
    if checksum is None:
        raise DamagedSnapshot("it was written by an earlier version or by another program")
    if checksum != _checksum(tensors, header):
        raise DamagedSnapshot("its checksum is wrong")
    try:
        losses = [float(loss) for loss in json.loads(header["losses"])]
        asked = dict(json.loads(header["asked"]))
        snapshot = Snapshot(header["identity"], int(header["step"]), losses, asked, tensors)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedSnapshot(f"it is incomplete: {error!s:.200}") from None
    if not re.fullmatch("[0-9a-f]{64}", snapshot.identity):  # a part of it is in names of files
        raise DamagedSnapshot("its identity is not a hash")
    if snapshot.step != len(losses) or not isinstance(asked.get("settings", {}), dict):
        raise DamagedSnapshot("its parts do not fit each other")
    numbers = [one.float() for one in tensors.values() if one.is_floating_point()]
    if not all(map(math.isfinite, losses)) or not all(one.isfinite().all() for one in numbers):
        raise DamagedSnapshot("it contains infinite or NaN values")
    return snapshot


def is_like(value: Tensor | None, other: Any) -> bool:
    """Whether there is a value, of the other's shape and dtype."""
    other = torch.as_tensor(other)
    return value is not None and (value.shape, value.dtype) == (other.shape, other.dtype)


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def other_runs(files: Iterable[Path], asked: Mapping[str, Any]) -> list[str]:
    """A note on each other unfinished run of the same word: its file, its step, how to resume it."""
    notes = []
    for path in files:
        try:
            other = read_snapshot(path)
        except (OSError, DamagedSnapshot) as error:
            notes.append(
                f"{path} was left by another run and can't be used ({error}). It is left alone; "
                "delete it if you don't need it."
            )
            continue
        if other.identity != identity(asked):
            differs = _differences(other.asked, asked)
            back = ""
            if other.asked.get("start") != asked.get("start"):
                back = "go back to the version of the stack it started from (`restore`) and "
            notes.append(
                f"Another run of {asked.get('token', 'this word')} was stopped at step "
                f"{other.step} and is kept in {path}. It differs in {differs}. To resume it, {back}"
                "give the same request again; delete the file if you don't need it."
            )
    return notes


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    words = [text for name, text in _SOURCES.items() if theirs.get(name) != ours.get(name)]
    before, now = theirs.get("settings", {}), ours.get("settings", {})
    words += [
        f"`{excerpt(name)[1:-1]}` ({excerpt(before.get(name))}, now {excerpt(now.get(name))})"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return ", ".join(words) or "other details"

"""Stage 3: the state of an unfinished run, in a file beside the stack, from which the same request
resumes.

    <stack>.<token>.<run>.snapshot         while learning
    <stack>.<token>.<run>.dsc.snapshot     while consolidating

<run> is the first digits of the run's identity, so no run overwrites another's file. Tensors are the
trained values and the optimizer's state; the header holds identity, step, losses, the request, and a
checksum of everything.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .files import write_whole

_WHAT = {
    "noun": "the class noun",
    "pictures": "the pictures, captions or masks",
    "start": "what the stack held when it began",
    "checkpoint": "the checkpoint",
}


class DamagedSnapshot(Exception):
    """What is wrong with a snapshot's file."""


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
    """Errors: OSError for a file that can't be read; DamagedSnapshot for one that was changed."""
    try:
        data = path.read_bytes()
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))
    except (SafetensorError, struct.error) as error:
        raise DamagedSnapshot(str(error)) from None
    checksum = header.pop("checksum", None)
    if checksum is None:
        raise DamagedSnapshot("an earlier version of this program wrote it, or something else did")
    if checksum != _checksum(tensors, header):
        raise DamagedSnapshot("its checksum is wrong")
    try:
        losses = [float(loss) for loss in json.loads(header["losses"])]
        return Snapshot(
            header["identity"],
            int(header["step"]),
            losses,
            dict(json.loads(header["asked"])),
            tensors,
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedSnapshot(f"it is not whole: {error}") from None


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def other_runs(files: Iterable[Path], asked: Mapping[str, Any]) -> list[str]:
    """For each other unfinished run of the same word: where it is, how far, and how to resume it."""
    notes = []
    for path in files:
        try:
            other = read_snapshot(path)
        except (OSError, DamagedSnapshot) as error:
            notes.append(
                f"{path} is what another run left, and can't be used ({error}). It is not "
                "touched; delete it if it is not wanted."
            )
            continue
        if other.identity != identity(asked):
            differs = _differences(other.asked, asked)
            notes.append(
                f"Another run of {asked.get('token', 'this word')} was stopped at step "
                f"{other.step} and is kept in {path}. It differs in {differs}. "
                "To go on with it, ask for it as it was; delete the file if it is not wanted."
            )
    return notes


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    words = [text for name, text in _WHAT.items() if theirs.get(name) != ours.get(name)]
    before, now = theirs.get("settings", {}), ours.get("settings", {})
    words += [
        f"{name} ({before.get(name)}, now {now.get(name)})"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return ", ".join(words) or "how it was begun"

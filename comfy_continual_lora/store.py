"""Stage 6: `ConceptStack` <-> one safetensors file beside the checkpoint.

    adapter.<layer>.<part>                the current adapter
    before.<layer>.<part>                 the adapter before the newest concept was consolidated
    pool.<concept id>.<layer>.<part>      the adapter after each earlier concept
    wish.<concept id>.<layer>.<part>      a concept's target for the closed form (`targets`)
    fisher.<concept id>.<layer>.<part>    a concept's Fisher
    word.<concept id>                     a word's vectors, float32 (k, d)

The header holds the rest as JSON (`stackschema`) and can be read without loading a tensor. The file
is written to a temporary name, synced and renamed; earlier versions are kept in the history folder
beside it; one program writes at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save
from torch import Tensor

from .errors import StackError
from .files import real_file, write_whole
from .files import stack_path as stack_path
from .keeping import add_version, new_change, not_finite
from .keeping import writing as writing
from .stack import CheckpointInfo, ConceptRecord, ConceptStack
from .stackfile import opened, read_header
from .stackschema import FORMAT, VERSION, Shape, checked
from .versions import Change

# The tensors' and numbers' names in words; {} is a concept's word
_PARTS = {
    "word": "the word {}",
    "adapter": "the adapter",
    "before": "the adapter before it was consolidated",
    "pool": "the adapter after {}",
    "wish": "the target of {}",
    "fisher": "the Fisher of {}",
    "loss": "the loss of {}",
    "tau": "the temperature of the DC scores",
}


def load_stack(path: Path, fingerprint: str) -> ConceptStack:
    """Read a stack made for the checkpoint with this fingerprint; an empty one if there is no file.

    Errors: StackError for a file that can't be used, or belongs to another checkpoint.
    """
    if not real_file(path).exists():
        return ConceptStack(fingerprint)
    stack = _read(path)
    if stack.fingerprint != fingerprint:
        raise StackError(
            f"The concept stack {path} was made for another checkpoint (its K/V weights "
            f"{stack.fingerprint[:12]}, here {fingerprint[:12]}). Use it with its own checkpoint, "
            "or name another stack file."
        )
    return stack


def _read(path: Path) -> ConceptStack:
    """The file is opened once, so that all of it is from one version, and never memory-mapped, so
    that it can be replaced. (The safetensors library opens a file twice, and maps it.)
    """
    with opened(path) as (file, header, shapes):
        tensors = {name: _tensor(file, shape) for name, shape in shapes.items()}
    _check_finite(path, tensors)
    return _stack_of(header, tensors)


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise not_finite(path, bad)


def _tensor(file: IO[bytes], shape: Shape) -> Tensor:
    """A float32 tensor; `checked` has verified that the file holds it."""
    data = bytearray(4 * math.prod(shape.sizes))
    file.seek(shape.start)
    if file.readinto(data) < len(data):  # pyright: ignore[reportAttributeAccessIssue]
        raise OSError("it was truncated while being read")
    return torch.frombuffer(data, dtype=torch.float32).reshape(shape.sizes)


def _stack_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptStack:
    records = [ConceptRecord(**record) for record in header["concepts"]]
    stack = ConceptStack(header["fingerprint"], records, rank=header["rank"], tau=header["tau"])
    stack.checkpoint = CheckpointInfo(**header["base"])
    stack.history, stack.identity = header["history"], header["identity"]
    stack.later = header["later"]
    stack.identity = stack.owner
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "word":
            stack.words[rest] = torch.atleast_2d(tensor)  # in old stacks (d,)
        elif part == "adapter":
            stack.adapter = {**(stack.adapter or {}), rest: tensor}
        elif part == "before":
            stack.unconsolidated = {**(stack.unconsolidated or {}), rest: tensor}
        else:
            concept, _, name = rest.partition(".")
            by_concept = {"pool": stack.pool, "wish": stack.targets, "fisher": stack.fishers}[part]
            by_concept.setdefault(concept, {})[name] = tensor
    return stack


def read_records(path: Path) -> list[ConceptRecord]:
    """The concepts of a stack file in order, from its header alone; none if there is no file."""
    if not real_file(path).exists():
        return []
    return [ConceptRecord(**record) for record in read_header(path)["concepts"]]


def record_of_request(path: Path, digest: str) -> ConceptRecord | None:
    """The concept of a stack file that was learned by the request with this digest."""
    return next((record for record in read_records(path) if record.request == digest), None)


def open_stack(path: Path) -> ConceptStack:
    """Read a stack of any checkpoint. Errors: StackError if there is none."""
    return _read(path)


def change(kind: str, records: Sequence[ConceptRecord]) -> Change:
    """The change that is about to be stored, with the current time."""
    return new_change(kind, [record.name for record in records])


def save_stack(stack: ConceptStack, path: Path, change: Change | None = None) -> None:
    """Make this the stack's newest version, atomically: at every moment either the old or the new
    one is complete on disk.

    The previous version goes into the history. Errors: StackError if it can't be written, or holds
    values that are not finite.
    """
    _check_storable(path, stack)
    save_version(stack, real_file(path), change, knows_parent=True)


def _check_storable(path: Path, stack: ConceptStack) -> None:
    """Errors: StackError that names the part with values that are not finite."""
    tensors = _tensors_of(stack)
    numbers = {f"loss.{record.id}": record.loss for record in stack.records}
    tensors |= {name: torch.tensor(n) for name, n in {**numbers, "tau": stack.tau or 0.0}.items()}
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        part, _, rest = bad.partition(".")
        tokens = {record.id: record.token for record in stack.records}
        token = tokens.get(rest.partition(".")[0], "")
        raise StackError(
            f"Nothing was stored, because {_PARTS[part].format(token)} has infinite or NaN values "
            f"(in {bad}), which would make every picture black. {path} is unchanged. A lower "
            "`rate` or `precision` fp32 usually helps."
        )


def save_version(
    stack: ConceptStack, path: Path, change: Change | None, *, knows_parent: bool
) -> None:
    """`save_stack` at a real path; `knows_parent` false: undo has no version to go back to."""
    add_version(
        path,
        stack.history,
        lambda number, parent: write(stack, path, number, parent, change),
        knows_parent=knows_parent,
    )


def write(
    stack: ConceptStack, path: Path, number: int, parent: int | None, change: Change | None
) -> None:
    """Make this the file at `path`, as the version `number`."""
    stack.identity = stack.identity or secrets.token_hex(8)
    tensors = _tensors_of(stack)
    header = {
        "version": VERSION,
        "fingerprint": stack.fingerprint,
        "rank": stack.rank,
        "tau": stack.tau,
        "base": _fields_of(stack.checkpoint),
        "concepts": [_fields_of(record) for record in stack.records],
        "identity": stack.identity,
        "number": number,
        "parent": parent,
        "change": None if change is None else _fields_of(change),
        "history": stack.history,
        **stack.later,
    }
    metadata = {"format": FORMAT, "stack": json.dumps(header)}
    checked(
        path,
        metadata,
        {name: Shape("F32", tuple(tensor.shape), 0) for name, tensor in tensors.items()},
    )
    write_whole(path, save(tensors, metadata))


def _tensors_of(stack: ConceptStack) -> dict[str, Tensor]:
    """A file's tensors by name, float32 on the CPU."""
    tensors = {f"word.{concept}": word for concept, word in stack.words.items()}
    for part, adapter in (("adapter", stack.adapter), ("before", stack.unconsolidated)):
        tensors |= {f"{part}.{name}": tensor for name, tensor in (adapter or {}).items()}
    for part, adapters in (
        ("pool", stack.pool),
        ("wish", stack.targets),
        ("fisher", stack.fishers),
    ):
        for concept, adapter in adapters.items():
            tensors |= {f"{part}.{concept}.{name}": tensor for name, tensor in adapter.items()}
    return {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}


def _fields_of(part: ConceptRecord | CheckpointInfo | Change) -> dict[str, Any]:
    """A part of the header as it is stored."""
    fields = dataclasses.asdict(part)
    later = fields.pop("later")
    return {**fields, **later}

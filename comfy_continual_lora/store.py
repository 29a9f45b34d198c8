"""Stage 6: `ConceptStack` <-> one safetensors file beside the checkpoint.

    adapter.<layer>.<part>                the current adapter
    before.<layer>.<part>                 the adapter before the newest concept was consolidated
    pool.<concept id>.<layer>.<part>      the adapter after an earlier concept, if it was trained
    wish.<concept id>.<part>              a concept's target for the closed form (`targets`), int8;
                                          the layers, in order of their names, one below the other
    scale.<concept id>.<part>             what its numbers are multiplied by (`packed`), likewise
    alone.<concept id>, shared.<...>      rows of its prompts (`PromptRows`), float16 (k, d)
    ordinary.listed, ordinary.drawn       ordinary prompts (`Ordinary`): each moment's upper triangle
    fisher.<concept id>.<layer>.<part>    a concept's Fisher
    word.<concept id>                     a word's vectors, float32 (k, d)

All else is float32. The header holds the rest as JSON (`stackschema`) and can be read without
loading a tensor. The file is written, tensor by tensor, to a temporary name, synced and renamed;
earlier versions are kept in the history folder beside it; one program writes at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .adapters.adapter import Adapter
from .adapters.packed import Packed, by_layer, outputs_of, pack
from .errors import StackError
from .files import real_file, write_whole
from .files import stack_path as stack_path
from .keeping import add_version, new_change, not_finite
from .keeping import writing as writing
from .stack import CheckpointInfo, ConceptRecord, ConceptStack, Ordinary, PromptRows
from .stackfile import opened, read_header
from .stackschema import FORMAT, VERSION, checked
from .stacktensors import BYTES, Shape
from .versions import Change

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The tensors' and numbers' names in words; {} is a concept's word
_PARTS = {
    "word": "the word {}",
    "adapter": "the adapter",
    "before": "the adapter before it was consolidated",
    "pool": "the adapter after {}",
    "wish": "the target of {}",
    "scale": "the target of {}",
    "alone": "the prompts about {}",
    "shared": "the prompts about {}",
    "ordinary": "the ordinary prompts",
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
    check_checkpoint(stack, path, fingerprint)
    return stack


def check_checkpoint(stack: ConceptStack, path: Path, fingerprint: str) -> None:
    """Errors: StackError if the stack was made for a checkpoint with another fingerprint."""
    if stack.fingerprint != fingerprint:
        raise StackError(
            f"The concept stack {path} was made for another checkpoint (its K/V weights "
            f"{stack.fingerprint[:12]}, here {fingerprint[:12]}). Use it with its own checkpoint, "
            "or name another stack file."
        )


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
    """`checked` has verified that the file holds it."""
    data = bytearray(BYTES[shape.dtype] * math.prod(shape.sizes))
    file.seek(shape.start)
    if file.readinto(data) < len(data):  # pyright: ignore[reportAttributeAccessIssue]
        raise OSError("it was truncated while being read")
    if not data:  # which `frombuffer` does not take
        return torch.empty(shape.sizes, dtype=_DTYPES[shape.dtype])
    return torch.frombuffer(data, dtype=_DTYPES[shape.dtype]).reshape(shape.sizes)


def _stack_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptStack:
    records = [ConceptRecord(**record) for record in header["concepts"]]
    stack = ConceptStack(header["fingerprint"], records, rank=header["rank"], tau=header["tau"])
    stack.checkpoint = CheckpointInfo(**header["base"])
    stack.history, stack.identity = header["history"], header["identity"]
    stack.later = header["later"]
    stack.identity = stack.owner
    if header["ordinary"] is not None:
        stack.ordinary = _ordinary_of(header["ordinary"], tensors)
    joined: dict[str, dict[str, Adapter]] = {"wish": {}, "scale": {}}
    whole: dict[str, Adapter] = {}  # targets of format version 1
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "word":
            stack.words[rest] = torch.atleast_2d(tensor)  # in old stacks (d,)
        elif part == "adapter":
            stack.adapter = {**(stack.adapter or {}), rest: tensor}
        elif part == "before":
            stack.unconsolidated = {**(stack.unconsolidated or {}), rest: tensor}
        elif part == "alone":
            stack.prompts[rest] = PromptRows(tensor, tensors[f"shared.{rest}"])
        elif part in joined and rest.count(".") == 1:
            concept, _, name = rest.partition(".")
            joined[part].setdefault(concept, {})[name] = tensor
        elif part in ("pool", "wish", "fisher"):
            concept, _, name = rest.partition(".")
            by_concept = {"pool": stack.pool, "wish": whole, "fisher": stack.fishers}[part]
            by_concept.setdefault(concept, {})[name] = tensor
    outputs = outputs_of(stack.adapter or {}) if joined["wish"] else {}
    for concept, parts in joined["wish"].items():
        scales = joined["scale"].get(concept)
        # format version 2 has none
        target = Packed(outputs, parts, scales) if scales else pack(by_layer(parts, outputs))
        stack.targets[concept] = target
    stack.targets |= {concept: pack(target) for concept, target in whole.items()}
    return stack


def _ordinary_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> Ordinary:
    """They are taken out of `tensors`, which are large."""
    drawn = tensors.pop("ordinary.drawn", None)
    return Ordinary(
        _whole(tensors.pop("ordinary.listed")),
        header["count"],
        tuple(header["nouns"]),
        None if drawn is None else _whole(drawn),
        header["share"],
    )


def _whole(triangle: Tensor) -> Tensor:
    """The symmetric matrix (d, d) with this upper triangle, (d (d + 1) / 2,)."""
    width = math.isqrt(2 * len(triangle))
    matrix = torch.empty(width, width)
    for row, values in enumerate(triangle.split(list(range(width, 0, -1)))):
        matrix[row, row:] = values
        matrix[row:, row] = values
    return matrix


def _triangle(matrix: Tensor) -> list[Tensor]:
    """The upper triangle of a matrix, row by row."""
    return [values[row:] for row, values in enumerate(matrix)]


def read_records(path: Path) -> list[ConceptRecord]:
    """The concepts of a stack file in order, from its header alone; none if there is no file."""
    if not real_file(path).exists():
        return []
    return [ConceptRecord(**record) for record in read_header(path)["concepts"]]


def learned_by(records: Sequence[ConceptRecord], digest: str) -> ConceptRecord | None:
    """The concept that was learned by the request with this digest."""
    return next((record for record in records if record.request == digest), None)


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
    numbers = {f"loss.{record.id}": record.loss for record in stack.records}
    numbers["tau"] = stack.tau or 0.0
    tensors = {**_tensors_of(stack), **{name: [torch.tensor(n)] for name, n in numbers.items()}}
    bad = next(
        (name for name, pieces in tensors.items() if not all(t.isfinite().all() for t in pieces)),
        None,
    )
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
        "ordinary": None if stack.ordinary is None else _described(stack.ordinary),
        "history": stack.history,
        **stack.later,
    }
    metadata = {"format": FORMAT, "stack": json.dumps(header)}
    shapes = {name: _shape(pieces) for name, pieces in tensors.items()}
    checked(path, metadata, shapes)
    write_whole(path, _file(tensors, shapes, metadata))


def _described(ordinary: Ordinary) -> dict[str, Any]:
    return {"count": ordinary.count, "nouns": ordinary.nouns, "share": ordinary.share}


def _shape(pieces: Sequence[Tensor]) -> Shape:
    first = pieces[0]
    rows = (sum(len(piece) for piece in pieces),) if first.dim() else ()
    return Shape(_NAMES[first.dtype], (*rows, *first.shape[1:]), 0)


def _file(
    tensors: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, Shape], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, so that there never is a second copy of all tensors."""
    sizes = {name: BYTES[shape.dtype] * math.prod(shape.sizes) for name, shape in shapes.items()}
    names = sorted(tensors, key=lambda name: (-BYTES[shapes[name].dtype], name))  # aligned
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in names:
        end = start + sizes[name]
        entries[name] = {
            "dtype": shapes[name].dtype,
            "shape": shapes[name].sizes,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        for piece in tensors[name]:
            if piece.numel():  # an empty one can't be cast
                yield piece.contiguous().numpy().data.cast("B")


def _tensors_of(stack: ConceptStack) -> dict[str, list[Tensor]]:
    """A file's tensors by name, on the CPU, each in pieces that stand one below the other."""
    tensors: dict[str, list[Tensor]] = {
        f"word.{concept}": [word] for concept, word in stack.words.items()
    }
    for part, adapter in (("adapter", stack.adapter), ("before", stack.unconsolidated)):
        tensors |= {f"{part}.{name}": [tensor] for name, tensor in (adapter or {}).items()}
    for part, adapters in (("pool", stack.pool), ("fisher", stack.fishers)):
        for concept, adapter in adapters.items():
            tensors |= {f"{part}.{concept}.{name}": [tensor] for name, tensor in adapter.items()}
    tensors = {name: [piece.detach().cpu().float()] for name, [piece] in tensors.items()}
    for concept, target in stack.targets.items():
        for name, parts in (("wish", target.numbers), ("scale", target.scales)):
            tensors |= {f"{name}.{concept}.{part}": [tensor] for part, tensor in parts.items()}
    for concept, kept in stack.prompts.items():
        tensors |= {f"alone.{concept}": [kept.alone], f"shared.{concept}": [kept.shared]}
    if stack.ordinary is not None:
        tensors["ordinary.listed"] = _triangle(stack.ordinary.listed)
        if stack.ordinary.drawn is not None:
            tensors["ordinary.drawn"] = _triangle(stack.ordinary.drawn)
    return tensors


def _fields_of(part: ConceptRecord | CheckpointInfo | Change) -> dict[str, Any]:
    """A part of the header as it is stored."""
    fields = dataclasses.asdict(part)
    later = fields.pop("later")
    return {**fields, **later}

"""Stage 6: `ConceptStack` <-> one safetensors file beside the checkpoint.

    adapter.<layer>.A|B                the current adapter
    pool.<concept id>.<layer>.A|B      past ones
    wish.<concept id>.<layer>.A|B      what one concept asks of all
    fisher.<concept id>.<layer>.A|B    what it found important
    word.<concept id>                  its vectors, float32 (k, d)

The header holds the rest as JSON (stackfile.py) and reads without loading a tensor. The file is
written
to a temporary name, synced and renamed; the versions before stay in the history folder beside it;
one
program writes at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from . import stackfile
from .concepts import name_of
from .errors import StackError
from .files import (
    check_names,
    clean_temporary,
    copy_whole,
    history_folder,
    real_file,
    set_aside,
    write_whole,
)
from .files import stack_path as stack_path
from .lora import Adapter
from .stackfile import FORMAT, HISTORY, VERSION, Change, Shape, Version, read_header

_AGAIN = "The concepts stored before are untouched."


@dataclass(frozen=True)
class ConceptRecord:
    """What the header keeps of one concept."""

    id: str
    token: str
    noun: str
    method: str
    images: int
    steps: int
    seed: int
    prompts: list[str]
    hashes: list[str]  # SHA-256 of the training pictures' files
    learned: str  # ISO 8601 date and time, UTC
    loss: float  # mean over the last tenth of the steps
    preview: str  # JPEG, base64
    settings: dict[str, Any]
    with_noun: bool = True  # whether prompts name it "V1 mug" or "V1"
    request: str = ""  # hash of what was asked for: pictures, captions, words, settings
    consolidated: str = ""  # the same of the last consolidation by itself

    @property
    def name(self) -> str:
        """How prompts name it."""
        return name_of(self.token, self.noun if self.with_noun else "")


@dataclass(frozen=True)
class Base:
    """What a stack remembers of its checkpoint, so that files for others can be written without
    loading it.
    """

    preset: str = "sd1"
    prediction: str = "epsilon"
    word_widths: Sequence[int] = ()  # how many numbers of a word's vector are for each text encoder


@dataclass
class ConceptStack:
    """The concepts a checkpoint has learned, in order.

    `adapter` draws all of them; `pool` holds what it was after each earlier concept.
    """

    fingerprint: str
    records: list[ConceptRecord] = field(default_factory=list)
    words: dict[str, Tensor] = field(default_factory=dict)  # by concept id
    adapter: Adapter | None = None
    pool: dict[str, Adapter] = field(
        default_factory=dict
    )  # by concept id; no entry where no adapter was there yet
    wishes: dict[str, Adapter] = field(
        default_factory=dict
    )  # by concept id; what it asked for where a solution for all took its adapter's place
    rank: int | None = None
    fishers: dict[str, Adapter] = field(
        default_factory=dict
    )  # by concept id; none for methods without EWC
    tau: float | None = None  # temperature of the DC scores, calibrated on the first concept
    before: Adapter | None = None  # the newest adapter before it was consolidated by itself
    base: Base = field(default_factory=Base)
    identity: str = ""  # whose the exported files are; set when the stack is first stored
    history: int = HISTORY  # how many earlier versions are kept

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Word vectors by token, for `Backbone.encode_prompts`."""
        return {record.token: self.words[record.id] for record in self.records}

    @property
    def owner(self) -> str:
        """Its identity; of a stack that an earlier program wrote, or that was never stored, one
        that follows from how it began.
        """
        begun = self.records[0].id if self.records else ""
        return self.identity or (
            hashlib.sha256(f"{self.fingerprint}/{begun}".encode()).hexdigest()[:16] if begun else ""
        )

    def find(self, token: str) -> ConceptRecord | None:
        """The concept with this word, in any case."""
        return next(
            (record for record in self.records if record.token.lower() == token.lower()), None
        )

    def adapter_after(self, concept: str) -> Adapter | None:
        """The adapter as it was when this concept had been learned."""
        return (
            self.adapter
            if self.records and concept == self.records[-1].id
            else self.pool.get(concept)
        )

    def add(self, record: ConceptRecord, word: Tensor, adapter: Adapter | None) -> None:
        """Put a new concept on top; the adapter so far goes into the pool."""
        if self.records and self.adapter is not None:
            self.pool[self.records[-1].id] = self.adapter
        self.records.append(record)
        self.words[record.id] = word
        self.adapter, self.before = adapter, None

    def undo(self) -> ConceptRecord:
        """Take the newest concept off: word, record and Fisher; the adapter is as it was before."""
        if not self.records:
            raise StackError("There is no concept to undo: the stack is empty.")
        record = self.records.pop()
        del self.words[record.id]
        self.fishers.pop(record.id, None)
        self.wishes.pop(record.id, None)
        if not self.records:
            self.tau = None
        self.rank = (
            self.records[-1].settings.get("rank", self.rank) if self.records else None
        )  # the closed form may have made it larger since
        self.adapter, self.before = (
            self.pool.pop(self.records[-1].id, None) if self.records else None,
            None,
        )
        return record

    def as_of(self, count: int, *, consolidated: bool = True) -> ConceptStack:
        """A stack as this one was with its first `count` concepts; `consolidated` false: before the
        newest one was consolidated by itself.
        """
        copies = {
            name: copy.copy(getattr(self, name))
            for name in ("records", "words", "pool", "wishes", "fishers")
        }
        past = dataclasses.replace(self, **copies)
        while len(past.records) > max(count, 0):
            past.undo()
        if not consolidated and past.before is not None:
            past.adapter = past.before
        return past


def load_stack(path: Path, fingerprint: str) -> ConceptStack:
    """Read a stack made for the checkpoint with this fingerprint; an empty stack where there is no
    file.
    """
    if not real_file(path).exists():
        return ConceptStack(fingerprint)
    stack = _read(path)
    if stack.fingerprint != fingerprint:
        raise StackError(
            f"The concept stack {path} was made for another checkpoint (its K/V weights "
            f"{stack.fingerprint[:12]}, here {fingerprint[:12]}). "
            "Use it with its own checkpoint, or name another stack file."
        )
    return stack


def _read(path: Path) -> ConceptStack:
    """The file is opened once, so that all of it is of one version, and never mapped, so that it
    can be replaced.

    (The safetensors library opens a file twice, and maps it.)
    """
    with stackfile.opened(path) as (file, header, shapes):
        tensors = {name: _tensor(file, shape) for name, shape in shapes.items()}
    _check_finite(path, tensors)
    return _stack_of(header, tensors)


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise StackError(
            f"The concept stack {path} can't hold numbers that are not finite, as {bad} does: "
            "every picture would be black. "
            "Restore an earlier version, or get the file again."
        )


def _tensor(file: IO[bytes], shape: Shape) -> Tensor:
    """A float32 tensor; `checked` has seen that the file holds it."""
    data = bytearray(4 * math.prod(shape.sizes))
    file.seek(shape.start)
    if file.readinto(data) < len(data):  # pyright: ignore[reportAttributeAccessIssue]
        raise OSError("it became shorter while it was read")
    return torch.frombuffer(data, dtype=torch.float32).reshape(shape.sizes)


def _stack_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptStack:
    records = [ConceptRecord(**record) for record in header["concepts"]]
    stack = ConceptStack(header["fingerprint"], records, rank=header["rank"], tau=header["tau"])
    stack.base = Base(**header["base"])  # stacks from before there were other families are SD1.x
    stack.history, stack.identity = header["history"], header["identity"]
    stack.identity = stack.owner
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "word":
            stack.words[rest] = torch.atleast_2d(
                tensor
            )  # in old stacks a word has one vector, (d,)
        elif part == "adapter":
            stack.adapter = {**(stack.adapter or {}), rest: tensor}
        elif part == "before":
            stack.before = {**(stack.before or {}), rest: tensor}
        else:
            concept, _, name = rest.partition(".")
            {"pool": stack.pool, "wish": stack.wishes, "fisher": stack.fishers}[part].setdefault(
                concept, {}
            )[name] = tensor
    return stack


def read_records(path: Path) -> list[ConceptRecord]:
    """The concepts of a stack file in order, from its header alone; none where there is no file."""
    return (
        [ConceptRecord(**record) for record in read_header(path)["concepts"]]
        if real_file(path).exists()
        else []
    )


def open_stack(path: Path) -> ConceptStack:
    """Read a stack whatever its checkpoint. Raises StackError where there is none."""
    return _read(path)


def change(kind: str, records: Sequence[ConceptRecord]) -> Change:
    """What is about to be stored, and when."""
    return Change(
        kind,
        [record.name for record in records],
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def save_stack(stack: ConceptStack, path: Path, change: Change | None = None) -> None:
    """Make this the stack's newest version, so that at every moment either the old or the new one
    is whole on disk.

    The version before goes to the history. Errors: StackError where it can't be written.
    """
    _save(stack, real_file(path), change, knows_parent=True)


def _save(stack: ConceptStack, path: Path, change: Change | None, *, knows_parent: bool) -> None:
    known = stackfile.versions(path)
    current = next((one for one in known if one.current), None)
    free, parent = max((one.number for one in known), default=0) + 1, None
    with _told_if_it_fails(path):
        if current is not None:
            parent = _keep(path, current, free) if stack.history else current.number
        number = free if parent is None else max(free, parent + 1)
        _write(stack, path, number, parent if knows_parent else None, change)
        _prune(path, stack.history)


def _keep(path: Path, current: Version, free: int) -> int:
    """Put the version in use into the history; returns its number there, `free` being one that
    nobody has.
    """
    folder = history_folder(path)
    folder.mkdir(exist_ok=True)
    number = current.number
    target = folder / f"{number}.stack"
    if target.exists() and not _same_version(
        target, path
    ):  # the file came from elsewhere, with its numbers
        number = free
        target = folder / f"{number}.stack"
    copy_whole(path, target)
    return number


def _same_version(one: Path, other: Path) -> bool:
    """Whether both are the same change of the same stack."""
    try:
        headers = [
            {**read_header(path), "number": None, "parent": None, "identity": "", "history": 0}
            for path in (one, other)
        ]
    except StackError:
        return False
    return headers[0] == headers[1]


def _write(
    stack: ConceptStack, path: Path, number: int, parent: int | None, change: Change | None
) -> None:
    stack.identity = stack.identity or secrets.token_hex(8)
    tensors = {f"word.{concept}": word for concept, word in stack.words.items()}
    for part, adapter in (("adapter", stack.adapter), ("before", stack.before)):
        tensors |= {f"{part}.{name}": tensor for name, tensor in (adapter or {}).items()}
    for part, held in (("pool", stack.pool), ("wish", stack.wishes), ("fisher", stack.fishers)):
        tensors |= {
            f"{part}.{concept}.{name}": tensor
            for concept, adapter in held.items()
            for name, tensor in adapter.items()
        }
    header = {
        "version": VERSION,
        "fingerprint": stack.fingerprint,
        "rank": stack.rank,
        "tau": stack.tau,
        "base": dataclasses.asdict(stack.base),
        "concepts": [dataclasses.asdict(r) for r in stack.records],
        "identity": stack.identity,
        "number": number,
        "parent": parent,
        "change": None if change is None else dataclasses.asdict(change),
        "history": stack.history,
    }
    tensors = {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "stack": json.dumps(header)}
    stackfile.checked(
        path,
        metadata,
        {name: Shape("F32", tuple(tensor.shape), 0) for name, tensor in tensors.items()},
    )
    _check_finite(path, tensors)
    write_whole(path, save(tensors, metadata))


def _prune(path: Path, most: int) -> None:
    """Keep the newest `most` earlier versions, and of the others the one that undoing goes back to."""
    found = [one for one in stackfile.versions(path) if not one.current]
    parent = stackfile.parent_of(path) if most else None
    spare = [one for one in found if parent is None or one.number != parent.number]
    for one in spare[max(0, most - (parent is not None)) :]:
        one.file.unlink(missing_ok=True)
    if not most:
        with suppress(OSError):
            history_folder(path).rmdir()


@contextmanager
def _told_if_it_fails(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StackError(
            f"The concept stack {path} can't be written ({error.strerror or error}): no room or "
            f"no permission there. {_AGAIN}"
        ) from None


# --- going back ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undone:
    """What was taken back: the change, the concept it was about, the tokens on the stack now, the
    number of the version that was left.
    """

    change: str
    token: str
    noun: str
    tokens: list[str]
    version: int


def undo(path: Path, version: int | None = None) -> Undone:
    """Take the last change back, whatever it was: the stack is again exactly as before it.

    What is left stays in the history. Where the version before is no longer kept, the newest
    concept is
    taken off, if learning it was the last change. `version`: the number of the version that is
    meant.
    Errors: StackError where there is nothing to take back, or the stack is at another version by
    now.
    """
    path = real_file(path)
    with writing(path):
        was = read_header(path)
        current = stackfile.in_use(path)
        assert current  # its header was just read
        if version is not None and version != current.number:
            raise StackError(
                f"The stack {path} has changed: it is at version {current.number} now "
                f"({current.change}). Look again, then undo."
            )
        if (parent := stackfile.parent_of(path)) is not None:
            _go_back(path, parent)
        elif stackfile.takes_off_newest(path):
            stack = open_stack(path)
            stack.undo()
            _save(stack, path, change("undone", stack.records), knows_parent=False)
        else:
            raise StackError(stackfile.undo_preview(path))
        now = read_header(path)
    return _undone(was, now, current)


def _undone(was: dict[str, Any], now: dict[str, Any], left: Version) -> Undone:
    sides = [{record["id"]: record for record in header["concepts"]} for header in (was, now)]
    other = [
        side[one] for side in sides for one in side if one not in sides[0] or one not in sides[1]
    ]
    about = (other or was["concepts"] or [{"token": "", "noun": ""}])[-1]
    return Undone(
        left.change,
        about["token"],
        about["noun"],
        [record["token"] for record in now["concepts"]],
        left.number,
    )


def restore(path: Path, number: int) -> Version:
    """Go to the version with this number; the one in use now stays in the history. A damaged one is
    set aside as <name>.damaged.

    Errors: StackError for a number that is not kept, or a version that can't be read.
    """
    path = real_file(path)
    with writing(path):
        try:
            known = stackfile.versions(path)
        except StackError:
            known = stackfile.earlier(path)
        chosen = next((one for one in known if one.number == number), None)
        if chosen is None:
            numbers = ", ".join(str(one.number) for one in known) or "none"
            raise StackError(f"There is no version {number} of {path}. Kept are: {numbers}.")
        if not chosen.current:
            _go_back(path, chosen)
        now = stackfile.in_use(path)
        assert now  # it was just written
        return now


def _go_back(path: Path, chosen: Version) -> None:
    stack, header = open_stack(chosen.file), read_header(chosen.file)
    with _told_if_it_fails(path):
        try:
            current = stackfile.in_use(path)
        except StackError:
            current = None
            set_aside(path)
        if current is not None:
            stack.history = read_header(path)["history"]
            if stack.history:
                _keep(path, current, stackfile.versions(path)[0].number + 1)
        if (header["number"], header["history"]) == (chosen.number, stack.history):
            chosen.file.replace(path)  # needs no room on the disk
        else:
            _write(stack, path, chosen.number, chosen.parent, stackfile.change_of(header))
            chosen.file.unlink()


def keep_versions(path: Path, count: int) -> None:
    """Say how many earlier versions this stack keeps; those that are too many go at once.

    Errors: StackError for a number out of range.
    """
    if not 0 <= count <= 1000:
        raise StackError(f"A stack can keep 0 to 1000 earlier versions; {count} was asked for.")
    path = real_file(path)
    with writing(path):
        stack, current = open_stack(path), stackfile.in_use(path)
        assert current  # it was just read
        stack.history = count
        with _told_if_it_fails(path):
            _write(
                stack, path, current.number, current.parent, stackfile.change_of(read_header(path))
            )
            _prune(path, count)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the stack for one writer, from reading it to replacing it; what killed writers left is
    cleaned up first.

    Errors: StackError, at once, when another program holds it or the folder is not writable.
    """
    path = real_file(path)
    check_names(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StackError(
            f"Another program is changing {path} just now. Wait until it is done, or stop it."
        ) from None
    except OSError as error:
        raise StackError(
            f"The folder {path.parent} can't be written to ({error.strerror or error}). Allow "
            "writing there, or put the stack elsewhere."
        ) from None
    try:
        _clean(path)
        yield
    finally:
        lock.release()


def _clean(path: Path) -> None:
    with suppress(OSError):
        for folder in (path.parent, history_folder(path)):
            clean_temporary(folder)
        for stray in path.parent.glob(
            f".{glob.escape(path.name)}.????????"
        ):  # earlier programs' names
            stray.unlink()

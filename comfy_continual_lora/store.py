"""Stage 6: `ConceptStack` <-> one safetensors file beside the checkpoint.

File: tensors "adapter.<layer>.A|B" (the current adapter), "pool.<concept id>.<layer>.A|B" (past ones), "wish.<concept id>.<layer>.A|B" (what one
concept asks of all), "fisher.<concept id>.<layer>.A|B" (what it found important), "word.<concept id>" (its vectors, float32 (k, d)); the header holds
the rest as JSON and reads without loading a tensor. It is written to a temporary name, synced and renamed; the version before stays beside it as
"<name>.previous"; one program writes at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .concepts import name_of
from .errors import StackError
from .files import stack_path as stack_path
from .lora import Adapter

FORMAT = "comfy-continual-lora"
VERSION = 1
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
    """What a stack remembers of its checkpoint, so that files for others can be written without loading it."""

    preset: str = "sd1"
    prediction: str = "epsilon"
    word_widths: Sequence[int] = ()  # how many numbers of a word's vector are for each text encoder


@dataclass
class ConceptStack:
    """The concepts a checkpoint has learned, in order. `adapter` draws all of them; `pool` holds what it was after each earlier concept."""

    fingerprint: str
    records: list[ConceptRecord] = field(default_factory=list)
    words: dict[str, Tensor] = field(default_factory=dict)  # by concept id
    adapter: Adapter | None = None
    pool: dict[str, Adapter] = field(default_factory=dict)  # by concept id; no entry where no adapter was there yet
    wishes: dict[str, Adapter] = field(default_factory=dict)  # by concept id; what it asked for where a solution for all took its adapter's place
    rank: int | None = None
    fishers: dict[str, Adapter] = field(default_factory=dict)  # by concept id; none for methods without EWC
    tau: float | None = None  # temperature of the DC scores, calibrated on the first concept
    before: Adapter | None = None  # the newest adapter before it was consolidated by itself
    base: Base = field(default_factory=Base)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Word vectors by token, for `Backbone.encode_prompts`."""
        return {record.token: self.words[record.id] for record in self.records}

    def adapter_after(self, concept: str) -> Adapter | None:
        """The adapter as it was when this concept had been learned."""
        return self.adapter if self.records and concept == self.records[-1].id else self.pool.get(concept)

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
        self.rank = self.records[-1].settings.get("rank", self.rank) if self.records else None  # the closed form may have made it larger since
        self.adapter, self.before = self.pool.pop(self.records[-1].id, None) if self.records else None, None
        return record

    def as_of(self, count: int, *, consolidated: bool = True) -> ConceptStack:
        """A stack as this one was with its first `count` concepts; `consolidated` false: before the newest one was consolidated by itself."""
        copies = {name: copy.copy(getattr(self, name)) for name in ("records", "words", "pool", "wishes", "fishers")}
        past = dataclasses.replace(self, **copies)
        while len(past.records) > max(count, 0):
            past.undo()
        if not consolidated and past.before is not None:
            past.adapter = past.before
        return past


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a stack file. Raises StackError for a file that is damaged, foreign or newer than this program."""
    previous = path.with_name(path.name + ".previous")
    rescue = f" The version before it is {previous}; rename it to {path.name} to go back to it." if previous.exists() else ""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StackError(f"The concept stack {path} can't be read ({error}): it is cut short or no safetensors file.{rescue}") from None
    if metadata.get("format") != FORMAT:
        raise StackError(f"{path} is a safetensors file but no concept stack. Move it away, or name another stack file with --stack.")
    header = json.loads(metadata["stack"])
    if header["version"] > VERSION:
        raise StackError(f"{path} has format version {header['version']}, this program reads up to {VERSION}. Update comfy-continual-lora.")
    return header


def load_stack(path: Path, fingerprint: str) -> ConceptStack:
    """Read a stack made for the checkpoint with this fingerprint; an empty stack where there is no file."""
    if not path.exists():
        return ConceptStack(fingerprint)
    header = read_header(path)
    if header["fingerprint"] != fingerprint:
        raise StackError(
            f"The concept stack {path} was made for another checkpoint (its K/V weights {header['fingerprint'][:12]}, here {fingerprint[:12]}). "
            "Use it with its own checkpoint, or name another stack file with --stack."
        )
    stack = ConceptStack(fingerprint, [ConceptRecord(**r) for r in header["concepts"]], rank=header["rank"], tau=header.get("tau"))
    stack.base = Base(**header.get("base", {}))  # stacks from before there were other families are SD1.x
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                part, _, rest = key.partition(".")
                tensor = file.get_tensor(key)
                if part == "word":
                    stack.words[rest] = torch.atleast_2d(tensor)  # in old stacks a word has one vector, (d,)
                elif part == "adapter":
                    stack.adapter = {**(stack.adapter or {}), rest: tensor}
                elif part == "before":
                    stack.before = {**(stack.before or {}), rest: tensor}
                else:
                    concept, _, name = rest.partition(".")
                    {"pool": stack.pool, "wish": stack.wishes, "fisher": stack.fishers}[part].setdefault(concept, {})[name] = tensor
    except SafetensorError as error:
        raise StackError(f"The concept stack {path} can't be read ({error}).") from None
    return stack


def read_records(path: Path) -> list[ConceptRecord]:
    """The concepts of a stack file in order, from its header alone; none where there is no file."""
    return [ConceptRecord(**record) for record in read_header(path)["concepts"]] if path.exists() else []


def open_stack(path: Path) -> ConceptStack:
    """Read a stack whatever its checkpoint. Raises StackError where there is none."""
    if not path.exists():
        raise StackError(f"There is no concept stack at {path}. Learn a concept first.")
    return load_stack(path, read_header(path)["fingerprint"])


def save_stack(stack: ConceptStack, path: Path) -> None:
    """Write the stack so that at every moment either the old or the new version is whole on disk."""
    tensors = {f"word.{concept}": word for concept, word in stack.words.items()}
    for part, adapter in (("adapter", stack.adapter), ("before", stack.before)):
        tensors |= {f"{part}.{name}": tensor for name, tensor in (adapter or {}).items()}
    for part, held in (("pool", stack.pool), ("wish", stack.wishes), ("fisher", stack.fishers)):
        tensors |= {f"{part}.{concept}.{name}": tensor for concept, adapter in held.items() for name, tensor in adapter.items()}
    header = {
        "version": VERSION, "fingerprint": stack.fingerprint, "rank": stack.rank, "tau": stack.tau,
        "base": dataclasses.asdict(stack.base), "concepts": [dataclasses.asdict(r) for r in stack.records],
    }  # fmt: skip
    data = save({k: v.contiguous().cpu() for k, v in tensors.items()}, {"format": FORMAT, "stack": json.dumps(header)})
    try:
        if path.exists():
            previous = path.with_name(path.name + ".previous")
            write_whole(previous, path.read_bytes())
        write_whole(path, data)
    except OSError as error:
        raise StackError(f"The concept stack {path} can't be written ({error.strerror or error}): no room or no permission there. {_AGAIN}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file through a temporary name in the same folder, synced and renamed; on failure the old file stays and the temporary one goes."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the stack for one writer, from reading it to replacing it.

    Errors: StackError, at once, when another program holds it or the folder is not writable.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StackError(f"Another program is changing {path} just now. Wait until it is done, or stop it.") from None
    except OSError as error:
        raise StackError(
            f"The folder {path.parent} can't be written to ({error.strerror or error}). Allow writing there, or put the stack elsewhere with --stack."
        ) from None
    try:
        yield
    finally:
        lock.release()

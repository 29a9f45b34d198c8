"""The value of a CONCEPT_STACK wire, its description in nodes, and how nodes take and give it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import ContinualLoraError, SettingError, StackError, excerpt
from ..files import cache_folder, real_file, stamp_of
from ..progress import counted
from . import host
from .schema import Execute, in_widget_names

if TYPE_CHECKING:
    from ..stack import ConceptRecord, ConceptStack

# What was last seen of each stack's file, and how often it had changed before
_SEEN: dict[Path, tuple[tuple[int, int] | None, int]] = {}


def state_of(file: Path) -> str:
    """The state of a file, for ComfyUI to compare.

    A file that was deleted, or put back with its old time, is in another state than when it was like
    that before: what nodes did then has to be done again.
    """
    changes = changes_of(file)
    return f"{file} {_SEEN[file][0]} {changes}"


def changes_of(file: Path) -> int:
    """How often a file was found changed, deleted or put back since this was first asked."""
    state = stamp_of(file)
    before, changes = _SEEN.get(file, (state, 0))
    _SEEN[file] = state, changes + (state != before)
    return _SEEN[file][1]


def kept_report(stack: Path, concept: str) -> Path:
    """Where the report of learning a concept is kept: in the stack's cache."""
    return cache_folder(real_file(stack)) / f"{concept}.report"


@dataclass(frozen=True)
class StackHandle:
    """A stack's file and the version that is meant (its first `count` concepts).

    Learning always continues from the newest concept on disk; drawing and exporting use that
    version. `consolidated` false: as it was before the newest concept was consolidated.
    `selected`: some of its concepts, with a LoRA solved for only these (Select Concepts).
    """

    checkpoint: Path
    file: Path
    count: int
    consolidated: bool = True
    selected: ConceptStack | None = None
    prediction: str = "auto"  # of the checkpoint's net, as asked for

    @property
    def records(self) -> list[ConceptRecord]:
        """The version's concepts, without their tensors."""
        from ..store import read_records

        return self.selected.records if self.selected else read_records(self.file)[: self.count]

    @property
    def place(self) -> dict[str, Any]:
        """The fields that every request has.

        Errors: StackError for a selection: requests are about the file, which holds all concepts.
        """
        if self.selected:
            raise StackError(
                "Select Concepts is for drawing and exporting; this node works with whole stacks. "
                "Connect Load Concept Stack."
            )
        return {
            "checkpoint": self.checkpoint,
            "stack": self.file,
            "device": host.device(),
            "prediction": self.prediction,
        }

    def read(self) -> ConceptStack | None:
        """The version's stack; None if there is none yet."""
        from ..consolidation import as_of
        from ..store import open_stack

        if self.selected:
            return self.selected
        if not self.file.exists():
            return None
        return as_of(open_stack(self.file), self.count, consolidated=self.consolidated)

    def as_of(self, count: int) -> StackHandle:
        """The version with its first `count` concepts."""
        return dataclasses.replace(self, count=count, consolidated=True, selected=None)

    def now(self) -> StackHandle:
        """The version that is on disk now, whose state counts as seen."""
        from ..store import read_records

        state_of(self.file)
        return self.as_of(len(read_records(self.file)))

    def described(self) -> str:
        """Its concepts, one per line, and its file."""
        records, file = self.records, self.file
        if not records:
            text = f"No concept learned yet. The stack will be {file}."
            if orphans := host.stacks_without_checkpoint(file.parent):
                text += (
                    f"\nIf the checkpoint was renamed, rename its stack too, to {file.name}. "
                    f"Stacks here without a checkpoint: {', '.join(orphans)}"
                )
            return text
        lines = [
            f"{n}. {one.name}   {one.method}, {counted(one.steps, 'step')}, "
            f"{counted(one.images, 'picture')}, {one.learned[:10]}"
            for n, one in enumerate(records, start=1)
        ]
        return "\n".join([*lines, f"in {file}"])


# --- for nodes -------------------------------------------------------------------------------------


class _Wire(NamedTuple):
    """What comes by a wire, and how to recognise it."""

    kind: str
    fits: Callable[[Any], bool]
    source: str  # what to connect
    error: type[ContinualLoraError] = SettingError


_STACK = _Wire(
    "concept stack",
    lambda value: isinstance(value, StackHandle),
    'the stack of Load Concept Stack; in a prompt for the API that is ["ID", 0], with its ID',
    StackError,
)
_TEXT = _Wire("text", lambda value: isinstance(value, str), "a node that gives a STRING")
_NUMBER = _Wire(
    "number", lambda value: isinstance(value, (int, float)), "a node that gives an INT or a FLOAT"
)
_TEXTS = (
    *("token", "tokens", "noun", "captions", "trigger", "lora"),
    *("prefix", "subfolder", "clip_folder"),
)
_NUMBERS = ("strength", "version", "restore", "keep", "score_pictures")  # that are no settings
_WIRES = {
    **dict.fromkeys(_TEXTS, _TEXT),
    **dict.fromkeys(_NUMBERS, _NUMBER),
    "stack": _STACK,
    "other": _STACK,
    "model": _Wire(
        "MODEL", lambda value: hasattr(value, "model_options"), "the MODEL of Load Checkpoint"
    ),
    "clip": _Wire(
        "CLIP",
        lambda value: hasattr(value, "tokenizer"),
        "the CLIP of Load Checkpoint or, for a checkpoint without a text encoder, of Load CLIP",
    ),
    "latent": _Wire(
        "LATENT",
        lambda value: isinstance(value, dict) and hasattr(value.get("samples"), "shape"),
        "the LATENT of a sampler",
    ),
}


def with_wires(execute: Execute) -> Execute:
    """`in_widget_names` of a node whose wires are checked: see `_WIRES`.

    Errors: StackError or SettingError for anything else in its place: ComfyUI checks neither a value
    that its API gives for a wire, nor what comes from a node of any type; and a loader gives None for
    what a file lacks.
    """

    @functools.wraps(execute)
    def wrapped(*args: Any, **given: Any) -> Any:
        for name, value in given.items():
            wire = _WIRES.get(name)
            values = value if isinstance(value, list) else [value]
            if wire and not all(map(wire.fits, values)):
                raise wire.error(
                    f"{name} is {excerpt(value)}, which is no {wire.kind}. Connect {wire.source}."
                )
        return execute(*args, **given)

    return in_widget_names(wrapped)  # type: ignore[return-value]


def reported(stack: StackHandle, report: str) -> Any:
    """`stack_and_report`: the stack as it is now, and the report with what it holds."""
    now = stack.now()
    return io.NodeOutput(now, f"{report}\n\n{now.described()}")


def not_on_stack(stack: StackHandle, token: str) -> Any:
    """`stack_and_report` where there is nothing to do: no concept has this word."""
    report = f"There is no concept {token!r} on the stack; nothing was done."
    return io.NodeOutput(stack.now(), report)

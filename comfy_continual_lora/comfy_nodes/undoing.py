"""Nodes that take a stack back: undo, history."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import StackError
from ..files import cache_folder, real_file, write_whole
from ..operations import OPERATIONS
from ..requests import HistoryRequest, RestoreRequest, UndoRequest
from ..versions import Version, in_use, takes_off_newest, undo_preview
from .handle import StackHandle, not_on_stack, reported, with_wires
from .schema import (
    ADVANCED,
    Stack,
    schema,
    stack_and_report,
)


class UndoConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Undo",
            "Undo Concept",
            "Undo the last change of the stack, whatever it was: the stack is exactly as it was "
            "before. Without a word or version it only reports what it would undo.",
            ["remove concept", "forget", "undo"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "token",
                    default="",
                    tooltip="The word of the newest concept, if learning it was the last change. If "
                    "it is not on the stack, nothing is done.",
                ),
                io.Int.Input(
                    "version",
                    default=0,
                    min=0,
                    max=1_000_000_000,
                    optional=True,
                    tooltip="The number of the version to undo, as shown in the report, whatever "
                    "made it. If it is no longer in use, nothing is done.",
                ),
            ],
            outputs=stack_and_report(),
        )

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, token: str, version: int = 0) -> Any:
        current = in_use(stack.file)
        if current is None or not (token.strip() or version):
            number = "" if current is None else f" To do that, set version to {current.number}."
            return reported(stack, f"{undo_preview(stack.file)}{number}")
        if version and version != current.number:
            report = (
                f"The stack is now at version {current.number}, no longer at {version}; nothing "
                "was done."
            )
            return io.NodeOutput(stack.now(), report)
        if not version and not cls._is_newest(stack, current, token.strip()):
            return not_on_stack(stack, token)
        result = OPERATIONS["undo"](UndoRequest(**stack.place, version=current.number))
        return reported(stack, result.summary())

    @staticmethod
    def _is_newest(stack: StackHandle, current: Version, token: str) -> bool:
        """Whether the last change was to learn the concept with this word; false for a word that is
        not on the stack.

        Errors: StackError if the last change was another one.
        """
        tokens = [one.lower() for one in current.tokens]
        if token.lower() not in tokens:
            return False
        if tokens[-1] != token.lower():
            raise StackError(
                f"{token} is not the newest concept; {current.tokens[-1]} is, and builds on it. "
                "Undo that one first, or use Forget Concept."
            )
        if not takes_off_newest(stack.file):
            raise StackError(
                f"Learning {token} was not the last change: {current.change} was. To undo that, "
                f"set version to {current.number}."
            )
        return True


class StackHistory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "History",
            "Stack History",
            "List the versions of the stack that are kept, what made each and its size on disk, or "
            "go back to one of them. The one in use is kept.",
            ["undo", "versions", "restore", "go back"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Int.Input(
                    "restore",
                    default=0,
                    min=0,
                    max=1_000_000_000,
                    optional=True,
                    tooltip="The number of the version to go back to, as listed in the report; it is "
                    "done once. 0: only list them. To go back to the same again, queue with 0 first.",
                ),
                io.Int.Input(
                    "keep",
                    default=-1,
                    min=-1,
                    max=1000,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="How many earlier versions this stack keeps from now on (5 in a new "
                    "stack). -1: no change.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=stack_and_report(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # the list is read from disk at every run

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, restore: int = 0, keep: int = -1) -> Any:
        refusal = cls._go_back(stack, restore)
        request = HistoryRequest(**stack.place, keep=keep if keep >= 0 else None)
        result = OPERATIONS["history"](request)
        return io.NodeOutput(stack.now(), refusal + result.summary())

    @classmethod
    def _go_back(cls, stack: StackHandle, version: int) -> str:
        """Go back to the version, unless this node was last queued with the same number: what has
        been done since stays. Returns why nothing was done, or nothing.
        """
        node = str(getattr(getattr(cls, "hidden", None), "unique_id", None) or "")
        file = cache_folder(real_file(stack.file)) / "restored.json"
        last = _last_restored(file)
        if version == last.get(node, 0):
            current = in_use(stack.file) if version else None
            if current is None or current.number == version:
                return ""
            return (
                f"The stack went back to version {version} before and is now at version "
                f"{current.number}; nothing was done. To go back again, set restore to 0, queue, and "
                f"set it to {version}.\n\n"
            )
        if version:
            OPERATIONS["restore"](RestoreRequest(**stack.place, version=version))
        with suppress(OSError):  # a cache: without it the next queue goes back again
            file.parent.mkdir(exist_ok=True)
            write_whole(file, json.dumps(last | {node: version}).encode())
        return ""


def _last_restored(file: Path) -> dict[str, Any]:
    """Which versions the nodes were last asked to go back to, by the nodes' ids."""
    try:
        last = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return last if isinstance(last, dict) else {}

"""The table of operations, which every front end reads. Light.

A front end makes an operation's request from its user's input, calls the operation, and shows the
result's `summary()` or sends its `as_json()`. Messages and notes mark the names of NAMES, for which
each front end has its own (`errors.spelled`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from .fields import Settings
from .progress import OnProgress, ignore
from .requests import (
    ConsolidateRequest,
    DrawRequest,
    EvaluateRequest,
    ExportRequest,
    ForgetRequest,
    HistoryRequest,
    ImportRequest,
    InfoRequest,
    LearnRequest,
    MergeRequest,
    RenameRequest,
    Request,
    RestoreRequest,
    ScoreRequest,
    SolveRequest,
    UndoRequest,
)
from .results import Result


@dataclass(frozen=True)
class Operation:
    """`name`: of the command, the route and the worker's job; `function`: of the pipeline, or of a
    light `module` of it.
    """

    name: str
    request: type[Request]
    help: str
    function: str
    module: str = "pipeline"

    def __call__(self, request: Request, on_progress: OnProgress = ignore) -> Result:
        request.check()
        module = import_module(f".{self.module}", __package__)
        run: Callable[[Request, OnProgress], Result] = getattr(module, self.function)
        return run(request, on_progress)


_ALL = (
    Operation("learn", LearnRequest, "teach the checkpoint one more concept", "learn_concept"),
    Operation(
        "consolidate",
        ConsolidateRequest,
        "strengthen earlier concepts once more against the newest one (DSC)",
        "consolidate",
    ),
    Operation(
        "closed_form",
        SolveRequest,
        "solve for all concepts at once, in seconds, without pictures",
        "consolidate_in_closed_form",
        "solving",
    ),
    Operation(
        "forget",
        ForgetRequest,
        "remove any one concept, and what later adapters know of it",
        "forget",
        "solving",
    ),
    Operation(
        "merge",
        MergeRequest,
        "put the concepts of another stack of the same checkpoint on this one",
        "merge",
        "solving",
    ),
    Operation(
        "import",
        ImportRequest,
        "put a K/V LoRA that another program made on the stack, as one concept",
        "import_concept",
    ),
    Operation(
        "scores",
        ScoreRequest,
        "show which learned concept is in each picture, and how certain that is",
        "dc_scores",
    ),
    Operation(
        "evaluate",
        EvaluateRequest,
        "measure how much of each concept is retained since it was learned",
        "evaluate",
    ),
    Operation("draw", DrawRequest, "draw pictures; learned words stand for their concepts", "draw"),
    Operation(
        "export",
        ExportRequest,
        "write one LoRA and one embedding per word, for ComfyUI, A1111, Forge and diffusers",
        "export",
        "solving",
    ),
    Operation(
        "rename",
        RenameRequest,
        "give a concept another word",
        "rename",
        "upkeep",
    ),
    Operation(
        "undo",
        UndoRequest,
        "undo the last change of the stack, whatever it was",
        "undo",
        "upkeep",
    ),
    Operation(
        "history",
        HistoryRequest,
        "list the stack's versions, what made them and their size",
        "history",
        "upkeep",
    ),
    Operation(
        "restore",
        RestoreRequest,
        "go back to another version of the stack; the one in use is kept",
        "restore",
        "upkeep",
    ),
    Operation("info", InfoRequest, "show what a checkpoint has learned", "info", "upkeep"),
)
OPERATIONS = {operation.name: operation for operation in _ALL}


def _names() -> Iterator[str]:
    for operation in _ALL:
        yield operation.name
        for field in dataclasses.fields(operation.request):
            yield field.name
            if isinstance(field.default, Settings):
                yield from (one.name for one in dataclasses.fields(field.default))  # type: ignore[arg-type]


NAMES = frozenset(_names())  # of operations, fields of requests and settings

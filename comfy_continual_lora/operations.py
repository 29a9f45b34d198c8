"""The table of operations, which every front end reads. Light.

A front end makes the request of an operation from what its user gave, calls the operation, and shows
the result's `summary()` or sends its `as_json()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    Request,
    RestoreRequest,
    ScoreRequest,
    SolveRequest,
    UndoRequest,
)
from .results import Result


@dataclass(frozen=True)
class Operation:
    """`name` is that of the command, the route and the worker's job; `function` the pipeline's."""

    name: str
    request: type[Request]
    help: str
    function: str

    def __call__(self, request: Request, on_progress: OnProgress = ignore) -> Result:
        from . import pipeline

        request.check()
        run: Callable[[Request, OnProgress], Result] = getattr(pipeline, self.function)
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
    ),
    Operation(
        "forget",
        ForgetRequest,
        "take any one concept out, and what later adapters know of it",
        "forget",
    ),
    Operation(
        "merge",
        MergeRequest,
        "put the concepts of another stack of the same checkpoint on this one",
        "merge",
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
        "tell which learned concept each picture shows, and how sure that is",
        "dc_scores",
    ),
    Operation(
        "evaluate",
        EvaluateRequest,
        "tell how much of each concept is kept since it was learned",
        "evaluate",
    ),
    Operation("draw", DrawRequest, "draw pictures; learned words stand for their concepts", "draw"),
    Operation(
        "export",
        ExportRequest,
        "write one LoRA and one embedding a word, for ComfyUI, A1111, Forge and diffusers",
        "export",
    ),
    Operation(
        "undo", UndoRequest, "take the last change of the stack back, whatever it was", "undo"
    ),
    Operation(
        "history",
        HistoryRequest,
        "list the stack's versions, what made them and what they take",
        "history",
    ),
    Operation(
        "restore",
        RestoreRequest,
        "go to another version of the stack; the one in use now is kept",
        "restore",
    ),
    Operation("info", InfoRequest, "show what a checkpoint has learned", "info"),
)
OPERATIONS = {operation.name: operation for operation in _ALL}

"""Nodes that ask about what was learned: which concept does a picture show, and is one fading?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..operations import OPERATIONS
from ..requests import EvaluateRequest, ScoreRequest
from ..settings import EvaluateSettings, ScoreSettings
from . import host
from .handle import StackHandle, with_wires
from .schema import (
    ADVANCED,
    Stack,
    first_values,
    schema,
    settings_from,
    validates,
    widgets,
)

if TYPE_CHECKING:
    from ..results import ScoreResult


def scores_table(result: ScoreResult) -> str:
    """One line per picture: its concept, and the likeliest ones."""
    rows = []
    for number, one in enumerate(result.images, start=1):
        likely = ", ".join(f"{name} {p:.2f}" for name, p in list(one.probabilities.items())[:4])
        unsure = "" if one.scores.sure else " (not sure)"
        rows.append(f"picture {number}: {one.scores.best}{unsure}   {likely}")
    return "\n".join(rows)


class ComputeScores(io.ComfyNode):
    SETTINGS = ("trials", "seed", "stages", "weighting", "rows", "size", "fit")

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Scores",
            "Compute DC Scores",
            "Which of the learned concepts does each picture show, or another thing of that kind, "
            "or none of these, and how certain is that?",
            ["classify", "diffusion classifier", "which concept"],
            is_input_list=True,
            inputs=[
                Stack.Input("stack"),
                io.Image.Input("images", tooltip="Pictures to score, as a batch or a list."),
                *widgets(ScoreSettings, cls.SETTINGS, ("trials", "seed")),
            ],
            outputs=[
                io.String.Output(
                    display_name="scores", tooltip="One line per picture, the likeliest first."
                ),
                io.Image.Output(display_name="chart", tooltip="The same as bars."),
                io.String.Output(
                    display_name="best concept",
                    tooltip="The word that most pictures show, or c_0 for none.",
                ),
                io.String.Output(
                    display_name="probabilities",
                    tooltip="JSON: for each picture the probability of every concept.",
                ),
            ],
        )

    validate_inputs = validates(ScoreSettings, SETTINGS)

    @classmethod
    @with_wires
    def execute(cls, images: list, **given: list) -> Any:
        from .. import report

        values = first_values(given)
        stack: StackHandle = values["stack"]
        settings = settings_from(ScoreSettings, values)
        with host.saved_pictures(images) as files, host.at_work() as on_progress:
            request = ScoreRequest(**stack.place, images=files, settings=settings)
            result: Any = OPERATIONS["scores"](request, on_progress)
            chart = report.score_sheet(result.images)
        best = [one.scores.best for one in result.images]
        probabilities = [one.probabilities for one in result.images]
        return io.NodeOutput(
            on_progress.with_notes(scores_table(result)),
            host.to_image([chart]),
            max(best, key=best.count),
            json.dumps(probabilities),
        )


class EvaluateRetention(io.ComfyNode):
    SETTINGS = ("pictures", "steps", "seed", "guidance", "trials", "size")

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Evaluate",
            "Evaluate Retention",
            "Is a concept fading? Draws every concept with every version of the stack since it was "
            "learned and compares: a heat map, and how much is retained.",
            ["forgetting", "heat map", "retention"],
            inputs=[
                Stack.Input("stack"),
                *widgets(EvaluateSettings, cls.SETTINGS, ("pictures", "steps", "seed")),
                io.String.Input(
                    "clip_folder",
                    default="",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="A folder with a CLIP vision model, as transformers saves it, to compare "
                    "with; empty: what the checkpoint itself sees.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat map",
                    tooltip="Rows: concepts; columns: after each one that was learned.",
                ),
                io.String.Output(
                    display_name="report", tooltip="How much of each concept is retained."
                ),
            ],
        )

    validate_inputs = validates(EvaluateSettings, SETTINGS)

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, clip_folder: str = "", **given: Any) -> Any:
        from .. import report

        request = EvaluateRequest(
            **stack.place,
            clip=Path(clip_folder) if clip_folder.strip() else None,
            settings=settings_from(EvaluateSettings, given),
        )
        with host.at_work() as on_progress:
            result: Any = OPERATIONS["evaluate"](request, on_progress)
        sheet = host.to_image([report.retention_sheet(result)])
        return io.NodeOutput(sheet, on_progress.with_notes(result.summary()))

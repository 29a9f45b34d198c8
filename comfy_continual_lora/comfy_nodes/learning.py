"""Nodes that learn: a concept from pictures; consolidate by training or in closed form."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..operations import OPERATIONS
from ..requests import ConsolidateRequest, LearnRequest, SolveRequest
from ..settings import LearnSettings, SolveSettings, TrainSettings
from . import host
from .asking import scores_table
from .handle import StackHandle, kept_report, with_wires
from .schema import (
    ADVANCED,
    Stack,
    first_values,
    in_widget_names,
    schema,
    settings_from,
    solving_widgets,
    stack_and_report,
    validates,
    widgets,
)

if TYPE_CHECKING:
    from ..results import LearnResult


class LearnConcept(io.ComfyNode):
    SETTINGS = (
        "method",
        "steps",
        "rank",
        "rate",
        "seed",
        "preview_every",
        "token_rate",
        "batch",
        "size",
        "fit",
        "flip",
        "adapter",
        "ewc_strength",
        "retention_weight",
        "dsc_steps",
        "fisher_samples",
        "precision",
        "checkpointing",
    )
    LATER = ("vectors", "accumulate")
    LAST = ("kind", "until", "watch_every", "preview_prompts", "keep_features", "clip_skip")
    SHOWN = ("steps", "seed", "preview_every")

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Learn",
            "Learn Concept (continual LoRA)",
            "Teach the checkpoint one more thing from 3 to 15 pictures, without forgetting what "
            "it learned before. Cancel keeps what was learned so far; queue again to resume. The "
            "same request is never learned twice.",
            ["train lora", "dreambooth", "textual inversion", "personalize", "learn"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Image.Input(
                    "images",
                    tooltip="3 to 15 pictures of the thing, as a batch or a list (sizes may differ).",
                ),
                io.String.Input(
                    "token",
                    default="V1",
                    tooltip="The new word, such as V1. Prompts use it from now on.",
                ),
                io.String.Input(
                    "noun", default="", tooltip="What kind of thing it is, such as teapot or dog."
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="A caption for each picture (a list), or one for all; prompts are made "
                    "up for pictures without one.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="A mask for each picture: white is learned from, black is not. LoadImage's "
                    "MASK is white where the picture is transparent: put InvertMask between. One of "
                    "another size is scaled. Fishers and DC scores see the whole picture.",
                ),
                *widgets(LearnSettings, cls.SETTINGS, cls.SHOWN),
                io.Combo.Input(
                    "if_word_exists",
                    options=["refuse", "replace the newest"],
                    default="refuse",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="What to do if the word is already on the stack, learned from other "
                    "pictures or with other settings: refuse, or replace that concept (if it is "
                    "the newest), which stays until the new one is stored.",
                ),
                # last: saved workflows identify widgets by their position
                *widgets(LearnSettings, cls.LATER),
                io.Int.Input(
                    "score_pictures",
                    default=4,
                    min=0,
                    max=1000,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="How many of its pictures are scored once it is learned, for the "
                    "report: which of the concepts does each show? 0: none.",
                ),
                *widgets(LearnSettings, cls.LAST),
            ],
            outputs=[
                Stack.Output(
                    display_name="stack",
                    tooltip="With the new concept on top: for Apply Concepts, Export Concepts or the "
                    "next Learn Concept.",
                ),
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="The stack's LoRA for stock nodes; words need Apply Concepts.",
                ),
                io.Image.Output(
                    display_name="loss curve",
                    tooltip="The loss over the steps, also where it was learned before; with "
                    "watch_every, a second picture shows the likeness to pictures held out.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was learned, notes on the pictures, scores, and what is on the "
                    "stack.",
                ),
            ],
        )

    validate_inputs = validates(
        LearnSettings, (*SETTINGS, *LATER, *LAST), ("token", "noun"), needs_noun=True
    )

    @classmethod
    @with_wires
    def execute(
        cls, images: list, captions: list | None = None, masks: list | None = None, **given: list
    ) -> Any:
        from ..curves import curve_picture, looks_picture
        from ..stock import stock_lora

        values = first_values(given)
        stack: StackHandle = values["stack"]
        with (
            host.saved_pictures(images, captions or (), masks or ()) as files,
            host.at_work() as on_progress,
        ):
            request = LearnRequest(
                **stack.place,
                images=files,
                token=values["token"].strip(),
                noun=values["noun"].strip(),
                settings=settings_from(LearnSettings, values),
                replace=values.get("if_word_exists", "refuse") != "refuse",
                score=values.get("score_pictures", 4),
            )
            result: Any = OPERATIONS["learn"](request, on_progress)
            report = cls._report(stack.file, result, on_progress)
        number = [one.id for one in stack.now().records].index(result.record.id) + 1
        after = dataclasses.replace(stack.as_of(number), consolidated=False)
        learned = after.read()
        assert learned  # it has just been stored
        record = result.record
        curves = [curve_picture(record.losses, f"Loss while learning {record.token}")]
        if record.watched:
            curves.append(looks_picture(record.watched))
        return io.NodeOutput(
            after,
            stock_lora(learned),
            host.to_image(curves),
            f"{report}\n\n{after.described()}",
        )

    @staticmethod
    def _report(stack: Path, result: LearnResult, on_progress: host.Reporter) -> str:
        """What was done and with what; it is kept, so that the same request has the same report."""
        record = result.record
        kept = kept_report(stack, record.id)
        done = dataclasses.replace(result, scores=None).summary()
        loss = f"Loss {record.loss:.4f} after {record.steps} steps."
        if result.again:
            before = kept.read_text(encoding="utf-8") if kept.exists() else loss
            return on_progress.with_notes(f"{done}\n{before}")
        report = on_progress.with_notes(f"{done}\n{loss}")
        if result.scores is not None:
            report += f"\nDC scores of its pictures:\n{scores_table(result.scores)}"
        with suppress(OSError):  # a cache: without it only the loss is told again
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(report, encoding="utf-8")
        return report


class Consolidate(io.ComfyNode):
    SETTINGS = (
        "dsc_steps",
        "dsc_rate",
        "seed",
        "rate",
        "batch",
        "size",
        "fit",
        "flip",
        "dsc_a1",
        "dsc_a2",
        "dsc_b1",
        "dsc_b2",
        "dsc_redraw",
        "ewc_strength",
        "retention_weight",
        "precision",
        "fisher_samples",
        "checkpointing",
        "accumulate",
    )
    SHOWN = ("dsc_steps", "dsc_rate", "seed")

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Consolidate",
            "Consolidate (DSC)",
            "Strengthen the earlier concepts once more against the newest one (Diffusion Scores "
            "Consolidation). Needs the newest concept's pictures. The same request is never run "
            "twice.",
            ["DSC", "distill", "consolidate", "forgetting"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Image.Input(
                    "images", tooltip="The pictures the newest concept was learned from."
                ),
                *widgets(TrainSettings, cls.SETTINGS, cls.SHOWN),
            ],
            outputs=[
                Stack.Output(display_name="stack", tooltip="The stack with its new LoRA."),
                io.Image.Output(display_name="loss curve", tooltip="The loss over the steps."),
                io.String.Output(display_name="report", tooltip="What was done."),
            ],
        )

    validate_inputs = validates(TrainSettings, SETTINGS)

    @classmethod
    @with_wires
    def execute(cls, images: list, **given: list) -> Any:
        from ..curves import curve_picture

        values = first_values(given)
        stack: StackHandle = values["stack"]
        settings = settings_from(TrainSettings, values)
        with host.saved_pictures(images) as files, host.at_work() as on_progress:
            request = ConsolidateRequest(**stack.place, images=files, settings=settings)
            result: Any = OPERATIONS["consolidate"](request, on_progress)
        curve = curve_picture(result.losses, "Loss while consolidating")
        report = on_progress.with_notes(result.summary())
        return io.NodeOutput(stack.now(), host.to_image([curve]), report)


class ConsolidateInClosedForm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "ClosedForm",
            "Consolidate (closed form)",
            "Restore what later concepts took from earlier ones: the one LoRA closest to what each "
            "concept's own did to its prompts. Takes seconds, needs no pictures, and gives the same "
            "result every time.",
            ["consolidate", "forgetting", "merge", "restore"],
            is_output_node=True,
            inputs=[Stack.Input("stack"), *solving_widgets()],
            outputs=stack_and_report(),
        )

    validate_inputs = validates()

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, **given: Any) -> Any:
        request = SolveRequest(**stack.place, settings=settings_from(SolveSettings, given))
        with host.at_work() as on_progress:
            result = OPERATIONS["closed_form"](request, on_progress)
        return io.NodeOutput(stack.now(), on_progress.with_notes(result.summary()))


class ExamplePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Examples",
            "Mini-SD Example Pictures",
            "Pictures of a thing the mini-SD has never seen, to try learning on.",
            ["test images", "demo"],
            inputs=[
                io.Int.Input(
                    "which", default=1, min=1, max=30, tooltip="Which of the 30 example things."
                ),
                io.Int.Input(
                    "count",
                    default=5,
                    min=1,
                    max=10,
                    tooltip="How many pictures of it, each on another background.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Its pictures, one batch."),
                io.String.Output(display_name="noun", tooltip="What kind of thing it is."),
            ],
        )

    @classmethod
    @in_widget_names
    def execute(cls, which: int, count: int) -> Any:
        from PIL import Image

        from ..mini import world

        concept = world.concepts("development")[which - 1]
        return io.NodeOutput(
            host.to_image([Image.fromarray(p) for p in world.concept_pictures(concept, count)]),
            concept.noun,
        )

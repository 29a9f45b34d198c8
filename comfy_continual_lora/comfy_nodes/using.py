"""Nodes that draw with what was learned: apply, areas, select, export."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import SettingError, StackError, excerpt
from ..files import is_reserved, stack_stem
from ..presets import PLAIN_NAME_PRESETS
from ..requests import SelectRequest
from ..settings import SolveSettings
from . import host
from .handle import StackHandle, with_wires
from .origin import is_from
from .schema import (
    ADVANCED,
    Stack,
    schema,
    settings_from,
    solving_widgets,
    stack_and_report,
    validates,
)
from .words import with_names, with_words

# Files that this process exported and that should still be there
_EXPORTED: set[Path] = set()


class ApplyConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Apply",
            "Apply Concepts",
            "Add the learned concepts to MODEL and CLIP: write V1, V2, ... in ordinary prompts. "
            "Several in one prompt each get the area where their noun is. Sample with KSampler as "
            "usual.",
            ["load lora", "use concepts", "apply stack"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                Stack.Input("stack"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the LoRA; 1 is as learned.",
                ),
                io.Int.Input(
                    "version",
                    default=0,
                    min=0,
                    max=10_000,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Use the stack as it was after this many concepts; 0: the version of "
                    "the input.",
                ),
                io.Boolean.Input(
                    "mixed",
                    default=False,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Let the looks of several learned things in one prompt mix, as ComfyUI "
                    "draws the exported LoRA, in place of keeping each to its area.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Areas for the learned things of a prompt in the order in which it names "
                    "them, one mask each, of any size; without them, areas are found.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For KSampler: it draws what was learned."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="For CLIP Text Encode: it knows V1, V2, ..."
                ),
            ],
        )

    @classmethod
    @with_wires
    def execute(
        cls,
        model: Any,
        clip: Any,
        stack: StackHandle,
        strength: float,
        version: int = 0,
        mixed: bool = False,
        masks: Any = None,
    ) -> Any:
        masks = host.masks_of(masks)
        if version and stack.selected:
            raise StackError(
                "Select Concepts chooses from the newest version, so version would leave out its "
                "choice. Set version to 0, or connect Load Concept Stack."
            )
        if 0 < (count := stack.now().count) < version:
            raise StackError(
                f"There is no version {version} of the stack {stack.file.name}: it holds {count} "
                f"concepts. Set version to 1 to {count}, or to 0 for the version of the input."
            )
        concepts = (stack.as_of(version) if version else stack).read()
        if concepts is None or not concepts.records:
            host.tell(f"The stack {stack.file.name} holds no concept yet, so nothing is applied.")
            return io.NodeOutput(model, clip)
        if strength:
            model = cls._patched(model, stack, concepts, strength)
        nouns = None if mixed else concepts.nouns
        if concepts.checkpoint.preset in PLAIN_NAME_PRESETS:
            clip = with_names(clip, list(concepts.tokens), nouns)
        else:
            clip = cls._with_clip_skip(clip, concepts.checkpoint.clip_skip)
            clip = with_words(clip, concepts.tokens, nouns)
        if mixed:
            return io.NodeOutput(model, clip)
        from .apart import with_areas

        return io.NodeOutput(with_areas(model, concepts.checkpoint.preset, masks), clip)

    @staticmethod
    def _with_clip_skip(clip: Any, clip_skip: int) -> Any:
        """The CLIP at the layer that the stack was learned with, unless its user chose one."""
        if clip_skip == 1:
            return clip
        if clip.layer_idx is None:
            clip = clip.clone()
            clip.clip_layer(-clip_skip)
        elif clip.layer_idx != -clip_skip:
            host.tell(
                f"The stack was learned with clip skip {clip_skip}, but CLIP Set Last Layer is at "
                f"{clip.layer_idx}. Set it to {-clip_skip}, or take it out."
            )
        return clip

    @staticmethod
    def _patched(model: Any, stack: StackHandle, concepts: Any, strength: float) -> Any:
        """Errors: StackError if the model is of another family than the stack's."""
        import comfy.sd  # pyright: ignore[reportMissingImports]

        from ..stock import stock_lora

        lora = stock_lora(concepts)
        if not lora:
            return model
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
        layers = {key.split(".")[0] for key in lora}
        before, after = (sum(map(len, one.patches.values())) for one in (model, patched))
        if after - before < len(layers):
            raise StackError(
                f"The stack {stack.file.name} changes {len(layers)} layers, but this MODEL has only "
                f"{after - before} of them: it belongs to another kind of checkpoint. Load "
                f"{stack.checkpoint.name}."
            )
        if not is_from(model, stack.checkpoint):
            host.tell(
                f"This MODEL is not {stack.checkpoint.name}, for which the stack {stack.file.name} "
                f"was learned: its concepts may come out wrong. Load {stack.checkpoint.name}."
            )
        return patched


class ConceptAreas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Areas",
            "Concept Areas",
            "Where the learned things of the prompt are in the picture that was just sampled with "
            "the model of Apply Concepts: a mask each, in the order in which the prompt names them.",
            ["masks", "where", "segmentation"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled with."),
                io.Latent.Input("latent", tooltip="What was sampled."),
            ],
            outputs=[
                io.Mask.Output(display_name="masks", tooltip="One mask per learned thing, a batch.")
            ],
        )

    @classmethod
    @with_wires
    def execute(cls, model: Any, latent: Any) -> Any:
        from .apart import found_masks

        return io.NodeOutput(found_masks(model, latent["samples"]))


class SelectConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Select",
            "Select Concepts",
            "Some concepts of the stack, with a LoRA solved for only these: with many on the stack, "
            "it draws them more faithfully than the one LoRA for all. For Apply Concepts and Export "
            "Concepts; the stack on disk is not changed.",
            ["choose concepts", "subset", "filter"],
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "tokens",
                    default="V1",
                    tooltip="The words used in the prompts, such as V1, V3.",
                ),
                *solving_widgets(),
            ],
            outputs=stack_and_report(),
        )

    validate_inputs = validates()

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, tokens: str, **given: Any) -> Any:
        from .. import pipeline

        only = tokens.replace(",", " ").split()
        settings = settings_from(SolveSettings, given)
        request = SelectRequest(**stack.place, only=only, settings=settings)
        with host.at_work() as on_progress:
            selected = pipeline.select(request, on_progress)
        names = ", ".join(record.name for record in selected.records)
        report = f"Solved for {names} alone; rank {selected.rank}."
        chosen = dataclasses.replace(stack, selected=selected)
        return io.NodeOutput(chosen, on_progress.with_notes(report))


class ExportConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Export",
            "Export Concepts",
            "Write the stack as one stock LoRA (kohya layout) into ComfyUI's loras folder and one "
            "embedding per word into its embeddings folder; any program can load them.",
            ["save lora", "export lora"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Boolean.Input(
                    "remove_superseded",
                    default=False,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Also remove this stack's earlier exports of the same concepts; "
                    "otherwise they are listed.",
                ),
                io.String.Input(
                    "prefix",
                    default="",
                    optional=True,
                    tooltip="What the LoRA's name begins with; empty: the stack's name.",
                ),
                io.String.Input(
                    "subfolder",
                    default="",
                    optional=True,
                    tooltip="A folder in ComfyUI's loras folder, such as mine/dogs; it is made if "
                    "need be. Embeddings stay in the embeddings folder.",
                ),
                io.Boolean.Input(
                    "save_workflow",
                    default=True,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Put this workflow into the LoRA's metadata, as ComfyUI does with "
                    "pictures: drop the file on the canvas to see how it was made.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[
                io.String.Output(
                    display_name="lora name", tooltip="As Load LoRA lists it, with its subfolder."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The files, and what to write in prompts to use them.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Exported files that were deleted are written again; ComfyUI would reuse its last result."""
        return ", ".join(sorted(str(path) for path in _EXPORTED if not path.exists()))

    @classmethod
    @with_wires
    def execute(
        cls,
        stack: StackHandle,
        remove_superseded: bool = False,
        prefix: str = "",
        subfolder: str = "",
        save_workflow: bool = True,
    ) -> Any:
        import folder_paths  # pyright: ignore[reportMissingImports]

        from ..export import export_files
        from ..store import read_records

        concepts = stack.read()
        if concepts is None:
            raise StackError(
                f"There is nothing to export: no concept stack at {stack.file}. Learn a concept "
                "first."
            )
        loras, embeddings = (
            Path(folder_paths.get_folder_paths(kind)[0]) for kind in ("loras", "embeddings")
        )
        folder = _inside(loras, subfolder)
        result = export_files(
            concepts,
            folder,
            embeddings,
            prefix.strip() or stack_stem(stack.file),
            only=[record.token for record in concepts.records] if stack.selected else [],
            remove=remove_superseded,
            words=[record.token for record in read_records(stack.file)],
            metadata=host.workflow_of(cls) if save_workflow else {},
        )
        _EXPORTED.difference_update(result.removed)
        _EXPORTED.update(result.files)
        name = str(result.lora.relative_to(loras)) if result.lora else ""
        return io.NodeOutput(name, result.summary())


def _inside(folder: Path, subfolder: str) -> Path:
    """A folder in this one. Errors: SettingError for one that is elsewhere."""
    parts = [part.strip() for part in subfolder.replace("\\", "/").split("/") if part.strip()]
    bad = [
        part
        for part in parts
        if is_reserved(part) or set(part) == {"."} or re.search(r'[<>:"|?*\x00-\x1f]', part)
    ]
    if bad or subfolder.strip().startswith(("/", "\\")):
        raise SettingError(
            f"subfolder is {excerpt(subfolder)}; it has to be a folder inside {folder}, such as "
            "mine/dogs."
        )
    return folder.joinpath(*parts)

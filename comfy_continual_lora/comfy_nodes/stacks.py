"""Nodes about whole stacks: load, forget, merge, import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import StackError
from ..operations import OPERATIONS
from ..presets import PREDICTIONS
from ..requests import ForgetRequest, ImportRequest, MergeRequest
from ..settings import SolveSettings
from . import host
from .handle import StackHandle, changes_of, not_on_stack, reported, state_of, with_wires
from .schema import (
    ADVANCED,
    Stack,
    in_widget_names,
    schema,
    settings_from,
    solving_widgets,
    stack_and_report,
    validates,
    widgets,
)

_OWN, _NEW = "own", "new"  # choices beside the names of stacks
_IMPORTED: set[Path] = set()  # files that this process imported


class LoadConceptStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "LoadStack",
            "Load Concept Stack",
            "Load what a checkpoint has learned so far: one file beside it. A checkpoint may have "
            "several stacks; choose one, or start a new one.",
            ["concepts", "checkpoint", "open stack"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoints(),
                    tooltip="The checkpoint to teach. Its own file never changes. Anima's nets, from "
                    "diffusion_models, are listed too.",
                ),
                io.String.Input(
                    "stack_name",
                    default="",
                    optional=True,
                    tooltip="The name of a new stack (letters, digits, - and _), which is kept apart "
                    "from the checkpoint's own; empty for that one.",
                ),
                io.Combo.Input(
                    "stack",
                    options=[_OWN, _NEW, *host.stack_names()],
                    default=_OWN,
                    optional=True,
                    tooltip="own: the checkpoint's own stack, or the one that stack_name says. new: "
                    "one more, named by stack_name. Or one of those that are there.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=["auto", *PREDICTIONS],
                    default="auto",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="What the checkpoint's net predicts. auto: what the stack or the file "
                    "says, which can't tell a rectified flow: choose flow for one, and put "
                    "ModelSamplingSD3 in front of the sampler.",
                ),
            ],
            outputs=[
                Stack.Output(
                    display_name="stack", tooltip="For Learn Concept, or for Apply Concepts."
                ),
                io.String.Output(
                    display_name="concepts", tooltip="What is on the stack, and where its file is."
                ),
            ],
        )

    @staticmethod
    def _file(checkpoint: str, stack_name: str, stack: str) -> Path:
        """Errors: StackError for a new stack without a name."""
        if stack == _NEW and not stack_name.strip():
            raise StackError(
                "A new stack needs a name. Write one into stack_name, such as family, or choose "
                f"{_OWN} for the checkpoint's own stack."
            )
        name = stack_name if stack in (_OWN, _NEW) else stack
        return host.stack_file(host.checkpoint_path(checkpoint), name)

    validate_inputs = validates(names=(), others=("stack_name",))

    @classmethod
    @in_widget_names
    def fingerprint_inputs(
        cls, checkpoint: str, stack_name: str = "", stack: str = _OWN, prediction: str = "auto"
    ) -> str:
        file = cls._file(checkpoint, stack_name, stack)
        if not file.exists():
            return f"{state_of(file)} {host.stacks_without_checkpoint(file.parent)}"
        return state_of(file)

    @classmethod
    @in_widget_names
    def execute(
        cls, checkpoint: str, stack_name: str = "", stack: str = _OWN, prediction: str = "auto"
    ) -> Any:
        file, path = cls._file(checkpoint, stack_name, stack), host.checkpoint_path(checkpoint)
        loaded = StackHandle(path, file, 0, prediction=prediction).now()
        return io.NodeOutput(loaded, loaded.described())


class ForgetConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Forget",
            "Forget Concept",
            "Remove any one concept from the stack: its word, its preview, and what the LoRA knows "
            "of it. The others stay. (For the newest one, use Undo.)",
            ["remove concept", "unlearn", "delete"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "token",
                    default="",
                    tooltip="Its word. If it is not on the stack, nothing is done.",
                ),
                *solving_widgets(),
            ],
            outputs=stack_and_report(),
        )

    validate_inputs = validates()

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, token: str, **given: Any) -> Any:
        tokens = [one.token.lower() for one in stack.now().records]
        if token.strip().lower() not in tokens:
            return not_on_stack(stack, token)
        settings = settings_from(SolveSettings, given)
        request = ForgetRequest(**stack.place, token=token.strip(), settings=settings)
        with host.at_work() as on_progress:
            result = OPERATIONS["forget"](request, on_progress)
        return reported(stack, on_progress.with_notes(result.summary()))


class MergeStacks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Merge",
            "Merge Concept Stacks",
            "Put the concepts of another stack of the same checkpoint on this one. A word that both "
            "have gets a new name. Concepts that this stack already has are left alone.",
            ["combine", "join", "share concepts"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack", tooltip="Gets the other's concepts."),
                Stack.Input("other", tooltip="Is not changed."),
                *solving_widgets(),
            ],
            outputs=stack_and_report(),
        )

    validate_inputs = validates()

    @classmethod
    @with_wires
    def execute(cls, stack: StackHandle, other: StackHandle, **given: Any) -> Any:
        if other.selected:
            raise StackError(
                "Select Concepts is for drawing and exporting; only whole stacks can be merged. "
                "Connect the other's Load Concept Stack."
            )
        settings = settings_from(SolveSettings, given)
        request = MergeRequest(**stack.place, other=other.file, settings=settings)
        with host.at_work() as on_progress:
            result = OPERATIONS["merge"](request, on_progress)
        return reported(stack, on_progress.with_notes(result.summary()))


class ImportLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "Import",
            "Import LoRA as Concept",
            "Put a K/V LoRA that another program made on the stack, as one more concept with a "
            "word of its own.",
            ["foreign lora", "convert lora", "custom diffusion"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Combo.Input(
                    "lora",
                    options=host.files("loras"),
                    tooltip="It may change K and V of cross-attention only.",
                ),
                io.String.Input("token", default="W1", tooltip="Its word from now on."),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="What kind of thing it is; empty: prompts use only its word.",
                ),
                io.Combo.Input(
                    "embedding",
                    options=["", *host.files("embeddings")],
                    default="",
                    tooltip="The embedding its prompts used.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Instead of an embedding: the word its prompts used, if it is one "
                    "token, such as sks.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength it is used at.",
                ),
                *widgets(ImportRequest, ("rest",), shown=("rest",)),
            ],
            outputs=stack_and_report(),
        )

    validate_inputs = validates(names=(), others=("token", "noun"))

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, embedding: str | None = None, **_: Any) -> str:
        """Files that were written again under the same names are imported again. None: a wire, which
        may name any file that was imported before.
        """
        given = {"loras": lora, "embeddings": embedding}
        files = [host.file_of(kind, name) for kind, name in given.items() if name]
        states = [state_of(file) for file in files]
        if None in given.values() and (changes := sum(map(changes_of, _IMPORTED))):
            states.append(str(changes))
        return " ".join(states)

    @classmethod
    @with_wires
    def execute(
        cls,
        stack: StackHandle,
        lora: str,
        token: str,
        noun: str,
        embedding: str,
        trigger: str,
        strength: float,
        rest: str = "refuse",
    ) -> Any:
        lora_file = host.file_of("loras", lora)
        embedding_file = host.file_of("embeddings", embedding) if embedding else None
        for file in filter(None, (lora_file, embedding_file)):
            changes_of(file)  # from now on
            _IMPORTED.add(file)
        request = ImportRequest(
            **stack.place,
            lora=lora_file,
            token=token.strip(),
            noun=noun,
            embedding=embedding_file,
            trigger=trigger.strip(),
            strength=strength,
            rest=rest,
        )
        with host.at_work() as on_progress:
            result = OPERATIONS["import"](request, on_progress)
        return reported(stack, on_progress.with_notes(result.summary()))

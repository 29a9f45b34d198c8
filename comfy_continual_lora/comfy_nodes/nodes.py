"""The nodes.

Each builds a request from its widgets, shows progress and the result; defaults, ranges and help
come from settings.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports] - only inside ComfyUI

from ..errors import StackError, TokenError
from ..files import STACKS
from ..settings import (
    ConsolidateSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    explained,
    from_widget,
)
from . import host
from .host import StackHandle

if TYPE_CHECKING:
    from .. import pipeline

CATEGORY = "Continual LoRA"
Stack = io.Custom("CONCEPT_STACK")
_ADVANCED = {"advanced": True}  # collapsed where the host knows how


def _schema(name: str, title: str, description: str, aliases: Sequence[str], **rest: Any) -> Any:
    """io.Schema of this host's version: what an older one does not know is left out."""
    known = {f.name for f in dataclasses.fields(io.Schema)}
    values = {
        "node_id": f"ContinualLora_{name}",
        "display_name": title,
        "category": CATEGORY,
        "description": description,
        "search_aliases": ["continual lora", *aliases],
        **rest,
    }
    return io.Schema(**{key: value for key, value in values.items() if key in known})


def _widgets(settings: type, main: Sequence[str], advanced: Sequence[str] = ()) -> list[Any]:
    return [_widget(settings, name, name in advanced) for name in (*main, *advanced)]


def _widget(settings: type, name: str, advanced: bool) -> Any:
    """A setting's widget.

    Where the setting's default is "what suits the checkpoint", 0 (or auto) stands for it.
    """
    f = next(f for f in dataclasses.fields(settings) if f.name == name)
    meta, kind = f.metadata, str(f.type).split(" ")[0]
    help = explained(f)
    help = help[0].upper() + help[1:]
    rest: dict[str, Any] = {
        "optional": True,
        "tooltip": help + ".",
        "extra_dict": _ADVANCED if advanced else None,
    }
    if meta["choices"]:
        return io.Combo.Input(name, options=list(meta["choices"]), default=f.default, **rest)
    if kind == "bool" and f.default is None:
        return io.Combo.Input(name, options=["auto", "yes", "no"], default="auto", **rest)
    if kind == "bool":
        return io.Boolean.Input(name, default=f.default, **rest)
    low = 0 if f.default is None else meta["low"]
    high = min(meta["high"] or 1_000_000, 2**63 - 1)
    if kind == "int":
        if name == "seed":
            rest["control_after_generate"] = (
                False  # ComfyUI would change it at every queue, and each would be another request
            )
        return io.Int.Input(
            name, default=f.default or 0, min=int(low), max=int(high), step=meta["multiple"], **rest
        )
    return io.Float.Input(
        name, default=f.default or 0.0, min=low, max=high, step=1e-6, round=1e-7, **rest
    )


def _settings(settings: type, given: dict[str, Any]) -> Any:
    """Widgets' values -> settings; 0 and auto become None again where None is the default."""
    return settings(
        **{
            f.name: from_widget(f, given.get(f.name, f.default))
            for f in dataclasses.fields(settings)
        }
    )


def _where(stack: StackHandle) -> dict[str, Any]:
    return {"stack": stack.file, "device": host.device()}


def _now(stack: StackHandle, **change: Any) -> StackHandle:
    """The stack as it is on disk now."""
    from ..store import read_records

    return dataclasses.replace(
        stack,
        **{
            "count": len(read_records(stack.file)),
            "consolidated": True,
            "selected": None,
            **change,
        },
    )


def _say(stack: StackHandle) -> str:
    records, file = stack.records, stack.file
    if not records:
        lone = host.stacks_without_checkpoint(file.parent)
        hint = (
            (
                f"\nIf the checkpoint was renamed, rename its stack too, to {file.name}. Stacks "
                "here "
                f"without a checkpoint: {', '.join(lone)}"
            )
            if lone
            else ""
        )
        return f"No concept learned yet. The stack will be {file}.{hint}"
    lines = [
        f"{n}. {r.name}   {r.method}, {r.steps} steps, {r.images} pictures, {r.learned[:10]}"
        for n, r in enumerate(records, start=1)
    ]
    return "\n".join([*lines, f"in {file}"])


def _table(scored: Sequence[pipeline.Scored]) -> str:
    rows = []
    for number, one in enumerate(scored, start=1):
        likely = ", ".join(
            f"{name} {p:.2f}"
            for name, p in zip(one.scores.names[:4], one.scores.probabilities, strict=False)
        )
        rows.append(
            f"picture {number}: {one.scores.best}{'' if one.scores.sure else ' (not sure)'}   "
            f"{likely}"
        )
    return "\n".join(rows)


class LoadConceptStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "LoadStack",
            "Load Concept Stack",
            "What a checkpoint has learned so far: one file beside it.",
            ["concepts", "checkpoint", "open stack"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoints(),
                    tooltip="The checkpoint that learns. It never changes itself.",
                ),
                io.String.Input(
                    "stack_name",
                    default="",
                    optional=True,
                    extra_dict=_ADVANCED,
                    tooltip="Empty for the checkpoint's own stack; a name for another one, kept "
                    "apart from it.",
                ),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="concepts")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, stack_name: str = "") -> str:
        file = host.stack_file(host.checkpoint_path(checkpoint), stack_name)
        if not file.exists():
            return f"{file} {host.stacks_without_checkpoint(file.parent)}"
        return f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}"

    @classmethod
    def execute(cls, checkpoint: str, stack_name: str = "") -> Any:
        path = host.checkpoint_path(checkpoint)
        stack = _now(StackHandle(path, host.stack_file(path, stack_name), 0))
        return io.NodeOutput(stack, _say(stack))


class LearnConcept(io.ComfyNode):
    MAIN = ("method", "steps", "rank", "rate", "seed", "preview_every")
    ADVANCED = (
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

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Learn",
            "Learn Concept (continual LoRA)",
            "Teach the checkpoint one more thing from 3 to 15 pictures, without forgetting what "
            "it learned before. Cancel keeps what was learned "
            "so far; queue again to go on. The same request is never learned twice.",
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
                    "up where there is none.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="A mask for each picture: white is learned from, black is not.",
                ),
                *_widgets(LearnSettings, cls.MAIN, cls.ADVANCED),
                io.Combo.Input(
                    "if_word_exists",
                    options=["refuse", "replace the newest"],
                    default="refuse",
                    optional=True,
                    extra_dict=_ADVANCED,
                    tooltip="What to do when the word is on the stack already, learned from other "
                    "pictures or with other settings: refuse, or learn "
                    "it again in place of that one (if it is the newest), which stays until the "
                    "new one is stored.",
                ),
                *_widgets(
                    LearnSettings, (), ("vectors",)
                ),  # last: saved workflows know widgets by their place
            ],
            outputs=[
                Stack.Output(display_name="stack"),
                io.LoraModel.Output(display_name="lora"),
                io.Image.Output(display_name="loss curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, images: list, captions: list | None = None, masks: list | None = None, **given: list
    ) -> Any:
        from .. import pipeline
        from ..curves import curve_picture
        from ..export import stock_lora

        values = {name: value[0] for name, value in given.items()}
        stack, token, noun = values["stack"], values["token"].strip(), values["noun"].strip()
        settings = _settings(LearnSettings, values)
        with host.saved_pictures(images, captions or (), masks or ()) as files:
            replace = values.get("if_word_exists", "refuse") != "refuse"
            request = pipeline.LearnRequest(
                stack.checkpoint, files, token, noun, settings, replace, **_where(stack)
            )
            known, losses = pipeline.learned_before(request), []
            if known is not None:
                text = (
                    f"{known.name} is on the stack already, learned from these very pictures and "
                    f"settings on {known.learned[:10]}; nothing was done."
                )
            else:
                if not replace:
                    cls._refuse_taken(stack, token)
                with host.at_work() as on_progress:
                    done = pipeline.learn_concept(request, on_progress)
                    known, losses = done.record, done.losses
                    scoring = ScoreSettings(trials=8, size=settings.size, fit=settings.fit)
                    scored = pipeline.dc_scores(
                        pipeline.ScoreRequest(stack.checkpoint, files, scoring, **_where(stack)),
                        on_progress,
                    )
                text = (
                    f"Learned {known.name} in {known.steps} steps; loss {known.loss:.4f} at the "
                    f"end.\nDC scores of its pictures:\n{_table(scored)}"
                )
                text = "\n".join([*on_progress.notes, text])
        after = _now(
            stack, count=[r.id for r in _now(stack).records].index(known.id) + 1, consolidated=False
        )
        curve = curve_picture(losses, f"Loss while learning {known.token}")
        return io.NodeOutput(
            after, stock_lora(after.read()), host.to_image([curve]), f"{text}\n\n{_say(after)}"
        )

    @staticmethod
    def _refuse_taken(stack: StackHandle, token: str) -> None:
        """Errors: TokenError for a word that is on the stack."""
        records = _now(stack).records
        taken = next((r for r in records if r.token.lower() == token.lower()), None)
        if taken is None:
            return
        later = (
            ""
            if taken is records[-1]
            else " Concepts learned after it build on it, so it can't be replaced either."
        )
        raise TokenError(
            f"The word {token} is taken: it is the {taken.noun} learned on {taken.learned[:10]}, "
            "from other pictures or with other settings. "
            f"Choose another word, or undo it first (Undo Concept, or if_word_exists here).{later}"
        )


class Consolidate(io.ComfyNode):
    MAIN = ("dsc_steps", "dsc_rate", "seed")
    ADVANCED = (
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
    )

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Consolidate",
            "Consolidate (DSC)",
            "Strengthen the earlier concepts once more against the newest one (Diffusion Scores "
            "Consolidation). Needs the newest concept's pictures. "
            "The same request is never done twice.",
            ["DSC", "distill", "consolidate", "forgetting"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Image.Input(
                    "images", tooltip="The pictures the newest concept was learned from."
                ),
                *_widgets(ConsolidateSettings, cls.MAIN, cls.ADVANCED),
            ],
            outputs=[
                Stack.Output(display_name="stack"),
                io.Image.Output(display_name="loss curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, images: list, **given: list) -> Any:
        from .. import pipeline
        from ..curves import curve_picture

        values = {name: value[0] for name, value in given.items()}
        stack = values["stack"]
        records, losses = _now(stack).records, []
        with host.saved_pictures(images) as files:
            request = pipeline.ConsolidateRequest(
                stack.checkpoint, files, _settings(ConsolidateSettings, values), **_where(stack)
            )
            if records and records[-1].consolidated == request.digest:
                text = (
                    f"{records[-1].name} was consolidated with these very pictures and settings "
                    "already; nothing was done."
                )
            else:
                with host.at_work() as on_progress:
                    done = pipeline.consolidate(request, on_progress)
                losses = done.losses
                text = (
                    f"Consolidated {done.record.name}, with {len(records) - 1} before it, in "
                    f"{len(losses)} steps."
                )
                text = "\n".join([*on_progress.notes, text])
        return io.NodeOutput(
            _now(stack), host.to_image([curve_picture(losses, "Loss while consolidating")]), text
        )


class ComputeScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Scores",
            "Compute DC Scores",
            "Which of the learned concepts, or which class noun without one (c_0), does each "
            "picture show, and how sure is that?",
            ["classify", "diffusion classifier", "which concept"],
            is_input_list=True,
            inputs=[
                Stack.Input("stack"),
                io.Image.Input("images", tooltip="Pictures to judge, as a batch or a list."),
                *_widgets(
                    ScoreSettings,
                    ("trials", "seed"),
                    ("stages", "weighting", "rows", "size", "fit"),
                ),
            ],
            outputs=[
                io.String.Output(display_name="scores"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="best concept"),
                io.String.Output(
                    display_name="probabilities",
                    tooltip="JSON: for each picture the probability of every concept.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images: list, **given: list) -> Any:
        from .. import pipeline, report

        values = {name: value[0] for name, value in given.items()}
        stack = values["stack"]
        with host.saved_pictures(images) as files, host.at_work() as on_progress:
            request = pipeline.ScoreRequest(
                stack.checkpoint, files, _settings(ScoreSettings, values), **_where(stack)
            )
            scored = pipeline.dc_scores(request, on_progress)
            chart = report.score_sheet(scored)
        best = [one.scores.best for one in scored]
        chances = [
            dict(zip(one.scores.names, one.scores.probabilities, strict=True)) for one in scored
        ]
        return io.NodeOutput(
            _table(scored), host.to_image([chart]), max(best, key=best.count), json.dumps(chances)
        )


class ApplyConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Apply",
            "Apply Concepts",
            "MODEL and CLIP that know the learned concepts: write V1, V2, ... into ordinary "
            "prompts. Sample with KSampler as ever.",
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
                    extra_dict=_ADVANCED,
                    tooltip="The stack as it was after its first so many concepts; 0: the version "
                    "that comes in.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, stack: StackHandle, strength: float, version: int = 0
    ) -> Any:
        import comfy.sd  # pyright: ignore[reportMissingImports]

        from ..export import stock_lora

        held = (
            dataclasses.replace(stack, count=version, consolidated=True, selected=None).read()
            if version
            else stack.read()
        )
        if held is None or not held.records:
            return io.NodeOutput(model, clip)
        lora = stock_lora(held)
        if lora and strength:
            patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
            modules = {key.split(".")[0] for key in lora}
            if (
                found := sum(map(len, patched.patches.values()))
                - sum(map(len, model.patches.values()))
            ) < len(modules):
                raise StackError(
                    f"The stack {stack.file.name} changes {len(modules)} layers, but {found} of "
                    "them are in this MODEL: it belongs to another kind "
                    f"of checkpoint. Load {stack.checkpoint.name}."
                )
            model = patched
        return io.NodeOutput(model, host.with_words(clip, held.tokens))


class SelectConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Select",
            "Select Concepts",
            "Some concepts of the stack, with a LoRA solved for them alone: of a stack of many "
            "it draws them nearer than the one LoRA for all. For "
            "Apply Concepts and Export Concepts; the stack on disk stays as it is.",
            ["choose concepts", "subset", "filter"],
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "tokens",
                    default="V1",
                    tooltip="Words of the concepts, such as V1, V3: those that the prompts name.",
                ),
                *_solving(),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, stack: StackHandle, tokens: str, **given: Any) -> Any:
        from .. import pipeline

        with host.at_work() as on_progress:
            selected = pipeline.select(
                _solve_request(stack, given), tokens.replace(",", " ").split(), on_progress
            )
        names = ", ".join(record.name for record in selected.records)
        return io.NodeOutput(
            dataclasses.replace(stack, selected=selected),
            f"Solved for {names} alone; rank {selected.rank}.",
        )


class ExportConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Export",
            "Export Concepts",
            "Write the stack as one stock LoRA (kohya layout) into ComfyUI's loras folder and "
            "one embedding a word into its embeddings folder: they "
            "load in any program.",
            ["save lora", "export lora"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.Boolean.Input(
                    "remove_superseded",
                    default=False,
                    optional=True,
                    extra_dict=_ADVANCED,
                    tooltip="Also remove this stack's earlier exports of the same concepts; "
                    "otherwise they are listed.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora name"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, stack: StackHandle, remove_superseded: bool = False) -> Any:
        import folder_paths  # pyright: ignore[reportMissingImports]

        from ..export import export_files

        held = stack.read()
        if held is None:
            raise StackError(
                f"There is nothing to export: no concept stack at {stack.file}. Learn a concept "
                "first."
            )
        out, words = (
            Path(folder_paths.get_folder_paths(kind)[0]) for kind in ("loras", "embeddings")
        )
        only = [record.token for record in held.records] if stack.selected else []
        done = export_files(
            held,
            out,
            words,
            stack.file.name.removesuffix(STACKS),
            only=only,
            remove=remove_superseded,
        )
        files = [str(path) for path in (done.lora, *done.embeddings) if path]
        prompts = ", ".join(f"embedding:{path.stem}" for path in done.embeddings)
        report = "\n".join(
            [*files, f"In prompts of stock nodes the words are {prompts}.", *done.notes]
        )
        return io.NodeOutput(done.lora.name if done.lora else "", report)


class EvaluateRetention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Evaluate",
            "Evaluate Retention",
            "Is a concept fading? Draws every concept with every version of the stack since it "
            "was learned, and compares: a heat map, and how much "
            "is kept.",
            ["forgetting", "heat map", "retention"],
            inputs=[
                Stack.Input("stack"),
                *_widgets(
                    EvaluateSettings, ("pictures", "steps", "seed"), ("guidance", "trials", "size")
                ),
                io.String.Input(
                    "clip_folder",
                    default="",
                    optional=True,
                    extra_dict=_ADVANCED,
                    tooltip="A folder with a CLIP vision model, as transformers saves it, to compare "
                    "with; empty: the mini-SD's own, or latents.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="heat map"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, stack: StackHandle, clip_folder: str = "", **given: Any) -> Any:
        from .. import pipeline, report

        clip = Path(clip_folder) if clip_folder.strip() else None
        request = pipeline.EvaluateRequest(
            stack.checkpoint, None, clip, _settings(EvaluateSettings, given), **_where(stack)
        )
        with host.at_work() as on_progress:
            found = pipeline.evaluate(request, on_progress)
        return io.NodeOutput(
            host.to_image([report.retention_sheet(found)]), report.retention_table(found)
        )


class UndoConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Undo",
            "Undo Concept",
            "Take the last change of the stack back, whatever it was: the stack is again exactly "
            "what it was before. With no word and no version "
            "it only says what it would take back.",
            ["remove concept", "forget", "undo"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "token",
                    default="",
                    tooltip="The word of the newest concept, if learning it was the last change. If "
                    "it is gone, nothing is done.",
                ),
                io.Int.Input(
                    "version",
                    default=0,
                    min=0,
                    max=1_000_000_000,
                    optional=True,
                    tooltip="The number of the version to leave, as the report names it, whatever "
                    "made it. If it is left already, nothing is done.",
                ),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, stack: StackHandle, token: str, version: int = 0) -> Any:
        from .. import pipeline, stackfile

        wanted, now = token.strip().lower(), stackfile.in_use(stack.file)
        if now is None or not (wanted or version):
            number = "" if now is None else f" To do that, set version to {now.number}."
            return io.NodeOutput(
                _now(stack), f"{stackfile.undo_preview(stack.file)}{number}\n\n{_say(_now(stack))}"
            )
        if version and version != now.number:
            return io.NodeOutput(
                _now(stack),
                f"The stack is at version {now.number} now, no longer at {version}; nothing was "
                "done.",
            )
        if not version:
            known = [one.lower() for one in now.tokens]
            if wanted not in known:
                return _not_there(stack, token)
            if known[-1] != wanted:
                raise StackError(
                    f"{token} is not the newest concept; {now.tokens[-1]} is, and builds on it. "
                    "Undo that one first, or use Forget Concept."
                )
            if not stackfile.takes_off_newest(stack.file):
                raise StackError(
                    f"Learning {token} was not the last change: {now.change} was. To take that "
                    f"back, set version to {now.number}."
                )
        done = pipeline.undo(stack.checkpoint, stack.file, now.number)
        after = _now(stack)
        text = (
            f"Took back: {done.change}. It is version {done.version} in Stack History, which can "
            "bring it back."
        )
        return io.NodeOutput(after, f"{text}\n\n{_say(after)}")


class StackHistory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "History",
            "Stack History",
            "The versions of the stack that are kept, what made each and what it takes on disk; "
            "go to one of them. The one in use now is kept.",
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
                    tooltip="The number of the version to go to, as the report lists it. 0: only "
                    "list them.",
                ),
                io.Int.Input(
                    "keep",
                    default=-1,
                    min=-1,
                    max=1000,
                    optional=True,
                    extra_dict=_ADVANCED,
                    tooltip="How many earlier versions this stack keeps from now on (5 in a new "
                    "stack). -1: leave that as it is.",
                ),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # what is listed is on disk, so it is read at every run

    @classmethod
    def execute(cls, stack: StackHandle, restore: int = 0, keep: int = -1) -> Any:
        from .. import pipeline, stackfile

        if keep >= 0:
            pipeline.keep_versions(stack.checkpoint, keep, stack.file)
        if restore:
            pipeline.restore(stack.checkpoint, restore, stack.file)
        found = stackfile.versions(stack.file)
        lines = [
            (
                f"{'*' if one.current else ' '} {one.number}: {one.change}, {one.when[:10]}, "
                f"{one.size / 1e6:.1f} MB ({', '.join(one.tokens) or 'empty'})"
            )
            for one in found
        ]
        return io.NodeOutput(
            _now(stack),
            "\n".join(
                [*lines, "* is the version in use." if lines else "Nothing was learned yet."]
            ),
        )


class ExamplePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Examples",
            "Mini-SD Example Pictures",
            "Pictures of a thing the mini-SD has never seen, to try learning with.",
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
                    tooltip="How many pictures of it, each in another place.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images"), io.String.Output(display_name="noun")],
        )

    @classmethod
    def execute(cls, which: int, count: int) -> Any:
        from PIL import Image

        from ..mini import world

        concept = world.concepts("development")[which - 1]
        return io.NodeOutput(
            host.to_image([Image.fromarray(p) for p in world.concept_pictures(concept, count)]),
            concept.noun,
        )


class ConsolidateInClosedForm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "ClosedForm",
            "Consolidate (closed form)",
            "Bring back what later concepts took from earlier ones: the one LoRA closest to what "
            "each concept's own did to its prompts. Seconds, "
            "without pictures, the same result every time.",
            ["consolidate", "forgetting", "merge", "restore"],
            is_output_node=True,
            inputs=[Stack.Input("stack"), *_solving()],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, stack: StackHandle, **given: Any) -> Any:
        from .. import pipeline

        with host.at_work() as on_progress:
            found = pipeline.consolidate_in_closed_form(_solve_request(stack, given), on_progress)
        lines = [
            f"{name}: {found.before[name]:.1%} of what it did was lost, now {after:.1%}"
            for name, after in found.after.items()
        ]
        return io.NodeOutput(
            _now(stack),
            "\n".join(
                [f"Solved for {len(lines)} concepts at once; rank {found.rank} holds them.", *lines]
            ),
        )


class ForgetConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Forget",
            "Forget Concept",
            "Take any one concept off the stack: its word, its previews, and what the LoRA knows "
            "of it. The others stay. (The newest one: Undo.)",
            ["remove concept", "unlearn", "delete"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack"),
                io.String.Input(
                    "token", default="", tooltip="Its word. If it is gone already, nothing is done."
                ),
                *_solving(),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, stack: StackHandle, token: str, **given: Any) -> Any:
        from .. import pipeline

        if token.strip().lower() not in [r.token.lower() for r in _now(stack).records]:
            return _not_there(stack, token)
        with host.at_work() as on_progress:
            record = pipeline.forget(_solve_request(stack, given), token.strip(), on_progress)
        after = _now(stack)
        return io.NodeOutput(
            after,
            f"Forgot {record.name}. Undo Concept brings it back; Stack History with keep 0 drops "
            "it for good. "
            f"Files exported before still know it.\n\n{_say(after)}",
        )


class MergeStacks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
            "Merge",
            "Merge Concept Stacks",
            "Put the concepts of another stack of the same checkpoint on this one. A word that "
            "both have gets a new name. Concepts it has already "
            "are left alone.",
            ["combine", "join", "share concepts"],
            is_output_node=True,
            inputs=[
                Stack.Input("stack", tooltip="Takes the other's concepts."),
                Stack.Input("other", tooltip="Stays as it is."),
                *_solving(),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, stack: StackHandle, other: StackHandle, **given: Any) -> Any:
        from .. import pipeline

        if other.selected:
            raise StackError(
                "Select Concepts is for drawing and exporting; whole stacks are merged. Connect "
                "the other's Load Concept Stack."
            )
        known = {record.id for record in _now(stack).records}
        if all(record.id in known for record in other.records):
            return io.NodeOutput(
                _now(stack),
                f"{stack.file.name} has all concepts of {other.file.name} already; nothing was "
                "done.",
            )
        with host.at_work() as on_progress:
            renamed = pipeline.merge(_solve_request(stack, given), other.file, on_progress)
        after = _now(stack)
        return io.NodeOutput(
            after,
            "\n".join(
                [*(f"Its {old} is {new} here." for old, new in renamed.items()), _say(after)]
            ),
        )


class ImportLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _schema(
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
                    tooltip="What kind of thing it is; empty: prompts name it by its word alone.",
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
                    tooltip="Else the word its prompts used, if it is one token, such as sks.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength it is used at.",
                ),
            ],
            outputs=[Stack.Output(display_name="stack"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls,
        stack: StackHandle,
        lora: str,
        token: str,
        noun: str,
        embedding: str,
        trigger: str,
        strength: float,
    ) -> Any:
        from .. import pipeline

        if token.strip().lower() in [
            r.token.lower() for r in _now(stack).records if r.method == "import"
        ]:
            return io.NodeOutput(_now(stack), f"{token} is on the stack already; nothing was done.")
        word = host.file_of("embeddings", embedding) if embedding else None
        request = pipeline.ImportRequest(
            stack.checkpoint,
            host.file_of("loras", lora),
            token.strip(),
            noun,
            word,
            trigger.strip(),
            strength,
            **_where(stack),
        )
        with host.at_work() as on_progress:
            record = pipeline.import_concept(request, on_progress)
        after = _now(stack)
        return io.NodeOutput(after, f"{lora} is {record.name} now.\n\n{_say(after)}")


def _not_there(stack: StackHandle, token: str) -> Any:
    return io.NodeOutput(
        _now(stack), f"No concept named {token!r} is on the stack; nothing was done."
    )


def _solving() -> list[Any]:
    return _widgets(SolveSettings, (), ("energy", "rank", "ridge", "ordinary_weight"))


def _solve_request(stack: StackHandle, given: dict[str, Any]) -> pipeline.SolveRequest:
    from .. import pipeline

    return pipeline.SolveRequest(stack.checkpoint, _settings(SolveSettings, given), **_where(stack))


NODES = [
    LoadConceptStack,
    LearnConcept,
    Consolidate,
    ComputeScores,
    ApplyConcepts,
    ExportConcepts,
    EvaluateRetention,
    UndoConcept,
    ExamplePictures,
    SelectConcepts,
    ConsolidateInClosedForm,
    ForgetConcept,
    MergeStacks,
    ImportLora,
    StackHistory,
]

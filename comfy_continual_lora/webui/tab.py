"""The tab: pictures in, a word and a class noun, Learn; what is on the stack; consolidate, score,
evaluate, export, undo. gradio 3.41 to 6.

`build(host)` makes the components inside an open `gr.Blocks`. What it needs of the program around
it is `Host`; this one is no program at all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .. import imagefile, stackfile
from ..curves import curve_picture
from ..errors import StackError
from ..files import PICTURES, STACKS, stack_path
from ..settings import LearnSettings, explained, from_widget
from .asking import QUESTIONS
from .copies import Batch, Copies
from .environment import NotReady, Preparation
from .job import Busy, Desk, Job
from .shown import code, history, html, markdown, picture_of, status, table

PLANS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
ADVANCED = (
    "method",
    "steps",
    "rank",
    "rate",
    "vectors",
    "token_rate",
    "batch",
    "size",
    "fit",
    "flip",
    "seed",
    "adapter",
    "ewc_strength",
    "retention_weight",
    "dsc_steps",
    "fisher_samples",
    "precision",
    "checkpointing",
    "preview_every",
)
REFUSED = (ValueError, OSError, StackError, Busy, NotReady)  # what a click can ask for in vain
# gradio 3 has no timer, so a script presses a button while it says that something runs and is in
# sight. No handler
# runs long: there, one whose page was left keeps the server from closing, so that "Reload UI"
# hangs.
_PULSE = """() => {
  const button = () => document.querySelector("#continual_lora_pulse");
  button().style.display = "none";
  setInterval(() => button()?.textContent.includes("busy") && !document.hidden && button().click(), 1000);
}"""
_TIMER = hasattr(gr, "Timer")
SHOWN: dict[str, Any] = {"preview_every": 50}  # here pictures while learning are worth their time


class Host:
    """What the tab needs of the program it is in; here there is none, and checkpoints lie in one
    folder.

    Environment variables choose what no page may: CONTINUAL_LORA_PYTHON, the Python that learns,
    and
    CONTINUAL_LORA_FOLDERS, more folders the API may read pictures from, separated as in PATH.
    """

    def __init__(self, models: Path, folder: Path) -> None:
        """`folder`: pictures the API may read, copies and exports of the tab."""
        self.models, self.folder = models, folder
        self.copies, self.desk, self.preparation = (
            Copies(folder),
            Desk(self.python),
            Preparation(self.prepare),
        )
        self.desk.tidy = lambda job: self.copies.tidy(
            shown=[request.get("out", "") for _, request in job.jobs]
        )
        self.copies.tidy()

    def python(self) -> str:
        """The worker's Python. Errors: NotReady."""
        return os.environ.get("CONTINUAL_LORA_PYTHON") or self.own_python()

    def own_python(self) -> str:
        return sys.executable

    def checkpoints(self) -> dict[str, Path]:
        """By the name the user knows."""
        found = sorted(p for p in self.models.rglob("*.safetensors") if not p.name.endswith(STACKS))
        return {str(p.relative_to(self.models)): p for p in found}

    def exports(self) -> tuple[Path, Path]:
        """Folders for LoRAs and for embeddings."""
        return self.folder / "exports", self.folder / "exports"

    def prepare(self, say: Callable[[str], object]) -> None:
        """Make the worker's environment, saying how far it is; nothing where there is nothing to
        make.
        """

    def default_plan(self) -> str:
        return next(iter(PLANS))

    def logins(self) -> dict[str, str] | None:
        """Who may use the API, and with which password; None: everybody."""
        return None

    def picture_folders(self) -> list[Path]:
        """Where the API may read pictures."""
        named = os.environ.get("CONTINUAL_LORA_FOLDERS", "").split(os.pathsep)
        return [self.folder / "pictures", *(Path(one) for one in named if one)]

    def example(self, token: str) -> tuple[list[str], str]:
        """Pictures of a thing that the mini-SD does not know, another for each word, and its class
        noun.
        """
        from ..mini import world

        number = int(re.sub(r"[^0-9]", "", token or "")[:9] or 1)
        concept = world.concepts("development")[(number - 1) % world.CONCEPTS_PER_SPLIT]
        folder = Path(_examples().name) / concept.name
        return [str(file) for file in world.save_pictures(concept, folder)], concept.noun

    def hand_in(self, *jobs: tuple[str, dict[str, Any]], batch: Batch | None = None) -> Job:
        """Start jobs, with copies of the pictures they need.

        Errors: NotReady, Busy, OSError; then no copy is left.
        """
        self.python()

        def before() -> None:
            self.copies.live()
            if batch:
                self.copies.write(batch)

        return self.desk.start(*jobs, before=before)


@functools.cache
def _examples() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, in the temporary one: from there gradio shows files."""
    return tempfile.TemporaryDirectory(prefix="continual-lora-examples-")


# --- what a click asks for
# --------------------------------------------------------------------------------------------------


def stack_file(checkpoint: Path, name: str = "") -> Path:
    """`files.stack_path`. Errors: ValueError, like all that a click can ask for in vain."""
    try:
        return stack_path(checkpoint, name)
    except StackError as error:
        raise ValueError(str(error)) from None


def concepts_of(stack: Path) -> list[dict[str, Any]]:
    """The concepts of a stack file, from its header; none where there is no file.

    Errors: ValueError for a file that is none.
    """
    try:
        return stackfile.read_header(stack)["concepts"] if stack.exists() else []
    except (StackError, OSError) as error:
        raise ValueError(str(error)) from None


def versions_of(stack: Path) -> list[stackfile.Version]:
    """The versions of a stack that are kept, the newest first. Errors: ValueError."""
    try:
        return stackfile.versions(stack)
    except (StackError, OSError) as error:
        raise ValueError(str(error)) from None


def uploaded(files: Sequence[Any] | None) -> list[Path]:
    """What gr.File gives: paths in newer versions, open files in older ones.

    Errors: ValueError for a file that a request only named: older versions would open any file of
    this machine.
    """
    folder = Path(
        os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio"
    ).resolve()
    found = []
    for file in files or ():
        is_path = isinstance(file, (str, Path))
        named = (
            [Path(file)]
            if is_path
            else [
                Path(getattr(file, name)) for name in ("name", "orig_name") if hasattr(file, name)
            ]
        )
        if not named or not all(path.resolve().is_relative_to(folder) for path in named):
            raise ValueError("A file was named that was not uploaded to this page.")
        found.append(named[0])
    return found


def picture_at(path: Path | str, side: int = 10_000) -> Image.Image | None:
    """A picture, at most so wide and high; None for what is none."""
    try:
        with imagefile.opened(Path(path)) as picture:
            picture.load()  # before the file is closed
            picture.thumbnail((side, side))
            return picture
    except Exception:  # Pillow raises what it likes
        return None


def caption_in(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(10_000).strip()


def typed(captions: Sequence[Sequence[Any]] | None) -> dict[str, str]:
    """The captions' table by picture; a user may have added columns, and without pictures older
    versions have a row of no columns.
    """
    return {str(row[0]): str(row[1] or "") for row in captions or () if len(row) > 1}


def settings_of(kind: type, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Widgets' values -> what differs from the defaults; 0 and "auto" stand for what suits the
    checkpoint.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    chosen = {
        name: from_widget(known[name], value) for name, value in zip(names, values, strict=True)
    }
    return {name: value for name, value in chosen.items() if value != known[name].default}


def learn_jobs(
    host: Host,
    checkpoint: Path,
    stack: Path,
    images: Sequence[str],
    token: str,
    noun: str,
    settings: dict[str, Any],
) -> list[tuple[str, dict[str, Any]]]:
    """Learn, then export, so that prompts know the word at once."""
    where = {"checkpoint": str(checkpoint), "stack": str(stack)}
    request = {
        **where,
        "images": list(images),
        "token": token.strip(),
        "noun": noun.strip(),
        "settings": settings,
    }
    return [("learn", request), export_job(host, where)]


def export_job(
    host: Host, where: dict[str, str], only: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """`only`: words, for a LoRA solved for these alone."""
    loras, embeddings = host.exports()
    return "export", {**where, "out": str(loras), "embeddings": str(embeddings), "only": list(only)}


# --- the components
# --------------------------------------------------------------------------------------------------


def _widget(kind: type, name: str) -> Any:
    """A setting's component; label, range and help come from its declaration."""
    f = next(f for f in dataclasses.fields(kind) if f.name == name)
    meta, base = f.metadata, str(f.type).split(" ")[0]
    default = SHOWN.get(name, f.default)
    said: dict[str, Any] = {
        "label": name.replace("_", " "),
        "info": explained(f),
        "elem_id": f"continual_lora_{name}",
    }
    if meta["choices"]:
        return gr.Dropdown(list(meta["choices"]), value=default, **said)
    if base == "bool" and default is None:
        return gr.Dropdown(["auto", "yes", "no"], value="auto", **said)
    if base == "bool":
        return gr.Checkbox(value=default, **said)
    return gr.Number(value=default or 0, precision=0 if base == "int" else None, **said)


def build(host: Host, page: gr.Blocks) -> None:
    """The tab's components inside the open `page`, and what their clicks do."""
    kept: dict[str, dict[str, float | None]] = {}  # by stack file: the last evaluation

    def where(checkpoint: str, name: str) -> tuple[Path, Path]:
        path = host.checkpoints().get(checkpoint)
        if path is None:
            raise ValueError(
                "Choose a checkpoint first."
                if not checkpoint
                else f"The checkpoint {checkpoint} is gone; press Refresh."
            )
        return path, stack_file(path, (name or "").strip())

    def shown(checkpoint: str, name: str) -> list[str]:
        """The concepts and the history of a stack."""
        try:
            stack = where(checkpoint, name)[1]
            return [
                table(concepts_of(stack), kept.get(str(stack), {})),
                history(versions_of(stack)),
            ]
        except ValueError as error:
            return [f"<p>{html(error)}</p>", ""]

    def is_busy() -> bool:
        return host.desk.is_busy or host.preparation.is_running

    def environment_said() -> str:
        """How far its preparation is, or what it lacks; nothing where it is ready."""
        if host.preparation.is_running:
            return code("\n".join(list(host.preparation.lines)))
        if host.preparation.error:
            return f"**{markdown(host.preparation.error)}**"
        try:
            host.python()
            return "The environment for learning is ready." if host.preparation.is_done else ""
        except NotReady as error:
            return f"**{markdown(error)}**"

    def mark() -> str:
        """What differs when there is something new to see."""
        job = host.desk.job
        told = (job.number, job.state, len(job.losses), job.progress, job.notes) if job else ()
        return repr((told, list(host.preparation.lines), is_busy()))

    def view(checkpoint: str, name: str) -> list[Any]:
        """Values of `outputs`."""
        now, job = mark(), host.desk.job
        results = job.results if job else {}
        if job and "evaluate" in results:
            kept[job.jobs[0][1]["stack"]] = results["evaluate"]["kept"]
        charts = [one["chart"] for one in results.values() if one.get("chart")]
        chart = picture_at(charts[-1]) if charts else None
        losses = job.losses if job else []
        return [
            status(job),
            curve_picture(losses, f"loss, {len(losses)} steps") if losses else None,
            picture_of(job.preview) if job else None,
            gr.update(value=chart, visible=bool(chart)),
            *shown(checkpoint, name),
            environment_said(),
            gr.update(active=is_busy())
            if _TIMER
            else gr.update(value="busy" if is_busy() else "idle"),
            now,
        ]

    def look(checkpoint: str, name: str, before: str) -> list[Any]:
        return (
            [*(gr.update() for _ in outputs[1:]), before]
            if before == mark()
            else view(checkpoint, name)
        )

    def say(error: Exception) -> list[Any]:
        return [f"**{markdown(error)}**", *(gr.update() for _ in outputs[2:]), mark()]

    def pictures(
        files: Sequence[Any] | None, captions: Sequence[Sequence[Any]], stack: Path, token: str
    ) -> Batch:
        paths = [path for path in uploaded(files) if path.suffix.lower() != ".txt"]
        if not paths:
            raise ValueError("No pictures yet: drop 3 to 15 pictures of the thing.")
        said = typed(captions)
        captioned = [said.get(path.name, "").strip() for path in paths]
        return host.copies.batch(
            [(path.name, path.read_bytes()) for path in paths], captioned, stack, token
        )

    def learn(
        checkpoint: str,
        name: str,
        files: Any,
        captions: Any,
        token: str,
        noun: str,
        plan: str,
        *values: Any,
    ) -> list[Any]:
        try:
            path, stack = where(checkpoint, name)
            settings = settings_of(LearnSettings, ADVANCED, values)
            if values[0] == LearnSettings().method and plan in PLANS:
                settings["method"] = PLANS[plan]
            token, noun = (token or "").strip(), (noun or "").strip()
            batch = pictures(files, captions, stack, token)
            jobs = learn_jobs(host, path, stack, batch.paths, token, noun, settings)
            host.hand_in(*jobs, batch=batch)
        except REFUSED as error:
            return say(error)
        return view(checkpoint, name)

    def act(
        kind: str, needs_pictures: bool = False, then_export: bool = False
    ) -> Callable[..., list[Any]]:
        def handler(checkpoint: str, name: str, *given: Any) -> list[Any]:
            try:
                path, stack = where(checkpoint, name)
                request: dict[str, Any] = {"checkpoint": str(path), "stack": str(stack)}
                batch = None
                if needs_pictures:
                    newest = [one["token"] for one in concepts_of(stack)[-1:]]
                    batch = pictures(
                        given[0], (), stack, newest[0] if newest and kind == "consolidate" else ""
                    )
                    request["images"] = batch.paths
                if kind in ("scores", "evaluate"):
                    request["out"] = host.copies.charts()
                only: list[str] = []
                if kind == "export" and given:
                    only = str(given[0] or "").replace(",", " ").split()
                    if not only:
                        raise ValueError(
                            "No word is on the left: type those to export, such as V1, V3."
                        )
                first = export_job(host, request, only) if kind == "export" else (kind, request)
                more = (
                    [export_job(host, {k: request[k] for k in ("checkpoint", "stack")})]
                    if then_export
                    else []
                )
                host.hand_in(first, *more, batch=batch)
            except REFUSED as error:
                return say(error)
            return view(checkpoint, name)

        return handler

    def ask(kind: str) -> Callable[..., list[Any]]:
        """Say what a destructive click will do; nothing is done yet."""

        def handler(checkpoint: str, name: str, given: Any = None) -> list[Any]:
            given = given.strip() if isinstance(given, str) else given
            try:
                asked = QUESTIONS[kind](*where(checkpoint, name), given)
            except REFUSED as error:
                return [*say(error), *not_asked()]
            pending = {"ask": (kind, checkpoint, name, given), "sentence": asked.sentence}
            texts = [f"**{markdown(asked.sentence)}**", gr.update(value=asked.yes)]
            return [
                *(gr.update() for _ in outputs[1:]),
                mark(),
                gr.update(visible=True),
                *texts,
                pending,
            ]

        return handler

    def not_asked() -> list[Any]:
        return [gr.update(visible=False), "", gr.update(), None]

    def confirm(checkpoint: str, name: str, pending: dict[str, Any] | None) -> list[Any]:
        """Do what was asked, if it is still the very thing that was told."""
        try:
            if not pending:
                raise ValueError("Nothing was asked.")
            kind, *place, given = pending["ask"]
            asked = QUESTIONS[kind](*where(*place), given)
            if asked.sentence != pending["sentence"]:
                raise ValueError("The stack has changed meanwhile. Look at it, then ask once more.")
            host.hand_in(asked.job)
        except REFUSED as error:
            return [*say(error), *not_asked()]
        return [*view(checkpoint, name), *not_asked()]

    def stop(checkpoint: str, name: str) -> list[Any]:
        if host.desk.job:
            host.desk.job.stop()
        return view(checkpoint, name)

    def prepare(checkpoint: str, name: str) -> list[Any]:
        host.preparation.start()
        return view(checkpoint, name)

    def thumbnails(
        files: Sequence[Any] | None, captions: Sequence[Sequence[Any]]
    ) -> tuple[list[tuple[Image.Image, str]], list[list[str]]]:
        """Thumbnails, and a row for each: what was typed for that name before, else the text file
        dropped with it, else nothing.
        """
        try:
            paths, said = uploaded(files), typed(captions)
        except ValueError as error:
            raise gr.Error(str(error)) from None
        texts = {path.stem: caption_in(path) for path in paths if path.suffix.lower() == ".txt"}
        seen = [
            (path, picture)
            for path in paths
            if path.suffix.lower() in PICTURES and (picture := picture_at(path, 400))
        ]
        return [(picture, path.name) for path, picture in seen], [
            [p.name, said.get(p.name) or texts.get(p.stem, "")] for p, _ in seen
        ]

    names = list(host.checkpoints())
    ready = environment_said()
    first = shown(names[0], "") if names else ["", ""]
    outputs: list[Any] = []
    with gr.Row():
        with gr.Column():
            with gr.Group(visible=bool(ready)):
                environment = gr.Markdown(ready, latex_delimiters=[])
                make = gr.Button("Prepare environment")
            with gr.Row():
                checkpoint = gr.Dropdown(
                    names,
                    value=names[0] if names else None,
                    label="Checkpoint",
                    elem_id="continual_lora_checkpoint",
                )
                refresh = gr.Button("Refresh", scale=0)
            files = gr.File(
                file_count="multiple",
                label="Pictures of the thing, 3 to 15",
                elem_id="continual_lora_files",
            )
            gallery = gr.Gallery(label="Pictures", columns=5, height=160)
            example = gr.Button(
                "Example pictures, for trying it on the mini-SD", elem_id="continual_lora_example"
            )
            with gr.Row():
                token = gr.Textbox(
                    "V1",
                    label="Word",
                    info="new; prompts use it from now on",
                    elem_id="continual_lora_token",
                )
                noun = gr.Textbox(
                    "",
                    label="Class noun",
                    info="what kind of thing it is, such as teapot or dog",
                    elem_id="continual_lora_noun",
                )
            plan = gr.Radio(list(PLANS), value=host.default_plan(), label="Method")
            with gr.Row():
                go = gr.Button("Learn", variant="primary", elem_id="continual_lora_learn")
                halt = gr.Button("Stop", elem_id="continual_lora_stop")
            with gr.Accordion("Captions, and settings for experts", open=False):
                captions = gr.Dataframe(
                    headers=["picture", "caption"],
                    type="array",
                    interactive=True,
                    elem_id="continual_lora_captions",
                    label="Captions: type one beside a picture, or drop its .txt with it; where "
                    "there is none, prompts are made up",
                )
                stack_name = gr.Textbox(
                    "",
                    label="Stack",
                    info="empty: the checkpoint's own; a name: another one, kept apart from it",
                    elem_id="continual_lora_stack",
                )
                advanced = []
                for start in range(0, len(ADVANCED), 3):
                    with gr.Row():
                        advanced += [
                            _widget(LearnSettings, name) for name in ADVANCED[start : start + 3]
                        ]
        with gr.Column():
            told = gr.Markdown(
                status(host.desk.job), elem_id="continual_lora_status", latex_delimiters=[]
            )
            preview = gr.Image(
                label="Preview: the new concept, and the first one", type="pil", height=220
            )
            losses = gr.Image(label="Loss", type="pil", height=220)
            chart = gr.Image(label="Chart", type="pil", visible=False)
            concepts = gr.HTML(first[0], elem_id="continual_lora_concepts")
            with gr.Row():
                consolidate, solve = (
                    gr.Button("Consolidate (DSC)"),
                    gr.Button("Consolidate (closed form)"),
                )
                scores, evaluate = gr.Button("Compute DC scores"), gr.Button("Evaluate retention")
            with gr.Row():
                export, some = (
                    gr.Button("Export"),
                    gr.Button("Export the words on the left alone", elem_id="continual_lora_some"),
                )
                undo = gr.Button("Undo the last change ...", elem_id="continual_lora_undo")
                forget = gr.Button(
                    "Forget the word on the left ...", elem_id="continual_lora_forget"
                )
            with gr.Group(visible=False, elem_id="continual_lora_asking") as asking:
                question = gr.Markdown("", latex_delimiters=[], elem_id="continual_lora_question")
                with gr.Row():
                    yes = gr.Button("Yes", variant="stop", elem_id="continual_lora_yes")
                    no = gr.Button("Cancel", elem_id="continual_lora_no")
            with gr.Accordion("History of the stack", open=False):
                past = gr.HTML(first[1], elem_id="continual_lora_history")
                with gr.Row():
                    number = gr.Number(
                        value=1, precision=0, label="Version", elem_id="continual_lora_version"
                    )
                    restore = gr.Button(
                        "Go back to the version ...", elem_id="continual_lora_restore"
                    )

    marked, pending = gr.State(""), gr.State(None)
    pulse = (
        gr.Timer(1, active=False) if _TIMER else gr.Button("idle", elem_id="continual_lora_pulse")
    )

    place = [checkpoint, stack_name]
    outputs += [told, losses, preview, chart, concepts, past, environment, pulse, marked]
    confirmed = [*outputs, asking, question, yes, pending]
    for click, handler, inputs in (
        (go.click, learn, [*place, files, captions, token, noun, plan, *advanced]),
        (consolidate.click, act("consolidate", True, True), [*place, files]),
        (solve.click, act("closed_form", then_export=True), place),
        (scores.click, act("scores", True), [*place, files]),
        (evaluate.click, act("evaluate"), place),
        (export.click, act("export"), place),
        (some.click, act("export"), [*place, token]),
        (halt.click, stop, place),
        (make.click, prepare, place),
        (page.load, view, place),  # a page that is opened, or opened again, while a job runs
    ):
        click(handler, inputs, outputs)
    undo.click(ask("undo"), place, confirmed)
    forget.click(ask("forget"), [*place, token], confirmed)
    restore.click(ask("restore"), [*place, number], confirmed)
    yes.click(confirm, [*place, pending], confirmed)
    no.click(not_asked, None, confirmed[len(outputs) :])
    if isinstance(pulse, gr.Button):
        pulse.click(look, [*place, marked], outputs, show_progress="hidden", queue=False)
        script: dict[str, Any] = {"_js": _PULSE}
        page.load(None, None, None, **script)
    else:
        pulse.tick(look, [*place, marked], outputs, show_progress="hidden")
    example.click(host.example, token, [files, noun])
    files.change(thumbnails, [files, captions], [gallery, captions])
    refresh.click(lambda: gr.update(choices=list(host.checkpoints())), None, checkpoint)
    for changed in place:
        changed.change(
            lambda *given: [*shown(*given), *not_asked()],
            place,
            [concepts, past, *confirmed[len(outputs) :]],
        )

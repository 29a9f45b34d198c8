"""The tab: pictures in, a word and a class noun, Learn; what is on the stack; consolidate, score, evaluate, export, undo. gradio 3.41 to 6.

`build(host)` makes the components inside an open `gr.Blocks`. What it needs of the program around it is `Host`; this one is no program at all.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..curves import curve_picture
from ..errors import StackError
from ..files import PICTURES, STACKS, stack_path
from ..settings import LearnSettings, explained, from_widget
from .environment import NotReady
from .job import Busy, Desk, Job

PLANS = {
    "Recommended: hold what earlier prompts do": "retention",
    "The paper's: EWC, DC scores, consolidation": "lora_dsc_ewc_dc",
    "No protection (forgets; for comparison)": "lora",
}
ADVANCED = ("method", "steps", "rank", "rate", "vectors", "token_rate", "batch", "size", "fit", "flip", "seed", "adapter", "ewc_strength",
            "retention_weight", "dsc_steps", "fisher_samples", "precision", "checkpointing", "preview_every")  # fmt: skip
SHOWN: dict[str, Any] = {"preview_every": 50}  # here pictures while learning are worth their time


class Host:
    """What the tab needs of the program it is in; here there is none, and checkpoints lie in one folder."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.models, self.folder = models, folder  # `folder`: pictures, charts and exports of the tab
        self.desk = Desk(self.python)

    def python(self) -> str:
        """The worker's Python. Errors: NotReady."""
        return sys.executable

    def checkpoints(self) -> dict[str, Path]:
        """By the name the user knows."""
        found = sorted(p for p in self.models.rglob("*.safetensors") if not p.name.endswith(STACKS))
        return {str(p.relative_to(self.models)): p for p in found}

    def exports(self) -> tuple[Path, Path]:
        """Folders for LoRAs and for embeddings."""
        return self.folder / "exports", self.folder / "exports"

    def prepare(self) -> Iterator[str]:
        """Make the worker's environment, saying how far it is; nothing where there is nothing to make."""
        yield from ()

    def default_plan(self) -> str:
        return next(iter(PLANS))

    def logins(self) -> dict[str, str]:
        """Who may use the API, and with which password; nobody named: everybody."""
        return {}

    def picture_folders(self) -> list[Path]:
        """Where the API may read pictures."""
        return [self.folder / "pictures"]

    def example(self, token: str) -> tuple[list[str], str]:
        """Pictures of a thing that the mini-SD does not know, another for each word, and its class noun."""
        from ..mini import world

        concept = world.concepts("development")[(int(re.sub(r"\D", "", token) or 1) - 1) % world.CONCEPTS_PER_SPLIT]
        folder = Path(tempfile.gettempdir()) / "continual-lora-examples" / concept.name
        return [str(file) for file in world.save_pictures(concept, folder)], concept.noun


# --- what a click asks for -----------------------------------------------------------------------------------------------------------


def stack_file(checkpoint: Path, name: str = "") -> Path:
    """`files.stack_path`. Errors: ValueError, like all that a click can ask for in vain."""
    try:
        return stack_path(checkpoint, name)
    except StackError as error:
        raise ValueError(str(error)) from None


def concepts_of(stack: Path) -> list[dict[str, Any]]:
    """The concepts of a stack file, from its header; none where there is no file. Errors: ValueError for a file that is none."""
    if not stack.exists():
        return []
    try:
        with stack.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(json.loads(file.read(length))["__metadata__"]["stack"])["concepts"]
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError):
        raise ValueError(
            f"{stack} can't be read as a concept stack: it is cut short or something else. Its last version is {stack.name}.previous."
        ) from None


def keep_pictures(files: Sequence[str | Path], captions: Sequence[str], folder: Path) -> list[Path]:
    """Copies in a folder named after what they hold, so that the same pictures are the same request, with their captions beside them."""
    digest = hashlib.sha256(repr(list(captions)).encode())
    for file in files:
        digest.update(Path(file).read_bytes())
    target = folder / digest.hexdigest()[:24]
    target.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, file in enumerate(files):
        kept.append(target / f"{number:03d}{Path(file).suffix.lower()}")
        shutil.copyfile(file, kept[-1])
        if number < len(captions) and captions[number].strip():
            kept[-1].with_suffix(".txt").write_text(captions[number].strip(), encoding="utf-8")
    return kept


def paths_of(files: Sequence[Any] | None) -> list[Path]:
    """What gr.File gives: paths in newer versions, open files in older ones."""
    return [Path(getattr(file, "name", file)) for file in files or ()]


def typed(captions: Sequence[Sequence[str]]) -> dict[str, str]:
    """The captions' table by picture; a user may have added columns, and without pictures older versions have a row of no columns."""
    return {row[0]: row[1] for row in captions if row}


def settings_of(kind: type, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Widgets' values -> what differs from the defaults; 0 and "auto" stand for what suits the checkpoint."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    chosen = {name: from_widget(known[name], value) for name, value in zip(names, values, strict=True)}
    return {name: value for name, value in chosen.items() if value != known[name].default}


def learn_jobs(
    host: Host, checkpoint: Path, stack: Path, images: Sequence[Path], token: str, noun: str, settings: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Learn, then export, so that prompts know the word at once."""
    where = {"checkpoint": str(checkpoint), "stack": str(stack)}
    request = {**where, "images": [str(p) for p in images], "token": token.strip(), "noun": noun.strip(), "settings": settings}
    return [("learn", request), export_job(host, where)]


def export_job(host: Host, where: dict[str, str], only: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """`only`: words, for a LoRA solved for these alone."""
    loras, embeddings = host.exports()
    return "export", {**where, "out": str(loras), "embeddings": str(embeddings), "only": list(only)}


# --- what is shown -------------------------------------------------------------------------------------------------------------------


def status(job: Job | None) -> str:
    """One paragraph: what goes on, how far, how long still; or how it ended."""
    if job is None:
        return "Ready."
    if job.state == "failed":
        return f"**{job.name} failed.** {job.message}"
    if job.state == "stopped":
        return f"**Stopped.** {job.message}. What was learned so far is kept: the same request goes on from here."
    if job.state == "done":
        return _ending(job)
    told = job.progress
    if not told or told["stage"] == "start":
        return "Starting the worker ..."
    line = f"**{told['stage']}** step {told['step']} of {told['steps']}"
    if told["loss"] is not None:
        line += f", loss {told['loss']:.4f}"
    if told["seconds_left"] is not None:
        line += f", {int(told['seconds_left']) // 60}:{int(told['seconds_left']) % 60:02d} left"
    return line + (" - stopping after this step ..." if job.state == "stopping" else "")


def _ending(job: Job) -> str:
    done, lines = job.results, []
    if "learn" in done:
        known = done["learn"]
        word = f"{known['token']} {known['noun']}"
        lines.append(f"**{word} is on the stack already**, from these very pictures and settings." if known.get("again") else f"**Learned {word}**.")
    if "consolidate" in done:
        lines.append(f"**Consolidated {done['consolidate']['token']}** in {len(done['consolidate']['losses'])} steps.")
    if "closed_form" in done:
        found = done["closed_form"]
        shares = ", ".join(f"{name} {share:.0%} (before {found['before'][name]:.0%})" for name, share in found["after"].items())
        lines.append(f"**Consolidated in closed form**, rank {found['rank']}. Lost of what each concept's own LoRA did: {shares}.")
    if "forget" in done:
        lines.append(f"**Forgot {done['forget']['token']} {done['forget']['noun']}.** LoRAs exported before still know it.")
    if "undo" in done:
        lines.append(f"**Took {done['undo']['token']} {done['undo']['noun']} off the stack.**")
    if "scores" in done:
        best = ", ".join(f"{Path(one['file']).name}: {one['best']}{'' if one['sure'] else ' (not sure)'}" for one in done["scores"]["images"])
        lines.append(f"**DC scores.** {best}")
    if "evaluate" in done:
        lines.append(f"**Retention.**\n```\n{done['evaluate']['table']}\n```")
    if "export" in done:
        out = done["export"]
        lora = f" `<lora:{Path(out['lora']).stem}:1>`" if out["lora"] else ""
        lines.append(f"Prompts know it now: *a photo of a {out['triggers'][-1]}*{lora}")
    return "\n\n".join(lines)


def picture_of(encoded: str | None) -> Image.Image | None:
    return Image.open(io.BytesIO(base64.b64decode(encoded))) if encoded else None


def table(concepts: Sequence[dict[str, Any]], kept: dict[str, float | None]) -> str:
    """The stack as HTML: preview, word, when and how, how much is kept as of the last evaluation."""
    if not concepts:
        return "<p>No concept learned yet.</p>"
    rows = []
    for one in concepts:
        picture = f'<img alt="" width="64" src="data:image/jpeg;base64,{one["preview"]}">' if one["preview"] else ""
        share = kept.get(f"{one['token']} {one['noun']}" if one["with_noun"] else one["token"])  # as an evaluation names it
        told = "-" if share is None else f"{100 * share:.0f} %"
        cells = (picture, f"<b>{html.escape(one['token'])}</b> {html.escape(one['noun'])}", one["learned"][:10],
                 f"{html.escape(one['method'])}, {one['steps']} steps, {one['images']} pictures", told)  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th align='left'>{name}</th>" for name in ("", "concept", "learned", "how", "kept"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


# --- the components ------------------------------------------------------------------------------------------------------------------


def _widget(kind: type, name: str) -> Any:
    """A setting's component; label, range and help come from its declaration."""
    f = next(f for f in dataclasses.fields(kind) if f.name == name)
    meta, base = f.metadata, str(f.type).split(" ")[0]
    default = SHOWN.get(name, f.default)
    said: dict[str, Any] = {"label": name.replace("_", " "), "info": explained(f), "elem_id": f"continual_lora_{name}"}
    if meta["choices"]:
        return gr.Dropdown(list(meta["choices"]), value=default, **said)
    if base == "bool" and default is None:
        return gr.Dropdown(["auto", "yes", "no"], value="auto", **said)
    if base == "bool":
        return gr.Checkbox(value=default, **said)
    return gr.Number(value=default or 0, precision=0 if base == "int" else None, **said)


def build(host: Host) -> None:
    """The tab's components and what their clicks do."""
    kept: dict[str, dict[str, float | None]] = {}  # by stack file: the last evaluation

    def where(checkpoint: str, name: str) -> tuple[Path, Path]:
        path = host.checkpoints().get(checkpoint)
        if path is None:
            raise ValueError("Choose a checkpoint first." if not checkpoint else f"The checkpoint {checkpoint} is gone; press Refresh.")
        return path, stack_file(path, (name or "").strip())

    def shown(checkpoint: str, name: str) -> str:
        try:
            stack = where(checkpoint, name)[1]
            return table(concepts_of(stack), kept.get(str(stack), {}))
        except ValueError as error:
            return f"<p>{html.escape(str(error))}</p>"

    def view(note: str = "") -> list[Any]:
        """status, curve, previews, chart"""
        job = host.desk.job
        charts = [r["chart"] for r in (job.results.values() if job else ()) if r.get("chart")]
        picture = picture_of(job.preview) if job else None
        chart = Image.open(charts[-1]) if charts and Path(charts[-1]).exists() else None
        losses = job.losses if job else []
        return [
            note or status(job),
            curve_picture(losses, f"loss, {len(losses)} steps") if losses else None,
            picture,
            gr.update(value=chart, visible=bool(chart)),
        ]

    def follow(checkpoint: str, name: str) -> Iterator[list[Any]]:
        """The state of the job a few times a second, until it ends; then the table too."""
        job, before = host.desk.job, None
        while job and not job.wait(0.4):
            told = (job.state, len(job.losses), str(job.progress))
            if told != before:
                before = told
                yield [*view(), gr.update()]
        if job and "evaluate" in job.results:
            kept[job.jobs[0][1]["stack"]] = job.results["evaluate"]["kept"]
        yield [*view(), shown(checkpoint, name)]

    def run(checkpoint: str, name: str, *jobs: tuple[str, dict[str, Any]]) -> Iterator[list[Any]]:
        try:
            host.desk.start(*jobs)
        except Busy as error:
            yield [*view(str(error)), gr.update()]
            return
        yield from follow(checkpoint, name)

    def say(error: Exception) -> list[Any]:
        return [f"**{error}**", gr.update(), gr.update(), gr.update(), gr.update()]

    def pictures(files: Sequence[Any] | None, captions: Sequence[Sequence[str]] = ()) -> list[Path]:
        paths = [path for path in paths_of(files) if path.suffix.lower() != ".txt"]
        if not paths:
            raise ValueError("No pictures yet: drop 3 to 15 pictures of the thing.")
        said = typed(captions)
        return keep_pictures(paths, [said.get(path.name, "") for path in paths], host.folder / "pictures")

    def learn(checkpoint: str, name: str, files: Any, captions: Any, token: str, noun: str, plan: str, *values: Any) -> Iterator[list[Any]]:
        try:
            path, stack = where(checkpoint, name)
            settings = settings_of(LearnSettings, ADVANCED, values)
            if values[0] == LearnSettings().method and plan:
                settings["method"] = PLANS[plan]
            jobs = learn_jobs(host, path, stack, pictures(files, captions), token, noun, settings)
        except ValueError as error:
            yield say(error)
            return
        yield from run(checkpoint, name, *jobs)

    def act(kind: str, needs_pictures: bool = False, then_export: bool = False) -> Any:
        def handler(checkpoint: str, name: str, *given: Any) -> Iterator[list[Any]]:
            try:
                path, stack = where(checkpoint, name)
                request: dict[str, Any] = {"checkpoint": str(path), "stack": str(stack)}
                if needs_pictures:
                    request["images"] = [str(p) for p in pictures(given[0])]
                if kind == "forget":
                    request["token"] = given[0].strip()
                if kind in ("scores", "evaluate"):
                    request["out"] = str(host.folder / "charts" / f"{time.time_ns():x}")
                only: list[str] = []
                if kind == "export" and given:
                    only = given[0].replace(",", " ").split()
                    if not only:
                        raise ValueError("No word is on the left: type those to export, such as V1, V3.")
                first = export_job(host, request, only) if kind == "export" else (kind, request)
            except ValueError as error:
                yield say(error)
                return
            more = [export_job(host, {k: request[k] for k in ("checkpoint", "stack")})] if then_export else []
            yield from run(checkpoint, name, first, *more)

        return handler

    def stop() -> str:
        if host.desk.job and not host.desk.job.wait(0):
            host.desk.job.stop()
        return status(host.desk.job)

    def thumbnails(files: Sequence[Any] | None, captions: Sequence[Sequence[str]]) -> tuple[list[tuple[Image.Image, str]], list[list[str]]]:
        """Thumbnails, and a row for each: what was typed for that name before, else the text file dropped with it, else nothing."""
        paths, said = paths_of(files), typed(captions)
        texts = {path.stem: path.read_text(encoding="utf-8", errors="replace").strip() for path in paths if path.suffix.lower() == ".txt"}
        shown = [path for path in paths if path.suffix.lower() in PICTURES]
        return [(Image.open(p), p.name) for p in shown], [[p.name, said.get(p.name) or texts.get(p.stem, "")] for p in shown]

    def prepare() -> Iterator[str]:
        lines: list[str] = []
        try:
            for line in host.prepare():
                lines = [*lines[-11:], line]
                yield "```\n" + "\n".join(lines) + "\n```"
            yield "The environment for learning is ready."
        except NotReady as error:
            yield f"**{error}**"

    def readiness() -> str:
        try:
            host.python()
            return ""
        except NotReady as error:
            return f"**{error}**"

    names = list(host.checkpoints())
    ready = readiness()
    with gr.Row():
        with gr.Column():
            with gr.Group(visible=bool(ready)):
                environment = gr.Markdown(ready)
                make = gr.Button("Prepare environment")
            with gr.Row():
                checkpoint = gr.Dropdown(names, value=names[0] if names else None, label="Checkpoint", elem_id="continual_lora_checkpoint")
                refresh = gr.Button("Refresh", scale=0)
            files = gr.File(file_count="multiple", label="Pictures of the thing, 3 to 15", elem_id="continual_lora_files")
            gallery = gr.Gallery(label="Pictures", columns=5, height=160)
            example = gr.Button("Example pictures, for trying it on the mini-SD", elem_id="continual_lora_example")
            with gr.Row():
                token = gr.Textbox("V1", label="Word", info="new; prompts use it from now on", elem_id="continual_lora_token")
                noun = gr.Textbox("", label="Class noun", info="what kind of thing it is, such as teapot or dog", elem_id="continual_lora_noun")
            plan = gr.Radio(list(PLANS), value=host.default_plan(), label="Method")
            with gr.Row():
                go = gr.Button("Learn", variant="primary", elem_id="continual_lora_learn")
                halt = gr.Button("Stop", elem_id="continual_lora_stop")
            with gr.Accordion("Captions, and settings for experts", open=False):
                captions = gr.Dataframe(
                    headers=["picture", "caption"], type="array", interactive=True, elem_id="continual_lora_captions",
                    label="Captions: type one beside a picture, or drop its .txt with it; where there is none, prompts are made up",
                )  # fmt: skip
                stack_name = gr.Textbox(
                    "", label="Stack", info="empty: the checkpoint's own; a name: another one, kept apart from it", elem_id="continual_lora_stack"
                )
                advanced = []
                for start in range(0, len(ADVANCED), 3):
                    with gr.Row():
                        advanced += [_widget(LearnSettings, name) for name in ADVANCED[start : start + 3]]
        with gr.Column():
            told = gr.Markdown(status(host.desk.job), elem_id="continual_lora_status")
            preview = gr.Image(label="Preview: the new concept, and the first one", type="pil", height=220)
            losses = gr.Image(label="Loss", type="pil", height=220)
            chart = gr.Image(label="Chart", type="pil", visible=False)
            concepts = gr.HTML(shown(names[0], "") if names else "", elem_id="continual_lora_concepts")
            with gr.Row():
                consolidate, solve = gr.Button("Consolidate (DSC)"), gr.Button("Consolidate (closed form)")
                scores, evaluate = gr.Button("Compute DC scores"), gr.Button("Evaluate retention")
            with gr.Row():
                export, some = gr.Button("Export"), gr.Button("Export the words on the left alone", elem_id="continual_lora_some")
                undo, forget = gr.Button("Undo the newest"), gr.Button("Forget the word on the left")

    outputs, place = [told, losses, preview, chart, concepts], [checkpoint, stack_name]
    go.click(learn, [*place, files, captions, token, noun, plan, *advanced], outputs)
    consolidate.click(act("consolidate", True, True), [*place, files], outputs)
    solve.click(act("closed_form", then_export=True), place, outputs)
    forget.click(act("forget"), [*place, token], outputs)
    scores.click(act("scores", True), [*place, files], outputs)
    evaluate.click(act("evaluate"), place, outputs)
    export.click(act("export"), place, outputs)
    some.click(act("export"), [*place, token], outputs)
    undo.click(act("undo"), place, outputs)
    halt.click(stop, None, told)
    make.click(prepare, None, environment)
    example.click(host.example, token, [files, noun])
    files.change(thumbnails, [files, captions], [gallery, captions])
    refresh.click(lambda: gr.update(choices=list(host.checkpoints())), None, checkpoint)
    for changed in place:
        changed.change(shown, place, concepts)

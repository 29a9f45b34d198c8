"""The tab's layout: pictures, word and class noun, Learn; the stack's concepts; consolidate, score,
evaluate, export, undo. gradio 3.41 to 6.

`build(host, page)` creates the components inside an open `gr.Blocks` and connects them with
`Handlers`.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ..fields import help_of
from ..settings import LearnSettings
from .handlers import ADVANCED, ASKING, HAS_TIMER, OUTPUTS, Handlers
from .host import Host
from .labels import METHOD_LABELS, label_of
from .shown import status

# gradio 3 has no timer, so a script presses a button while that reads "busy" and the page is
# visible. No handler may run long: in gradio 3, one whose page was closed keeps the server from
# shutting down, so that "Reload UI" hangs.
_PULSE = """() => {
  const button = () => document.querySelector("#continual_lora_pulse");
  button().style.display = "none";
  const isBusy = () => button()?.textContent.includes("busy") && !document.hidden;
  setInterval(() => isBusy() && button().click(), 1000);
}"""
# defaults that differ in the tab: previews while learning are worth their time
DEFAULTS: dict[str, Any] = {"preview_every": 50}


def build(host: Host, page: gr.Blocks) -> None:
    """Create the tab's components inside the open `page`, and connect their events."""
    handlers, parts = Handlers(host), SimpleNamespace()
    names = list(host.checkpoints())
    first = handlers.stack_shown(names[0], "") if names else ["", ""]
    with gr.Row():
        with gr.Column():
            _environment(parts, handlers.environment_shown())
            _what_to_learn(parts, names)
            _how_to_learn(parts, host)
            _for_experts(parts)
        with gr.Column():
            _what_is_shown(parts, host, first[0])
            _actions(parts)
            _question(parts)
            _history(parts, first[1])
    parts.mark, parts.pending = gr.State(""), gr.State(None)
    parts.pulse = _pulse()
    _connect_jobs(parts, handlers, page)
    _connect_questions(parts, handlers)
    _connect_pulse(parts, handlers, page)
    _connect_inputs(parts, handlers)


# --- components ----------------------------------------------------------------------------------


def _environment(parts: SimpleNamespace, lacks: str) -> None:
    with gr.Group(visible=bool(lacks)):
        parts.environment = gr.Markdown(lacks, latex_delimiters=[])
        parts.prepare = gr.Button("Prepare environment")


def _what_to_learn(parts: SimpleNamespace, names: list[str]) -> None:
    with gr.Row():
        parts.checkpoint = gr.Dropdown(
            names,
            value=names[0] if names else None,
            label=label_of("checkpoint"),
            elem_id="continual_lora_checkpoint",
        )
        parts.refresh = gr.Button("Refresh", scale=0)
    parts.files = gr.File(
        file_count="multiple",
        label=f"{label_of('images')}, 3 to 15, with their captions (a.txt) and masks (a.mask.png: white is "
        "learned from) if there are any",
        elem_id="continual_lora_files",
    )
    parts.gallery = gr.Gallery(label="Pictures", columns=5, height=160)
    parts.inventory = gr.Markdown("", elem_id="continual_lora_inventory", latex_delimiters=[])
    parts.example = gr.Button(
        "Example pictures, to try it on the mini-SD", elem_id="continual_lora_example"
    )
    with gr.Row():
        parts.token = gr.Textbox(
            "V1",
            label=label_of("token"),
            info="new; prompts use it from now on",
            elem_id="continual_lora_token",
        )
        parts.noun = gr.Textbox(
            "",
            label=label_of("noun"),
            info="what kind of thing it is, such as teapot or dog",
            elem_id="continual_lora_noun",
        )


def _how_to_learn(parts: SimpleNamespace, host: Host) -> None:
    parts.method = gr.Radio(list(METHOD_LABELS), value=host.default_method(), label="Method")
    parts.replace = gr.Checkbox(
        value=False,
        label=label_of("replace"),
        info="the old one stays until the new one is stored",
        elem_id="continual_lora_replace",
    )
    with gr.Row():
        parts.learn = gr.Button(
            label_of("learn"), variant="primary", elem_id="continual_lora_learn"
        )
        parts.stop = gr.Button("Stop", elem_id="continual_lora_stop")


def _for_experts(parts: SimpleNamespace) -> None:
    with gr.Accordion("Captions, and settings for experts", open=False):
        parts.captions = gr.Dataframe(
            headers=["picture", "caption"],
            type="array",
            interactive=True,
            elem_id="continual_lora_captions",
            label="Captions: type one beside a picture, or drop its .txt with it; prompts are made "
            "up for pictures without one",
        )
        parts.stack = gr.Textbox(
            "",
            label=label_of("stack"),
            info="empty: the checkpoint's own; a name: another one, kept apart from it",
            elem_id="continual_lora_stack",
        )
        parts.advanced = []
        for start in range(0, len(ADVANCED), 3):
            with gr.Row():
                parts.advanced += [_setting(name) for name in ADVANCED[start : start + 3]]


def _setting(name: str) -> Any:
    """A setting's component; label, range and help come from its declaration."""
    field = next(f for f in dataclasses.fields(LearnSettings) if f.name == name)
    choices, kind = field.metadata["choices"], str(field.type).split(" ")[0]
    default = DEFAULTS.get(name, field.default)
    rest: dict[str, Any] = {
        "label": label_of(name),
        "info": help_of(field),
        "elem_id": f"continual_lora_{name}",
    }
    if choices and default is None:
        return gr.Dropdown(["auto", *choices], value="auto", **rest)
    if choices:
        return gr.Dropdown(list(choices), value=default, **rest)
    if kind == "bool" and default is None:
        return gr.Dropdown(["auto", "yes", "no"], value="auto", **rest)
    if kind == "bool":
        return gr.Checkbox(value=default, **rest)
    return gr.Number(value=default or 0, precision=0 if kind == "int" else None, **rest)


def _what_is_shown(parts: SimpleNamespace, host: Host, concepts: str) -> None:
    parts.status = gr.Markdown(
        status(host.runner.job), elem_id="continual_lora_status", latex_delimiters=[]
    )
    parts.preview = gr.Image(
        label="Preview: the new concept, and the first one", type="pil", height=220
    )
    parts.losses = gr.Image(label="Loss", type="pil", height=220)
    parts.chart = gr.Image(label="Chart", type="pil", visible=False)
    parts.concepts = gr.HTML(concepts, elem_id="continual_lora_concepts")


def _actions(parts: SimpleNamespace) -> None:
    with gr.Row():
        parts.consolidate = gr.Button(label_of("consolidate"))
        parts.closed_form = gr.Button(label_of("closed_form"))
        parts.scores = gr.Button(label_of("scores"))
        parts.evaluate = gr.Button(label_of("evaluate"))
    with gr.Row():
        parts.export = gr.Button(label_of("export"), elem_id="continual_lora_export")
        parts.export_some = gr.Button(
            "Export only the words on the left", elem_id="continual_lora_some"
        )
        parts.remove_superseded = gr.Checkbox(
            value=False,
            label=label_of("remove_superseded"),
            info="exports of the same concepts of this stack; otherwise they are listed",
            elem_id="continual_lora_remove_superseded",
        )
    with gr.Row():
        parts.undo = gr.Button(f"{label_of('undo')} ...", elem_id="continual_lora_undo")
        parts.forget = gr.Button(f"{label_of('forget')} ...", elem_id="continual_lora_forget")


def _question(parts: SimpleNamespace) -> None:
    with gr.Group(visible=False, elem_id="continual_lora_asking") as parts.asking:
        parts.question = gr.Markdown("", latex_delimiters=[], elem_id="continual_lora_question")
        with gr.Row():
            parts.yes = gr.Button("Yes", variant="stop", elem_id="continual_lora_yes")
            parts.no = gr.Button("Cancel", elem_id="continual_lora_no")


def _history(parts: SimpleNamespace, versions: str) -> None:
    with gr.Accordion(label_of("history"), open=False):
        parts.history = gr.HTML(versions, elem_id="continual_lora_history")
        with gr.Row():
            parts.version = gr.Number(
                value=1, precision=0, label=label_of("version"), elem_id="continual_lora_version"
            )
            parts.restore = gr.Button(
                f"{label_of('restore')} ...", elem_id="continual_lora_restore"
            )


def _pulse() -> Any:
    if HAS_TIMER:
        return gr.Timer(1, active=False)
    return gr.Button("idle", elem_id="continual_lora_pulse")


# --- connections ---------------------------------------------------------------------------------


def _outputs(parts: SimpleNamespace, names: tuple[str, ...] = OUTPUTS) -> list[Any]:
    return [getattr(parts, name) for name in names]


def _connect_jobs(parts: SimpleNamespace, handlers: Handlers, page: gr.Blocks) -> None:
    place, files = [parts.checkpoint, parts.stack], parts.files
    learning = [files, parts.captions, parts.token, parts.noun, parts.method, parts.replace]
    for event, handler, inputs in (
        (parts.learn.click, handlers.learn, [*place, *learning, *parts.advanced]),
        (
            parts.consolidate.click,
            handlers.consolidate,
            [*place, files, parts.captions, *parts.advanced],
        ),
        (parts.closed_form.click, handlers.closed_form, place),
        (parts.scores.click, handlers.scores, [*place, files]),
        (parts.evaluate.click, handlers.evaluate, place),
        (parts.export.click, handlers.export, [*place, parts.remove_superseded]),
        (
            parts.export_some.click,
            handlers.export_some,
            [*place, parts.remove_superseded, parts.token],
        ),
        (parts.stop.click, handlers.stop, place),
        (parts.prepare.click, handlers.prepare, place),
        (page.load, handlers.view, place),  # opened, or opened again, while a job runs
    ):
        event(handler, inputs, _outputs(parts))


def _connect_questions(parts: SimpleNamespace, handlers: Handlers) -> None:
    place, outputs = [parts.checkpoint, parts.stack], _outputs(parts, (*OUTPUTS, *ASKING))
    parts.undo.click(handlers.ask("undo"), place, outputs)
    parts.forget.click(handlers.ask("forget"), [*place, parts.token], outputs)
    parts.restore.click(handlers.ask("restore"), [*place, parts.version], outputs)
    parts.yes.click(handlers.confirm, [*place, parts.pending], outputs)
    parts.no.click(handlers.not_asked, None, _outputs(parts, ASKING))


def _connect_pulse(parts: SimpleNamespace, handlers: Handlers, page: gr.Blocks) -> None:
    inputs, outputs = [parts.checkpoint, parts.stack, parts.mark], _outputs(parts)
    if HAS_TIMER:
        parts.pulse.tick(handlers.look, inputs, outputs, show_progress="hidden")
        return
    parts.pulse.click(handlers.look, inputs, outputs, show_progress="hidden", queue=False)
    script: dict[str, Any] = {"_js": _PULSE}
    page.load(None, None, None, **script)


def _connect_inputs(parts: SimpleNamespace, handlers: Handlers) -> None:
    host, place = handlers.host, [parts.checkpoint, parts.stack]

    def other_stack(checkpoint: str, name: str) -> list[Any]:
        return [*handlers.stack_shown(checkpoint, name), *handlers.not_asked()]

    parts.example.click(host.example, parts.token, [parts.files, parts.noun])
    parts.files.change(
        handlers.thumbnails,
        [parts.files, parts.captions],
        [parts.gallery, parts.captions, parts.inventory],
    )
    parts.refresh.click(lambda: gr.update(choices=list(host.checkpoints())), None, parts.checkpoint)
    shown = _outputs(parts, ("concepts", "history", *ASKING))
    for changed in place:
        changed.change(other_stack, place, shown)

"""The page's layout: what to learn at the left, what is known at the right - cards, drawing, checks,
history. gradio 3.41 to 6.

`build(host, page)` creates the components inside an open `gr.Blocks`; `events` connects them with
`Handlers`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ..fields import help_of
from ..requests import LearnRequest
from ..settings import LearnSettings
from .events import connect
from .handlers import Handlers
from .host import Host
from .labels import label_of, methods
from .outputs import ADVANCED, CARDS, CHIPS, DEFAULTS, HAS_TIMER, SLOTS


def build(host: Host, page: gr.Blocks) -> None:
    """Create the page's components inside the open `page`, and connect their events."""
    handlers, parts = Handlers(host), SimpleNamespace()
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    gr.HTML(f"<style>{style}</style>", elem_id="continual_lora_style")
    parts.mark, parts.pending = gr.State(("", "")), gr.State(None)
    parts.first, parts.tokens, parts.beside = gr.State(0), gr.State([]), gr.State([])
    with gr.Column(elem_id="continual_lora_page"):
        _environment(parts, handlers.environment_shown())
        with gr.Row():
            with gr.Column(min_width=340):
                _what_to_learn(parts, host)
                _learning(parts)
                _for_experts(parts, host)
            with gr.Column(min_width=340):
                _known(parts, host)
                _drawing(parts)
                _checks(parts)
                _history(parts)
        parts.pulse = _pulse()
    connect(parts, handlers, page)


def _text(name: str, value: str = "", **rest: Any) -> Any:
    """Markdown under our ids."""
    return gr.Markdown(value, elem_id=f"continual_lora_{name}", latex_delimiters=[], **rest)


def _downloads(name: str, label: str) -> Any:
    """Files to download; shown once there are any."""
    return gr.File(
        label=label,
        file_count="multiple",
        interactive=False,
        visible=False,
        elem_id=f"continual_lora_{name}",
    )


def _button(name: str, text: str, **rest: Any) -> Any:
    return gr.Button(text, elem_id=f"continual_lora_{name}", **rest)


# --- learning ------------------------------------------------------------------------------------


def _environment(parts: SimpleNamespace, lacks: str) -> None:
    with gr.Group(visible=bool(lacks)) as parts.lacking:
        parts.environment = _text("environment", lacks)
        parts.prepare = _button("prepare", "Prepare environment")


def _what_to_learn(parts: SimpleNamespace, host: Host) -> None:
    gr.Markdown("### Learn something new")
    names, chosen = list(host.checkpoints()), host.preferred()[0]
    with gr.Row():
        parts.checkpoint = gr.Dropdown(
            names,
            value=chosen or None,
            label=label_of("checkpoint"),
            elem_id="continual_lora_checkpoint",
            scale=4,
        )
        parts.refresh = _button("refresh", "Refresh", scale=1, min_width=80)
    parts.files = gr.File(
        file_count="multiple",
        label=f"{label_of('images')}, 3 to 15; captions (a.txt) and masks (a.mask.png: white is learned "
        "from), if there are any",
        elem_id="continual_lora_files",
        height=150,
    )
    parts.example = _button("example", "Example pictures, to try it on the mini-SD", size="sm")
    parts.inventory = _text("inventory", visible=False)
    with gr.Row():
        for number in range(SLOTS):
            with gr.Column(
                visible=False, min_width=130, elem_id=f"continual_lora_slot_{number}"
            ) as slot:
                thumb = gr.HTML("")
                caption = gr.Textbox(
                    "",
                    lines=2,
                    label=f"Caption of picture {number + 1}",
                    show_label=False,
                    placeholder="caption, if any",
                    elem_id=f"continual_lora_caption_{number}",
                )
            for kind, part in (("slot", slot), ("thumb", thumb), ("caption", caption)):
                setattr(parts, f"{kind}_{number}", part)
    with gr.Row():
        parts.token = gr.Textbox(
            "",
            label=label_of("token"),
            info="new; prompts use it from now on",
            elem_id="continual_lora_token",
            min_width=120,
        )
        parts.noun = gr.Textbox(
            "",
            label=label_of("noun"),
            info="what kind of thing it is, such as teapot or dog",
            elem_id="continual_lora_noun",
            min_width=120,
        )


def _learning(parts: SimpleNamespace) -> None:
    with gr.Row():
        parts.learn = _button("learn", label_of("learn"), variant="primary", scale=2, min_width=120)
        parts.estimate = _button("estimate", "How long?", min_width=110)
        parts.stop = _button("stop", "Stop", interactive=False, min_width=80)
    parts.changed = _text("changed", visible=False)
    parts.bar = gr.HTML("", visible=False, elem_id="continual_lora_bar")
    parts.status = _text("status")
    with gr.Row(visible=False, elem_id="continual_lora_queue") as parts.queue:
        parts.waits = gr.Dropdown(
            [], label="Waiting", elem_id="continual_lora_waits", scale=2, min_width=160
        )
        parts.learn_next = _button("learn_next", "Learn next", size="sm", min_width=90)
        parts.take_off = _button("take_off", "Take off", size="sm", min_width=90)
    with gr.Row():
        parts.preview = gr.Image(
            label="Preview: the new concept, and the first one",
            type="pil",
            height=220,
            visible=False,
        )
        parts.losses = gr.Image(label="How it went", type="pil", height=220, visible=False)


def _for_experts(parts: SimpleNamespace, host: Host) -> None:
    with gr.Accordion("Method, and settings for experts", open=False):
        parts.method = gr.Dropdown(
            methods(),
            value=host.default_method(),
            label=label_of("method"),
            elem_id="continual_lora_method",
        )
        parts.replace = gr.Checkbox(
            value=False,
            label=label_of("replace"),
            info="the old one stays until the new one is stored",
            elem_id="continual_lora_replace",
        )
        parts.prediction = _widget(LearnRequest, "prediction")
        parts.stack = gr.Textbox(
            "",
            label=label_of("stack"),
            info="empty: the checkpoint's own; a name: another one, kept apart from it",
            elem_id="continual_lora_stack",
        )
        parts.advanced = []
        for start in range(0, len(ADVANCED), 3):
            with gr.Row():
                parts.advanced += [
                    _widget(LearnSettings, name) for name in ADVANCED[start : start + 3]
                ]


def _widget(kind: type, name: str) -> Any:
    """A setting's or a request's component; label, range and help come from its declaration."""
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    choices, type_ = field.metadata["choices"], str(field.type).split(" ")[0]
    default = DEFAULTS.get(name, field.default)
    rest: dict[str, Any] = {
        "label": label_of(name),
        "info": help_of(field, "auto" if choices else "0"),
        "elem_id": f"continual_lora_{name}",
        "min_width": 150,
    }
    if choices and default is None:
        return gr.Dropdown(["auto", *choices], value="auto", **rest)
    if choices:
        return gr.Dropdown(list(choices), value=default, **rest)
    if type_ == "bool" and default is None:
        return gr.Dropdown(["auto", "yes", "no"], value="auto", **rest)
    if type_ == "bool":
        return gr.Checkbox(value=default, **rest)
    if type_ == "str":
        return gr.Textbox(value=default, **rest)
    return gr.Number(value=default or 0, precision=0 if type_ == "int" else None, **rest)


# --- what is known -------------------------------------------------------------------------------


def _known(parts: SimpleNamespace, host: Host) -> None:
    gr.Markdown("### What it knows")
    parts.none = gr.HTML("", visible=False, elem_id="continual_lora_none")
    with gr.Row(elem_id="continual_lora_concepts"):
        for number in range(CARDS):
            _card(parts, host, number)
    parts.more = _button("more", "Show others", visible=False, size="sm")
    with gr.Group(visible=False, elem_id="continual_lora_asking") as parts.asking:
        parts.question = _text("question")
        with gr.Row():
            parts.yes = _button("yes", "Yes", variant="stop")
            parts.no = _button("no", "Cancel")
    parts.renamed = gr.State("")
    with gr.Group(visible=False, elem_id="continual_lora_renaming") as parts.renaming:
        parts.to = gr.Textbox("", label=label_of("to"), elem_id="continual_lora_to")
        with gr.Row():
            parts.rename = _button("rename", label_of("rename"), variant="primary")
            parts.keep = _button("keep", "Cancel")
    parts.said_bar = gr.HTML("", visible=False, elem_id="continual_lora_said_bar")
    parts.said = _text("said")
    parts.downloads = _downloads("downloads", "Exported just now")


def _card(parts: SimpleNamespace, host: Host, number: int) -> None:
    """A concept with what can be done to it; the card's face is HTML."""
    with gr.Column(visible=False, min_width=200, elem_id=f"continual_lora_card_{number}") as card:
        face = gr.HTML("")
        with gr.Row():
            small: dict[str, Any] = {"size": "sm", "min_width": 48}
            draw = _button(f"draw_{number}", "Draw", **small)
            export = _button(f"export_{number}", "Export", **small)
            rename = _button(f"rename_{number}", f"{label_of('rename')} ...", **small)
            forget = _button(f"forget_{number}", f"{label_of('forget')} ...", **small)
        send = _button(f"send_{number}", "Send to txt2img", visible=host.sends_prompts, **small)
    for kind, part in (
        ("card", card),
        ("face", face),
        ("draw", draw),
        ("export", export),
        ("rename", rename),
        ("forget", forget),
        ("send", send),
    ):
        setattr(parts, f"{kind}_{number}", part)


def _drawing(parts: SimpleNamespace) -> None:
    gr.Markdown("### Draw")
    parts.prompt = gr.Textbox(
        "",
        lines=2,
        label=label_of("prompts"),
        info="may name several learned things; each line is a prompt of its own",
        elem_id="continual_lora_prompt",
    )
    with gr.Row():
        for number in range(CHIPS):
            chip = _button(f"chip_{number}", "", visible=False, size="sm", min_width=120)
            setattr(parts, f"chip_{number}", chip)
    with gr.Row():
        parts.count = gr.Number(
            4, precision=0, label=label_of("count"), elem_id="continual_lora_count", min_width=90
        )
        parts.sampling = gr.Number(
            25, precision=0, label="Sampling steps", elem_id="continual_lora_sampling", min_width=90
        )
        parts.drawn_seed = gr.Number(
            -1,
            precision=0,
            label="Seed (-1: any)",
            elem_id="continual_lora_drawn_seed",
            min_width=90,
        )
    parts.negative = gr.Textbox(
        "", label="What not to draw", lines=1, elem_id="continual_lora_negative"
    )
    with gr.Row():
        parts.draw = _button("draw", "Draw", variant="primary", scale=2, min_width=120)
        parts.halt = _button("halt", "Stop", interactive=False, min_width=80)
    parts.gallery = gr.Gallery(
        label="Drawn", columns=4, visible=False, elem_id="continual_lora_gallery"
    )


def _checks(parts: SimpleNamespace) -> None:
    with gr.Accordion("Export all, check and consolidate", open=False):
        parts.words = gr.Textbox(
            "",
            label=label_of("only"),
            info="to export alone, in one LoRA solved for them, such as V1, V3; empty: all",
            elem_id="continual_lora_words",
        )
        parts.remove_superseded = gr.Checkbox(
            value=False,
            label=label_of("remove_superseded"),
            info="exports of the same concepts of this stack; otherwise they are listed",
            elem_id="continual_lora_remove_superseded",
        )
        parts.export = _button("export", label_of("export"))
        parts.exports = _downloads("exports", "All that was exported, the newest first")
        with gr.Row():
            parts.evaluate = _button("evaluate", label_of("evaluate"), min_width=140)
            parts.scores = _button("scores", label_of("scores"), min_width=140)
        with gr.Row():
            parts.closed_form = _button("closed_form", label_of("closed_form"), min_width=140)
            parts.consolidate = _button("consolidate", label_of("consolidate"), min_width=140)
        gr.Markdown("DSC and the question of pictures take the pictures dropped under Learn.")
        parts.chart = gr.Image(label="Chart", type="pil", visible=False)


def _history(parts: SimpleNamespace) -> None:
    with gr.Accordion(label_of("history"), open=False):
        parts.undo = _button("undo", f"{label_of('undo')} ...")
        parts.history = gr.HTML("", elem_id="continual_lora_history")
        with gr.Row():
            parts.version = gr.Number(
                value=1, precision=0, label=label_of("version"), elem_id="continual_lora_version"
            )
            parts.restore = _button("restore", f"{label_of('restore')} ...")


def _pulse() -> Any:
    if HAS_TIMER:
        return gr.Timer(1, active=False)
    return gr.Button("idle", elem_id="continual_lora_pulse")

"""What happens when something on the page is pressed, chosen or dropped: each event's handler, with
the components that it reads and those that it shows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr

from .handlers import Handlers
from .outputs import (
    ADVANCED,
    ASKING,
    CARDS,
    CHIPS,
    HAS_TIMER,
    OUTPUTS,
    PICTURES,
    RENAMING,
    SLOTS,
    STACK,
    not_asked,
)

# gradio 3 has no timer, so a script presses a button while that reads "busy" and the page is
# visible. No handler may run long: the server waits for it when it shuts down for "Reload UI".
_PULSE = """() => {
  const button = () => document.querySelector("#continual_lora_pulse");
  button().style.display = "none";
  const isBusy = () => button()?.textContent.includes("busy") && !document.hidden;
  setInterval(() => isBusy() && button().click(), 1000);
}"""
# The web UI's own page: its prompt, and its way to the tab. Empty prompts are refusals.
_SEND = """(prompt) => {
  if (!prompt) return;
  const field = document.querySelector("#txt2img_prompt textarea");
  field.value = prompt;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  if (window.switch_to_txt2img) window.switch_to_txt2img();
}"""
_IS_GRADIO_3 = gr.__version__.startswith("3.")
_JS = "_js" if _IS_GRADIO_3 else "js"


def connect(parts: SimpleNamespace, handlers: Handlers, page: gr.Blocks) -> None:
    """Connect the components that `tab` made; `parts` holds them by name."""
    _connect_jobs(parts, handlers, page)
    _connect_cards(parts, handlers)
    _connect_questions(parts, handlers)
    _connect_pulse(parts, handlers, page)
    _connect_inputs(parts, handlers)
    if _IS_GRADIO_3:
        _leave_the_queue(page)


def _leave_the_queue(page: gr.Blocks) -> None:
    """Send the page's events as plain requests.

    gradio 3's queue keeps a websocket for each, and waits for ever for one whose page was left before
    it was served: the server never shuts down, and "Reload UI" hangs.
    """
    for event in page.dependencies:  # pyright: ignore[reportAttributeAccessIssue] - gradio 3's
        event["queue"] = False


def _outputs(parts: SimpleNamespace, names: tuple[str, ...] = OUTPUTS) -> list[Any]:
    return [getattr(parts, name) for name in names]


def _place(parts: SimpleNamespace) -> list[Any]:
    return [parts.checkpoint, parts.stack, parts.first]


def _captions(parts: SimpleNamespace) -> list[Any]:
    return [getattr(parts, f"caption_{number}") for number in range(SLOTS)]


def _connect_jobs(parts: SimpleNamespace, handlers: Handlers, page: gr.Blocks) -> None:
    place, files, captions = _place(parts), parts.files, _captions(parts)
    words = [parts.token, parts.noun, parts.method, parts.replace, parts.prediction]
    learning = [*place, files, parts.beside, *words, *parts.advanced, *captions]
    how = [parts.count, parts.sampling, parts.drawn_seed, parts.negative]
    for event, handler, inputs in (
        (parts.learn.click, handlers.learn, learning),
        (parts.estimate.click, handlers.estimate, learning),
        (
            parts.consolidate.click,
            handlers.consolidate,
            [*place, files, parts.beside, *parts.advanced, *captions],
        ),
        (parts.closed_form.click, handlers.closed_form, place),
        (parts.scores.click, handlers.scores, [*place, files]),
        (parts.evaluate.click, handlers.evaluate, place),
        (
            parts.export.click,
            handlers.export,
            [*place, parts.remove_superseded, parts.words],
        ),
        (parts.draw.click, handlers.draw, [*place, parts.prompt, *how]),
        (parts.stop.click, handlers.stop, place),
        (parts.halt.click, handlers.stop, place),
        (parts.learn_next.click, handlers.learn_next, [*place, parts.waits]),
        (parts.take_off.click, handlers.take_off, [*place, parts.waits]),
        (parts.prepare.click, handlers.prepare, place),
    ):
        event(handler, inputs, _outputs(parts))
    # opened, or opened again, whatever happened meanwhile
    page.load(handlers.load, None, [parts.checkpoint, parts.stack, *_outputs(parts)])


def _numbered(parts: SimpleNamespace, kind: str, number: int) -> Any:
    """A card's button, or a chip."""
    return getattr(parts, f"{kind}_{number}")


def _connect_cards(parts: SimpleNamespace, handlers: Handlers) -> None:
    place, outputs = _place(parts), _outputs(parts)
    how = [parts.count, parts.sampling, parts.drawn_seed, parts.negative]
    drawing = [*place, parts.tokens, *how]
    exporting = [*place, parts.tokens, parts.remove_superseded]
    named = [parts.checkpoint, parts.stack, parts.tokens]
    asking = _outputs(parts, (*OUTPUTS, *ASKING))
    asking_name = _outputs(parts, RENAMING)
    sent = gr.Textbox("", visible=False)
    script: dict[str, Any] = {_JS: _SEND}
    for number in range(CARDS):
        _numbered(parts, "draw", number).click(handlers.draw_card(number), drawing, outputs)
        _numbered(parts, "export", number).click(handlers.export_card(number), exporting, outputs)
        _numbered(parts, "forget", number).click(handlers.ask_forget(number), named, asking)
        _numbered(parts, "rename", number).click(handlers.ask_name(number), named, asking_name)
        if handlers.host.sends_prompts:
            send = _numbered(parts, "send", number)
            done = send.click(handlers.send_card(number), named, [sent, parts.said])
            done.then(None, sent, None, **script)
    renaming = [*place, parts.renamed, parts.to]
    parts.rename.click(handlers.rename, renaming, [*outputs, parts.renaming])
    parts.to.submit(handlers.rename, renaming, [*outputs, parts.renaming])
    parts.keep.click(lambda: gr.update(visible=False), None, parts.renaming)
    for number in range(CHIPS):
        chip = _numbered(parts, "chip", number)
        chip.click(lambda prompt: prompt, chip, parts.prompt)
    turned = [parts.first, *_outputs(parts, STACK)]
    parts.more.click(handlers.turn, place, turned)


def _connect_questions(parts: SimpleNamespace, handlers: Handlers) -> None:
    place, outputs = [parts.checkpoint, parts.stack], _outputs(parts, (*OUTPUTS, *ASKING))
    parts.undo.click(handlers.ask("undo"), place, outputs)
    parts.restore.click(handlers.ask("restore"), [*place, parts.version], outputs)
    parts.yes.click(handlers.confirm, [*_place(parts), parts.pending], outputs)
    parts.no.click(not_asked, None, _outputs(parts, ASKING))


def _connect_pulse(parts: SimpleNamespace, handlers: Handlers, page: gr.Blocks) -> None:
    inputs = [*_place(parts), parts.mark, parts.token, parts.replace]
    outputs = _outputs(parts)
    if HAS_TIMER:
        parts.pulse.tick(handlers.look, inputs, outputs, show_progress="hidden")
        return
    parts.pulse.click(handlers.look, inputs, outputs, show_progress="hidden", queue=False)
    script: dict[str, Any] = {_JS: _PULSE}
    page.load(None, None, None, **script)


def _connect_inputs(parts: SimpleNamespace, handlers: Handlers) -> None:
    host = handlers.host
    parts.example.click(host.example, parts.token, [parts.files, parts.noun])
    fit = parts.advanced[ADVANCED.index("fit")]
    dropped = [parts.files, parts.beside, fit, *_captions(parts)]
    for changed in (parts.files, fit):
        changed.change(handlers.pictures, dropped, _outputs(parts, PICTURES))
    parts.refresh.click(handlers.refresh, parts.checkpoint, parts.checkpoint)
    shown = [parts.first, *_outputs(parts, (*STACK, "token", *ASKING))]
    for changed in (parts.checkpoint, parts.stack):
        changed.change(handlers.other_stack, [parts.checkpoint, parts.stack, parts.token], shown)
    settings = [parts.method, parts.prediction, *parts.advanced]
    for setting in settings:
        setting.change(handlers.changed, settings, parts.changed)

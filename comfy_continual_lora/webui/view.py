"""What the page shows of a host: the values of `OUTPUTS`, in that order. What is said of learning
stands beside Learn (`status`, `bar`), what is said of all else beside the concepts (`said`,
`said_bar`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..curves import curve_picture, looks_picture, stacked
from ..files import stack_path
from ..versions import versions
from ..words import name_in
from .cards import bar, card, no_card
from .environment import NotReady
from .host import Host, concepts_of
from .job import Job
from .labels import in_labels
from .loras import exports_of
from .outputs import CARDS, CHIPS, HAS_TIMER, REFUSED, STACK, Values, in_order, not_asked, visible
from .runner import Busy
from .shown import code, history, markdown, picture_of, status
from .uploads import picture_at

_SHOWN = 24  # pictures in the gallery
_BARS = {"status": "bar", "said": "said_bar"}
Mark = tuple[str, str]


class View:
    """`first`: how many of the newest concepts are on earlier pages of cards."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.gallery: list[tuple[str, str]] = []  # files last drawn, with prompt and seed

    def place(self, checkpoint: str, name: str) -> tuple[Path, Path]:
        """A checkpoint and its stack. Errors: ValueError, StackError."""
        if not checkpoint:
            raise ValueError("Choose a checkpoint first.")
        path = self.host.checkpoints().get(checkpoint)
        if path is None:
            raise ValueError(f"The checkpoint {checkpoint} is gone; press Refresh.")
        return path, stack_path(path, (name or "").strip())

    @property
    def is_busy(self) -> bool:
        return self.host.is_busy or self.host.preparation.is_running

    def environment_shown(self) -> str:
        """The progress of preparing the environment, or what is missing; empty if it is ready."""
        preparation = self.host.preparation
        if preparation.is_running:
            return code("\n".join(list(preparation.lines)))
        if preparation.error:
            return f"**{markdown(preparation.error)}**"
        try:
            self.host.python()
            return "The environment for learning is ready." if preparation.is_done else ""
        except NotReady as error:
            return f"**{markdown(error)}**"

    def mark(self) -> Mark:
        """What changes whenever there is something new to show: of the stack, and of the job."""
        host, job = self.host, self.host.runner.job
        stack = (job.number, job.state, list(job.results)) if job else ()
        seen = (len(job.losses), job.progress, job.notes) if job else ()
        lines = list(host.preparation.lines)
        waits = (host.waits(), len(host.past))
        return repr((stack, waits)), repr((seen, lines, self.is_busy))

    def view(self, checkpoint: str, name: str, first: int = 0, **more: Any) -> list[Any]:
        """The current values of all outputs."""
        return in_order({**self._progress(), **self._rest(checkpoint, name, first), **more})

    def look(
        self,
        checkpoint: str,
        name: str,
        first: int,
        before: Sequence[str],
        token: str = "",
        replace: bool = False,
    ) -> list[Any]:
        """What is new since the mark `before`."""
        now, seen = self.mark(), tuple(before or ())
        if now == seen:
            return in_order({})
        if seen and now[0] == seen[0]:
            return in_order(self._progress())
        more = {} if replace else self._next_word(checkpoint, name, token)
        return self.view(checkpoint, name, first, **more)

    def load(self) -> list[Any]:
        """Of a page that is opened or loaded again: its checkpoints, the chosen one, the stack's
        name, and all outputs.
        """
        checkpoint, name = self.host.preferred()
        names = list(self.host.checkpoints())
        choice = gr.update(choices=names, value=checkpoint or None)
        return [choice, name, *self.view(checkpoint, name, token=self._free_word(checkpoint, name))]

    def refresh(self, checkpoint: str) -> Any:
        """Checkpoints that are new; the chosen one stays, if it is still there."""
        self.host.refresh()
        names = list(self.host.checkpoints())
        chosen = checkpoint if checkpoint in names else next(iter(names), None)
        return gr.update(choices=names, value=chosen)

    def turn(self, checkpoint: str, name: str, first: int) -> list[Any]:
        """The cards of earlier concepts, or from the newest again; `first`, then `STACK`."""
        first = int(first or 0) + CARDS
        try:
            count = len(concepts_of(self.place(checkpoint, name)[1]))
        except REFUSED:
            count = 0
        first = first if first < count else 0
        return [first, *in_order(self._stack(checkpoint, name, first), STACK)]

    def other_stack(self, checkpoint: str, name: str, token: str) -> list[Any]:
        """Another checkpoint or stack was chosen: `first`, `STACK`, the word, `ASKING`."""
        word = self._next_word(checkpoint, name, token).get("token", gr.update())
        return [0, *in_order(self._stack(checkpoint, name, 0), STACK), word, *not_asked()]

    def _progress(self) -> Values:
        """The outputs that change while a job runs."""
        job, is_busy = self.host.runner.job, self.is_busy
        lacks = self.environment_shown()
        preview = picture_of(job.preview) if job else None
        curve = _curves(job)
        side, other = ("status", "said") if _is_learning(job) else ("said", "status")
        values = {
            side: self._status(job) if side == "status" else status(job),
            _BARS[side]: visible(bar(job)),
            _BARS[other]: visible(""),
            "learn": gr.update(value="Add to the queue" if self.host.is_busy else "Learn"),
            "stop": gr.update(interactive=self.host.is_busy),
            "halt": gr.update(interactive=self.host.is_busy),
            "losses": gr.update(value=curve, visible=bool(curve)),
            "preview": gr.update(value=preview, visible=bool(preview)),
            "environment": lacks,
            "lacking": gr.update(visible=bool(lacks)),
            "pulse": gr.update(active=is_busy)
            if HAS_TIMER
            else gr.update(value="busy" if is_busy else "idle"),
            "mark": self.mark(),
        }
        return values

    def _status(self, job: Job | None) -> str:
        """The job beside Learn, what waits for it, and how those before it ended."""
        host = self.host
        told = [status(job)]
        if waits := host.waits():
            told.append(f"Waiting: {markdown(', '.join(waits))}. Stop takes them off, too.")
        if host.past:
            told += ["Before that:", *list(host.past)]
        return "\n\n".join(told)

    def _rest(self, checkpoint: str, name: str, first: int) -> Values:
        """The outputs that change when a job begins or ends."""
        job = self.host.runner.job
        results = job.results if job else {}
        charts = [one["chart"] for one in results.values() if one.get("chart")]
        chart = picture_at(charts[-1]) if charts else None
        if job and "draw" in results:
            self.gallery = _with_prompts(job)
        pictures = [(picture_at(file), told) for file, told in self.gallery[:_SHOWN]]
        pictures = [one for one in pictures if one[0] is not None]
        files = _exported(results.get("export", {})) if self.host.offers_files else []
        other = "said" if _is_learning(job) else "status"
        waits = self.host.waits()
        return {
            other: "" if other == "said" else self._status(None),
            "chart": gr.update(value=chart, visible=bool(chart)),
            "gallery": gr.update(value=pictures, visible=bool(pictures)),
            "downloads": gr.update(value=files or None, visible=bool(files)),
            "queue": gr.update(visible=bool(waits)),
            "waits": gr.update(choices=waits, value=waits[0] if waits else None),
            **self._stack(checkpoint, name, first),
        }

    def _stack(self, checkpoint: str, name: str, first: int) -> Values:
        """Cards, proposed prompts and history, the newest concepts first."""
        concepts, table, message = [], "", "Nothing learned yet: the first concept comes here."
        album, stack, exports = self.host.album, Path(), []
        try:
            _, stack = self.place(checkpoint, name)
            concepts = list(reversed(concepts_of(stack)))
            table = history(versions(stack))
            if self.host.offers_files:
                exports = [str(path) for path in exports_of(self.host.exports()[0], stack)]
        except REFUSED as error:
            message = in_labels(error)
        shown, kept = concepts[first : first + CARDS], album.kept(stack)
        values: Values = {
            "none": visible("" if concepts else no_card(message)),
            "more": gr.update(
                visible=len(concepts) > CARDS,
                value=f"{first + 1} to {first + len(shown)} of {len(concepts)}: show others",
            ),
            "tokens": [one["token"] for one in shown],
            "history": table,
            "exports": gr.update(value=exports or None, visible=bool(exports)),
        }
        for number in range(CARDS):
            one = shown[number] if number < len(shown) else None
            values[f"card_{number}"] = gr.update(visible=one is not None)
            values[f"face_{number}"] = (
                card(one, album.drawing(stack, one), kept.get(one["id"])) if one else ""
            )
        prompts = _proposed(concepts)
        for number in range(CHIPS):
            prompt = prompts[number] if number < len(prompts) else ""
            values[f"chip_{number}"] = gr.update(value=prompt, visible=bool(prompt))
        return values

    def _free_word(self, checkpoint: str, name: str) -> Any:
        try:
            return self.host.free_word(self.place(checkpoint, name)[1])
        except REFUSED:
            return gr.update()

    def _next_word(self, checkpoint: str, name: str, token: str) -> Values:
        """The next free word, if the one on the page has been learned."""
        try:
            _, stack = self.place(checkpoint, name)
            learned = [one["token"].lower() for one in concepts_of(stack)]
            if (token or "").strip().lower() in learned:
                return {"token": self.host.free_word(stack)}
        except REFUSED:
            pass
        return {}

    def refused(self, error: Exception, side: str = "said") -> list[Any]:
        """What is said of the error. A page that was opened before the running job started, in another
        window, learns of it here: it follows it from now on, and can stop it.
        """
        values = self._progress() if isinstance(error, Busy) else {}
        return in_order({**values, side: f"**{markdown(in_labels(error))}**"})


def _curves(job: Job | None) -> Image.Image | None:
    """The losses of a job and, once it has learned, the looks at it."""
    if job is None or not job.losses:
        return None
    pictures = [curve_picture(job.losses, f"loss, {len(job.losses)} steps")]
    if looks := job.results.get("learn", {}).get("watched"):
        pictures.append(looks_picture(looks))
    return stacked(pictures)


def _is_learning(job: Job | None) -> bool:
    """Whether what is said of the job stands beside Learn."""
    return job is None or job.name in ("learn", "plan")


def _proposed(concepts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prompts about the newest concepts."""
    names = [name_in(one) for one in concepts[:2]]
    if not names:
        return []
    prompts = [f"a photo of a {names[0]}", f"a {names[0]} on grass", f"a painting of a {names[0]}"]
    return [*prompts, f"a photo of a {names[0]} and a {names[1]}"] if len(names) > 1 else prompts


def _with_prompts(job: Job) -> list[tuple[str, str]]:
    """The pictures that a job has drawn, with prompt and seed; not the sheet of all of them."""
    request, files = dict(job.jobs)["draw"], job.results["draw"]["files"]
    count, seed = request["settings"]["count"], request["settings"]["seed"]
    told = [
        f"{prompt} - seed {seed + number}"
        for prompt in request["prompts"]
        for number in range(count)
    ]
    return list(zip(map(str, files), told, strict=False))


def _exported(result: Mapping[str, Any]) -> list[str]:
    """The files of an export."""
    files = [result.get("lora"), *result.get("embeddings", ())]
    return [file for file in files if file and Path(file).is_file()]

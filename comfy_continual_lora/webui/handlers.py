"""The page's event handlers. Each returns the values of `OUTPUTS`, in that order; those that ask
first also return the values of `ASKING`.

What is said of learning stands beside Learn (`status`, `bar`), what is said of all else beside the
concepts (`said`, `said_bar`).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..curves import curve_picture
from ..errors import ContinualLoraError
from ..files import stack_path
from ..settings import LearnSettings, TrainSettings
from ..versions import versions
from ..words import name_in
from .asking import QUESTIONS
from .cards import bar, card, no_card, thumbnail
from .copies import Batch
from .environment import NotReady
from .host import (
    Host,
    JobRequest,
    concepts_of,
    newest_word,
    place_of,
)
from .job import Job
from .labels import in_labels, label_of, method_of
from .loras import newest_lora
from .runner import Busy
from .shown import code, history, markdown, picture_of, status
from .uploads import dropped, found_in, picture_at, settings_of

ADVANCED = (
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
    "accumulate",
    "preview_every",
)
# defaults that differ on the page: previews while learning are worth their time
DEFAULTS: dict[str, Any] = {"preview_every": 50}
CARDS = 12  # concepts that are shown at a time
SLOTS = 20  # pictures whose captions can be typed
CHIPS = 4  # prompts that are proposed
_SHOWN = 24  # pictures in the gallery

_FAST = (
    "status",
    "bar",
    "said",
    "said_bar",
    "learn",
    "stop",
    "halt",
    "losses",
    "preview",
    "environment",
    "lacking",
    "pulse",
    "mark",
)
STACK = (
    *(f"card_{number}" for number in range(CARDS)),
    *(f"face_{number}" for number in range(CARDS)),
    "none",
    "more",
    "tokens",
    *(f"chip_{number}" for number in range(CHIPS)),
    "history",
)
OUTPUTS = (*_FAST, *STACK, "chart", "gallery", "downloads", "token", "prompt")
ASKING = ("asking", "question", "yes", "pending")
RENAMING = ("renaming", "renamed", "to")
PICTURES = (
    "names",
    "inventory",
    *(f"slot_{number}" for number in range(SLOTS)),
    *(f"thumb_{number}" for number in range(SLOTS)),
    *(f"caption_{number}" for number in range(SLOTS)),
)
_BARS = {"status": "bar", "said": "said_bar"}
REFUSED = (ValueError, OSError, ContinualLoraError, Busy, NotReady)  # shown instead of a traceback
HAS_TIMER = hasattr(gr, "Timer")
Jobs = tuple[list[JobRequest], Batch | None]
Values = dict[str, Any]
Mark = tuple[str, str]


class Handlers:
    """The handlers of one page.

    `first`: how many of the newest concepts are on earlier pages of cards. `names`: the pictures
    that the captions are of, in order.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.gallery: list[tuple[str, str]] = []  # files last drawn, with prompt and seed

    # --- what is shown -------------------------------------------------------------------------

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
        waits = (len(host.waiting), len(host.past))
        return repr((stack, waits)), repr((seen, lines, self.is_busy))

    def view(self, checkpoint: str, name: str, first: int = 0, **more: Any) -> list[Any]:
        """The current values of all outputs."""
        return _in_order({**self._progress(), **self._rest(checkpoint, name, first), **more})

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
            return _in_order({})
        if seen and now[0] == seen[0]:
            return _in_order(self._progress())
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
        return [first, *_in_order(self._stack(checkpoint, name, first), STACK)]

    def other_stack(self, checkpoint: str, name: str, token: str) -> list[Any]:
        """Another checkpoint or stack was chosen: `first`, `STACK`, the word, `ASKING`."""
        word = self._next_word(checkpoint, name, token).get("token", gr.update())
        return [0, *_in_order(self._stack(checkpoint, name, 0), STACK), word, *self.not_asked()]

    def _progress(self) -> Values:
        """The outputs that change while a job runs."""
        job, is_busy = self.host.runner.job, self.is_busy
        lacks = self.environment_shown()
        losses = job.losses if job else []
        preview = picture_of(job.preview) if job else None
        curve = curve_picture(losses, f"loss, {len(losses)} steps") if losses else None
        side, other = ("status", "said") if _is_learning(job) else ("said", "status")
        values = {
            side: self._status(job) if side == "status" else status(job),
            _BARS[side]: _visible(bar(job)),
            _BARS[other]: _visible(""),
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
        if waiting := [_title(jobs) for jobs, _ in list(host.waiting)]:
            told.append(f"Waiting: {markdown(', '.join(waiting))}. Stop takes them off, too.")
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
        return {
            other: "" if other == "said" else self._status(None),
            "chart": gr.update(value=chart, visible=bool(chart)),
            "gallery": gr.update(value=pictures, visible=bool(pictures)),
            "downloads": gr.update(value=files or None, visible=bool(files)),
            **self._stack(checkpoint, name, first),
        }

    def _stack(self, checkpoint: str, name: str, first: int) -> Values:
        """Cards, proposed prompts and history, the newest concepts first."""
        concepts, table, message = [], "", "Nothing learned yet: the first concept comes here."
        album, stack = self.host.album, Path()
        try:
            _, stack = self.place(checkpoint, name)
            concepts = list(reversed(concepts_of(stack)))
            table = history(versions(stack))
        except REFUSED as error:
            message = in_labels(error)
        shown, kept = concepts[first : first + CARDS], album.kept(stack)
        values: Values = {
            "none": _visible("" if concepts else no_card(message)),
            "more": gr.update(
                visible=len(concepts) > CARDS,
                value=f"{first + 1} to {first + len(shown)} of {len(concepts)}: show others",
            ),
            "tokens": [one["token"] for one in shown],
            "history": table,
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
        return _in_order({side: f"**{markdown(in_labels(error))}**"})

    # --- jobs ----------------------------------------------------------------------------------

    def _hand_in(
        self,
        checkpoint: str,
        name: str,
        first: int,
        jobs_of: Callable[[Path, Path], Jobs],
        side: str = "said",
        **more: Any,
    ) -> list[Any]:
        try:
            jobs, batch = jobs_of(*self.place(checkpoint, name))
            self.host.hand_in(*jobs, batch=batch)
        except REFUSED as error:
            return self.refused(error, side)
        self.host.opened, self.host.past = (checkpoint, (name or "").strip()), []
        return self.view(checkpoint, name, first, **more)

    def _learn_request(
        self,
        path: Path,
        stack: Path,
        files: Any,
        names: Sequence[str],
        token: str,
        noun: str,
        method: str,
        replace: bool,
        *rest: Any,
    ) -> tuple[dict[str, Any], Batch]:
        """The request to learn, with its pictures. `rest`: advanced settings, then captions."""
        settings = settings_of(LearnSettings, ADVANCED, rest[: len(ADVANCED)])
        if (chosen := method_of(method)) != LearnSettings().method:
            settings["method"] = chosen
        word = (token or "").strip()
        typed = _typed(names, rest[len(ADVANCED) :])
        batch = self.host.copies.batch(found_in(files, typed), stack, word)
        request = {**place_of(path, stack), "images": batch.paths, "token": word}
        request |= {"noun": (noun or "").strip(), "replace": bool(replace), "settings": settings}
        return request, batch

    def learn(self, checkpoint: str, name: str, first: int, *given: Any) -> list[Any]:
        """Learn, then export, so that prompts know the word at once; after what is running.

        `given`: as `_learn_request` takes it.
        """
        try:
            path, stack = self.place(checkpoint, name)
            request, batch = self._learn_request(path, stack, *given)
            if request["token"].lower() in [word.lower() for word in self.host.in_work(stack)]:
                raise ValueError(
                    f"{request['token']} is being learned already; choose another word."
                )
            export = self.host.export_job(place_of(path, stack))
            waits = self.host.hand_in_or_wait(("learn", request), export, batch=batch)
        except REFUSED as error:
            return self.refused(error, "status")
        self.host.opened = checkpoint, (name or "").strip()
        more = {"token": self.host.free_word(stack)} if waits and not request["replace"] else {}
        return self.view(checkpoint, name, first, **more)

    def estimate(self, checkpoint: str, name: str, first: int, *given: Any) -> list[Any]:
        """What learning would take. `given`: as `_learn_request` takes it."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            request, batch = self._learn_request(path, stack, *given)
            return [("plan", request)], batch

        return self._hand_in(checkpoint, name, first, jobs_of, "status")

    def consolidate(
        self,
        checkpoint: str,
        name: str,
        first: int,
        files: Any,
        names: Sequence[str],
        *rest: Any,
    ) -> list[Any]:
        """`rest`: advanced settings, then captions."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            chosen = settings_of(LearnSettings, ADVANCED, rest[: len(ADVANCED)])
            own = {field.name for field in dataclasses.fields(TrainSettings)}
            settings = {name: value for name, value in chosen.items() if name in own}
            place = place_of(path, stack)
            pictures = found_in(files, _typed(names, rest[len(ADVANCED) :]))
            batch = self.host.copies.batch(pictures, stack, newest_word(stack))
            request = {**place, "images": batch.paths, "settings": settings}
            return [("consolidate", request), self.host.export_job(place)], batch

        return self._hand_in(checkpoint, name, first, jobs_of)

    def closed_form(self, checkpoint: str, name: str, first: int) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            place = place_of(path, stack)
            return [("closed_form", place), self.host.export_job(place)], None

        return self._hand_in(checkpoint, name, first, jobs_of)

    def scores(self, checkpoint: str, name: str, first: int, files: Any) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            batch = self.host.copies.batch(found_in(files, {}), stack)
            request = {**place_of(path, stack), "images": batch.paths}
            return [("scores", {**request, "plot": self.host.chart("scores")})], batch

        return self._hand_in(checkpoint, name, first, jobs_of)

    def evaluate(self, checkpoint: str, name: str, first: int) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            plot = self.host.chart("retention")
            return [("evaluate", {**place_of(path, stack), "plot": plot})], None

        return self._hand_in(checkpoint, name, first, jobs_of)

    def export(
        self, checkpoint: str, name: str, first: int, remove_superseded: bool, words: str = ""
    ) -> list[Any]:
        """`words`: those to export alone, with spaces or commas between; empty for all."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            place, only = place_of(path, stack), str(words or "").replace(",", " ").split()
            remove = bool(remove_superseded)
            return [self.host.export_job(place, only, remove_superseded=remove)], None

        return self._hand_in(checkpoint, name, first, jobs_of)

    def draw(
        self,
        checkpoint: str,
        name: str,
        first: int,
        prompt: str,
        count: float = 4,
        steps: float = 25,
        seed: float = -1,
        negative: str = "",
    ) -> list[Any]:
        """Draw each line of the prompt. A seed below 0 stands for any."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            prompts = [line.strip() for line in str(prompt or "").splitlines() if line.strip()]
            if not prompts:
                raise ValueError("No prompt yet: say what to draw, such as a photo of a V1 dog.")
            start = secrets.randbelow(2**31) if seed is None or seed < 0 else int(seed)
            settings: dict[str, Any] = {
                "count": int(count or 1),
                "steps": int(steps or 25),
                "seed": start,
            }
            if negative and negative.strip():
                settings["negative"] = negative.strip()
            request = {**place_of(path, stack), "prompts": prompts, "out": str(self.host.drawn())}
            return [("draw", {**request, "settings": settings})], None

        return self._hand_in(checkpoint, name, first, jobs_of, prompt=prompt)

    def stop(self, checkpoint: str, name: str, first: int) -> list[Any]:
        self.host.stop()
        return self.view(checkpoint, name, first)

    def prepare(self, checkpoint: str, name: str, first: int) -> list[Any]:
        self.host.preparation.start()
        return self.view(checkpoint, name, first)

    # --- of one card ---------------------------------------------------------------------------

    def draw_card(self, number: int) -> Callable[..., list[Any]]:
        """Draw the concept of this card."""

        def handler(
            checkpoint: str, name: str, first: int, tokens: Sequence[str], *how: Any
        ) -> list[Any]:
            try:
                concept = self._concept(checkpoint, name, tokens, number)
            except REFUSED as error:
                return self.refused(error)
            return self.draw(checkpoint, name, first, f"a photo of a {name_in(concept)}", *how)

        return handler

    def export_card(self, number: int) -> Callable[..., list[Any]]:
        """Export the concept of this card alone."""

        def handler(
            checkpoint: str, name: str, first: int, tokens: Sequence[str], remove: bool
        ) -> list[Any]:
            try:
                concept = self._concept(checkpoint, name, tokens, number)
            except REFUSED as error:
                return self.refused(error)
            return self.export(checkpoint, name, first, remove, concept["token"])

        return handler

    def send_card(self, number: int) -> Callable[..., list[Any]]:
        """The prompt for txt2img of this card's concept, and what is said."""

        def handler(checkpoint: str, name: str, tokens: Sequence[str]) -> list[Any]:
            try:
                concept = self._concept(checkpoint, name, tokens, number)
                stack = self.place(checkpoint, name)[1]
                lora = newest_lora(self.host.exports()[0], stack, concept["token"])
                if lora is None:
                    raise ValueError("There is no export of this stack yet: press Export first.")
            except REFUSED as error:
                return ["", f"**{markdown(in_labels(error))}**"]
            return [f"a photo of a {name_in(concept)} <lora:{lora.stem}:1>", gr.update()]

        return handler

    def _concept(
        self, checkpoint: str, name: str, tokens: Sequence[str], number: int
    ) -> dict[str, Any]:
        """Errors: ValueError if the stack no longer has it."""
        token = tokens[number] if number < len(tokens or ()) else ""
        concepts = concepts_of(self.place(checkpoint, name)[1])
        concept = next((one for one in concepts if one["token"] == token), None)
        if concept is None:
            raise ValueError(f"The word {token} is not on the stack; load the page again.")
        return concept

    # --- what is asked first -------------------------------------------------------------------

    def ask(self, kind: str) -> Callable[..., list[Any]]:
        """Say what a destructive click will do; nothing is done yet."""

        def handler(checkpoint: str, name: str, given: Any = None) -> list[Any]:
            try:
                question = QUESTIONS[kind](*self.place(checkpoint, name), given)
            except REFUSED as error:
                return [*self.refused(error), *self.not_asked()]
            pending = {"ask": (kind, checkpoint, name, given), "sentence": question.sentence}
            texts = [f"**{markdown(question.sentence)}**", gr.update(value=question.yes)]
            return [*_in_order({}), gr.update(visible=True), *texts, pending]

        return handler

    def ask_forget(self, number: int) -> Callable[..., list[Any]]:
        """Ask whether to forget the concept of this card."""
        ask = self.ask("forget")

        def handler(checkpoint: str, name: str, tokens: Sequence[str]) -> list[Any]:
            return ask(checkpoint, name, tokens[number] if number < len(tokens or ()) else "")

        return handler

    def ask_name(self, number: int) -> Callable[..., list[Any]]:
        """Ask for the new word of this card's concept: the values of `RENAMING`."""

        def handler(checkpoint: str, name: str, tokens: Sequence[str]) -> list[Any]:
            token = tokens[number] if number < len(tokens or ()) else ""
            label = f"The new word for {token}"
            return [gr.update(visible=True), token, gr.update(value=token, label=label)]

        return handler

    def rename(self, checkpoint: str, name: str, first: int, token: str, to: str) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            request = {**place_of(path, stack), "token": token, "to": (to or "").strip()}
            return [("rename", request)], None

        return [*self._hand_in(checkpoint, name, first, jobs_of), gr.update(visible=False)]

    @staticmethod
    def not_asked() -> list[Any]:
        """Values of `ASKING`."""
        return [gr.update(visible=False), "", gr.update(), None]

    def confirm(
        self, checkpoint: str, name: str, first: int, pending: dict[str, Any] | None
    ) -> list[Any]:
        """Do what was asked, if it is still exactly what the question said."""
        try:
            if not pending:
                raise ValueError("There is nothing to confirm.")
            kind, *place, given = pending["ask"]
            question = QUESTIONS[kind](*self.place(*place), given)
            if question.sentence != pending["sentence"]:
                raise ValueError("The stack has changed in the meantime. Check it, then try again.")
            self.host.hand_in(question.job)
        except REFUSED as error:
            return [*self.refused(error), *self.not_asked()]
        return [*self.view(checkpoint, name, first), *self.not_asked()]

    # --- inputs --------------------------------------------------------------------------------

    @staticmethod
    def pictures(
        files: Sequence[Any] | None, names: Sequence[str], fit: str, *captions: str
    ) -> list[Any]:
        """The values of `PICTURES` for what was dropped."""
        try:
            found, told = dropped(files, _typed(names, captions), fit)
        except REFUSED as error:
            raise gr.Error(in_labels(error)) from None
        if len(found) > SLOTS:
            told += f"\nCaptions of the first {SLOTS} can be typed here; drop a.txt with a.jpg for others."
        values: Values = {"names": [one.name for one in found], "inventory": markdown(told)}
        for number in range(SLOTS):
            one = found[number] if number < len(found) else None
            values[f"slot_{number}"] = gr.update(visible=one is not None)
            values[f"thumb_{number}"] = thumbnail(one.name, one.image) if one else ""
            values[f"caption_{number}"] = one.caption if one else ""
        return _in_order(values, PICTURES)

    def changed(self, method: str, *advanced: Any) -> str:
        """Which settings differ from what the page began with."""
        settings = settings_of(LearnSettings, ADVANCED, advanced)
        told = [
            f"{label_of(name)} {value}"
            for name, value in settings.items()
            if value != DEFAULTS.get(name)
        ]
        if method != self.host.default_method():
            told.insert(0, f"method {method}")
        return f"Changed below: {markdown(', '.join(told))}." if told else ""


def _in_order(values: Mapping[str, Any], names: Sequence[str] = OUTPUTS) -> list[Any]:
    """A value for each output; those without one stay as they are."""
    return [values[name] if name in values else gr.update() for name in names]


def _visible(text: str) -> Any:
    """An update of a part that takes no room while it is empty."""
    return gr.update(value=text, visible=bool(text))


def _is_learning(job: Job | None) -> bool:
    """Whether what is said of the job stands beside Learn."""
    return job is None or job.name in ("learn", "plan")


def _title(jobs: Sequence[JobRequest]) -> str:
    request = jobs[0][1]
    return f"{request.get('token', '')} {request.get('noun', '')}".strip()


def _typed(names: Sequence[str], captions: Sequence[str]) -> dict[str, str]:
    """The captions by picture."""
    return {name: caption or "" for name, caption in zip(names or (), captions, strict=False)}


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

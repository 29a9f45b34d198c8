"""The tab's event handlers. Each returns the values of `OUTPUTS`, in that order; those that ask
first also return the values of `ASKING`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..curves import curve_picture
from ..errors import ContinualLoraError
from ..files import stack_path
from ..settings import LearnSettings, TrainSettings
from ..versions import versions
from .asking import QUESTIONS
from .copies import Batch
from .environment import NotReady
from .host import (
    Host,
    JobRequest,
    concepts_of,
    newest_word,
    place_of,
)
from .labels import METHOD_LABELS, in_labels
from .runner import Busy
from .shown import code, history, html, markdown, picture_of, status, table
from .uploads import found_in, picture_at, settings_of, thumbnails

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
    "accumulate",
    "preview_every",
)
OUTPUTS = (
    "status",
    "losses",
    "preview",
    "chart",
    "concepts",
    "history",
    "environment",
    "pulse",
    "mark",
)
ASKING = ("asking", "question", "yes", "pending")
REFUSED = (ValueError, OSError, ContinualLoraError, Busy, NotReady)  # shown instead of a traceback
HAS_TIMER = hasattr(gr, "Timer")
Jobs = tuple[list[JobRequest], Batch | None]


class Handlers:
    """The handlers of one page, with the last evaluation of each stack file."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kept: dict[str, dict[str, float | None]] = {}

    # --- what is shown -------------------------------------------------------------------------

    def place(self, checkpoint: str, name: str) -> tuple[Path, Path]:
        """A checkpoint and its stack. Errors: ValueError, StackError."""
        if not checkpoint:
            raise ValueError("Choose a checkpoint first.")
        path = self.host.checkpoints().get(checkpoint)
        if path is None:
            raise ValueError(f"The checkpoint {checkpoint} is gone; press Refresh.")
        return path, stack_path(path, (name or "").strip())

    def stack_shown(self, checkpoint: str, name: str) -> list[str]:
        """The concepts and the history of a stack."""
        try:
            _, stack = self.place(checkpoint, name)
            concepts = table(concepts_of(stack), self.kept.get(str(stack), {}))
            return [concepts, history(versions(stack))]
        except REFUSED as error:
            return [f"<p>{html(in_labels(error))}</p>", ""]

    @property
    def is_busy(self) -> bool:
        return self.host.runner.is_busy or self.host.preparation.is_running

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

    def mark(self) -> str:
        """A string that changes whenever there is something new to show."""
        job, lines = self.host.runner.job, list(self.host.preparation.lines)
        seen = (job.number, job.state, len(job.losses), job.progress, job.notes) if job else ()
        return repr((seen, lines, self.is_busy))

    def view(self, checkpoint: str, name: str) -> list[Any]:
        """The current values of all outputs."""
        mark, job = self.mark(), self.host.runner.job
        results = job.results if job else {}
        if job and "evaluate" in results:
            self.kept[job.jobs[0][1]["stack"]] = results["evaluate"]["kept"]
        charts = [one["chart"] for one in results.values() if one.get("chart")]
        chart = picture_at(charts[-1]) if charts else None
        losses = job.losses if job else []
        return [
            status(job),
            curve_picture(losses, f"loss, {len(losses)} steps") if losses else None,
            picture_of(job.preview) if job else None,
            gr.update(value=chart, visible=bool(chart)),
            *self.stack_shown(checkpoint, name),
            self.environment_shown(),
            self._pulse(),
            mark,
        ]

    def _pulse(self) -> Any:
        if HAS_TIMER:
            return gr.update(active=self.is_busy)
        return gr.update(value="busy" if self.is_busy else "idle")

    def look(self, checkpoint: str, name: str, before: str) -> list[Any]:
        """`view`, if there is something new since the mark `before`."""
        if before != self.mark():
            return self.view(checkpoint, name)
        return [*(gr.update() for _ in OUTPUTS[1:]), before]

    def refused(self, error: Exception) -> list[Any]:
        message = f"**{markdown(in_labels(error))}**"
        return [message, *(gr.update() for _ in OUTPUTS[2:]), self.mark()]

    # --- jobs ----------------------------------------------------------------------------------

    def _hand_in(
        self, checkpoint: str, name: str, jobs_of: Callable[[Path, Path], Jobs]
    ) -> list[Any]:
        try:
            jobs, batch = jobs_of(*self.place(checkpoint, name))
            self.host.hand_in(*jobs, batch=batch)
        except REFUSED as error:
            return self.refused(error)
        return self.view(checkpoint, name)

    def _pictures(
        self,
        files: Sequence[Any] | None,
        captions: Sequence[Sequence[Any]] | None,
        stack: Path,
        token: str = "",
    ) -> Batch:
        return self.host.copies.batch(found_in(files, captions), stack, token)

    def learn(
        self,
        checkpoint: str,
        name: str,
        files: Any,
        captions: Any,
        token: str,
        noun: str,
        method: str,
        replace: bool,
        *advanced: Any,
    ) -> list[Any]:
        """Learn, then export, so that prompts know the word at once."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            settings = settings_of(LearnSettings, ADVANCED, advanced)
            if advanced[0] == LearnSettings().method and method in METHOD_LABELS:
                settings["method"] = METHOD_LABELS[method]
            word = (token or "").strip()
            place = place_of(path, stack)
            batch = self._pictures(files, captions, stack, word)
            request = {**place, "images": batch.paths, "token": word, "settings": settings}
            request |= {"noun": (noun or "").strip(), "replace": bool(replace)}
            return [("learn", request), self.host.export_job(place)], batch

        return self._hand_in(checkpoint, name, jobs_of)

    def consolidate(
        self, checkpoint: str, name: str, files: Any, captions: Any, *advanced: Any
    ) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            chosen = settings_of(LearnSettings, ADVANCED, advanced)
            own = {field.name for field in dataclasses.fields(TrainSettings)}
            settings = {name: value for name, value in chosen.items() if name in own}
            place = place_of(path, stack)
            batch = self._pictures(files, captions, stack, newest_word(stack))
            request = {**place, "images": batch.paths, "settings": settings}
            return [("consolidate", request), self.host.export_job(place)], batch

        return self._hand_in(checkpoint, name, jobs_of)

    def closed_form(self, checkpoint: str, name: str) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            place = place_of(path, stack)
            return [("closed_form", place), self.host.export_job(place)], None

        return self._hand_in(checkpoint, name, jobs_of)

    def scores(self, checkpoint: str, name: str, files: Any) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            batch = self._pictures(files, None, stack)
            request = {**place_of(path, stack), "images": batch.paths}
            return [("scores", {**request, "plot": self.host.chart("scores")})], batch

        return self._hand_in(checkpoint, name, jobs_of)

    def evaluate(self, checkpoint: str, name: str) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            plot = self.host.chart("retention")
            return [("evaluate", {**place_of(path, stack), "plot": plot})], None

        return self._hand_in(checkpoint, name, jobs_of)

    def export(self, checkpoint: str, name: str, remove_superseded: bool) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            place = place_of(path, stack)
            return [self.host.export_job(place, remove_superseded=bool(remove_superseded))], None

        return self._hand_in(checkpoint, name, jobs_of)

    def export_some(
        self, checkpoint: str, name: str, remove_superseded: bool, token: str
    ) -> list[Any]:
        def jobs_of(path: Path, stack: Path) -> Jobs:
            only = str(token or "").replace(",", " ").split()
            if not only:
                raise ValueError(
                    "No word was entered on the left: enter those to export, such as V1, V3."
                )
            place = place_of(path, stack)
            remove = bool(remove_superseded)
            return [self.host.export_job(place, only, remove_superseded=remove)], None

        return self._hand_in(checkpoint, name, jobs_of)

    def stop(self, checkpoint: str, name: str) -> list[Any]:
        if self.host.runner.job:
            self.host.runner.job.stop()
        return self.view(checkpoint, name)

    def prepare(self, checkpoint: str, name: str) -> list[Any]:
        self.host.preparation.start()
        return self.view(checkpoint, name)

    # --- what is asked first -------------------------------------------------------------------

    def ask(self, kind: str) -> Callable[..., list[Any]]:
        """Say what a destructive click will do; nothing is done yet."""

        def handler(checkpoint: str, name: str, given: Any = None) -> list[Any]:
            given = given.strip() if isinstance(given, str) else given
            try:
                question = QUESTIONS[kind](*self.place(checkpoint, name), given)
            except REFUSED as error:
                return [*self.refused(error), *self.not_asked()]
            pending = {"ask": (kind, checkpoint, name, given), "sentence": question.sentence}
            texts = [f"**{markdown(question.sentence)}**", gr.update(value=question.yes)]
            unchanged = [*(gr.update() for _ in OUTPUTS[1:]), self.mark()]
            return [*unchanged, gr.update(visible=True), *texts, pending]

        return handler

    @staticmethod
    def not_asked() -> list[Any]:
        """Values of `ASKING`."""
        return [gr.update(visible=False), "", gr.update(), None]

    def confirm(self, checkpoint: str, name: str, pending: dict[str, Any] | None) -> list[Any]:
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
        return [*self.view(checkpoint, name), *self.not_asked()]

    # --- uploads -------------------------------------------------------------------------------

    @staticmethod
    def thumbnails(files: Sequence[Any] | None, captions: Sequence[Sequence[Any]]) -> list[Any]:
        """The gallery, the caption table, and what was dropped in words."""
        try:
            pictures, rows, told = thumbnails(files, captions)
        except REFUSED as error:
            raise gr.Error(in_labels(error)) from None
        return [pictures, rows, markdown(told)]

"""The page's event handlers: what clicks do. Each returns the values of `OUTPUTS`, in that order;
those that ask first also return the values of `ASKING`.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..settings import LearnSettings, TrainSettings
from ..words import name_in
from .asking import QUESTIONS
from .cards import thumbnail
from .copies import Batch
from .host import JobRequest, concepts_of, newest_word, place_of
from .labels import in_labels, label_of, method_of
from .loras import newest_lora
from .outputs import (
    ADVANCED,
    DEFAULTS,
    PICTURES,
    REFUSED,
    SLOTS,
    Values,
    in_order,
    not_asked,
    visible,
)
from .shown import markdown
from .uploads import Key, dropped, found_in, settings_of
from .view import View

Jobs = tuple[list[JobRequest], Batch | None]
Beside = Sequence[tuple[Key, str]]


class Handlers(View):
    """The handlers of one page. `beside`: the pictures that the captions are beside, in order, each
    with the caption that was uploaded with it.
    """

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
        beside: Beside,
        token: str,
        noun: str,
        method: str,
        replace: bool,
        prediction: str,
        *rest: Any,
    ) -> tuple[dict[str, Any], Batch]:
        """The request to learn, with its pictures. `rest`: advanced settings, then captions."""
        settings = settings_of(LearnSettings, ADVANCED, rest[: len(ADVANCED)])
        if (chosen := method_of(method)) != LearnSettings().method:
            settings["method"] = chosen
        word = (token or "").strip()
        typed = _typed(beside, rest[len(ADVANCED) :])
        batch = self.host.copies.batch(found_in(files, typed), stack, word)
        request = {**place_of(path, stack), "images": batch.paths, "token": word}
        request |= {"noun": (noun or "").strip(), "replace": bool(replace), "settings": settings}
        request["prediction"] = prediction or "auto"
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
                    f"{request['token']} is being learned already; give the next thing another "
                    f"word, such as {self.host.free_word(stack)}."
                )
            export = self.host.export_job(place_of(path, stack))
            waits = self.host.hand_in_or_wait(("learn", request), export, batch=batch)
        except REFUSED as error:
            return self.refused(error, "status")
        self.host.opened = checkpoint, (name or "").strip()
        is_next = waits and not request["replace"]
        more = {"token": self._free_word(checkpoint, name)} if is_next else {}
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
        beside: Beside,
        *rest: Any,
    ) -> list[Any]:
        """`rest`: advanced settings, then captions."""

        def jobs_of(path: Path, stack: Path) -> Jobs:
            chosen = settings_of(LearnSettings, ADVANCED, rest[: len(ADVANCED)])
            own = {field.name for field in dataclasses.fields(TrainSettings)}
            settings = {name: value for name, value in chosen.items() if name in own}
            place = place_of(path, stack)
            pictures = found_in(files, _typed(beside, rest[len(ADVANCED) :]))
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

    def learn_next(self, checkpoint: str, name: str, first: int, waits: str) -> list[Any]:
        return self._queued(self.host.learn_next, waits, checkpoint, name, first)

    def take_off(self, checkpoint: str, name: str, first: int, waits: str) -> list[Any]:
        return self._queued(self.host.take_off, waits, checkpoint, name, first)

    def _queued(self, change: Callable[[str], object], waits: str, *place: Any) -> list[Any]:
        try:
            change(waits or "")
        except REFUSED as error:
            return self.refused(error, "status")
        return self.view(*place)

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
                found = newest_lora(*self.host.exports(), stack, concept["token"])
                if found is None:
                    raise ValueError(
                        f"There is no export with {concept['token']} yet: press Export first."
                    )
            except REFUSED as error:
                return ["", f"**{markdown(in_labels(error))}**"]
            lora, token = found
            name = name_in({**concept, "token": token})
            return [f"a photo of a {name} <lora:{lora.stem}:1>", gr.update()]

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
                return [*self.refused(error), *not_asked()]
            pending = {"ask": (kind, checkpoint, name, given), "sentence": question.sentence}
            texts = [f"**{markdown(question.sentence)}**", gr.update(value=question.yes)]
            return [*in_order({}), gr.update(visible=True), *texts, pending]

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
            return [*self.refused(error), *not_asked()]
        return [*self.view(checkpoint, name, first), *not_asked()]

    # --- inputs --------------------------------------------------------------------------------

    @staticmethod
    def pictures(
        files: Sequence[Any] | None, beside: Beside, fit: str, *captions: str
    ) -> list[Any]:
        """The values of `PICTURES` for what was dropped."""
        try:
            found, told = dropped(files, _typed(beside, captions), fit)
        except REFUSED as error:
            raise gr.Error(in_labels(error)) from None
        if len(found) > SLOTS:
            told += f"\nCaptions of the first {SLOTS} can be typed here; drop a.txt with a.jpg for others."
        values: Values = {
            "beside": [(one.key, one.own) for one in found],
            "inventory": visible(markdown(told)),
        }
        for number in range(SLOTS):
            one = found[number] if number < len(found) else None
            values[f"slot_{number}"] = gr.update(visible=one is not None)
            values[f"thumb_{number}"] = thumbnail(one.name, one.image) if one else ""
            values[f"caption_{number}"] = one.caption if one else ""
        return in_order(values, PICTURES)

    def changed(self, method: str, prediction: str, *advanced: Any) -> Any:
        """Which settings differ from what the page began with."""
        settings = settings_of(LearnSettings, ADVANCED, advanced)
        told = [
            f"{label_of(name)} {value}"
            for name, value in settings.items()
            if value != DEFAULTS.get(name)
        ]
        if prediction != "auto":
            told.insert(0, f"{label_of('prediction')} {prediction}")
        if method != self.host.default_method():
            told.insert(0, f"method {method}")
        return visible(f"Changed below: {markdown(', '.join(told))}." if told else "")


def _typed(beside: Beside, captions: Sequence[str]) -> dict[Key, str]:
    """The captions by picture, where they are not the ones that were uploaded: a cleared one too."""
    return {
        key: caption or ""
        for (key, own), caption in zip(beside or (), captions, strict=False)
        if (caption or "") != own
    }

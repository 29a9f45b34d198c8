"""What the tab and the API share: the host program, stacks, and starting jobs.

No gradio, no torch: the API also works without the tab, and this runs inside the host.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ContinualLoraError
from ..files import stack_path
from ..listing import checkpoints_in
from ..stackfile import read_header
from ..words import name_of
from .album import Album
from .copies import Batch, Copies
from .environment import NotReady, Preparation
from .job import Job
from .labels import METHOD_LABELS
from .runner import Busy, JobRunner
from .shown import markdown, status

JobRequest = tuple[str, dict[str, Any]]  # for `worker`
Waiting = tuple[tuple[JobRequest, ...], Batch | None]


class Host:
    """The interface between the tab and the program it runs in. This one is for the standalone tab,
    with checkpoints in one folder.

    Environment variables set what no page may: CONTINUAL_LORA_PYTHON, the Python of the worker, and
    CONTINUAL_LORA_FOLDERS, more folders the API may read pictures from, separated as in PATH.
    """

    offers_files = True  # whether the page offers exports for download
    sends_prompts = False  # whether there is a txt2img to send prompts to

    def __init__(self, models: Path, folder: Path) -> None:
        """`folder`: for pictures the API may read, for the tab's copies, drawings and exports."""
        self.models, self.folder = models, folder
        self.copies, self.album = Copies(folder), Album(folder / "album")
        self.opened: tuple[str, str] | None = None  # checkpoint and stack of the page's last job
        self.waiting: list[Waiting] = []  # what is learned after the running job
        self.past: list[str] = []  # how the jobs before a waiting one ended, as Markdown
        self._queue_lock = threading.RLock()
        self.runner = JobRunner(self.python)
        self.preparation = Preparation(self.prepare)
        self.runner.tidy, self.runner.after = self._tidy, self._go_on
        self.copies.tidy()

    def python(self) -> str:
        """The worker's Python. Errors: NotReady."""
        return os.environ.get("CONTINUAL_LORA_PYTHON") or self.own_python()

    def own_python(self) -> str:
        return sys.executable

    def checkpoints(self) -> dict[str, Path]:
        """Checkpoints by their name in the list."""
        return {str(path.relative_to(self.models)): path for path in checkpoints_in(self.models)}

    def refresh(self) -> None:
        """Look for checkpoints again, where the program keeps a list of them."""

    def loaded(self) -> str:
        """The name of the checkpoint that the program uses now; empty if that is not known."""
        return ""

    def preferred(self) -> tuple[str, str]:
        """The checkpoint and the stack's name that a page opens with: the last job's, else those in
        use, else the ones that learned last, else the first.
        """
        known = self.checkpoints()
        if self.opened and self.opened[0] in known:
            return self.opened
        if (name := self.loaded()) in known:
            return name, ""
        stacks = {name: _changed(path) for name, path in known.items()}
        return max(stacks, key=lambda name: stacks[name], default=""), ""

    def drawn(self) -> Path:
        """The folder for pictures that the page draws."""
        return self.folder / "drawn"

    def exports(self) -> tuple[Path, Path]:
        """Folders for LoRAs and for embeddings."""
        return self.folder / "exports", self.folder / "exports"

    def prepare(self, say: Callable[[str], object]) -> None:
        """Create the worker's environment, reporting progress through `say`; here there is none."""

    def default_method(self) -> str:
        """A key of METHOD_LABELS."""
        return next(iter(METHOD_LABELS))

    def logins(self) -> dict[str, str] | None:
        """Users and passwords of the API; None if it needs no login."""
        return None

    def picture_folders(self) -> list[Path]:
        """The folders the API may read pictures from."""
        named = os.environ.get("CONTINUAL_LORA_FOLDERS", "").split(os.pathsep)
        return [self.folder / "pictures", *(Path(one) for one in named if one)]

    def example(self, token: str) -> tuple[list[str], str]:
        """Pictures of a thing that the mini-SD does not know, a different one for each word, and
        its class noun.
        """
        from ..mini import world

        number = int(re.sub(r"[^0-9]", "", token or "")[:9] or 1)
        concept = world.concepts("development")[(number - 1) % world.CONCEPTS_PER_SPLIT]
        folder = Path(_examples().name) / concept.name
        return [str(file) for file in world.save_pictures(concept, folder)], concept.noun

    def hand_in(self, *jobs: JobRequest, batch: Batch | None = None) -> Job:
        """Start jobs, with copies of the pictures they need.

        Errors: NotReady, Busy, OSError; no copy is left in that case.
        """
        self.python()

        def before() -> None:
            self.copies.live()
            if batch:
                self.copies.write(batch)

        return self.runner.start(*jobs, before=before)

    # --- the queue --------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self.runner.is_busy or bool(self.waiting)

    def hand_in_or_wait(self, *jobs: JobRequest, batch: Batch | None = None) -> bool:
        """Start jobs, or let them wait for those before them; returns whether they wait.

        Errors: those of `hand_in`, except Busy.
        """
        with self._queue_lock:
            if not self.is_busy:
                self.past = []
                self.hand_in(*jobs, batch=batch)
                return False
            self.python()
            self.waiting.append((jobs, batch))
            return True

    def waits(self) -> list[str]:
        """What waits to be learned, in this order: "1. V2 mug", ..."""
        requests = [jobs[0][1] for jobs, _ in list(self.waiting)]
        named = [name_of(one.get("token", ""), one.get("noun", "")) for one in requests]
        return [f"{number}. {name}" for number, name in enumerate(named, 1)]

    def learn_next(self, waits: str) -> None:
        """Let one of those that wait be the next. Errors: as `take_off`."""
        with self._queue_lock:
            self.waiting.insert(0, self.take_off(waits))

    def take_off(self, waits: str) -> Waiting:
        """Take one off the queue, named as in `waits`. Errors: ValueError if it is no longer there."""
        with self._queue_lock:
            try:
                return self.waiting.pop(self.waits().index(waits))
            except ValueError:
                raise ValueError("The queue has changed in the meantime; choose again.") from None

    def stop(self) -> None:
        """Stop the running job, and start none of those that wait."""
        with self._queue_lock:
            self.waiting.clear()
        if self.runner.job:
            self.runner.job.stop()

    def _go_on(self, job: Job) -> None:
        """Start what waits, after this job."""
        with self._queue_lock:
            if self.waiting and not self.runner.is_busy:
                self.past.append(status(job))
            while self.waiting and not self.runner.is_busy:
                jobs, batch = self.waiting.pop(0)
                try:
                    self.hand_in(*jobs, batch=batch)
                except Busy:  # the API has just started another: after that one
                    self.waiting.insert(0, (jobs, batch))
                    return
                except (NotReady, OSError) as error:
                    logging.exception("continual-lora: a job that waited could not start")
                    word = markdown(jobs[0][1].get("token", ""))
                    self.past.append(f"**{word}**: {markdown(error)}")

    def in_work(self, stack: Path) -> list[str]:
        """The words that are being learned, or wait to be."""
        running = self.runner.job.jobs if self.runner.job and self.runner.is_busy else []
        requests = [running, *(jobs for jobs, _ in self.waiting)]
        return [
            request["token"]
            for jobs in requests
            for name, request in jobs
            if name == "learn" and request["stack"] == str(stack)
        ]

    def free_word(self, stack: Path) -> str:
        """The next word that is neither learned nor being learned: V1, V2, ... Errors: as `concepts_of`."""
        tokens = [one["token"] for one in concepts_of(stack)] + self.in_work(stack)
        taken = {token.lower() for token in tokens}
        return next(word for n in itertools.count(1) if (word := f"V{n}").lower() not in taken)

    def _tidy(self, job: Job) -> None:
        """Keep what an ended job shows of its stack's concepts; remove copies no one needs."""
        stack = Path(job.jobs[0][1].get("stack", ""))
        try:
            if job.results and stack.name:
                self.album.add(stack, concepts_of(stack), job)
        except (OSError, ValueError, ContinualLoraError):
            logging.exception("continual-lora: the drawings could not be kept")
        self.copies.tidy(shown=_chart_folders(job))

    # --- jobs -------------------------------------------------------------------------------------

    def chart(self, name: str) -> str:
        """A file for a job's chart, in a folder of its own; the job creates both."""
        return str(Path(self.copies.charts()) / f"{name}.png")

    def export_job(
        self, place: dict[str, str], only: Sequence[str] = (), *, remove_superseded: bool = False
    ) -> JobRequest:
        """`only`: words, for a LoRA solved for these alone."""
        loras, embeddings = self.exports()
        request = {**place, "out": str(loras), "embeddings": str(embeddings), "only": list(only)}
        return "export", {**request, "remove_superseded": remove_superseded}


def _chart_folders(job: Job) -> list[str]:
    """The folders of the charts that a job draws."""
    return [str(Path(request["plot"]).parent) for _, request in job.jobs if request.get("plot")]


def _changed(checkpoint: Path) -> float:
    """When the checkpoint's stack changed; 0 if there is none."""
    try:
        return stack_path(checkpoint).stat().st_mtime
    except (OSError, ContinualLoraError):
        return 0.0


def leave() -> None:
    """Remove the example pictures; for an end of the process that runs no cleanup."""
    _examples().cleanup()


@functools.cache
def _examples() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder of this process; gradio serves files only from there."""
    return tempfile.TemporaryDirectory(prefix="continual-lora-examples-")


# --- stacks --------------------------------------------------------------------------------------


def place_of(checkpoint: Path, stack: Path) -> dict[str, str]:
    """The fields that every request has."""
    return {"checkpoint": str(checkpoint), "stack": str(stack)}


def concepts_of(stack: Path) -> list[dict[str, Any]]:
    """The concepts of a stack file, from its header; none if there is no file.

    Errors: StackError, OSError for a file that is not a stack.
    """
    return read_header(stack)["concepts"] if stack.exists() else []


def newest_word(stack: Path) -> str:
    """The newest concept's word; empty if there is no concept. Errors: as `concepts_of`."""
    concepts = concepts_of(stack)
    return concepts[-1]["token"] if concepts else ""

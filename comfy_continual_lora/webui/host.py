"""What the tab and the API share: the host program, stacks, and starting jobs.

No gradio, no torch: the API also works without the tab, and this runs inside the host.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import checkpoints_in
from ..stackfile import read_header
from .copies import Batch, Copies
from .environment import Preparation
from .job import Job
from .labels import METHOD_LABELS
from .runner import JobRunner

JobRequest = tuple[str, dict[str, Any]]  # for `worker`


class Host:
    """The interface between the tab and the program it runs in. This one is for the standalone tab,
    with checkpoints in one folder.

    Environment variables set what no page may: CONTINUAL_LORA_PYTHON, the Python of the worker, and
    CONTINUAL_LORA_FOLDERS, more folders the API may read pictures from, separated as in PATH.
    """

    def __init__(self, models: Path, folder: Path) -> None:
        """`folder`: for pictures the API may read, and for the tab's copies and exports."""
        self.models, self.folder = models, folder
        self.copies = Copies(folder)
        self.runner = JobRunner(self.python)
        self.preparation = Preparation(self.prepare)
        self.runner.tidy = lambda job: self.copies.tidy(shown=_chart_folders(job))
        self.copies.tidy()

    def python(self) -> str:
        """The worker's Python. Errors: NotReady."""
        return os.environ.get("CONTINUAL_LORA_PYTHON") or self.own_python()

    def own_python(self) -> str:
        return sys.executable

    def checkpoints(self) -> dict[str, Path]:
        """Checkpoints by their name in the list."""
        return {str(path.relative_to(self.models)): path for path in checkpoints_in(self.models)}

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

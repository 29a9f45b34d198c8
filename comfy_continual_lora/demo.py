"""A demonstration on the mini-SD: learn two concepts one after the other, draw them alone and
together, write a report.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from . import pipeline, report
from .concepts import read_image
from .errors import SettingError
from .files import history_folder, stack_path
from .mini import world
from .mini.weights import write_checkpoint
from .progress import OnProgress
from .requests import DrawRequest, LearnRequest
from .settings import DrawSettings

PICKED = (2, 6)  # which development concepts
PLACES = ("on grass", "on sand", "in snow", "on wood")


def run_demo(out: Path, on_progress: OnProgress, say: Callable[[str], object]) -> Path:
    """Write checkpoint, pictures and report.html to `out`; returns the report's path.

    Every run starts from scratch.
    """
    started = time.monotonic()
    _begin(out)
    checkpoint = out / "mini.safetensors"
    write_checkpoint(checkpoint)
    examples = world.concepts("development")
    named = [(f"V{n}", examples[index]) for n, index in enumerate(PICKED, start=1)]
    sections, sheet = [], []
    for step, (token, concept) in enumerate(named, start=1):
        parts, rows = _learned(checkpoint, named[:step], on_progress, say)
        sections.append((f"Step {step}: learn {token} {concept.noun}", parts))
        sheet += rows
    parts, both = _both(checkpoint, named, on_progress)
    sections.append(("Both in one picture", parts))
    say("Writing the report ...")
    pictures = [picture for row in [*sheet, both] for picture in row]
    report.grid(pictures, len(PLACES)).save(out / "sheet.png")
    path = out / "report.html"
    intro = (
        "One small Stable Diffusion, two things it had never seen, learned one after the other "
        f"in {time.monotonic() - started:.0f} seconds."
    )
    page = report.page("Two concepts, one after the other", intro, sections)
    path.write_text(page, encoding="utf-8")
    return path


def _learned(
    checkpoint: Path,
    named: Sequence[tuple[str, world.Concept]],
    on_progress: OnProgress,
    say: Callable[[str], object],
) -> tuple[list[str], list[list[Image.Image]]]:
    """Learn the last of these and draw all; returns parts of the report and rows of the sheet."""
    token, concept = named[-1]
    folder = checkpoint.parent / f"pictures-{token}"
    pictures = [read_image(file) for file in world.save_pictures(concept, folder)]
    say(f"Learning {token}, a {concept.noun}, from {len(pictures)} pictures ...")
    request = LearnRequest(checkpoint, folder, token, concept.noun)
    result = pipeline.learn_concept(request, on_progress)
    rows = [pictures[: len(PLACES)]]
    caption = (
        f"The {len(pictures)} pictures {token} is learned from; they are not needed afterwards."
    )
    parts = [report.figure(pictures, caption)]
    for word, thing in named:
        prompts = [f"a photo of a {word} {thing.noun} {place}" for place in PLACES]
        rows.append(_draw(checkpoint, prompts, on_progress))
        caption = f"Drawn now: a photo of a {word} {thing.noun} {', '.join(PLACES)}"
        parts.append(report.figure(rows[-1], caption))
    parts.append(report.curve(result.losses, f"Loss while learning {token}"))
    return parts, rows


def _both(
    checkpoint: Path, named: Sequence[tuple[str, world.Concept]], on_progress: OnProgress
) -> tuple[list[str], list[Image.Image]]:
    """Both things in one prompt: parts of the report, and the pictures."""
    names = " and a ".join(f"{token} {concept.noun}" for token, concept in named)
    prompts = [f"a photo of a {names} {place}" for place in PLACES]
    both = _draw(checkpoint, prompts, on_progress)
    mixed = _draw(checkpoint, prompts, on_progress, mixed=True)
    places = ", ".join(PLACES)
    apart = f"In one prompt, each where its noun is: a photo of a {names} {places}"
    blended = "The same prompts as a program without this one draws them: the looks mix"
    return [report.figure(both, apart), report.figure(mixed, blended)], both


def _begin(out: Path) -> None:
    """An empty stack in the demo's own folder.

    Errors: SettingError for a folder that holds something else.
    """
    mark = out / ".continual-lora-demo"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(
            f"{out} already exists and was not made by the demo, which starts from scratch. Choose "
            "another folder as `out`."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    stack = stack_path(out / "mini.safetensors")
    stack.unlink(missing_ok=True)
    shutil.rmtree(history_folder(stack), ignore_errors=True)


def _draw(
    checkpoint: Path, prompts: Sequence[str], on_progress: OnProgress, *, mixed: bool = False
) -> list[Image.Image]:
    request = DrawRequest(checkpoint, prompts, DrawSettings(seed=1, mixed=mixed))
    return [one.image for one in pipeline.draw(request, on_progress).pictures]

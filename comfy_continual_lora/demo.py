"""The main job on the mini-SD: learn two concepts one after the other, draw them, write a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from . import pipeline, report, store
from .concepts import read_image
from .errors import SettingError
from .files import history_folder
from .mini import world
from .mini.weights import write_checkpoint
from .progress import OnProgress
from .settings import DrawSettings, LearnSettings

PICKED = (2, 6)  # which development concepts
PLACES = ("on grass", "on sand", "in snow", "on wood")


def run_demo(out: Path, on_progress: OnProgress, say: Callable[[str], object]) -> Path:
    """Leave the checkpoint, the pictures and report.html in `out`; returns the report's path.

    Every run starts from scratch.
    """
    started = time.monotonic()
    _begin(out)
    checkpoint = out / "mini.safetensors"
    write_checkpoint(checkpoint)
    concepts = [
        (f"V{n}", world.concepts("development")[index]) for n, index in enumerate(PICKED, start=1)
    ]
    sections: list[tuple[str, list[str]]] = []
    alone: list[Image.Image] = []
    for step, (token, concept) in enumerate(concepts, start=1):
        figures, images = _learn(checkpoint, concepts[:step], on_progress, say)
        sections.append((f"Step {step}: learn {token} {concept.noun}", figures))
        alone += images
    figures, beside = _draw_together(checkpoint, concepts, on_progress)
    sections.append(("Both in one picture", figures))
    say("Writing the report ...")
    _sheet(alone, beside).save(out / "sheet.png")
    path = out / "report.html"
    intro = (
        "One small Stable Diffusion, two things it had never seen, learned one after the other "
        f"in {time.monotonic() - started:.0f} seconds."
    )
    page = report.page("Two concepts, one after the other", intro, sections)
    path.write_text(page, encoding="utf-8")
    return path


def _learn(
    checkpoint: Path,
    concepts: Sequence[tuple[str, world.Concept]],
    on_progress: OnProgress,
    say: Callable[[str], object],
) -> tuple[list[str], list[Image.Image]]:
    """Learn the last of the concepts, then draw all; the report's figures, and images for the sheet."""
    token, concept = concepts[-1]
    folder = checkpoint.parent / f"pictures-{token}"
    pictures = [read_image(file) for file in world.save_pictures(concept, folder)]
    say(f"Learning {token}, a {concept.noun}, from {len(pictures)} pictures ...")
    result = pipeline.learn_concept(
        pipeline.LearnRequest(checkpoint, folder, token, concept.noun, LearnSettings()),
        on_progress,
    )
    caption = f"The {len(pictures)} pictures {token} was learned from; they are not needed again."
    figures = [report.figure(pictures, caption)]
    images = pictures[: len(PLACES)]
    for known, thing in concepts:
        prompt = f"a photo of a {known} {thing.noun}"
        drawn = _draw(checkpoint, [f"{prompt} {place}" for place in PLACES], on_progress)
        figures.append(report.figure(drawn, f"Drawn now: {prompt} {', '.join(PLACES)}"))
        images += drawn
    figures.append(report.curve(result.losses, f"Loss while learning {token}"))
    return figures, images


def _draw_together(
    checkpoint: Path, concepts: Sequence[tuple[str, world.Concept]], on_progress: OnProgress
) -> tuple[list[str], list[Image.Image]]:
    """Both concepts in one picture: the report's figures, and the pictures with areas."""
    names = [f"{token} {concept.noun}" for token, concept in concepts]
    left, right = (f"a photo of a {name}" for name in names)
    together = f"a photo of a {' and a '.join(names)}"
    places = ", ".join(PLACES)
    beside = _draw(
        checkpoint, [(f"{left} {place}", f"{right} {place}") for place in PLACES], on_progress
    )
    mixed = _draw(checkpoint, [f"{together} {place}" for place in PLACES], on_progress)
    caption = f"Beside each other, each in an area of its own: {left}, and {right}, {places}"
    figures = [
        report.figure(beside, caption, width=224),
        report.figure(
            mixed, f"Asked for in one prompt, where their looks mix: {together} {places}"
        ),
    ]
    return figures, beside


def _begin(out: Path) -> None:
    """An empty stack in the demo's own folder.

    Errors: SettingError for a folder that holds something else.
    """
    mark = out / ".continual-lora-demo"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(
            f"{out} exists already and is not the demo's, which starts from scratch. Name another "
            "folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    stack = store.stack_path(out / "mini.safetensors")
    stack.unlink(missing_ok=True)
    shutil.rmtree(history_folder(stack), ignore_errors=True)


def _draw(
    checkpoint: Path, prompts: Sequence[str | Sequence[str]], on_progress: OnProgress
) -> list[Image.Image]:
    request = pipeline.DrawRequest(checkpoint, prompts, DrawSettings(seed=1))
    return [drawing.image for drawing in pipeline.draw(request, on_progress)]


def _sheet(alone: Sequence[Image.Image], beside: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one thing in rows of four, below them the wider ones of both in rows of two."""
    above, below = report.grid(alone, len(PLACES)), report.grid(beside, 2)
    sheet = Image.new("RGB", (above.width, above.height + 4 + below.height), "white")
    sheet.paste(above)
    sheet.paste(below, ((above.width - below.width) // 2, above.height + 4))
    return sheet

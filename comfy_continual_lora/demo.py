"""The main job, shown on the mini-SD: learn two concepts one after the other, draw both alone and
together, write a report.
"""

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
    """Leave checkpoint, pictures and report.html in `out`; returns the report.

    Runs again from nothing each time.
    """
    started = time.monotonic()
    _begin(out)
    checkpoint = out / "mini.safetensors"
    write_checkpoint(checkpoint)
    taught = [
        (f"V{n}", world.concepts("development")[index]) for n, index in enumerate(PICKED, start=1)
    ]
    sections, sheet = [], []
    for step, (token, concept) in enumerate(taught, start=1):
        folder = out / f"pictures-{token}"
        pictures = [read_image(file) for file in world.save_pictures(concept, folder)]
        say(f"Learning {token}, a {concept.noun}, from {len(pictures)} pictures ...")
        result = pipeline.learn_concept(
            pipeline.LearnRequest(checkpoint, folder, token, concept.noun, LearnSettings()),
            on_progress,
        )
        sheet.append(pictures[: len(PLACES)])
        parts = [
            report.figure(
                pictures,
                f"The {len(pictures)} pictures {token} was learned from; they are not needed "
                "again.",
            )
        ]
        for known, thing in taught[:step]:
            drawn = _draw(
                checkpoint,
                [f"a photo of a {known} {thing.noun} {place}" for place in PLACES],
                on_progress,
            )
            parts.append(
                report.figure(
                    drawn, f"Drawn now: a photo of a {known} {thing.noun} {', '.join(PLACES)}"
                )
            )
            sheet.append(drawn)
        parts.append(report.curve(result.losses, f"Loss while learning {token}"))
        sections.append((f"Step {step}: learn {token} {concept.noun}", parts))
    names = [f"{token} {concept.noun}" for token, concept in taught]
    left, right = (f"a photo of a {name}" for name in names)
    together = f"a photo of a {' and a '.join(names)}"
    beside = _draw(
        checkpoint, [(f"{left} {place}", f"{right} {place}") for place in PLACES], on_progress
    )
    mixed = _draw(checkpoint, [f"{together} {place}" for place in PLACES], on_progress)
    parts = [
        report.figure(
            beside,
            f"Beside each other, each in an area of its own: {left}, and {right}, "
            f"{', '.join(PLACES)}",
            width=224,
        ),
        report.figure(
            mixed, f"Asked for in one prompt, where their looks mix: {together} {', '.join(PLACES)}"
        ),
    ]
    sections.append(("Both in one picture", parts))
    say("Writing the report ...")
    _sheet([p for row in sheet for p in row], beside).save(out / "sheet.png")
    path = out / "report.html"
    intro = (
        "One small Stable Diffusion, two things it had never seen, learned one after the other "
        f"in {time.monotonic() - started:.0f} seconds."
    )
    path.write_text(
        report.page("Two concepts, one after the other", intro, sections), encoding="utf-8"
    )
    return path


def _begin(out: Path) -> None:
    """An empty stack in the demo's own folder.

    Errors: SettingError for a folder that holds something else.
    """
    mark = out / ".continual-lora-demo"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(
            f"{out} is there already and is not the demo's, which begins from nothing. Name "
            "another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    stack = store.stack_path(out / "mini.safetensors")
    stack.unlink(missing_ok=True)
    shutil.rmtree(history_folder(stack), ignore_errors=True)


def _draw(
    checkpoint: Path, prompts: Sequence[str | Sequence[str]], on_progress: OnProgress
) -> list[Image.Image]:
    return [
        d.image
        for d in pipeline.draw(
            pipeline.DrawRequest(checkpoint, prompts, DrawSettings(seed=1)), on_progress
        )
    ]


def _sheet(alone: Sequence[Image.Image], beside: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one thing in rows of four, under them the wider ones of both in rows of two."""
    above, below = report.grid(alone, len(PLACES)), report.grid(beside, 2)
    sheet = Image.new("RGB", (above.width, above.height + 4 + below.height), "white")
    sheet.paste(above)
    sheet.paste(below, ((above.width - below.width) // 2, above.height + 4))
    return sheet

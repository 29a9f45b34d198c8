"""A demonstration on the mini-SD: learn two concepts one after the other, draw them alone and
together, measure what is kept, write a report.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from . import pipeline, report, reportpage
from .concepts import read_image
from .errors import SettingError
from .files import STACKS, history_folder, snapshots_of
from .keeping import writing
from .mini import world
from .mini.weights import write_checkpoint
from .progress import OnProgress
from .requests import DrawRequest, EvaluateRequest, LearnRequest
from .settings import DrawSettings, LearnSettings
from .stackfile import read_header
from .verdicts import RetentionReport
from .words import name_in

PICKED = (2, 6)  # which development concepts
WORDS = [f"V{number}" for number, _ in enumerate(PICKED, 1)]
PLACES = ("on grass", "on sand", "in snow", "on wood")
_SHOWN = ("method", "steps", "batch", "rank", "vectors", "rate", "token_rate", "seed")

Named = Sequence[tuple[str, world.Concept]]


def run_demo(
    out: Path, on_progress: OnProgress, say: Callable[[str], object], steps: int | None = None
) -> Path:
    """Write checkpoint, pictures and report.html to `out`; returns the report's path.

    Every run starts from scratch. `steps`: training steps of each concept, if not the mini-SD's own.
    """
    settings = LearnSettings(steps=steps)
    settings.check()
    started = time.monotonic()
    _begin(out)
    checkpoint = out / "mini.safetensors"
    write_checkpoint(checkpoint)
    examples = world.concepts("development")
    named = [(word, examples[index]) for word, index in zip(WORDS, PICKED, strict=True)]
    sections, sheet = [], []
    for step, (token, concept) in enumerate(named, start=1):
        parts, rows = _learned(checkpoint, named[:step], settings, on_progress, say)
        sections.append((f"Step {step}: learn {token} {concept.noun}", parts))
        sheet += rows
    parts, both = _both(checkpoint, named, on_progress)
    sections.append(("Both in one picture", parts))
    say("Comparing what is drawn with the pictures ...")
    sections.append(("Is the first one still itself?", _kept(checkpoint, named, on_progress)))
    sections.append(("Go on from here", _next_commands(checkpoint, named)))
    say("Writing the report ...")
    pictures = [picture for row in [*sheet, both] for picture in row]
    report.grid(pictures, len(PLACES)).save(out / "sheet.png")
    path = out / "report.html"
    intro = (
        "One small Stable Diffusion, two things it had never seen, learned one after the other. All "
        f"of it, with every picture below, took {reportpage.duration(time.monotonic() - started)}."
    )
    page = reportpage.page("Two things, one after the other", intro, sections)
    path.write_text(page, encoding="utf-8")
    return path


def _folder(checkpoint: Path, token: str) -> Path:
    return checkpoint.parent / "pictures" / token


def _learned(
    checkpoint: Path,
    named: Named,
    settings: LearnSettings,
    on_progress: OnProgress,
    say: Callable[[str], object],
) -> tuple[list[str], list[list[Image.Image]]]:
    """Learn the last of these and draw all; returns parts of the report and rows of the sheet."""
    started = time.monotonic()
    token, concept = named[-1]
    folder = _folder(checkpoint, token)
    pictures = [read_image(file) for file in world.save_pictures(concept, folder)]
    say(f"Learning {token}, a {concept.noun}, from {len(pictures)} pictures ...")
    request = LearnRequest(checkpoint, folder, token, concept.noun, settings)
    result = pipeline.learn_concept(request, on_progress)
    took = reportpage.duration(time.monotonic() - started)
    rows = [pictures[: len(PLACES)]]
    caption = (
        f"The {len(pictures)} pictures {token} is learned from; they are not needed afterwards."
    )
    shown = [f"A picture that {token} is learned from: a {concept.noun}"] * len(pictures)
    parts = [reportpage.figure(pictures, caption, shown)]
    for word, thing in named:
        prompts = [f"a photo of a {word} {thing.noun} {place}" for place in PLACES]
        rows.append(_draw(checkpoint, prompts, on_progress))
        when = "Drawn now" if word == token else f"Drawn again, now that {token} is learned too"
        caption = f"{when}: a photo of a {word} {thing.noun} {', '.join(PLACES)}"
        parts.append(reportpage.figure(rows[-1], caption, [f"Drawn: {one}" for one in prompts]))
    parts.append(reportpage.curve(result.losses, f"Loss while learning {token}, in {took}"))
    used = result.record.settings
    parts.append(reportpage.settings_table({name: used[name] for name in _SHOWN}))
    return parts, rows


def _both(
    checkpoint: Path, named: Named, on_progress: OnProgress
) -> tuple[list[str], list[Image.Image]]:
    """Both things in one prompt: parts of the report, and the pictures."""
    names = _both_names(named)
    prompts = [f"a photo of a {names} {place}" for place in PLACES]
    both = _draw(checkpoint, prompts, on_progress)
    mixed = _draw(checkpoint, prompts, on_progress, mixed=True)
    places = ", ".join(PLACES)
    apart = f"In one prompt, each where its noun is: a photo of a {names} {places}"
    blended = "The same prompts as a program without this one draws them: the looks mix"
    alts = [f"Drawn: {one}" for one in prompts]
    shown = reportpage.figure(both, apart, alts)
    return [shown, reportpage.figure(mixed, blended, [f"{one}, mixed" for one in alts])], both


def _both_names(named: Named) -> str:
    return " and a ".join(f"{token} {concept.noun}" for token, concept in named)


def _kept(checkpoint: Path, named: Named, on_progress: OnProgress) -> list[str]:
    """Each thing beside its first drawing and the newest, and what `evaluate` says."""
    request = EvaluateRequest(checkpoint, checkpoint.parent / "pictures")
    result = pipeline.evaluate(request, on_progress)
    parts = [
        reportpage.paragraph(
            "Each number is the likeness to the pictures above, by what the checkpoint itself sees; "
            "that of a real one is to the others."
        )
    ]
    parts += [_pair(checkpoint, result, j, token) for j, (token, _) in enumerate(named)]
    return [*parts, reportpage.paragraph(result.verdict)]


def _pair(checkpoint: Path, result: RetentionReport, j: int, token: str) -> str:
    real = read_image(min(_folder(checkpoint, token).glob("*.png")))
    last = len(result.names) - 1
    floor, own = float(result.floor[j]), float(result.own[j])
    shown = [(real, f"a real one: {own:.2f}")]
    for i, when in ((j, "when it was new"), (last, "now")):
        shown.append((result.pictures[i, j][0], f"{when}: {float(result.likeness[i, j]):.2f}"))
    good = {"well": True, "floor": False}.get(result.grades[j])
    said = f"{result.verdicts[j]} Any other thing of its kind: {floor:.2f}."
    return reportpage.first_and_now(result.names[j], shown, said, good)


def _next_commands(checkpoint: Path, named: Named) -> list[str]:
    here = ["--checkpoint", str(checkpoint)]
    both = f"a photo of a {_both_names(named)} in snow"
    mine = ["--checkpoint", "sd15.safetensors", "--images", "photos/dog"]
    commands = (
        ("Draw something else:", ["draw", *here, "--prompt", both, "-n", "4"]),
        (
            "Which of the two does a picture show?",
            ["scores", *here, "--images", str(checkpoint.parent / "pictures")],
        ),
        ("A LoRA and embeddings for other programs:", ["export", *here, "--out", "loras"]),
        ("In a browser, with your own pictures:", ["ui"]),
        (
            "Your own things, with a checkpoint of yours:",
            ["learn", *mine, "--token", "V1", "--noun", "dog"],
        ),
    )
    return [reportpage.command(what, ["continual-lora", *words]) for what, words in commands]


def _begin(out: Path) -> None:
    """An empty stack in the demo's own folder.

    Errors: SettingError for a folder that holds something else, or a stack that has learned more;
    StackError for a stack that can't be read.
    """
    mark = out / ".continual-lora-demo"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(
            f"{out} already exists and was not made by the demo, which starts from scratch. Choose "
            "another folder as `out`."
        )
    stack = out / f"mini{STACKS}"  # `stack_path` takes a checkpoint that is not there for a folder
    known = read_header(stack)["concepts"] if stack.exists() else []
    if own := [name_in(one) for one in known if one["token"] not in WORDS]:
        raise SettingError(
            f"{stack} has learned {', '.join(own)} since the demo, which starts from scratch. Choose "
            "another folder as `out`, or move this one away."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    with writing(stack):
        stack.unlink(missing_ok=True)
        shutil.rmtree(history_folder(stack), ignore_errors=True)
        for word in WORDS:
            for unfinished in snapshots_of(stack, word):
                unfinished.unlink(missing_ok=True)


def _draw(
    checkpoint: Path, prompts: Sequence[str], on_progress: OnProgress, *, mixed: bool = False
) -> list[Image.Image]:
    request = DrawRequest(checkpoint, prompts, DrawSettings(seed=1, mixed=mixed))
    return [one.image for one in pipeline.draw(request, on_progress).pictures]

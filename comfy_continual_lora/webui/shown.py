"""How the tab and the API describe a job and a stack.

Words, names and messages come from users, from untrusted files and from programs: `html` and
`markdown` escape them, so that a page shows them literally.
"""

from __future__ import annotations

import base64
import html as standard
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import spelled
from ..progress import RESUMED, unit_for
from ..versions import Version
from .job import Job
from .labels import LABELS

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")  # all of ASCII's: most of it is Markdown syntax
_JOINERS = "\u200c\u200d"  # several scripts and emoji need them


def visible(text: object) -> str:
    """The text with control characters, direction marks and lone surrogates replaced."""
    return "".join(
        c if c.isprintable() or c in _JOINERS else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def html(text: object) -> str:
    """HTML that shows the text literally, between tags and inside quoted attributes."""
    return standard.escape(visible(text))


def markdown(text: object) -> str:
    """Markdown that shows the text literally, line by line: no HTML, links, emphasis, code or
    headings.
    """
    lines = [
        _PUNCTUATION.sub(lambda match: f"&#{ord(match[0])};", visible(line.rstrip()))
        for line in str(text).splitlines()
    ]
    return "<br>".join(
        re.sub("^ +", lambda match: "&nbsp;" * len(match[0]), line)
        for line in lines
        if line.strip()
    )


def code(text: object) -> str:
    """A Markdown code block, with a fence longer than any in the text."""
    lines = [visible(line) for line in str(text).splitlines()]
    fence = "`" * max([3, *(1 + len(run) for line in lines for run in re.findall("`+", line))])
    return "\n".join([fence, *lines, fence])


Say = Callable[[object], str]


def status(job: Job | None, say: Say = markdown, names: Mapping[str, str] | None = LABELS) -> str:
    """What the job is doing, its progress and time left; or how it ended.

    `say` escapes text for Markdown, or is str for plain text; `names`: as of `errors.spelled`.
    """
    if job is None:
        return "Ready."
    notes = [say(spelled(note, names)) for note in job.notes]
    return "\n\n".join([_state(job, say, names), *notes])


def _state(job: Job, say: Say, names: Mapping[str, str] | None) -> str:
    if job.state == "failed":
        return _failure(job, say, names)
    if job.state == "stopped":
        stopped = f"**Stopped.** {say(job.message)}."
        if job.progress and job.progress["stage"] in RESUMED:
            stopped += " What was learned so far is kept: the same request resumes from here."
        return "\n\n".join([*_endings(job.results, say), stopped])
    if job.state == "done":
        return "\n\n".join(_endings(job.results, say))
    now, is_stopping = job.progress, job.state == "stopping"
    if not now or now["stage"] == "start":
        return "Stopping ..." if is_stopping else "Starting the worker ..."
    line = f"**{say(now['stage'])}** step {now['step']} of {now['steps']}"
    if now["loss"] is not None:
        line += f", loss {now['loss']:.4f}"
    if now["seconds_left"] is not None:
        minutes, seconds = divmod(int(now["seconds_left"]), 60)
        line += f", {minutes}:{seconds:02d} left"
    if is_stopping:
        line += " - stopping after this step ... (press Stop again to end it immediately)"
    return line


def _failure(job: Job, say: Say, names: Mapping[str, str] | None) -> str:
    """What failed, after what was finished and stored before."""
    message = spelled(job.marked or job.message, names)
    failed = f"**{say(job.unfinished)} failed.** {say(message)}"
    if not job.results:
        return failed
    return "\n\n".join([*_endings(job.results, say), "What was done so far is stored.", failed])


def _endings(results: Mapping[str, Any], say: Say) -> list[str]:
    """A text for each finished job."""
    paragraphs = []
    for name, sentences in _ENDINGS.items():
        if name in results:
            paragraphs += sentences(results[name], say)
    return paragraphs


def _planned(result: Mapping[str, Any], say: Say) -> list[str]:
    least, most = result["seconds"]
    unit, seconds = unit_for(most)
    few, count = least / seconds, most / seconds
    time = (
        f"{few:,.0f} to {count:,.0f} {unit}"
        if round(few) < round(count)
        else f"{count:,.0f} {unit}"
    )
    gigabytes = result["peak"] / 1e9
    again = "**It is already on the stack**, from the same pictures and settings."
    return [
        *([again] if result["again"] else []),
        f"**About {time}** of learning and at least {gigabytes:,.1f} GB of memory on "
        f"{say(result['device'])}, at {result['size']} x {result['size']} pixels. The stack takes "
        f"{result['stack_file'] / 1e6:,.1f} MB, an export {result['exported'] / 1e6:,.1f} MB.",
    ]


def _drawn(result: Mapping[str, Any], say: Say) -> list[str]:
    files = result["files"]
    return [f"**Drawn.** The pictures are in {say(Path(files[0]).parent)}."] if files else []


def _learned(result: Mapping[str, Any], say: Say) -> list[str]:
    word = say(f"{result['token']} {result['noun']}")
    if result.get("again"):
        return [f"**{word} is already on the stack**, from the same pictures and settings."]
    return [f"**Learned {word}**."]


def _consolidated(result: Mapping[str, Any], say: Say) -> list[str]:
    word = say(result["token"])
    if result.get("again"):
        return [f"**{word} was already consolidated** with the same pictures and settings."]
    return [f"**Consolidated {word}** in {len(result['losses'])} steps."]


def _solved(result: Mapping[str, Any], say: Say) -> list[str]:
    shares = ", ".join(
        f"{say(name)} {share:.0%} (before {result['before'][name]:.0%})"
        for name, share in result["after"].items()
    )
    return [
        f"**Consolidated in closed form**, rank {result['rank']}. Lost of what each concept's own "
        f"LoRA did: {shares}."
    ]


def _forgotten(result: Mapping[str, Any], say: Say) -> list[str]:
    word = say(f"{result['token']} {result['noun']}")
    return [f"**Forgot {word}.** LoRAs exported before still contain it."]


def _renamed(result: Mapping[str, Any], say: Say) -> list[str]:
    old, new = say(result["token"]), say(result["to"])
    return [f"**Renamed {old} to {new}.** Files exported before still say {old}: export again."]


def _undone(result: Mapping[str, Any], say: Say) -> list[str]:
    return [f"**Undone: {say(result['change'])}.** {_holds(result, say)}"]


def _restored(result: Mapping[str, Any], say: Say) -> list[str]:
    version, change = say(result["version"]), say(result["change"])
    return [f"**Went back to version {version}: {change}.** {_holds(result, say)}"]


def _scored(result: Mapping[str, Any], say: Say) -> list[str]:
    best = []
    for one in result["images"]:
        unsure = "" if one["sure"] else " (not sure)"
        best.append(f"{say(Path(one['file']).name)}: {say(one['best'])}{unsure}")
    return [f"**DC scores.** {', '.join(best)}"]


def _evaluated(result: Mapping[str, Any], _: Say) -> list[str]:
    return [f"**Retention.**\n\n{code(result['table'])}"]


def _exported(result: Mapping[str, Any], say: Say) -> list[str]:
    notes = [say(note) for note in result.get("notes", ())]
    if not result["triggers"]:
        return ["No concept is left to export.", *notes]
    lora = say(f"<lora:{Path(result['lora']).stem}:1>") if result["lora"] else ""
    prompt = say(f"a photo of a {result['triggers'][-1]}")
    folder = f" The files are in {say(Path(result['lora']).parent)}." if result["lora"] else ""
    return [f"Prompts know it now: *{prompt}* {lora}".rstrip() + folder, *notes]


_ENDINGS: dict[str, Callable[[Mapping[str, Any], Say], list[str]]] = {
    "plan": _planned,
    "draw": _drawn,
    "learn": _learned,
    "consolidate": _consolidated,
    "closed_form": _solved,
    "forget": _forgotten,
    "rename": _renamed,
    "undo": _undone,
    "restore": _restored,
    "scores": _scored,
    "evaluate": _evaluated,
    "export": _exported,
}


def _holds(result: Mapping[str, Any], say: Say) -> str:
    return f"The stack now holds {say(', '.join(result['tokens']) or 'no concept')}."


def history(versions: Sequence[Version]) -> str:
    """The versions of a stack as HTML, the newest first."""
    rows = []
    for one in versions:
        cells = (
            one.number,
            one.when[:10],
            one.change,
            ", ".join(one.tokens) or "no concept",
            f"{one.size / 1e6:.1f} MB",
        )
        line = "".join(f"<td>{html(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{line}<td>{'in use' if one.current else ''}</td></tr>")
    head = "".join(
        f"<th align='left'>{name}</th>"
        for name in ("version", "date", "change", "holds", "size", "")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else "<p>No version yet.</p>"


def picture_of(encoded: str | None) -> Image.Image | None:
    """A preview as an image; None if there is none or it is invalid."""
    try:
        return Image.open(
            io.BytesIO(base64.b64decode(encoded or "", validate=True)), formats=["JPEG"]
        )
    except (OSError, ValueError):
        return None

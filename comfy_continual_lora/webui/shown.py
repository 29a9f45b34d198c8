"""What the tab and the API say of a job and of a stack.

Words, names and messages come from users, from files of strangers and from programs: `html` and
`markdown`
stand between them and a page, so that a page shows them and never obeys them.
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

from ..stackfile import Version
from .job import Job

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")  # all of ASCII's: Markdown gives a meaning to most
_JOINERS = "\u200c\u200d"  # several scripts and emoji are written with them


def visible(text: object) -> str:
    """Without what can't be seen or can't be sent: control and direction marks, half characters."""
    return "".join(
        c if c.isprintable() or c in _JOINERS else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def html(text: object) -> str:
    """As HTML that shows these very characters, between tags and inside quoted attributes."""
    return standard.escape(visible(text))


def markdown(text: object) -> str:
    """As Markdown that shows these very characters, line by line: no HTML, link, emphasis, code or
    heading.
    """
    lines = [
        _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", visible(line.rstrip()))
        for line in str(text).splitlines()
    ]
    return "<br>".join(
        re.sub("^ +", lambda found: "&nbsp;" * len(found[0]), line)
        for line in lines
        if line.strip()
    )


def code(text: object) -> str:
    """As a Markdown block of code, which nothing in it can end."""
    lines = [visible(line) for line in str(text).splitlines()]
    fence = "`" * max([3, *(1 + len(run) for line in lines for run in re.findall("`+", line))])
    return "\n".join([fence, *lines, fence])


def status(job: Job | None, say: Callable[[object], str] = markdown) -> str:
    """What goes on, how far, how long still; or how it ended.

    `say` is str where no Markdown is wanted of what is told.
    """
    if job is None:
        return "Ready."
    return "\n\n".join([_state(job, say), *map(say, job.notes)])


def _state(job: Job, say: Callable[[object], str]) -> str:
    state, told = job.state, job.progress
    if state == "failed":
        return f"**{say(job.name)} failed.** {say(job.message)}"
    if state == "stopped":
        return (
            f"**Stopped.** {say(job.message)}. What was learned so far is kept: the same request "
            "goes on from here."
        )
    if state == "done":
        return _ending(job.results, say)
    if not told or told["stage"] == "start":
        return "Starting the worker ..." if state != "stopping" else "Stopping ..."
    line = f"**{say(told['stage'])}** step {told['step']} of {told['steps']}"
    if told["loss"] is not None:
        line += f", loss {told['loss']:.4f}"
    if told["seconds_left"] is not None:
        line += f", {int(told['seconds_left']) // 60}:{int(told['seconds_left']) % 60:02d} left"
    return line + (
        " - stopping after this step ... (Stop once more ends it at once)"
        if state == "stopping"
        else ""
    )


def _ending(done: Mapping[str, Any], say: Callable[[object], str]) -> str:
    lines = []
    if "learn" in done:
        known = done["learn"]
        word = say(f"{known['token']} {known['noun']}")
        again = f"**{word} is on the stack already**, from these very pictures and settings."
        lines.append(again if known.get("again") else f"**Learned {word}**.")
    if "consolidate" in done:
        lines.append(
            f"**Consolidated {say(done['consolidate']['token'])}** in "
            f"{len(done['consolidate']['losses'])} steps."
        )
    if "closed_form" in done:
        found = done["closed_form"]
        shares = ", ".join(
            f"{say(name)} {share:.0%} (before {found['before'][name]:.0%})"
            for name, share in found["after"].items()
        )
        lines.append(
            f"**Consolidated in closed form**, rank {found['rank']}. Lost of what each concept's "
            f"own LoRA did: {shares}."
        )
    if "forget" in done:
        lines.append(
            f"**Forgot {say(done['forget']['token'])} {say(done['forget']['noun'])}.** LoRAs "
            "exported before still know it."
        )
    if "undo" in done:
        lines.append(f"**Took back: {say(done['undo']['change'])}.** {_holds(done['undo'], say)}")
    if "restore" in done:
        back = done["restore"]
        lines.append(
            f"**Went back to version {say(back['version'])}: {say(back['change'])}.** "
            f"{_holds(back, say)}"
        )
    if "scores" in done:
        best = [
            (Path(one["file"]).name, one["best"], "" if one["sure"] else " (not sure)")
            for one in done["scores"]["images"]
        ]
        lines.append(
            "**DC scores.** "
            + ", ".join(f"{say(name)}: {say(word)}{unsure}" for name, word, unsure in best)
        )
    if "evaluate" in done:
        lines.append(f"**Retention.**\n\n{code(done['evaluate']['table'])}")
    if "export" in done:
        out = done["export"]
        lora = say(f"<lora:{Path(out['lora']).stem}:1>") if out["lora"] else ""
        prompt = say(f"a photo of a {out['triggers'][-1]}") if out["triggers"] else ""
        lines.append(
            f"Prompts know it now: *{prompt}* {lora}".rstrip()
            if out["triggers"]
            else "No concept is left to export."
        )
        lines += [say(note) for note in out.get("notes", ())]
    return "\n\n".join(lines)


def _holds(done: Mapping[str, Any], say: Callable[[object], str]) -> str:
    return f"The stack holds {say(', '.join(done['tokens']) or 'no concept')} now."


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
        told = "".join(f"<td>{html(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{told}<td>{'in use' if one.current else ''}</td></tr>")
    head = "".join(
        f"<th align='left'>{name}</th>"
        for name in ("version", "date", "change", "holds", "size", "")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else "<p>No version yet.</p>"


def picture_of(encoded: str | None) -> Image.Image | None:
    """A preview; None for what is none."""
    try:
        return Image.open(
            io.BytesIO(base64.b64decode(encoded or "", validate=True)), formats=["JPEG"]
        )
    except (OSError, ValueError):
        return None


def table(concepts: Sequence[Mapping[str, Any]], kept: Mapping[str, float | None]) -> str:
    """The stack as HTML: preview, word, when and how, how much is kept as of the last evaluation."""
    if not concepts:
        return "<p>No concept learned yet.</p>"
    rows = []
    for one in concepts:
        share = kept.get(
            f"{one['token']} {one['noun']}" if one["with_noun"] else one["token"]
        )  # as an evaluation names it
        cells = (
            _thumbnail(one["preview"]),
            f"<b>{html(one['token'])}</b> {html(one['noun'])}",
            html(str(one["learned"])[:10]),
            html(f"{one['method']}, {one['steps']} steps, {one['images']} pictures"),
            "-" if share is None else f"{100 * share:.0f} %",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th align='left'>{name}</th>" for name in ("", "concept", "learned", "how", "kept")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _thumbnail(encoded: object) -> str:
    """An HTML picture, if it is one, in base64 of our own."""
    try:
        data = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except ValueError:
        return ""
    if not data.startswith(b"\xff\xd8\xff"):  # JPEG
        return ""
    return f'<img alt="" width="64" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'

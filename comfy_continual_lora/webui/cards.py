"""The parts of the page that are HTML: a card for each concept, the progress bar, thumbnails.

Everything that comes from files is escaped (`shown.html`); pictures are encoded again or are JPEGs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..progress import counted
from .job import Job
from .shown import html

_JPEG = b"\xff\xd8\xff"


def card(concept: Mapping[str, Any], drawing: bytes, kept: float | None) -> str:
    """A concept: its photograph beside how it was last drawn, its name, and how it was learned."""
    name = f"{concept['token']} {concept['noun']}"
    counts = f"{counted(concept['steps'], 'step')}, {counted(concept['images'], 'picture')}"
    how = f"{concept['method']}, {counts}"
    share = "" if kept is None else f"<b>{100 * kept:.0f} % kept</b> at the last check. "
    photo = _image(_decoded(concept["preview"]), f"One of the pictures of {name}")
    drawn = _image(drawing, f"{name}, as it was last drawn")
    return (
        "<div class='cl-pair'>"
        f"<figure>{photo or _none('no picture')}photo</figure>"
        f"<figure>{drawn or _none('not drawn yet')}drawn</figure></div>"
        f"<div class='cl-name'>{html(concept['token'])} {html(concept['noun'])}</div>"
        f"<div class='cl-more'>{share}{html(str(concept['learned'])[:10])}: {html(how)}</div>"
    )


def no_card(message: str) -> str:
    """In place of the cards."""
    return f"<p>{html(message)}</p>"


def bar(job: Job | None) -> str:
    """The progress of a running job; empty if there is none."""
    if job is None or job.state not in ("starting", "running", "stopping"):
        return ""
    now = job.progress
    share = 100 * now["step"] / now["steps"] if now and now["steps"] else 0
    done = round(min(100.0, max(0.0, share)))
    stage = html(now.get("stage", "start"))
    return (
        f"<div class='cl-bar' role='progressbar' aria-valuemin='0' aria-valuemax='100' "
        f"aria-valuenow='{done}' aria-label='{stage}'><div style='width: {done}%'></div></div>"
    )


def thumbnail(name: str, picture: Image.Image | None) -> str:
    """A dropped picture above its name."""
    shown = _none("can't be read")
    if picture is not None:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=85)
        shown = _image(buffer.getvalue(), name)
    return f"<div class='cl-thumb'>{shown}<br>{html(name)}</div>"


def _none(text: str) -> str:
    return f"<div class='cl-none'>{html(text)}</div>"


def _decoded(encoded: object) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except ValueError:
        return b""


def _image(data: bytes, alt: str) -> str:
    """An HTML image, encoded in base64 by us; empty if the data is not a JPEG."""
    if not data.startswith(_JPEG):
        return ""
    encoded = base64.b64encode(data).decode()
    return f"<img alt='{html(alt)}' src='data:image/jpeg;base64,{encoded}'>"

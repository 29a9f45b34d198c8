"""The parts of the page that are HTML: a card for each concept, the progress bar, thumbnails, and the
style of all.

Everything that comes from files is escaped (`shown.html`); pictures are encoded again or are JPEGs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from .job import Job
from .shown import html

_JPEG = b"\xff\xd8\xff"
# Colours by the host's own variables where it has them; ids, since gradio 3 gives rows no classes.
STYLE = """
#continual_lora_style { display: none }
#continual_lora_page { --cl-soft: #52525b; --block-info-text-color: #52525b;
  --body-text-color-subdued: #52525b; --block-label-text-color: #3f3f46;
  --block-title-text-color: #27272a; --input-placeholder-color: #71717a;
  --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
  --button-primary-text-color: #ffffff; --button-primary-text-color-hover: #ffffff }
.dark #continual_lora_page { --cl-soft: #d4d4d8; --block-info-text-color: #d4d4d8;
  --body-text-color-subdued: #d4d4d8; --block-label-text-color: #e4e4e7;
  --block-title-text-color: #f4f4f5; --input-placeholder-color: #a1a1aa }
#continual_lora_page button:focus-visible { outline: 3px solid #2563eb; outline-offset: 2px }
#continual_lora_page [id^=continual_lora_card_] { max-width: 340px; padding: 8px;
  border: 1px solid var(--border-color-primary, #d4d4d8); border-radius: 8px }
#continual_lora_page [id^=continual_lora_slot_] { max-width: 190px }
.cl-pair { display: flex; gap: 6px }
.cl-pair figure { flex: 1; margin: 0; min-width: 0; text-align: center; font-size: 12px;
  color: var(--cl-soft) }
.cl-pair img, .cl-none { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px;
  margin: 0 }
.cl-none { display: flex; align-items: center; justify-content: center; padding: 4px;
  border: 1px dashed var(--cl-soft); box-sizing: border-box }
.cl-name { font-weight: 600; font-size: 16px; overflow-wrap: anywhere }
.cl-more { font-size: 13px; color: var(--cl-soft) }
.cl-bar { height: 10px; border-radius: 5px; overflow: hidden; background: #d4d4d8 }
.cl-bar div { height: 100%; background: #c2410c; transition: width .5s }
.dark .cl-bar { background: #52525b }
.dark .cl-bar div { background: #fb923c }
.cl-thumb img { width: 100%; max-height: 150px; object-fit: contain; border-radius: 6px; margin: 0 }
.cl-thumb { font-size: 12px; color: var(--cl-soft); overflow-wrap: anywhere }
#continual_lora_history table { width: 100% }
"""


def card(concept: Mapping[str, Any], drawing: bytes, kept: float | None) -> str:
    """A concept: its photograph beside how it was last drawn, its name, and how it was learned."""
    name = f"{concept['token']} {concept['noun']}"
    how = f"{concept['method']}, {concept['steps']} steps, {concept['images']} pictures"
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
    return f"<p>{html(message)}</p>" if message else ""


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

"""Stage 8: the HTML report: one file without scripts or external resources, for wide and narrow
screens, light and dark. Everything that is given as text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from PIL import Image

from .curves import smoothed
from .progress import counted

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --page: #fff; --box: #f3f4f6;
        --line: #d1d9e0; --curve: #0969da; --good: #1a7f37; --bad: #c0392b }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #9aa4af; --page: #14171b; --box: #20252b; --line: #3a424b;
          --curve: #6cb0ff; --good: #57c46b; --bad: #ff8a7a } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 0 auto;
       padding: 1.5rem 1rem 3rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
     padding-top: 1.25rem }
figure { margin: 1rem 0 1.4rem } figcaption { margin-top: .3rem }
figcaption, .soft { color: var(--soft); font-size: .9rem }
.row { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) }
.row img, .pair img { width: 100%; height: auto; border-radius: 6px; display: block }
@media (max-width: 600px) { .row { grid-template-columns: repeat(4, 1fr) } }
.pair { display: grid; gap: 10px; grid-template-columns: repeat(3, 1fr); max-width: 560px }
.pair div { font-size: .9rem; color: var(--soft) } .pair b { color: var(--text) }
.good { color: var(--good) } .bad { color: var(--bad) }
svg { width: 100%; max-width: 560px; height: auto; display: block }
pre { background: var(--box); border-radius: 6px; padding: .6rem .8rem; overflow-x: auto;
      user-select: all; font: .85rem/1.5 ui-monospace, monospace; margin: .3rem 0 1rem;
      white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left }
summary { cursor: pointer; color: var(--soft) } code { overflow-wrap: anywhere }
"""


def figure(images: Sequence[Image.Image], caption: str, alts: Sequence[str] = ()) -> str:
    """Images side by side with a caption; `alts` says what each shows, if the caption does not."""
    texts = alts or [f"{caption} ({n} of {len(images)})" for n in range(1, len(images) + 1)]
    tags = "".join(_image(image, text) for image, text in zip(images, texts, strict=True))
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure><div class="row">{tags}</div>{caption}</figure>'


def first_and_now(
    name: str,
    pictures: Sequence[tuple[Image.Image, str]],
    verdict: str,
    good: bool | None = None,
) -> str:
    """A concept's pictures beside each other, such as a real one, when it was new, and now, each
    with a line on it; then what to think of it.
    """
    cells = "".join(
        f"<div>{_image(image, f'{name}: {line}')}{html.escape(line)}</div>"
        for image, line in pictures
    )
    kind = {True: "good", False: "bad", None: ""}[good]
    return (
        f'<figure><div class="pair">{cells}</div>'
        f'<figcaption class="{kind}">{html.escape(verdict)}</figcaption></figure>'
    )


def curve(values: Sequence[float], caption: str, *, width: int = 560, height: int = 150) -> str:
    """A loss curve as SVG: the running mean over a twentieth of the steps."""
    smooth = smoothed(values)
    low, high = min(smooth), max(smooth)
    spread = high - low or 1.0
    across, down = (width - 60) / max(1, len(smooth) - 1), (height - 35) / spread
    points = " ".join(
        f"{45 + i * across:.1f},{10 + (high - v) * down:.1f}" for i, v in enumerate(smooth)
    )
    text = html.escape(caption)
    said = html.escape(f"{caption}: from {smooth[0]:.3f} to {smooth[-1]:.3f}")
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">'
        f'<polyline points="{points}" fill="none" stroke="var(--curve)" stroke-width="2"/>'
        f'<g font-size="12" fill="var(--soft)"><text x="0" y="15">{high:.3f}</text>'
        f'<text x="0" y="{height - 24}">{low:.3f}</text>'
        f'<text x="45" y="{height - 6}">step 1</text><text x="{width - 15}" y="{height - 6}" '
        f'text-anchor="end">{len(values)}</text></g></svg><figcaption>{text}</figcaption></figure>'
    )


def settings_table(values: Mapping[str, object], heading: str = "Settings") -> str:
    """Names and values, folded away."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<details><summary>{html.escape(heading)}</summary><table>{rows}</table></details>"


def command(what: str, words: Sequence[str]) -> str:
    """A command to copy, with what it does; one click selects all of it."""
    return f"<p>{html.escape(what)}</p><pre>{html.escape(pasted(words))}</pre>"


def pasted(words: Sequence[str]) -> str:
    """A command as this system's shell takes it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def page(title: str, intro: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A whole HTML page; section bodies are HTML made by the functions above."""
    body = "".join(
        f"<section><h2>{html.escape(heading)}</h2>{''.join(parts)}</section>"
        for heading, parts in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{paragraph(intro)}{body}</body></html>"
    )


def duration(seconds: float) -> str:
    """In the words of people: "40 seconds", "24 minutes", "1 hour 5 minutes"."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    minutes = round(seconds / 60)
    if minutes < 90:
        return counted(minutes, "minute")
    hours, rest = divmod(minutes, 60)
    whole = counted(hours, "hour")
    return f"{whole} {counted(rest, 'minute')}" if rest else whole


def _image(image: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = image.size
    return (
        f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )

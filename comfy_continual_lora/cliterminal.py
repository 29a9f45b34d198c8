"""What the terminal can show: colours, and how wide it is. Light."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TextIO

_STYLES = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


def styled(text: str, style: str, stream: TextIO) -> str:
    """The text in a style if the stream is a terminal that shows it, and NO_COLOR is not set."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if _has_colours(stream) else text


def _has_colours(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return False
    return os.name != "nt" or "WT_SESSION" in os.environ or "ANSICON" in os.environ


def wrapped(text: str) -> str:
    """The lines of a message as wide as the terminal, and never wider than is easy to read."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    lines = [
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def said(message: str, style: str, stream: TextIO) -> str:
    """A wrapped message of this program, whose name in front is in a style."""
    name, _, rest = wrapped(f"continual-lora: {message}").partition(":")
    return f"{styled(name, style, stream)}:{rest}"

"""What our exported files say of themselves. Light; the web UI imports it."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import OWNER, PRESET, TOKEN, WORDS, metadata_in
from ..presets import PRESETS
from ..stackfile import read_header

_LONGEST = 200  # characters of a class noun


def words_of(path: Path) -> tuple[dict[str, str], str]:
    """The class nouns of the words that a LoRA is for, by the names of their embeddings or as plain
    text, and its kind of checkpoint; none for any other file than an export of ours.
    """
    metadata = metadata_in(path)
    try:
        words, preset = json.loads(metadata.get(WORDS, "{}")), metadata.get(PRESET, "")
    except (ValueError, RecursionError):
        return {}, ""
    if preset not in PRESETS or not isinstance(words, dict):
        return {}, ""
    for word, noun in words.items():
        if not TOKEN.fullmatch(word) or not isinstance(noun, str) or len(noun) > _LONGEST:
            return {}, ""
    return words, preset


def exports_of(folder: Path, stack: Path) -> list[Path]:
    """The LoRAs and embeddings that were exported from a stack, the newest first.

    Errors: StackError, OSError for a file that is not a stack.
    """
    owner = read_header(stack)["identity"] if stack.exists() else ""
    files = folder.glob("*.safetensors") if owner else ()
    own = [path for path in files if metadata_in(path).get(OWNER) == owner]
    return sorted(own, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_lora(folder: Path, stack: Path, token: str) -> Path | None:
    """The newest exported LoRA of a stack that knows the word; None if there is none.

    Errors: as `exports_of`.
    """
    return next((one for one in exports_of(folder, stack) if token in words_of(one)[0]), None)

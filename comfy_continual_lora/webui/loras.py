"""What our exported LoRAs say of their words. Light; the web UI imports it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..areas import FINE
from ..files import PRESET, TOKEN, WORDS, stack_stem

_LONGEST = 200  # characters of a class noun


def words_of(path: Path) -> tuple[dict[str, str], str]:
    """The class nouns of the words that a LoRA is for, by the names of their embeddings, and its kind
    of checkpoint; none for any other file than an export of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        words, preset = json.loads(metadata.get(WORDS, "{}")), metadata.get(PRESET, "")
    except (OSError, SafetensorError, ValueError, RecursionError):
        return {}, ""
    if preset not in FINE or not isinstance(words, dict):
        return {}, ""
    for word, noun in words.items():
        if not TOKEN.fullmatch(word) or not isinstance(noun, str) or len(noun) > _LONGEST:
            return {}, ""
    return words, preset


def newest_lora(folder: Path, stack: Path, token: str) -> Path | None:
    """The newest exported LoRA of a stack that knows the word; None if there is none."""
    start = stack_stem(stack)
    found = [path for path in folder.glob("*.safetensors") if path.name.startswith(f"{start}-")]
    known = [path for path in found if token in words_of(path)[0]]
    return max(known, key=lambda path: path.stat().st_mtime, default=None)

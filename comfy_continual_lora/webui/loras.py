"""What our exported files say of themselves. Light; the web UI imports it."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import OWNER, PRESET, TOKEN, WORD, WORDS, metadata_in
from ..presets import PRESETS
from ..stackfile import read_header
from ..stackschema import owner_of

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
    owner = _owner(stack)
    files = folder.glob("*.safetensors") if owner else ()
    own = [path for path in files if metadata_in(path).get(OWNER) == owner]
    return sorted(own, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_lora(folder: Path, embeddings: Path, stack: Path, token: str) -> tuple[Path, str] | None:
    """The newest exported LoRA of a stack that knows the word, and how prompts name it there: by its
    embedding, which has another name if a stranger's has the word's; None if there is none.

    Errors: as `exports_of`.
    """
    owner, of = _owner(stack), {token: token}  # the word of each embedding
    for path in sorted(embeddings.glob(f"{token}*.safetensors")):
        metadata = metadata_in(path)
        if metadata.get(OWNER) == owner:
            of[path.stem] = metadata.get(WORD, path.stem)
    names = [name for name, word in of.items() if word == token]
    for lora in exports_of(folder, stack):
        words = words_of(lora)[0]
        if name := next((name for name in names if name in words), None):
            return lora, name
    return None


def _owner(stack: Path) -> str:
    """Whose a stack's exports are; empty if there is no stack. Errors: as `exports_of`."""
    if not stack.exists():
        return ""
    header = read_header(stack)
    concepts = [concept["id"] for concept in header["concepts"]]
    return owner_of(header["identity"], header["fingerprint"], concepts)

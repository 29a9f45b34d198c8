"""Stage 7: the stack -> files everyone can load: one LoRA, and one textual-inversion embedding for
each word; `stock` makes the tensors.

in: a stack - out: in a folder <name>.safetensors (the LoRA, with its trigger words in the metadata;
PEFT's format is a folder <name>), <name>.json and <name>.preview.jpg (A1111's card), and
<token>.safetensors for each word. A LoRA file is never overwritten: web UIs keep old weights and
hashes of a name they know. The metadata of a file say whose it is, and only files of the same stack
are overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .adapters.adapter import layers_of
from .errors import StackError
from .exported import CARD, Exported
from .files import (
    OWNER,
    PRESET,
    TOKEN,
    WORD,
    WORDS,
    check_path_length,
    clean_temporary,
    is_reserved,
    metadata_in,
    write_whole,
)
from .settings import FORMATS
from .stack import ConceptRecord, ConceptStack
from .stock import card, embedding, metadata_of, rank_in, stock_lora
from .words import name_of

# A file's owner: the stack's identity (OWNER), the word of an embedding (WORD), and the concepts a
# LoRA was solved for (empty for all)
_ONLY = "continual_lora.only"
# suffixes that some program loads as an embedding, named by the file's stem
_EMBEDDINGS = (".safetensors", ".pt", ".bin", ".png", ".webp", ".jxl", ".avif")


def export_files(
    stack: ConceptStack,
    out: Path,
    embeddings: Path,
    stem: str,
    format: str = "kohya",
    only: Sequence[str] = (),
    remove: bool = False,
    words: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write the files; the LoRA is named after the stack and its concepts, and ends in a hash.

    `stem` names the stack, `only` the concepts it was solved for, if not all; `remove` removes
    earlier exports of the same concepts; `words` are all of the stack's, if it has more; `metadata`
    is more for the LoRA's. A version before the newest supersedes nothing, and no LoRA the same one
    in another format. Only files of this stack are overwritten: if another file has a word's name, the
    word is exported under a new one, which is no other word's.
    Errors: StackError for an empty stack or a folder that can't be written.
    """
    _check_exportable(stack)
    _check_paths(stack, out, embeddings, stem, format)
    tensors = stock_lora(stack, format)
    lora = None
    try:
        with _exporting(out, embeddings):
            written = _write_words(stack, embeddings, words)
            # one without vectors is named by its word itself
            names = {
                token: written[token].stem if token in written else token for token in stack.tokens
            }
            triggers = [
                name_of(names[record.token], record.noun if record.with_noun else "")
                for record in stack.records
            ]
            if tensors:
                nouns = {names[record.token]: record.noun for record in stack.records}
                more = {**(metadata or {}), _ONLY: _joined(only), WORDS: json.dumps(nouns)}
                lora = _write_lora(stack, tensors, out, stem, triggers, format, more)
            current = (lora, *written.values())
            is_newest = bool(only) or {*words} <= stack.tokens.keys()
            found = _earlier(stack, out, embeddings, only) if is_newest else []
            others = [path for path in found if path not in current]
            if lora:
                _make_newest(lora, others)
            same = _names(stack, stem, triggers) if others else ()
            earlier = [
                path for path in others if path.name.removesuffix(".safetensors") not in same
            ]
            removed = [path for path in earlier if remove and _remove(path)]
    except OSError as error:
        raise StackError(
            f"The export to {out} failed ({error.strerror or error}): no room or no permission "
            "there. The stack is unchanged."
        ) from None
    return Exported(
        lora,
        list(written.values()),
        triggers,
        {token: path.stem for token, path in written.items() if path.stem != token},
        [path for path in earlier if path not in removed],
        removed,
        stack.checkpoint.clip_skip,
        _read_in_part(stack, written) if format in ("diffusers", "peft") else (),
    )


def _read_in_part(stack: ConceptStack, written: Mapping[str, Path]) -> list[str]:
    """The names of words with several vectors that are not in lower case.

    diffusers (0.42, `maybe_convert_prompt`) looks for a word's further vectors by what its tokenizer
    made of the prompt, which is in lower case.
    """
    names = {token: path.stem for token, path in written.items() if len(stack.tokens[token]) > 1}
    return [name for name in names.values() if name != name.lower()]


def _check_paths(stack: ConceptStack, out: Path, embeddings: Path, stem: str, format: str) -> None:
    """Errors: StackError if a path will be longer than the system allows."""
    tokens = [record.token for record in stack.records]
    name = lora_name(stem, tokens, "0" * 8)
    inside = f"{name}/adapter_model.safetensors" if format == "peft" else f"{name}.preview.jpg"
    check_path_length(out / inside)
    check_path_length(embeddings / f"{max(tokens, key=len)}-9999.safetensors")


def _check_exportable(stack: ConceptStack) -> None:
    """Errors: StackError for an empty stack, and for a word that can't name a file."""
    if not stack.records:
        raise StackError(
            "The stack holds no concept, so there is nothing to export. Learn one first."
        )
    for record in stack.records:
        if not TOKEN.fullmatch(record.token) or is_reserved(record.token):
            raise StackError(
                f"The word {record.token!r} can't be a file name. It may contain only letters, "
                "digits, - and _, and be no device of Windows, such as nul. Give the concept another "
                "word first."
            )


@contextmanager
def _exporting(*folders: Path) -> Iterator[None]:
    """Inside the block the folders exist and no other export changes them.

    Files that killed exports left there are cleaned up first.
    """
    with ExitStack() as locks:
        # `Path.resolve` raises for a loop of links
        for folder in sorted({Path(os.path.realpath(folder)) for folder in folders}):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".continual-lora.lock", timeout=60))
            except Timeout:
                raise StackError(
                    f"Another program has been exporting to {folder} for a minute. Wait until it "
                    "is done, or stop it."
                ) from None
            clean_temporary(folder)
        yield


def _taken(folder: Path) -> dict[str, list[Path]]:
    """The files that some program loads as an embedding, by name in lower case."""
    taken: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if path.suffix.lower() in _EMBEDDINGS:
            taken.setdefault(path.stem.lower(), []).append(path)
    return taken


def _write_words(stack: ConceptStack, folder: Path, words: Iterable[str]) -> dict[str, Path]:
    """Write the embedding of each word that has vectors; returns their files by word. `words` as in
    `export_files`.
    """
    taken = _taken(folder)
    own = {token.lower() for token in (*words, *stack.tokens)}
    return {
        record.token: _write_word(stack, record, folder, taken, own)
        for record in stack.records
        if len(stack.words[record.id])
    }


def _write_word(
    stack: ConceptStack,
    record: ConceptRecord,
    folder: Path,
    taken: dict[str, list[Path]],
    words: Collection[str],
) -> Path:
    """Write the embedding under its word's name, numbered if that is another file's, and then not as
    one of the stack's `words`; update `taken`.
    """
    tensors = {
        name: tensor.contiguous()
        for name, tensor in embedding(stack.words[record.id], stack.checkpoint).items()
    }
    data = save(tensors, {OWNER: stack.owner, WORD: record.token})
    for number in range(1, 10_000):
        name = record.token if number == 1 else f"{record.token}-{number}"
        if number > 1 and name.lower() in words:
            continue
        path = folder / f"{name}.safetensors"
        others = taken.get(path.stem.lower(), [])
        if all(other == path and _is_own(other, stack, record, tensors) for other in others):
            write_whole(path, data, new=not others)
            taken[path.stem.lower()] = [path]
            return path
    raise StackError(f"{folder} has no free name for {record.token}. Export to another folder.")


def _is_own(
    path: Path, stack: ConceptStack, record: ConceptRecord, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether an embedding's file is this stack's for this word, or for another under this word's
    name, which it had before the word was learned.

    A file without an owner, as early versions wrote it, counts if it holds the same vectors.
    """
    owner = _owner(path)
    if owner.get(OWNER):
        return owner[OWNER] == stack.owner and record.token in (owner.get(WORD), path.stem)
    try:
        existing = load_file(path)
    except (SafetensorError, OSError):
        return False
    return existing.keys() == tensors.keys() and all(
        torch.equal(existing[name], tensor) for name, tensor in tensors.items()
    )


def _owner(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of the one in a PEFT folder; empty for any other."""
    return metadata_in(path / "adapter_model.safetensors" if path.is_dir() else path)


def _earlier(stack: ConceptStack, out: Path, embeddings: Path, only: Sequence[str]) -> list[Path]:
    """LoRAs of the same stack and concepts, and embeddings of words that the stack no longer has."""
    earlier = []
    for path in sorted(out.iterdir()):
        owner = _owner(path) if path.suffix == ".safetensors" or path.is_dir() else {}
        if owner.get(OWNER) == stack.owner and owner.get(_ONLY) == _joined(only):
            earlier.append(path)
    if only:
        return earlier
    current = {"", *stack.tokens}
    for path in sorted(embeddings.glob("*.safetensors")):
        owner = _owner(path)
        if owner.get(OWNER) == stack.owner and owner.get(WORD, "") not in current:
            earlier.append(path)
    return earlier


def _make_newest(lora: Path, earlier: Iterable[Path]) -> None:
    """Have a LoRA that was exported before follow those that came after it, if there are any: the
    stack went back to what it holds, and `webui.loras` chooses the newest.
    """
    with suppress(OSError):  # else the other is chosen
        written = lora.stat().st_mtime
        if any(path.stat().st_mtime > written for path in earlier):
            lora.touch()


def _joined(only: Sequence[str]) -> str:
    return ",".join(sorted(token.lower() for token in only))


def _remove(path: Path) -> bool:
    """Remove an export with its card and preview; returns whether it is gone."""
    try:
        if path.is_dir():
            for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
                (path / name).unlink(missing_ok=True)
            path.rmdir()
        else:
            path.unlink()
            for ending in CARD:
                path.with_suffix(ending).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def lora_name(stem: str, tokens: Sequence[str], digest: str) -> str:
    """`sd15-V1-V2-1a2b3c4d`; for more than four concepts, only the first and the last.

    Characters that break a prompt's <lora:...> or a file system become hyphens, and a name that
    Windows reserves for a device begins with _.
    """
    words = "-".join(tokens)
    if len(tokens) > 4:
        words = f"{tokens[0]}-to-{tokens[-1]}-{len(tokens)}-concepts"
    safe = re.sub(r'[<>:,|?*/&"\\\0-\x1f]', "-", stem)[:100]
    name = f"{safe}-{words[:100]}-{digest[:8]}"
    return f"_{name}" if is_reserved(name) else name


def _names(stack: ConceptStack, stem: str, triggers: list[str]) -> list[str]:
    """The names of the stack's LoRA as it is now, in each format that can hold it."""
    names = []
    for format in FORMATS:
        with suppress(StackError):
            names.append(_name(stack, stock_lora(stack, format), stem, triggers))
    return names


def _name(
    stack: ConceptStack, tensors: Mapping[str, Tensor], stem: str, triggers: list[str]
) -> str:
    """The name of a LoRA, which ends in a hash of what it holds and whose it is."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    digest.update(json.dumps([triggers, stack.owner]).encode())
    return lora_name(stem, [record.token for record in stack.records], digest.hexdigest())


def _write_lora(
    stack: ConceptStack,
    tensors: dict[str, Tensor],
    out: Path,
    stem: str,
    triggers: list[str],
    format: str,
    more: Mapping[str, str],
) -> Path:
    """`more`: metadata beside what every LoRA of the stack has."""
    name = _name(stack, tensors, stem, triggers)
    rank = rank_in(tensors)
    metadata = {
        **more,
        **metadata_of(stack, name, triggers, rank),
        OWNER: stack.owner,
        PRESET: stack.checkpoint.preset,
    }
    if format == "peft":
        from peft import LoraConfig  # takes seconds

        folder = out / name
        assert rank  # only kohya's layout takes full-size changes
        layers = list(layers_of(stack.adapter or {}))
        folder.mkdir(exist_ok=True)  # PEFT asserts that there is no file
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        config.save_pretrained(str(folder))  # whatever is there: it may be of an earlier version
        if _owner(folder) != metadata:
            write_whole(folder / "adapter_model.safetensors", save(tensors, metadata))
        return folder
    # the hash covers the owner, so no other stack's file has this name
    path = out / f"{name}.safetensors"
    before = _owner(path)
    if before != metadata:  # else it was exported before
        write_whole(path, save(tensors, metadata), new=not before.get(OWNER))
    if format == "kohya":
        for ending, data in card(stack, triggers).items():
            beside = out / f"{name}{ending}"
            if not beside.exists():
                write_whole(beside, data, new=True)
    return path

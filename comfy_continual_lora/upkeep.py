"""Operations on a stack's file alone: what it holds, its history, undo, another word. Light: no
tensor is loaded, so that they take a fraction of a second.

Part of the pipeline, which re-exports these functions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import history as stack_history
from .checkpoint.path import check_path
from .errors import SettingError, StackError, TokenError
from .files import STACKS, check_names, real_file, snapshots_of, stack_path
from .keeping import add_version, new_change, rewrite, writing
from .listing import checkpoint_of, checkpoints_in
from .mentions import in_other_words
from .presets import PLAIN_NAME_PRESETS
from .progress import OnProgress, ignore
from .requests import (
    HistoryRequest,
    InfoRequest,
    RenameRequest,
    Request,
    RestoreRequest,
    UndoRequest,
)
from .results import (
    HistoryResult,
    InfoResult,
    Listed,
    ListResult,
    RenameResult,
    RestoreResult,
    UndoResult,
)
from .stackfile import read_header, read_shapes
from .stackschema import unreadable
from .versions import earlier, versions
from .words import check_apart, check_noun, check_token, is_ordinary, name_in, position_of


def info(request: InfoRequest, on_progress: OnProgress = ignore) -> InfoResult:
    """What a checkpoint has learned, from the stack's header."""
    path = request.stack_file
    if not path.exists():
        check_path(request.checkpoint)
        return InfoResult([], path, None, None, 0)
    header, shapes = read_shapes(path)
    newest = f"word.{header['concepts'][-1]['id']}" if header["concepts"] else ""
    used = [shape for key, shape in shapes.items() if key.startswith("adapter.") or key == newest]
    trainable = sum(math.prod(shape.sizes) for shape in used)
    return InfoResult(
        header["concepts"],
        path,
        header["fingerprint"],
        header["rank"],
        trainable,
        header["base"]["clip_skip"],
    )


def history(request: HistoryRequest, on_progress: OnProgress = ignore) -> HistoryResult:
    """The stack's versions that are kept, the newest first; `keep` sets how many from now on."""
    if request.keep is not None:
        stack_history.keep_versions(request.stack_file, request.keep)
    elif not request.stack_file.exists():
        check_path(request.checkpoint)
    return HistoryResult(versions(request.stack_file), request.stack_file)


def undo(request: UndoRequest, on_progress: OnProgress = ignore) -> UndoResult:
    """Undo the last change of the stack, whatever it was."""
    return stack_history.undo(_existing(request), request.version)


def restore(request: RestoreRequest, on_progress: OnProgress = ignore) -> RestoreResult:
    """Go back to a version of the history; the one in use now stays in it."""
    return RestoreResult(stack_history.restore(_existing(request), request.version))


def _existing(request: Request) -> Path:
    """The stack's file, so that nothing is written, not even a lock, where there is none.

    Errors: StackError if there is neither a stack nor an earlier version of it; CheckpointError if
    there is no checkpoint either.
    """
    path = request.stack_file
    if not real_file(path).exists() and not earlier(path):
        if request.stack is None:
            check_path(request.checkpoint)
        raise unreadable(path, FileNotFoundError())
    return path


def stacks_in(folder: Path) -> ListResult:
    """The checkpoints in a folder and those below it, with their stacks.

    Errors: SettingError if it is not a folder, or one that this user may not read.
    """
    try:
        if not folder.is_dir():
            raise SettingError(f"There is no folder {folder}. Give one with checkpoints.")
        os.listdir(folder)
    except OSError as error:
        raise SettingError(
            f"The folder {folder} can't be read ({error.strerror or error}). Give this user "
            "permission to read it, or name another."
        ) from None
    checkpoints = checkpoints_in(folder)
    known = set(checkpoints)
    stacks: dict[Path | None, list[Path]] = {}
    for stack in sorted(folder.rglob(f"*{STACKS}")):
        stacks.setdefault(checkpoint_of(stack, known), []).append(stack)
    rows: list[Listed] = []
    for checkpoint in checkpoints:
        own = stacks.get(checkpoint, [])
        if (usual := _usual_stack(checkpoint)) and usual not in own:
            own = [usual, *own]
        rows += [_listed(checkpoint, stack) for stack in own] or [Listed(checkpoint)]
    # of diffusers folders, and of checkpoints that are elsewhere
    rows += [_listed(None, stack) for stack in stacks.get(None, ())]
    return ListResult(folder, rows)


def _usual_stack(checkpoint: Path) -> Path | None:
    """The stack of this checkpoint that has no name, if there is one; a link has its target's."""
    try:
        path = stack_path(checkpoint)
    except OSError:  # a link into a folder that this user may not enter
        return None
    return path if os.path.exists(path) else None


def _listed(checkpoint: Path | None, stack: Path) -> Listed:
    try:
        names = [name_in(record) for record in read_header(stack)["concepts"]]
    except StackError as error:
        return Listed(checkpoint, stack, problem=str(error))
    return Listed(checkpoint, stack, names)


def rename(request: RenameRequest, on_progress: OnProgress = ignore) -> RenameResult:
    """Give a concept another word; its vectors and what the LoRA knows of it stay as they are.

    Its prompts, and what later concepts' captions say of it, name the new word too. The version
    before goes into the history. Errors: StackError for a word that is not on the stack, or a
    checkpoint whose names are plain text; TokenError for a new one that is taken, a word of another
    concept's noun, or can't be used.
    """
    path = real_file(_existing(request))
    with writing(path):
        header = read_header(path)
        records = header["concepts"]
        tokens = [record["token"] for record in records]
        number = position_of(request.token, tokens)
        old, new = tokens[number], request.to
        if header["base"]["preset"] in PLAIN_NAME_PRESETS:
            raise StackError(
                f"{old} can't be renamed: names on this checkpoint are plain text, and the LoRA knows "
                f"the thing by the text {old} alone."
            )
        if new.lower() == old.lower():
            raise TokenError(f"{old} and {new} are the same word: prompts take any case for it.")
        if new.lower() in map(str.lower, tokens):
            raise TokenError(f"{new} is another concept's word. Choose one that is free.")
        check_token(new, (), is_ordinary)
        check_noun(records[number]["noun"], new)
        others = {one["token"]: one["noun"] for one in records if one["token"] != old}
        check_apart(new, "", others)
        check_names(path, new)
        names = {token: new if token == old else token for token in tokens}
        renamed = [_renamed(record, names) for record in records[number:]]
        name = name_in(renamed[0])
        change = new_change("renamed", [f"{name_in(records[number])} to {name}"])
        concepts = [*records[:number], *renamed]

        def write(number: int, parent: int | None) -> None:
            changed = {"number": number, "parent": parent, "change": vars(change)}
            rewrite(path, path, {**changed, "concepts": concepts})

        add_version(path, header["history"], write)
    unfinished = [*snapshots_of(path, old), *snapshots_of(path, new)]
    return RenameResult(old, new, name, request.stack_file, unfinished)


def _renamed(record: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A record where concepts of its stack have other words, by their old ones; the request that
    made it had the old one, so it is no longer its own.
    """
    prompts = [in_other_words(prompt, names) for prompt in record["prompts"]]
    if (new := names[record["token"]]) == record["token"]:
        return {**record, "prompts": prompts}
    return {**record, "token": new, "prompts": prompts, "request": ""}

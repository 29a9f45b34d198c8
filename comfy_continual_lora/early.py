"""Mistakes that files and words of a request show, found before torch is imported and anything is
loaded.

The pipeline finds them too, but some only once the checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint.path import check_path
from .errors import CheckpointError, ConceptImagesError, SettingError, StackError
from .files import check_names, real_file, standing_at
from .inventory import groups, inventory
from .requests import (
    ConsolidateRequest,
    DrawRequest,
    EvaluateRequest,
    ExportRequest,
    ForgetRequest,
    ImportRequest,
    LearnRequest,
    MergeRequest,
    Request,
    ScoreRequest,
    SolveRequest,
)
from .stackfile import read_header
from .words import check_apart, check_newest, check_noun, check_spelling, check_token, is_ordinary


def check(request: Request) -> None:
    """Errors: the ContinualLoraError for the first mistake that can be seen without torch."""
    request.check()
    if not isinstance(request, ExportRequest) or request.only:
        check_path(request.checkpoint)
    for kind, look in _CHECKS.items():
        if isinstance(request, kind):
            look(request)


def check_learn(request: LearnRequest) -> None:
    """Errors: ConceptImagesError, TokenError, SettingError, StackError."""
    check_path(request.checkpoint)
    inventory(request.images)
    check_spelling(request.token)
    check_noun(request.noun, request.token, required=True)
    check_names(request.stack_file, request.token)
    if request.settings.preview_prompts.strip() and not request.settings.preview_every:
        raise SettingError(
            "`preview_prompts` are never drawn: `preview_every` is 0. Set it, such as to 100 steps."
        )
    records = _records(request)
    tokens = [record["token"] for record in records]
    if request.token.lower() in map(str.lower, tokens):
        if request.digest in (record["request"] for record in records):
            return  # it was learned before, and nothing will be done
        if request.replace:
            check_newest(request.token, tokens[-1])
            del records[-1], tokens[-1]
    check_token(request.token, tokens, is_ordinary)
    check_apart(request.token, request.class_noun, _nouns(records))
    _check_writable(request.stack_file)


def _check_writable(stack: Path) -> None:
    """Errors: StackError if the stack's folder could not be made or written to."""
    there, fits = standing_at(real_file(stack).absolute().parent)
    if not fits:
        reason = "no permission to write in it" if there.is_dir() else "it is a file"
        raise StackError(
            f"The concept stack {stack} can't be stored in {there}: {reason}. Allow writing there, or "
            "name another `stack`."
        )


def _draw(request: DrawRequest) -> None:
    texts = [one for p in request.prompts for one in ([p] if isinstance(p, str) else p)]
    if not any(text.strip() for text in texts):
        raise SettingError("`prompts` has no prompt. Give one, such as a photo of a V1 teapot.")
    if request.out:
        _folder(request.out)
    _on_stack(request, *request.only)


def _export(request: ExportRequest) -> None:
    for folder in filter(None, (request.out, request.embeddings)):
        _folder(folder)
    if not _records(request):
        raise StackError(f"{request.stack_file} holds no concept to export. Learn one first.")
    _on_stack(request, *request.only)


def _import(request: ImportRequest) -> None:
    for path in filter(None, (request.lora, request.embedding)):
        if not path.exists():
            raise CheckpointError(f"There is no file {path}. Give the path of what to import.")
    check_noun(request.noun, request.token)
    check_token(request.token, (), is_ordinary)
    nouns = _nouns(_records(request))
    if request.token not in nouns:  # else it may be the same file again
        check_apart(request.token, request.class_noun, nouns)


def _merge(request: MergeRequest) -> None:
    read_header(request.other)
    _records(request)


def _consolidate(request: ConsolidateRequest) -> None:
    inventory(request.images)
    _at_least(request, 2, "to consolidate")


def _scores(request: ScoreRequest) -> None:
    groups(request.images)
    _plot(request)
    _at_least(request, 1, "to score")


def _evaluate(request: EvaluateRequest) -> None:
    if request.images:
        groups(request.images)
    if request.clip and not request.clip.is_dir():
        raise ConceptImagesError(f"There is no folder {request.clip} with a CLIP model.")
    _plot(request)
    _at_least(request, 1, "to evaluate")


_CHECKS: dict[type[Request], Callable[[Any], None]] = {
    LearnRequest: check_learn,
    ConsolidateRequest: _consolidate,
    SolveRequest: lambda request: _at_least(request, 2, "to consolidate"),
    ForgetRequest: lambda request: _on_stack(request, request.token),
    MergeRequest: _merge,
    ImportRequest: _import,
    ScoreRequest: _scores,
    EvaluateRequest: _evaluate,
    DrawRequest: _draw,
    ExportRequest: _export,
}


def _records(request: Request) -> list[dict[str, Any]]:
    """The concepts of the stack; none if there is no file. Errors: StackError."""
    path = request.stack_file
    return read_header(path)["concepts"] if real_file(path).exists() else []


def _nouns(records: list[dict[str, Any]]) -> dict[str, str]:
    """Class nouns by word."""
    return {record["token"]: record["noun"] for record in records}


def _on_stack(request: Request, *tokens: str) -> None:
    if not tokens:
        _records(request)
        return
    known = [record["token"] for record in _records(request)]
    for token in tokens:
        if token.lower() not in map(str.lower, known):
            raise StackError(
                f"There is no concept {token!r} on the stack {request.stack_file}. It has: "
                f"{', '.join(known) or 'none'}."
            )


def _at_least(request: Request, count: int, purpose: str) -> None:
    found = len(_records(request))
    if found < count:
        needed = "a concept" if count == 1 else f"{count} concepts"
        raise StackError(
            f"There is nothing {purpose}: {request.stack_file} needs at least {needed}, and has "
            f"{found or 'none'}. Learn first."
        )


def _folder(folder: Any) -> None:
    from .imagefile import check_folder

    check_folder(folder)


def _plot(request: ScoreRequest | EvaluateRequest) -> None:
    if request.plot:
        from .imagefile import check_output

        check_output(request.plot)

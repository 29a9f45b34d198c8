"""The requests of front ends: a dataclass for each operation, whose fields carry their help. Light.

`parse` makes a checked request from JSON. Errors name fields and settings in backquotes; each front
end substitutes its own names (`ContinualLoraError.spelled`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import SettingError, StackError, excerpt
from .fields import Settings, check_field, check_names, check_type, option
from .files import stack_path
from .presets import PREDICTIONS
from .settings import (
    EXECUTION_SETTINGS,
    FORMATS,
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    TrainSettings,
)
from .words import ARTICLES

CHECKPOINT_HELP = "a .safetensors checkpoint or a diffusers folder"
STACK_HELP = "the concept stack, if not the file beside the checkpoint"
DEVICE_HELP = "auto, cpu, cuda (NVIDIA, AMD), cuda:1, xpu (Intel) or mps (Apple)"
PREDICTION_HELP = (
    "what the checkpoint's net predicts; auto: what the stack or the file says, which can't tell a "
    "rectified flow (flow)"
)
IMAGES_HELP = (
    "folder with 3 to 15 pictures; name.txt beside name.jpg is its caption, name.mask.png its mask "
    "(white is learned from)"
)
ONLY_HELP = (
    "solve for a LoRA of only these concepts: with many on the stack, it draws them more faithfully "
    "than the one LoRA for all"
)
PLOT_HELP = "also draw the result to this file"


# --- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """The fields that every request has."""

    checkpoint: Path = option(CHECKPOINT_HELP)
    _: KW_ONLY
    stack: Path | None = option(STACK_HELP, None)
    device: str = option(DEVICE_HELP, "auto")
    prediction: str = option(PREDICTION_HELP, "auto", choices=("auto", *PREDICTIONS))

    @property
    def stack_file(self) -> Path:
        """Errors: StackError for a stack or a checkpoint without a name, such as an empty path."""
        if self.stack is None:
            return stack_path(self.checkpoint)
        if self.stack.name in ("", ".."):
            raise StackError(
                f"`stack` is {str(self.stack)!r}, which is a folder. Name the file of a concept stack, "
                "or leave it out for the one beside the checkpoint."
            )
        return self.stack

    def check(self) -> None:
        """Errors: SettingError for the first invalid field or setting, or path without access."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Settings):
                value.check()
            else:
                check_field(field, value)
                for path in value if isinstance(value, (list, tuple)) else [value]:
                    _check_access(field.name, path)


@dataclass(frozen=True)
class LearnRequest(Request):
    """Teach one concept: `images` is a folder or a list of files."""

    images: Path | list[Path] = option(IMAGES_HELP)
    token: str = option("the new word, such as V1")
    noun: str = option("what kind of thing it is, such as teapot")
    settings: LearnSettings = LearnSettings()
    replace: bool = option(
        "replace the newest concept if it has this word; it stays until the new one is stored",
        False,
    )
    score: int = option(
        "how many of its pictures are scored once it is learned; 0: none", 0, low=0, high=1000
    )

    @property
    def digest(self) -> str:
        """A hash of the request, independent of where the pictures are; the stack stores it."""
        return _digest(self.images, self.settings, self.token, self.class_noun)

    @property
    def class_noun(self) -> str:
        """`noun` without spaces around it and without article or "my": prompts have their own."""
        return without_article(self.noun)


@dataclass(frozen=True)
class ConsolidateRequest(Request):
    """Consolidate the newest concept once more."""

    images: Path | list[Path] = option("the pictures the newest concept was learned from")
    settings: TrainSettings = TrainSettings()

    @property
    def digest(self) -> str:
        return _digest(self.images, self.settings)


@dataclass(frozen=True)
class SolveRequest(Request):
    """Consolidate in closed form."""

    settings: SolveSettings = SolveSettings()


@dataclass(frozen=True)
class SelectRequest(SolveRequest):
    """Some concepts with a LoRA solved for only these."""

    only: Sequence[str] = option(ONLY_HELP, ())


@dataclass(frozen=True)
class ForgetRequest(Request):
    """Take one concept off the stack."""

    token: str = option("its word")
    settings: SolveSettings = SolveSettings()


@dataclass(frozen=True)
class MergeRequest(Request):
    """Put another stack's concepts on this one."""

    other: Path = option("the other stack, a .concepts.safetensors file; it stays as it is")
    settings: SolveSettings = SolveSettings()


@dataclass(frozen=True)
class ImportRequest(Request):
    """A K/V LoRA from elsewhere as one more concept.

    Its word is an embedding's vectors, or a trigger that the tokenizer knows.
    """

    lora: Path = option(
        "its .safetensors file, in kohya's, diffusers' or PEFT's names, or PEFT's folder"
    )
    token: str = option("its word from now on")
    noun: str = option("what kind of thing it is; empty: prompts use only its word", "")
    embedding: Path | None = option("the embedding its prompts used, if there is one", None)
    trigger: str = option(
        "instead of an embedding: the word its prompts used, if it is one token, such as sks", ""
    )
    strength: float = option("strength it is used at", 1.0, low=-10, high=10)
    settings: SolveSettings = SolveSettings()
    rest: str = option(
        "what to do with changes of other layers than K and V of cross-attention: refuse the file, drop "
        "them, or keep them in a LoRA beside it, NAME-without-kv, to load at the same strength",
        "refuse",
        choices=("refuse", "drop", "keep"),
    )

    @property
    def class_noun(self) -> str:
        """As a `LearnRequest`'s."""
        return without_article(self.noun)


@dataclass(frozen=True)
class ScoreRequest(Request):
    """Which concepts do these pictures show? `images` may be a list of files."""

    images: Path | list[Path] = option(
        "folder with pictures, or with folders named after tokens to measure accuracy"
    )
    settings: ScoreSettings = ScoreSettings()
    plot: Path | None = option(PLOT_HELP, None)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """How much of each concept is kept?"""

    images: Path | None = option(
        "folder with folders named after tokens, with their pictures, if you still have them", None
    )
    clip: Path | None = option(
        "folder with a CLIP vision model (as transformers saves it) to compare pictures with, in place "
        "of what the checkpoint itself sees",
        None,
    )
    settings: EvaluateSettings = EvaluateSettings()
    plot: Path | None = option(PLOT_HELP, None)


@dataclass(frozen=True)
class DrawRequest(Request):
    """Draw prompts; learned tokens stand for their concepts.

    A sequence of prompts in place of one is drawn side by side; all have to be equally long.
    """

    prompts: Sequence[str | Sequence[str]] = option("what to draw, such as a photo of a V1 teapot")
    settings: DrawSettings = DrawSettings()
    only: Sequence[str] = option(ONLY_HELP, ())
    out: Path | None = option("folder for the pictures", None)


@dataclass(frozen=True)
class ExportRequest(Request):
    """Write the stack as one LoRA and one embedding per word."""

    out: Path = option("folder for the LoRA, such as the program's Lora folder")
    embeddings: Path | None = option("folder for the embeddings, if it is another", None)
    format: str = option(
        "whose names the LoRA has; kohya's load everywhere", "kohya", choices=FORMATS
    )
    only: Sequence[str] = option(ONLY_HELP, ())
    remove_superseded: bool = option(
        "also remove this stack's earlier exports of the same concepts; otherwise they are listed",
        False,
    )


@dataclass(frozen=True)
class RenameRequest(Request):
    """Give a concept another word."""

    token: str = option("its word now")
    to: str = option("its new word, such as V2")


@dataclass(frozen=True)
class UndoRequest(Request):
    """Undo the last change."""

    version: int | None = option("undo only if this is the version in use (see history)", None)


@dataclass(frozen=True)
class RestoreRequest(Request):
    """Go to another version of the stack."""

    version: int = option("its number in history")


@dataclass(frozen=True)
class HistoryRequest(Request):
    """List the stack's versions."""

    keep: int | None = option(
        "keep this many earlier versions of this stack from now on (a new stack: 5)", None, low=0
    )


@dataclass(frozen=True)
class InfoRequest(Request):
    """What a checkpoint has learned."""


def without_article(noun: str) -> str:
    """ "a dog" and "my dog" -> "dog" """
    return re.sub(rf"^(?:{ARTICLES}\s+)+(?=\S)", "", noun.strip(), flags=re.IGNORECASE)


def _check_access(name: str, path: Any) -> None:
    """Errors: SettingError for a path in a folder that this user may not enter."""
    try:
        if isinstance(path, Path):
            os.stat(path)
    except PermissionError as error:
        raise SettingError(
            f"`{name}` is {path}, which can't be accessed ({error.strerror}). Give this user "
            "permission to enter its folder, or name another."
        ) from None
    except (
        OSError,
        ValueError,
    ):  # one that is to be made; whoever reads it says that it is missing
        return


def _digest(images: Path | list[Path], settings: TrainSettings, *words: str) -> str:
    """Settings at their default are left out, so a later version with more settings gets the same
    digest.
    """
    import hashlib

    from .inventory import inventory

    defaults = dataclasses.asdict(type(settings)())
    changed = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in EXECUTION_SETTINGS and value != defaults[name]
    }
    digest = hashlib.sha256(json.dumps([*words, changed], sort_keys=True).encode())
    for picture in inventory(images).pictures:
        picture.feed(digest)
    return digest.hexdigest()


# --- JSON -> request -----------------------------------------------------------------------------

_Request = TypeVar("_Request", bound=Request)


def parse(kind: type[_Request], given: Mapping[str, Any]) -> _Request:
    """A request from JSON: paths as strings, `settings` as an object of those not at their default.

    Errors: SettingError for a field or setting that is unknown, missing, of another type or out of
    its range.
    """
    if not isinstance(given, Mapping):
        raise SettingError(
            'A request has to be an object, such as {"checkpoint": "a.safetensors"}.'
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_names("field", given, fields)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if given.get(name) is not None:
            values[name] = _value(field, given[name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SettingError(f"`{name}` is missing: {field.metadata['help']}.")
    request = kind(**values)
    request.check()
    return request


def settings_of(kind: type[Request]) -> type[Settings] | None:
    """The class of the request's settings, if it has any."""
    field = next((f for f in dataclasses.fields(kind) if f.name == "settings"), None)
    return type(field.default) if field else None  # type: ignore[return-value]


def _value(field: dataclasses.Field, value: Any) -> Any:
    if isinstance(field.default, Settings):
        return parse_settings(type(field.default), value)
    check_type(field, value)
    if "Path" not in str(field.type):
        return value
    if isinstance(value, list):
        return [_path(field.name, one) for one in value]
    return _path(field.name, value)


def _path(name: str, text: str) -> Path:
    """Errors: SettingError for a string that can't be a path on this system."""
    try:
        os.lstat(text or "\0")
    except (OSError, ValueError) as error:  # empty, too long, not encodable
        if not isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):
            raise SettingError(f"`{name}` is {excerpt(text)}, which is not a path.") from None
    return Path(text)


_Settings = TypeVar("_Settings", bound=Settings)


def parse_settings(kind: type[_Settings], given: Any) -> _Settings:
    """Settings from a JSON object of those not at their default, checked. Errors: SettingError."""
    if not isinstance(given, Mapping):
        raise SettingError('`settings` has to be an object, such as {"steps": 500}.')
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    check_names("setting", given, names)
    settings = kind(**given)
    settings.check()
    return settings

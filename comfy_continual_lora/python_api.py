"""The Python API: one object for a checkpoint and what it has learned. Light until it is used.

    from comfy_continual_lora import ContinualLora

    sd = ContinualLora("sd15.safetensors")
    sd.learn("photos/dog", token="V1", noun="dog")
    sd.draw("a photo of a V1 dog on grass")[0].image.save("dog.png")

Methods are the operations of `operations.py`: `run` calls any of them by name, the others spell out
the arguments of those used most. Settings are keyword arguments, those of `settings.py`.
Each call opens the checkpoint's files again and keeps no memory in use, so that it is cheaper to
draw many prompts in one call.

`on_progress` is called with a `Progress` a few times a second and may raise `Cancelled`; what was
learned until then is kept, and the same call goes on from there. Errors are `ContinualLoraError`s;
the stack then stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import SettingError
from .operations import OPERATIONS
from .progress import OnProgress, ignore
from .requests import parse
from .results import Drawn, DrawResult, InfoResult, LearnResult, Result, ScoreResult

if TYPE_CHECKING:
    from .exported import Exported
    from .verdicts import RetentionReport

Paths = str | Path | Sequence[str | Path]


class ContinualLora:
    """A checkpoint (a .safetensors file or a diffusers folder) and the stack of its concepts."""

    def __init__(
        self, checkpoint: str | Path, *, stack: str | Path | None = None, device: str = "auto"
    ) -> None:
        """`stack`: the file of what is learned, if not the one beside the checkpoint; `device`:
        auto, cpu, cuda, cuda:1 or mps. Nothing is opened yet.
        """
        self.checkpoint, self.stack, self.device = checkpoint, stack, device

    def learn(
        self,
        images: Paths,
        token: str,
        noun: str,
        *,
        replace: bool = False,
        on_progress: OnProgress = ignore,
        **settings: Any,
    ) -> LearnResult:
        """Learn one more concept from a folder or a list of 3 to 15 pictures.

        `token`: its new word, such as V1; `noun`: what kind of thing it is; `replace`: in place of
        the newest concept, if that has this word; `settings`: those of `LearnSettings`.
        """
        fields = {"images": images, "token": token, "noun": noun, "replace": replace}
        return cast(LearnResult, self.run("learn", on_progress, settings=settings, **fields))

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        only: Sequence[str] = (),
        on_progress: OnProgress = ignore,
        **settings: Any,
    ) -> list[Drawn]:
        """Draw prompts; each `Drawn` has an `image` (Pillow's), its prompt and its seed.

        `only`: words, for a LoRA solved for these alone; `settings`: those of `DrawSettings`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        result = self.run("draw", on_progress, settings=settings, prompts=prompts, only=only)
        return list(cast(DrawResult, result).pictures)

    def export(
        self,
        out: str | Path,
        *,
        embeddings: str | Path | None = None,
        format: str = "kohya",
        only: Sequence[str] = (),
        on_progress: OnProgress = ignore,
    ) -> Exported:
        """Write one LoRA for all concepts, and an embedding for each word, for other programs.

        `out`: the folder for the LoRA; `embeddings`: for the embeddings, if it is another one;
        `format`: whose names the LoRA has, those of kohya, diffusers or peft.
        """
        fields = {"out": out, "embeddings": embeddings, "format": format, "only": only}
        return cast("Exported", self.run("export", on_progress, **fields))

    def scores(
        self, images: Paths, *, on_progress: OnProgress = ignore, **settings: Any
    ) -> ScoreResult:
        """Which learned concept is in each picture, by Diffusion Classifier scores."""
        result = self.run("scores", on_progress, settings=settings, images=images)
        return cast(ScoreResult, result)

    def evaluate(self, *, on_progress: OnProgress = ignore, **settings: Any) -> RetentionReport:
        """How much of each concept is retained since it was learned."""
        return cast("RetentionReport", self.run("evaluate", on_progress, settings=settings))

    def info(self) -> InfoResult:
        """What is learned, from the stack's header alone."""
        return cast(InfoResult, self.run("info"))

    def run(self, operation: str, on_progress: OnProgress = ignore, **fields: Any) -> Result:
        """Any operation, such as `run("forget", token="V2")`, with the fields of its request.

        Errors: SettingError for an operation, a field or a setting that is unknown or invalid.
        """
        if operation not in OPERATIONS:
            raise SettingError(
                f"There is no operation {operation!r}. There are {', '.join(OPERATIONS)}."
            )
        chosen = OPERATIONS[operation]
        place = {"checkpoint": self.checkpoint, "stack": self.stack, "device": self.device}
        given = {name: _plain(value) for name, value in {**place, **fields}.items()}
        return chosen(parse(chosen.request, given), on_progress)


def _plain(value: Any) -> Any:
    """Paths as strings and sequences as lists, as in JSON."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value

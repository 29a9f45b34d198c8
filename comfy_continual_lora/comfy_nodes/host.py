"""What the nodes need of ComfyUI: checkpoints, pictures, progress, memory, words in prompts, and
the mini-SD in the stock loader.

Only ComfyUI imports this module; heavy imports of ours are inside the functions.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]

from ..errors import ConceptImagesError, StackError
from ..files import STACKS, stack_path
from ..progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..store import ConceptRecord, ConceptStack

MINI = "mini-sd.safetensors"


@dataclass(frozen=True)
class StackHandle:
    """What travels along a CONCEPT_STACK wire: where the stack lies, and which of its versions is
    meant (its first `count` concepts).

    Learning always goes on from the newest concept on disk; drawing and exporting take the version
    meant. `consolidated` false: as it was before
    the newest concept was consolidated by itself. `selected`: some of its concepts, with a LoRA
    solved for them alone (Select Concepts).
    """

    checkpoint: Path
    file: Path
    count: int
    consolidated: bool = True
    selected: ConceptStack | None = None

    @property
    def records(self) -> list[ConceptRecord]:
        """The concepts meant, without their tensors."""
        from ..store import read_records

        return self.selected.records if self.selected else read_records(self.file)[: self.count]

    def read(self) -> Any:
        """The ConceptStack meant, or None while there is no stack yet."""
        from ..store import open_stack

        if self.selected:
            return self.selected
        return (
            open_stack(self.file).as_of(self.count, consolidated=self.consolidated)
            if self.file.exists()
            else None
        )


def checkpoints() -> list[str]:
    """The checkpoints ComfyUI knows, without our own stacks, which lie beside them."""
    return [
        name for name in folder_paths.get_filename_list("checkpoints") if not name.endswith(STACKS)
    ]


def checkpoint_path(name: str) -> Path:
    found = folder_paths.get_full_path("checkpoints", name)
    if found is None:
        raise StackError(
            f"There is no checkpoint {name} in ComfyUI's checkpoint folders any more. Choose "
            "another, or put it back."
        )
    return Path(found)


def files(kind: str) -> list[str]:
    """The names of ComfyUI's files of a kind, such as loras, which end in .safetensors."""
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]


def file_of(kind: str, name: str) -> Path:
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        raise StackError(
            f"The file {name} is gone from ComfyUI's {kind} folders. Choose another one."
        )
    return Path(found)


def stack_file(checkpoint: Path, name: str) -> Path:
    """Where a stack lies: beside the checkpoint; a checkpoint may have several, told apart by name."""
    return stack_path(checkpoint, name.strip())


def stacks_without_checkpoint(folder: Path) -> list[str]:
    stacks = [path.name for path in folder.glob(f"*{STACKS}")]
    stems = {path.stem for path in folder.iterdir() if not path.name.endswith(STACKS)}
    return sorted(name for name in stacks if not any(name.startswith(f"{stem}.") for stem in stems))


# --- pictures
# --------------------------------------------------------------------------------------------------


@contextmanager
def saved_pictures(
    images: Sequence[Tensor], captions: Sequence[str] = (), masks: Sequence[Tensor] = ()
) -> Iterator[list[Path]]:
    """`save_pictures` for the time of the block: a stopped run goes on from the same pictures,
    wherever they lie.
    """
    files = save_pictures(images, captions, masks)
    try:
        yield files
    finally:
        shutil.rmtree(files[0].parent, ignore_errors=True)


def save_pictures(
    images: Sequence[Tensor], captions: Sequence[str] = (), masks: Sequence[Tensor] = ()
) -> list[Path]:
    """IMAGE batches (n, h, w, 3 or 4) in 0..1, of any sizes -> PNG files in ComfyUI's temporary
    folder, the same for the same pictures.

    `captions`: none, one for all, or one a picture; an empty one counts as none. `masks`: MASK
    batches (n, h, w), none or one a picture.
    """
    import numpy as np
    from PIL import Image

    pictures = [one for batch in images for one in batch]
    if not pictures:
        raise ConceptImagesError(
            "No pictures came in. Connect an IMAGE batch or list of 3 to 15 pictures of the "
            "thing to learn."
        )
    if len(captions) not in (0, 1, len(pictures)):
        raise ConceptImagesError(
            f"There are {len(captions)} captions for {len(pictures)} pictures. Give one for each, "
            "one for all, or none."
        )
    said = (
        list(captions) * len(pictures)
        if len(captions) == 1
        else list(captions) or [""] * len(pictures)
    )
    painted = [one for batch in masks for one in (batch if batch.dim() == 3 else batch[None])]
    if len(painted) not in (0, len(pictures)):
        raise ConceptImagesError(
            f"There are {len(painted)} masks for {len(pictures)} pictures. Give one for each, or "
            "none."
        )
    arrays, painted = (
        [np.clip(one.cpu().float().numpy() * 255 + 0.5, 0, 255).astype(np.uint8) for one in group]
        for group in (pictures, painted)
    )
    digest = hashlib.sha256(repr(said).encode())
    for array in (*arrays, *painted):
        digest.update(repr(array.shape).encode() + array.tobytes())
    folder = Path(folder_paths.get_temp_directory()) / "continual_lora" / digest.hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (array, caption) in enumerate(zip(arrays, said, strict=True)):
        files.append(folder / f"{number:03d}.png")
        Image.fromarray(array).save(files[-1])
        if painted:
            Image.fromarray(painted[number]).save(files[-1].with_suffix(".mask.png"))
        if caption.strip():
            files[-1].with_suffix(".txt").write_text(caption.strip(), encoding="utf-8")
    return files


def to_image(pictures: Sequence[Image]) -> Tensor:
    """Pictures of one size -> IMAGE (n, h, w, 3) in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(
        np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]) / 255
    )


# --- progress and memory
# --------------------------------------------------------------------------------------------------


class Reporter:
    """Shows progress, lets the user cancel, and keeps what a report has to say of the run."""

    def __init__(self) -> None:
        self.bars: dict[str, Any] = {}
        self.notes: list[str] = []

    def __call__(self, progress: Progress) -> None:
        memory.throw_exception_if_processing_interrupted()
        if progress.note:
            logging.info("comfy-continual-lora: %s", progress.note)
            self.notes.append(progress.note)
        bar = self.bars.setdefault(progress.stage, ProgressBar(progress.steps))
        preview = ("JPEG", progress.preview, 512) if progress.preview is not None else None
        bar.update_absolute(progress.step, progress.steps, preview)


@contextmanager
def at_work() -> Iterator[Reporter]:
    """The GPU is emptied, gradients are allowed (nodes run in inference mode), and what is yielded
    shows progress and lets the user cancel.
    """
    import torch

    memory.unload_all_models()
    memory.soft_empty_cache()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield Reporter()
    finally:
        gc.collect()
        memory.soft_empty_cache()


def device() -> str:
    return str(memory.get_torch_device())


# --- words in prompts
# --------------------------------------------------------------------------------------------------


TEXT_ENCODERS = (
    "clip_l",
    "clip_h",
    "clip_g",
)  # as ComfyUI calls those of SD1, SD2 and SDXL, in the order of a word's vector


def with_words(clip: Any, words: Mapping[str, Tensor]) -> Any:
    """A copy of a CLIP that understands the learned words wherever they stand in a prompt, weights
    and all.

    ComfyUI knows such words as "embedding:NAME" with a file for each; here the prompt is rewritten
    so, and the vectors come from the stack.
    """
    if not words:
        return clip
    inner = {
        name: getattr(clip.tokenizer, name)
        for name in TEXT_ENCODERS
        if hasattr(clip.tokenizer, name)
    }
    if not inner:
        raise StackError(
            "This CLIP has no CLIP text encoder, so it can't take the stack's words. Use the "
            "CLIP of the stack's own checkpoint."
        )
    widths = [tokenizer.embedding_size for tokenizer in inner.values()]
    if (long := next(iter(words.values())).shape[1]) != sum(widths):
        raise StackError(
            f"The vectors of the stack's words have {long} numbers, this CLIP's {sum(widths)}: "
            "they belong to another kind of checkpoint."
        )
    pattern = re.compile(
        rf"(?<!\w)(?<!embedding:)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE
    )
    parts = {token.lower(): word.split(widths, 1) for token, word in words.items()}
    done = clip.clone()
    done.tokenizer = copy.copy(clip.tokenizer)
    for number, (name, tokenizer) in enumerate(inner.items()):
        setattr(
            done.tokenizer,
            name,
            _knowing(tokenizer, pattern, {token: part[number] for token, part in parts.items()}),
        )
    return done


def _knowing(tokenizer: Any, pattern: re.Pattern[str], known: Mapping[str, Tensor]) -> Any:
    """A copy of one text encoder's tokenizer for which the words found by `pattern` stand for
    vectors (k, d).
    """

    class Words(type(tokenizer)):
        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
            return super().tokenize_with_weights(
                pattern.sub(r" embedding:\1 ", text), *args, **kwargs
            )

        def _try_get_embedding(self, embedding_name: str) -> Any:
            found = super()._try_get_embedding(
                embedding_name
            )  # (vectors, leftover); newer versions put the name between them
            name, _, leftover = embedding_name.partition(" ")
            return (known[name.lower()], *found[1:-1], leftover) if name.lower() in known else found

    knowing = copy.copy(tokenizer)
    knowing.__class__ = Words
    knowing.embedding_directory = knowing.embedding_directory or []
    return knowing


# --- the mini-SD
# --------------------------------------------------------------------------------------------------


def offer_mini() -> None:
    """Put the mini-SD into the checkpoint list, and teach the stock loader its sizes.

    The match is exact, so no other checkpoint is touched.
    """
    folder = Path(__file__).parents[2] / "models"
    path, shipped = folder / MINI, Path(__file__).parents[1] / "mini" / "weights" / MINI
    try:
        if not path.exists() or path.stat().st_mtime < shipped.stat().st_mtime:
            from ..mini.weights import write_checkpoint

            write_checkpoint(path)
    except OSError as error:
        logging.warning(
            "comfy-continual-lora: the mini-SD can't be written to %s (%s); the workflows need "
            "another checkpoint",
            path,
            error,
        )
        return
    folder_paths.add_model_folder_path("checkpoints", str(folder))
    _teach_loader(path)


def _teach_loader(path: Path) -> None:
    import comfy.supported_models as supported  # pyright: ignore[reportMissingImports]
    from comfy import sd1_clip, supported_models_base  # pyright: ignore[reportMissingImports]
    from safetensors import safe_open

    from ..checkpoint import keys, shapes

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        text = {
            n.removeprefix(keys.TEXT_PREFIX): tuple(file.get_slice(n).get_shape())
            for n in names
            if n.startswith(keys.TEXT_PREFIX)
        }
        channels = file.get_slice(keys.UNET_PREFIX + "input_blocks.0.0.weight").get_shape()[0]
    sizes = shapes.text_config(text)
    width = sizes["hidden_size"]

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "embedding_size": width})

    class Tokenizers(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokenizer)

    class Clip(sd1_clip.SD1ClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: Any = None
        ) -> None:
            super().__init__(device, dtype, {**(model_options or {}), "clip_l_model_config": sizes})

    class MiniSD(supported.SD15):
        unet_config = {  # noqa: RUF012 - ComfyUI's way
            **supported.SD15.unet_config,
            "context_dim": width,
            "model_channels": channels,
        }

        def clip_target(self, state_dict: Any = None) -> Any:
            return supported_models_base.ClipTarget(Tokenizers, Clip)

    if not any(known.__name__ == "MiniSD" for known in supported.models):
        supported.models.append(MiniSD)

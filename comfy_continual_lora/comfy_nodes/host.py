"""The interface to ComfyUI: its files, images, progress, the device.

Only ComfyUI imports this module; heavy imports of ours are inside the functions.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]

from ..errors import ConceptImagesError, StackError, spelled
from ..files import STACKS, stack_path
from ..progress import Progress
from .schema import WIDGETS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def checkpoints() -> list[str]:
    """The checkpoints ComfyUI lists, without our stacks, which are beside them."""
    return [
        name for name in folder_paths.get_filename_list("checkpoints") if not name.endswith(STACKS)
    ]


def checkpoint_path(name: str) -> Path:
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise StackError(
            f"The checkpoint {name} is no longer in ComfyUI's checkpoint folders. Choose another, "
            "or put it back."
        )
    return Path(path)


def files(kind: str) -> list[str]:
    """The names of ComfyUI's files of a kind, such as loras, which end in .safetensors."""
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]


def file_of(kind: str, name: str) -> Path:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise StackError(
            f"The file {name} is no longer in ComfyUI's {kind} folders. Choose another one."
        )
    return Path(path)


def stack_file(checkpoint: Path, name: str) -> Path:
    """A stack's file, beside the checkpoint; a checkpoint may have several, distinguished by name."""
    return stack_path(checkpoint, name.strip())


def stacks_without_checkpoint(folder: Path) -> list[str]:
    stacks = [path.name for path in folder.glob(f"*{STACKS}")]
    stems = {path.stem for path in folder.iterdir() if not path.name.endswith(STACKS)}
    return sorted(name for name in stacks if not any(name.startswith(f"{stem}.") for stem in stems))


# --- pictures ------------------------------------------------------------------------------------


@contextmanager
def saved_pictures(
    images: Sequence[Tensor], captions: Sequence[str] = (), masks: Sequence[Tensor] = ()
) -> Iterator[list[Path]]:
    """`save_pictures` for the duration of the block. A stopped run can still be resumed, with the
    same pictures in any place.
    """
    files = save_pictures(images, captions, masks)
    try:
        yield files
    finally:
        shutil.rmtree(files[0].parent, ignore_errors=True)


def save_pictures(
    images: Sequence[Tensor], captions: Sequence[str] = (), masks: Sequence[Tensor] = ()
) -> list[Path]:
    """IMAGE batches (n, h, w, 3 or 4) in 0..1, of any sizes -> files "picture 1", ... in ComfyUI's
    temporary folder, as PNG; the same images give the same files.

    `captions`: none, one for all, or one per image; an empty one counts as none. `masks`: MASK
    batches (n, h, w), none or one mask per image; `_is_placeholder` counts as none.
    Errors: ConceptImagesError.
    """
    from PIL import Image

    from ..inventory import as_caption

    arrays = [
        _pixels(image, f"picture {number}")
        for number, image in enumerate(itertools.chain.from_iterable(images), 1)
    ]
    parts = (batch if batch.dim() == 3 else batch[None] for batch in masks)
    mask_arrays = [
        _pixels(mask, f"the mask of picture {number}")
        for number, mask in enumerate(itertools.chain.from_iterable(parts), 1)
    ]
    _check_counts(len(arrays), len(captions), len(mask_arrays))
    texts = [
        as_caption(text, f"The caption of picture {number}")[0]
        for number, text in enumerate(captions, 1)
    ] or [""]
    texts *= len(arrays) // len(texts)
    digest = hashlib.sha256(repr(texts).encode())
    for array in (*arrays, *mask_arrays):
        digest.update(repr(array.shape).encode() + array.tobytes())
    folder = Path(folder_paths.get_temp_directory()) / "continual_lora" / digest.hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (array, text) in enumerate(zip(arrays, texts, strict=True)):
        name = f"picture {number + 1}"  # without an ending: messages say it
        files.append(folder / name)
        Image.fromarray(array).save(files[-1], "PNG")
        if mask_arrays and not _is_placeholder(mask_arrays[number]):
            Image.fromarray(mask_arrays[number]).save(folder / f"{name}.mask.png")
        if text:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return files


def _check_counts(pictures: int, captions: int, masks: int) -> None:
    """Errors: ConceptImagesError."""
    if not pictures:
        raise ConceptImagesError(
            "The input has no pictures. Connect an IMAGE batch or list of 3 to 15 pictures of the "
            "thing to learn."
        )
    if captions not in (0, 1, pictures):
        raise ConceptImagesError(
            f"There are {captions} captions for {pictures} pictures. Give one for each, one for "
            "all, or none."
        )
    if masks not in (0, pictures):
        raise ConceptImagesError(
            f"There are {masks} masks for {pictures} pictures. Give one for each, or none."
        )


def _is_placeholder(mask: Any) -> bool:
    """Whether it stands for no mask: LoadImage gives 64 x 64 zeros for a picture without alpha,
    which InvertMask turns into ones.
    """
    return mask.shape == (64, 64) and mask.min() == mask.max() and mask.min() in (0, 255)


def _pixels(values: Tensor, name: str) -> Any:
    """Values in 0..1 -> an array of bytes. Errors: ConceptImagesError for NaN and infinity."""
    import numpy as np

    if not values.isfinite().all():
        raise ConceptImagesError(
            f"In the input, {name} has values that are not finite, so the node that made it failed. "
            "Check its other outputs, or use a VAE in fp32."
        )
    return np.clip(values.cpu().float().numpy() * 255 + 0.5, 0, 255).astype(np.uint8)


def to_image(pictures: Sequence[Image]) -> Tensor:
    """Images of one size -> IMAGE (n, h, w, 3) in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(
        np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]) / 255
    )


# --- progress and memory -------------------------------------------------------------------------


def tell(text: str) -> None:
    """Show a warning at the node that is running, and in the console."""
    logging.warning("comfy-continual-lora: %s", text)
    _show(text)


def _show(text: str) -> None:
    """Show a text at the node that is running, in place of the one before."""
    try:
        from comfy_execution.utils import (  # pyright: ignore[reportMissingImports]
            get_executing_context,
        )
        from server import PromptServer  # pyright: ignore[reportMissingImports]

        server, running = PromptServer.instance, get_executing_context()
        if running is not None:
            server.send_progress_text(text, running.node_id)
    except (ImportError, AttributeError):  # an older ComfyUI
        pass


class Reporter:
    """Shows progress, lets the user cancel, shows the run's notes at its node as they come, and keeps
    them for its report.

    The first call frees the GPU; work done before that needs none, and may be all there is to do.
    """

    def __init__(self) -> None:
        self.bars: dict[str, Any] = {}
        self.notes: list[str] = []

    def __call__(self, progress: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if not self.bars:
            model_management.unload_all_models()
            model_management.soft_empty_cache()
        if progress.note:
            note = spelled(progress.note, WIDGETS)
            if note not in self.notes:
                logging.info("comfy-continual-lora: %s", note)
                self.notes.append(note)
                _show("\n".join(self.notes))
        bar = self.bars.setdefault(progress.stage, ProgressBar(progress.steps))
        preview = ("JPEG", progress.preview, 512) if progress.preview is not None else None
        bar.update_absolute(progress.step, progress.steps, preview)

    def with_notes(self, text: str) -> str:
        """The run's notes, followed by the report."""
        return "\n".join([*self.notes, text])


@contextmanager
def at_work() -> Iterator[Reporter]:
    """Enable gradients (nodes run in inference mode) and yield a `Reporter`; free memory at the end."""
    import torch

    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield Reporter()
    finally:
        gc.collect()
        model_management.soft_empty_cache()


def device() -> str:
    return str(model_management.get_torch_device())

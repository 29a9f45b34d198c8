"""The interface to ComfyUI: its files, images, progress, the device.

Only ComfyUI imports this module; heavy imports of ours are inside the functions.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]

from ..checkpoint.keys import is_anima_net
from ..errors import ConceptImagesError, StackError, excerpt, spelled
from ..files import STACKS, stack_path
from ..listing import is_checkpoint, weights_are
from ..progress import OneBar, Progress, counted, duration
from .schema import WIDGETS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


_CHECKPOINTS, _NETS = "checkpoints", "diffusion_models"  # ComfyUI's kinds of files
# behind the name of a net, as ComfyUI marks pictures: no name of a checkpoint ends so
_NET_MARK = f" [{_NETS}]"


def checkpoints() -> list[str]:
    """What can be taught: the checkpoints ComfyUI lists, and Anima's nets among its diffusion models,
    marked as such; without our stacks, which are beside them.
    """
    names = folder_paths.get_filename_list(_CHECKPOINTS)
    nets = [f"{name}{_NET_MARK}" for name in folder_paths.get_filename_list(_NETS) if _is_net(name)]
    return [name for name in names if not name.endswith(STACKS)] + nets


def _is_net(name: str) -> bool:
    path = folder_paths.get_full_path(_NETS, name) if is_checkpoint(name) else None
    return path is not None and bool(weights_are(is_anima_net, Path(path)))


def checkpoint_path(name: str) -> Path:
    """The file of one of `checkpoints`. Errors: StackError if it is gone."""
    kind = _NETS if name.endswith(_NET_MARK) else _CHECKPOINTS
    path = folder_paths.get_full_path(kind, name.removesuffix(_NET_MARK))
    if path is None:
        raise StackError(
            f"The checkpoint {name} is no longer in ComfyUI's {kind} folders. Choose another, or put "
            "it back."
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


def stack_names() -> list[str]:
    """The names of all stacks that are not a checkpoint's own, over all checkpoints."""
    files = [*folder_paths.get_filename_list(_CHECKPOINTS), *folder_paths.get_filename_list(_NETS)]
    stems = {name.rpartition(".")[0] for name in files if not name.endswith(STACKS)}
    ends = {name.removesuffix(STACKS) for name in files if name.endswith(STACKS)} - stems
    parts = [end.rpartition(".") for end in ends]
    return sorted({name for stem, _, name in parts if stem in stems})


def stacks_without_checkpoint(folder: Path) -> list[str]:
    stacks = [path.name for path in folder.glob(f"*{STACKS}")]
    # without stacks, their histories and caches
    stems = {path.stem for path in folder.iterdir() if Path(path.stem).suffix != ".concepts"}
    return sorted(name for name in stacks if not any(name.startswith(f"{stem}.") for stem in stems))


def workflow_of(node: Any) -> dict[str, str]:
    """What ComfyUI writes into the metadata of a picture: the prompt and the workflow, as JSON.

    `node` is a node's class with these hidden inputs. Empty if the user has turned metadata off.
    """
    hidden = getattr(node, "hidden", None)
    if hidden is None:
        return {}
    from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

    if args.disable_metadata:
        return {}
    parts = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in parts.items() if value is not None}


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

    _check_batches("images", images, channels=(3, 4))
    _check_batches("masks", masks)
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


def masks_of(value: Any) -> Tensor | None:
    """A MASK (n, h, w) or (h, w), or None where none is connected -> (n, h, w).

    Errors: ConceptImagesError for anything else.
    """
    if value is None:
        return None
    _check_batches("masks", [value])
    return value if value.dim() == 3 else value[None]


def _check_batches(name: str, values: Sequence[Any], channels: Sequence[int] = ()) -> None:
    """Errors: ConceptImagesError for what is no IMAGE or MASK: ComfyUI checks neither a value that its
    API gives for a wire, nor what comes from a node of any type.
    """
    import torch

    for one in values:
        if not isinstance(one, torch.Tensor):
            raise ConceptImagesError(
                f"{name} is {excerpt(one)}, which holds no pixels. Connect a node that loads or makes "
                "pictures, such as Load Image."
            )
        if channels and (one.dim() != 4 or one.shape[-1] not in channels):
            raise ConceptImagesError(
                f"{name} is a tensor of shape {tuple(one.shape)}; an IMAGE is (pictures, height, width, "
                "3 or 4). Use another node to make it."
            )
        if not channels and one.dim() not in (2, 3):
            raise ConceptImagesError(
                f"{name} is a tensor of shape {tuple(one.shape)}; a MASK is (masks, height, width). "
                "Use another node to make it, such as Convert Image to Mask."
            )


def _check_counts(pictures: int, captions: int, masks: int) -> None:
    """Errors: ConceptImagesError."""
    if not pictures:
        raise ConceptImagesError(
            "The input has no pictures. Connect an IMAGE batch or list of 3 to 15 pictures of the "
            "thing to learn."
        )
    if captions not in (0, 1, pictures):
        raise ConceptImagesError(
            f"Got {counted(captions, 'caption')} for {counted(pictures, 'picture')}. Give one for "
            "each, one for all, or none."
        )
    if masks not in (0, pictures):
        raise ConceptImagesError(
            f"Got {counted(masks, 'mask')} for {counted(pictures, 'picture')}. Give one for each, or none."
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
    _show_at_node(text)


def _show_at_node(text: str) -> None:
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


_PARTS = 1000  # of the bar
_SECONDS_AT_NODE, _SECONDS_IN_CONSOLE = 0.5, 10.0  # between two lines about the same stage


class Reporter:
    """Shows progress as one bar and a line of text under the run's notes, lets the user cancel, and
    keeps the notes for its report.

    The first call frees the GPU; work done before that needs none, and may be all there is to do.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._bar: Any = None
        self._done, self._stage = OneBar(), ""
        self._started = time.monotonic()
        self._shown = self._logged = 0.0

    def __call__(self, progress: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = ProgressBar(_PARTS)
            model_management.unload_all_models()
            model_management.soft_empty_cache()
        if progress.note:
            note = spelled(progress.note, WIDGETS)
            if note not in self.notes:
                logging.info("comfy-continual-lora: %s", note)
                self.notes.append(note)
        preview = ("JPEG", progress.preview, 512) if progress.preview is not None else None
        self._bar.update_absolute(int(_PARTS * self._done(progress)), _PARTS, preview)
        self._say(progress)

    def _say(self, progress: Progress) -> None:
        """The line of text: at the node, and less often in the console."""
        now = time.monotonic()
        edge = progress.stage != self._stage or progress.step == progress.steps
        self._stage = progress.stage
        if edge or now - self._shown >= _SECONDS_AT_NODE:
            self._shown = now
            _show_at_node("\n".join([*self.notes, progress.in_words()]))
        if edge or now - self._logged >= _SECONDS_IN_CONSOLE:
            self._logged = now
            logging.info("comfy-continual-lora: %s", progress.in_words())

    def finish(self) -> None:
        """Fill the bar, if there is one, and say how long it took."""
        if self._bar is not None:
            self._bar.update_absolute(_PARTS, _PARTS)
            done = f"done in {duration(time.monotonic() - self._started)}"
            _show_at_node("\n".join([*self.notes, done]))

    def with_notes(self, text: str) -> str:
        """The run's notes, followed by the report."""
        return "\n".join([*self.notes, text])


@contextmanager
def at_work() -> Iterator[Reporter]:
    """Yield a `Reporter`; free memory at the end."""
    try:
        reporter = Reporter()
        yield reporter
        reporter.finish()
    finally:
        gc.collect()
        model_management.soft_empty_cache()


def device() -> str:
    return str(model_management.get_torch_device())

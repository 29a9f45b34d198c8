"""Stage 4: a cache of second moments of text features, beside the stack.

A moment depends only on the text encoders, the prompts and the learned words. The stack keeps those it
needs; the cache bridges the time until the first concept is learned, so that a run that was stopped
does not encode a thousand prompts again.

    <name>.concepts.cache/<hash>.moment      a safetensors file of one matrix; may be deleted any time
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .files import write_whole
from .mentions import named, split
from .textspace import moment

if TYPE_CHECKING:
    from .checkpoint.backbone import Backbone


def clear_moments(folder: Path) -> None:
    """Remove all moments of a folder, and the folder if nothing else is in it."""
    with suppress(OSError):
        for path in folder.glob("*.moment"):
            path.unlink(missing_ok=True)
        folder.rmdir()


def clear_cache(folder: Path) -> None:
    """Remove all moments and reports of a folder, and the folder."""
    with suppress(OSError):
        for path in folder.glob("*.report"):
            path.unlink(missing_ok=True)
    clear_moments(folder)


class MomentCache:
    """`textspace.moment` with a cache in `folder`; None keeps nothing on disk."""

    def __init__(self, backbone: Backbone, folder: Path | None = None) -> None:
        self.backbone, self.folder = backbone, folder
        self.encoder = ""  # a hash of the empty prompt's features with these encoders and device

    def __call__(
        self,
        words: Mapping[str, Tensor],
        prompts: Sequence[str],
        share: float | None = None,
        on_batch: Callable[[int], None] = lambda _done: None,
    ) -> Tensor:
        """As `moment`, (d, d) float32 on the CPU."""
        path = self._path(words, prompts, share)
        matrix = self._read(path)
        if matrix is None:
            matrix = moment(self.backbone, words, prompts, share, on_batch).cpu()
            self._write(path, matrix)
        return matrix

    def _path(
        self, words: Mapping[str, Tensor], prompts: Sequence[str], share: float | None
    ) -> Path | None:
        if self.folder is None:
            return None
        if not self.encoder:
            with torch.no_grad():
                empty = self.backbone.encode_prompts([""]).float().cpu().numpy()
            self.encoder = hashlib.sha256(empty.tobytes()).hexdigest()
        key = hashlib.sha256(f"{self.encoder} {share}".encode())
        for prompt in prompts:  # as it is read: a later release may read other words in it
            key.update(json.dumps(split(prompt, words)).encode())
        for token in named(prompts, words):
            key.update(token.encode() + words[token].detach().cpu().float().numpy().tobytes())
        return self.folder / f"{key.hexdigest()[:32]}.moment"

    def _read(self, path: Path | None) -> Tensor | None:
        """None if there is no usable one."""
        width = self.backbone.word_width
        try:
            stored = load(path.read_bytes())["moment"] if path else None
        except (OSError, SafetensorError, KeyError):
            return None
        if stored is None or stored.dtype != torch.float32 or not stored.isfinite().all():
            return None
        return stored if stored.shape == (width, width) else None

    def _write(self, path: Path | None, matrix: Tensor) -> None:
        """A failure to write is ignored: the moment is computed again next time."""
        if path is None:
            return
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, save({"moment": matrix.contiguous()}))

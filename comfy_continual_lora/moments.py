"""Stage 4: second moments of text features that were computed before, kept beside the stack.

A moment depends on the text encoders, the prompts and the learned words alone, and these never change
once a concept is learned. Encoding them again for every new concept would make the hundredth take
longer to prepare than to learn.

    <name>.concepts.cache/<hash>.moment      a safetensors file of one matrix; may be deleted any time
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .checkpoint.backbone import Backbone
from .files import write_whole
from .textspace import moment


def clear_cache(folder: Path) -> None:
    """Remove all moments of a folder, and the folder."""
    with suppress(OSError):
        for path in folder.glob("*.moment"):
            path.unlink(missing_ok=True)
        folder.rmdir()


class MomentCache:
    """`textspace.moment` that encodes the same prompts once; `folder` None keeps nothing on disk."""

    def __init__(self, backbone: Backbone, folder: Path | None = None) -> None:
        self.backbone, self.folder = backbone, folder
        self.used: set[Path] = set()
        self.encoder = ""  # a hash of what these text encoders make of nothing, on this device

    def __call__(
        self, words: Mapping[str, Tensor], prompts: Sequence[str], share: float | None = None
    ) -> Tensor:
        """As `moment`, (d, d) float32 on the CPU."""
        path = self._path(words, prompts, share)
        known = self._read(path)
        if known is None:
            known = moment(self.backbone, words, prompts, share).cpu()
            self._write(path, known)
        return known

    def drop_unused(self) -> None:
        """Remove what this object was not asked for: moments of concepts that are gone."""
        if self.folder is not None and self.used:
            with suppress(OSError):
                for path in set(self.folder.glob("*.moment")) - self.used:
                    path.unlink(missing_ok=True)

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
        for prompt in prompts:
            key.update(prompt.encode() + b"\0")
        for token, word in words.items():
            if any(token in prompt for prompt in prompts):
                key.update(token.encode() + word.detach().cpu().float().numpy().tobytes())
        path = self.folder / f"{key.hexdigest()[:32]}.moment"
        self.used.add(path)
        return path

    def _read(self, path: Path | None) -> Tensor | None:
        """None if there is none that can be used."""
        width = self.backbone.word_width
        try:
            held = load(path.read_bytes())["moment"] if path else None
        except (OSError, SafetensorError, KeyError):
            return None
        if held is None or held.dtype != torch.float32 or not held.isfinite().all():
            return None
        if held.shape == (width, width):
            return held
        rows, columns = torch.triu_indices(width, width)
        if held.shape != rows.shape:
            return None
        whole = torch.zeros(width, width)
        whole[rows, columns] = held
        whole[columns, rows] = held
        return whole

    def _write(self, path: Path | None, computed: Tensor) -> None:
        """Without room it is computed again the next time."""
        if path is None:
            return
        rows, columns = torch.triu_indices(*computed.shape)
        symmetric = torch.equal(computed, computed.T)  # rounding may make it not quite so
        held = computed[rows, columns] if symmetric else computed
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, save({"moment": held.contiguous()}))

"""What every stage sees of a checkpoint: encode pictures, encode prompts, predict; no model family.
`stable` and `anima` are the families.

Shapes: n pictures, latents (n, c, h/8, w/8), text features (n, t, d); pictures are float32 in -1..1.
A word is k vectors, (k, d) float32; none if prompts name it in plain text. A family may have one row
more of features than cross-attention sees (`Backbone.context`).

What is learned from is read as plain text (`encode_prompts`); what is drawn may have weights, as in
(a V1 dog:1.2) (`encode_drawn`, `emphasis`).
"""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError, excerpt
from .overflow import widen_overflowing

LONGEST = 4  # times its own length that text is repeated to, to be of one length with other text
KV_MODULES = r".*\.attn2\.to_[kv]"


def kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(KV_MODULES, name)
    }


def finite(features: Tensor, prompt: str) -> Tensor:
    """The text features of a prompt with weights. Errors: SettingError if they are not finite."""
    if not features.isfinite().all():
        raise SettingError(
            f"The weights of the prompt {excerpt(prompt)} are too large. Give weights between 0 and "
            "2, as in (a V1 dog:1.2)."
        )
    return features


@dataclass(eq=False, kw_only=True)
class Backbone(ABC):
    """A loaded checkpoint.

    All parts are frozen; `unet` may carry adapters; the VAE stays in main memory while not in use.
    """

    path: Path
    unet: Any  # the net that denoises, a U-Net or a transformer of diffusers
    vae: Any
    tokenizer: Any  # ordinary prompts are drawn from its vocabulary
    preset: str  # which row of presets.PRESETS suits it
    size: int  # pixels a side it was trained at
    fingerprint: str  # SHA-256 of the file's K/V weights: which checkpoint a stack was made for
    prediction: str = "epsilon"  # what the net predicts, a value of `PREDICTIONS`
    declares_zero_snr: bool = False  # whether its files ask for a schedule that ends in pure noise
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tell: Callable[[str], None] = logging.getLogger(__name__).warning  # a sentence for the user

    latent_channels = 4

    def __post_init__(self) -> None:
        for part in self.parts:
            part.requires_grad_(False).eval()

    # --- what a family has of its own -------------------------------------------------------------

    @property
    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """The nets."""

    @property
    @abstractmethod
    def word_widths(self) -> list[int]:
        """How many values of a word's vector belong to each text encoder."""

    @property
    @abstractmethod
    def last_block(self) -> nn.Module:
        """The net's last block, whose output is (n, c, h, w) or (n, places, c)."""

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Text features (n, t, d).

        Each token of `words` that a prompt contains (`mentions.whole_words`) is replaced by its
        vectors (k, d), if it has any; gradients flow into them.
        """

    @abstractmethod
    def encode_drawn(self, prompt: str, words: Mapping[str, Tensor] | None = None) -> Tensor:
        """Text features of a prompt that is drawn, (1, t', d), with its weights. A short prompt
        without brackets gets what `encode_prompts` gives it.
        """

    @abstractmethod
    def padding(self, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
        """Which positions come after the end of each prompt, (n, t) bool."""

    @abstractmethod
    def second_word(self, prompt: str, token: str, words: Mapping[str, Tensor]) -> tuple[int, int]:
        """The position at which a prompt's last learned word, `token`, begins, and that of the
        prompt's padding.
        """

    @abstractmethod
    def not_read(self, prompt: str, words: Mapping[str, Tensor]) -> str:
        """The end of a prompt that is too long for the text encoder; empty if it reads all."""

    @abstractmethod
    def word_start(self, noun: str, generator: torch.Generator, count: int = 1) -> Tensor:
        """The initial vectors of a new word, (count, d) float32."""

    @abstractmethod
    def word_of_vocabulary(self, word: str) -> Tensor | None:
        """The vectors of a word that needs no learning, (k, d) float32; None for any other."""

    @abstractmethod
    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text without learned words."""

    @abstractmethod
    def drawn_positions(self, prompt: str) -> tuple[list[int], list[int], int]:
        """The ids of a drawn prompt's tokens, without learned words; where each is among the positions
        of `encode_drawn`; and the number of these.
        """

    @abstractmethod
    def _answer(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """The net's prediction; all as in `predict`, computed in the net's dtype."""

    @abstractmethod
    def _to_latent(self, vae: Any, picture: Tensor) -> Tensor:
        """A picture (1, 3, h, w) -> its latent (1, c, h/8, w/8), of variance about 1."""

    @abstractmethod
    def _to_picture(self, vae: Any, latent: Tensor) -> Tensor:
        """The inverse of `_to_latent`."""

    # --- what they share --------------------------------------------------------------------------

    @cached_property
    def kv_layers(self) -> dict[str, nn.Linear]:
        """The layers an adapter changes, K and V of every cross-attention, by their diffusers names.

        To be read before any adapter is attached.
        """
        return kv_layers(self.unet)

    @property
    def clip_skip(self) -> int:
        """Which layer of the text encoder is used, counted from the end."""
        return 1

    def with_clip_skip(self, clip_skip: int) -> Backbone:
        """The same checkpoint with another layer of the text encoder; for SD1.x."""
        assert clip_skip == 1
        return self

    @property
    def zero_snr(self) -> bool:
        """Whether nothing of the picture is left at the last timestep (Lin et al. 2023).

        Only where v is predicted: the noise in pure noise says nothing of the picture, and the error
        of what it is computed from would be infinite.
        """
        return self.declares_zero_snr and self.prediction == "v_prediction"

    @property
    def word_width(self) -> int:
        return sum(self.word_widths)

    @torch.no_grad()
    def encode_images(self, images: Iterable[Tensor]) -> list[Tensor]:
        """Pictures (3, h, w) -> latents (c, h/8, w/8), scaled.

        They are the mean of the posterior, so the same picture gives the same latent.
        """
        pictures = list(images)
        return self._with_vae(
            lambda vae: [self._to_latent(vae, one[None].to(self.device))[0] for one in pictures]
        )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) -> pictures (n, 3, 8h, 8w) in -1..1 on the CPU."""

        def decode(vae: Any) -> Tensor:
            images = torch.cat([self._to_picture(vae, latent[None]) for latent in latents])
            return images.clamp(-1, 1).float().cpu()

        return self._with_vae(decode)

    def _with_vae(self, work: Callable[[Any], Any]) -> Any:
        """Run `work` with the VAE on the device; it goes there for this work only.

        Learning needs the memory, and pictures are few. A picture of 1024 pixels takes more memory
        than a training step; if it does not fit beside the U-Net, the U-Net is moved to main memory.
        """
        try:
            return work(nn.Module.to(self.vae, self.device))
        except torch.cuda.OutOfMemoryError:
            pass  # what the attempt allocated is free after this block
        finally:
            nn.Module.to(self.vae, "cpu")
        try:
            nn.Module.to(self.unet, "cpu")
            torch.cuda.empty_cache()
            return work(nn.Module.to(self.vae, self.device))
        finally:
            nn.Module.to(self.vae, "cpu")
            nn.Module.to(self.unet, self.device)

    @contextmanager
    def text_aside(self) -> Iterator[None]:
        """Inside the block, text encoders that nothing is learned through lie in main memory, where
        they still encode prompts; their place on the device is free.
        """
        yield

    def context(self, features: Tensor) -> Tensor:
        """The rows of text features that cross-attention sees, (n, t, d)."""
        return features

    def lengthened(self, features: Tensor, length: int) -> Tensor:
        """The same text in more positions, a multiple of those it has: all are repeated equally often,
        so that attention to them gives the same.
        """
        context = self.context(features)
        rest = features[:, context.shape[1] :]
        return torch.cat([context.repeat(1, length // context.shape[1], 1), rest], 1)

    def is_known_word(self, token: str) -> bool:
        """Whether the tokenizer has a token of its own for this word: ordinary prompts may use it."""
        return len(self.token_ids(token)) == 1

    @torch.no_grad()
    def try_out(self) -> None:
        """Ask a net in fp16 once, so that layers that overflow are found before anything watches it."""
        if self.unet.dtype == torch.float16:
            side = self.size // 8
            draws = torch.Generator().manual_seed(0)
            noisy = torch.randn(1, self.latent_channels, side, side, generator=draws)
            timestep = torch.tensor([500], device=self.device)
            self.predict(noisy.to(self.device), timestep, self.encode_prompts(["a photo"]))

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """The net's prediction, float32, shaped as `noisy`.

        timestep (n,), features as `encode_prompts` gives them. Layers that overflow in fp16 are
        computed in float32 from then on (`overflow`).
        """
        dtype = self.unet.dtype

        def answer() -> Tensor:
            # adapters stay in float32; torch before 2.3 rejects autocast to float32, even disabled
            half = dtype != torch.float32
            with torch.autocast(self.device.type, dtype) if half else nullcontext():
                return self._answer(noisy, timestep, features).float()

        prediction = answer()
        if dtype != torch.float16 or prediction.isfinite().all():
            return prediction
        if not (layers := widen_overflowing(self.unet, answer)):
            return prediction
        self.tell(
            f"{len(layers)} of the net's layers overflow in fp16, the first of them {layers[0]}: they "
            "are computed in float32 from now on, the rest in fp16."
        )
        return answer()


class FrozenText:
    """Text features of prompts whose words do not change any more: prompts (k,) -> (k, t, d).

    Each prompt is encoded once.
    """

    def __init__(self, backbone: Backbone, words: Mapping[str, Tensor]) -> None:
        self.backbone, self.words = backbone, words
        self.cache: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> Tensor:
        if prompt not in self.cache:
            self.cache[prompt] = self._encode(prompt)
        return self.cache[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        return self.backbone.encode_prompts([prompt], self.words)


class DrawnText(FrozenText):
    """Text features of prompts that are drawn (`Backbone.encode_drawn`): prompts (k,) -> (k, t, d).

    Those of different lengths are repeated to a common one.
    """

    def _encode(self, prompt: str) -> Tensor:
        return self.backbone.encode_drawn(prompt, self.words)

    def length(self, prompts: Iterable[str]) -> int:
        """The number of positions that all of these can be repeated to."""
        return math.lcm(*map(self._positions, prompts))

    def _positions(self, prompt: str) -> int:
        return self.backbone.context(self._one(prompt)).shape[1]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        length = self.length(prompts)
        return torch.cat([self.backbone.lengthened(self._one(one), length) for one in prompts])

    def batches(self, prompts: Iterable[str]) -> list[Tensor]:
        """The same in as few tensors as lengths allow, in the order of the prompts.

        Anima's lengths seldom have a common one: 512 and 700 have 89600. Source: ComfyUI's
        `CONDCrossAttn.can_concat`, which repeats as often.
        """
        batches: list[list[str]] = []
        for prompt in prompts:
            together = [*batches[-1], prompt] if batches else []
            if together and self.length(together) <= LONGEST * max(map(self._positions, together)):
                batches[-1] = together
            else:
                batches.append([prompt])
        return [self(batch) for batch in batches]

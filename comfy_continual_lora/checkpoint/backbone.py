"""What every stage sees of a checkpoint: encode pictures, encode prompts, predict; no model family.

Shapes: n pictures, latents (n, 4, h/8, w/8), text features (n, 77, d); pictures are float32 in
-1..1. A word is k vectors, (k, d) float32; with two text encoders a vector is both encoders' vectors
concatenated, as their features are. The pooled text that SDXL's net takes too is a 78th row of the
features, padded with zeros; `Backbone.context` gives the rows that cross-attention sees.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..mentions import split
from .overflow import widen_overflowing
from .text import TextEncoder

KV_MODULES = r".*\.attn2\.to_[kv]"


def kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(KV_MODULES, name)
    }


@dataclass(eq=False)
class Backbone:
    """A loaded checkpoint.

    All parts are frozen; `unet` may carry adapters; the VAE stays in main memory while not in use.
    """

    path: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: Sequence[TextEncoder]
    tokenizer: CLIPTokenizer
    preset: str  # which row of settings.PRESETS suits it
    size: int  # pixels a side it was trained at
    fingerprint: str  # SHA-256 of the file's K/V weights: which checkpoint a stack was made for
    prediction: str = "epsilon"  # what the net predicts, a value of `PREDICTIONS`
    zero_snr: bool = False  # whether nothing of the picture is left at the last timestep
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tell: Callable[[str], None] = logging.getLogger(__name__).warning  # a sentence for the user

    def __post_init__(self) -> None:
        for part in self.parts:
            part.requires_grad_(False).eval()

    @property
    def parts(self) -> list[nn.Module]:
        return [self.unet, self.vae, *(encoder.model for encoder in self.text_encoders)]

    @cached_property
    def kv_layers(self) -> dict[str, nn.Linear]:
        """The layers an adapter changes, K and V of every cross-attention, by their diffusers names.

        To be read before any adapter is attached.
        """
        return kv_layers(self.unet)

    @property
    def word_widths(self) -> list[int]:
        """How many values of a word's vector belong to each text encoder."""
        return [encoder.width for encoder in self.text_encoders]

    @property
    def word_width(self) -> int:
        return sum(self.word_widths)

    @torch.no_grad()
    def encode_images(self, images: Iterable[Tensor]) -> list[Tensor]:
        """Pictures (3, h, w) -> latents (4, h/8, w/8), scaled.

        They are the mean of the posterior, so the same picture gives the same latent.
        """
        pictures = list(images)
        encoded = self._with_vae(
            lambda vae: [vae.encode(image[None].to(self.device)) for image in pictures]
        )
        latents = [
            e.latents if isinstance(self.vae, AutoencoderTiny) else e.latent_dist.mean
            for e in encoded
        ]
        return [latent[0] * self.vae.config["scaling_factor"] for latent in latents]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (n, 4, h, w) -> pictures (n, 3, 8h, 8w) in -1..1 on the CPU."""
        scaled = latents / self.vae.config["scaling_factor"]

        def decode(vae: Any) -> Tensor:
            images = torch.cat([vae.decode(latent[None]).sample for latent in scaled])
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

    def encode_prompts(
        self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Text features (n, 77, d), or (n, 78, d) with pooled text.

        Each token of `words` that a prompt contains (`mentions.whole_words`) is replaced by its
        vectors (k, d); gradients flow into them.
        """
        words = words or {}
        tokens = [self.tokenize(prompt, words) for prompt in prompts]
        ids, slot = torch.tensor(tokens, device=self.device).unbind(1)
        padding = self._after_end(ids)
        vectors = torch.cat(
            [word.to(self.device) for word in words.values()]
            or [torch.zeros(1, self.word_width, device=self.device)]
        )
        encoders = zip(self.text_encoders, vectors.split(self.word_widths, 1), strict=True)
        features, pooled = zip(
            *(
                encoder.encode(ids.masked_fill(padding, encoder.pad), slot, part)
                for encoder, part in encoders
            ),
            strict=True,
        )
        rows = [
            F.pad(row, (0, self.word_width - row.shape[1]))[:, None]
            for row in pooled
            if row is not None
        ]
        return torch.cat([torch.cat(features, 2), *rows], 1)

    def padding(self, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
        """Which positions come after the end of each prompt, (n, 77) bool."""
        ids = [self.tokenize(prompt, words)[0] for prompt in prompts]
        return self._after_end(torch.tensor(ids, device=self.device))

    def _after_end(self, ids: Tensor) -> Tensor:
        return ids.eq(int(self.tokenizer.eos_token_id)).cumsum(1) > 1  # type: ignore[arg-type]

    def context(self, features: Tensor) -> Tensor:
        """The rows of text features that cross-attention sees, (n, 77, d)."""
        return features[:, : self.tokenizer.model_max_length]

    def tokenize(self, prompt: str, words: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
        """77 token ids, padded with the end token, and which of the words' vectors replaces each.

        The latter counts over the vectors of all words; it is -1 if none does. What is longer is cut
        off (`not_read`).
        """
        longest = self.tokenizer.model_max_length
        end = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        ids, slot = (part[: longest - 1] for part in self._all_tokens(prompt, words))
        rest = longest - len(ids)
        return [*ids, *[end] * rest], [*slot, *[-1] * rest]

    def not_read(self, prompt: str, words: Mapping[str, Tensor]) -> str:
        """The end of a prompt that is too long for the text encoder, which takes 77 positions with
        start and end; empty if it reads all.
        """
        longest = self.tokenizer.model_max_length - 1
        if len(self._all_tokens(prompt, words)[0]) <= longest:
            return ""
        read = bisect_right(
            range(1, len(prompt)),
            longest,
            key=lambda count: len(self._all_tokens(prompt[:count], words)[0]),
        )
        return prompt[read:].strip()

    def _all_tokens(self, prompt: str, words: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
        """As `tokenize`, from the start token to the prompt's end, however long."""
        slots = {}
        count = 0
        for token, word in words.items():
            slots[token.lower()] = range(count, count + len(word))
            count += len(word)
        ids = [int(self.tokenizer.bos_token_id)]  # type: ignore[arg-type]
        slot = [-1]
        for number, piece in enumerate(split(prompt, words)):
            if number % 2:
                vectors = slots[piece.lower()]
                # any id but the end token's, which is where the pooled text is taken
                ids += [0] * len(vectors)
                slot += vectors
            elif piece.strip():
                piece_ids = self.token_ids(piece)
                ids += piece_ids
                slot += [-1] * len(piece_ids)
        return ids, slot

    def word_start(self, noun: str, generator: torch.Generator, count: int = 1) -> Tensor:
        """The initial vectors of a new word, (count, d) float32.

        They are the mean vector of the class noun's tokens plus a little noise, random without noun.
        """
        ids = self.token_ids(noun) if noun else []
        return torch.cat(
            [encoder.word_start(ids, generator, count) for encoder in self.text_encoders], 1
        )

    def word_of_vocabulary(self, word: str) -> Tensor | None:
        """The vector of a word that is one token, (1, d) float32; None for any other."""
        if not self.is_known_word(word):
            return None
        return torch.cat(
            [encoder.vectors(self.token_ids(word)) for encoder in self.text_encoders], 1
        )

    def is_known_word(self, token: str) -> bool:
        """Whether the tokenizer has a token of its own for this word: ordinary prompts may use it."""
        return len(self.token_ids(token)) == 1

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text without learned words."""
        # not verbose: too many tokens are cut off by `tokenize`, with no need for a warning
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @torch.no_grad()
    def try_out(self) -> None:
        """Ask a net in fp16 once, so that layers that overflow are found before anything watches it."""
        if self.unet.dtype == torch.float16:
            side = self.size // 8
            noisy = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
            timestep = torch.tensor([500], device=self.device)
            self.predict(noisy.to(self.device), timestep, self.encode_prompts(["a photo"]))

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """The net's prediction, float32, shaped as `noisy`.

        timestep (n,), features as `encode_prompts` gives them. Layers that overflow in fp16 are
        computed in float32 from then on (`overflow`).
        """
        dtype = self.unet.dtype
        added = None
        if pooled := self.text_encoders[-1].pooled_width:
            # SDXL is conditioned on the picture's size, its crop's position, and the size to draw
            height, width = (8 * side for side in noisy.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(
                len(noisy), -1
            )
            added = {"text_embeds": features[:, -1, :pooled].to(dtype), "time_ids": sizes}

        def answer() -> Tensor:
            # adapters stay in float32; torch before 2.3 rejects autocast to float32, even disabled
            half = dtype != torch.float32
            with torch.autocast(self.device.type, dtype) if half else nullcontext():
                context = self.context(features).to(dtype)
                given = noisy.to(dtype), timestep, context
                return self.unet(*given, added_cond_kwargs=added).sample.float()

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
    """Text features of prompts whose words do not change any more: prompts (k,) -> (k, 77 or 78, d).

    Each prompt is encoded once.
    """

    def __init__(self, backbone: Backbone, words: Mapping[str, Tensor]) -> None:
        self.backbone, self.words = backbone, words
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in self.cache:
                self.cache[prompt] = self.backbone.encode_prompts([prompt], self.words)[0]
        return torch.stack([self.cache[prompt] for prompt in prompts])

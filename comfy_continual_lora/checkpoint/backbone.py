"""What every stage sees of a checkpoint: encode pictures, encode prompts, predict what was asked.
Never a model family.

Shapes: n pictures, latents (n, 4, h/8, w/8), text features (n, 77, d); pictures are float32 in
-1..1. A word is k vectors in a row, (k, d)
float32: with two text encoders a vector is both encoders' vectors end to end, as their features
are. Where the net also wants the pooled text (SDXL),
it travels as a 78th row of the features, padded with zeros; `Backbone.context` are the rows that
cross-attention sees.
"""

from __future__ import annotations

import re
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

    All parts are frozen; `unet` may carry adapters; the VAE waits in main memory while it is not
    asked.
    """

    path: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: Sequence[TextEncoder]
    tokenizer: CLIPTokenizer
    preset: str  # which row of settings.PRESETS suits it
    size: int  # pixels a side it was trained at
    # SHA-256 of the K/V weights as the file has them: says whether a stack was made for this
    # checkpoint
    fingerprint: str
    # what the net answers, in diffusers' words: "epsilon", the noise, or "v_prediction"
    prediction: str = "epsilon"
    zero_snr: bool = False  # whether nothing of the picture is left at the last timestep
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for part in self.parts:
            part.requires_grad_(False).eval()

    @property
    def parts(self) -> list[nn.Module]:
        return [self.unet, self.vae, *(encoder.model for encoder in self.text_encoders)]

    @cached_property
    def kv_layers(self) -> dict[str, nn.Linear]:
        """The layers an adapter changes, by their diffusers names: K and V of every
        cross-attention. Taken before any adapter is attached.
        """
        return kv_layers(self.unet)

    @property
    def gradient_scale(self) -> float:
        """How many times larger gradients travel through the net, so that fp16 does not lose small
        ones.
        """
        return 1024.0 if self.unet.dtype == torch.float16 else 1.0

    @property
    def word_widths(self) -> list[int]:
        """How many numbers of a word's vector are for each text encoder."""
        return [encoder.width for encoder in self.text_encoders]

    @property
    def word_width(self) -> int:
        return sum(self.word_widths)

    @torch.no_grad()
    def encode_images(self, images: Iterable[Tensor]) -> list[Tensor]:
        """Pictures (3, h, w) -> latents (4, h/8, w/8), scaled; the mean of the posterior, so the
        same picture gives the same latent.
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
        return self._with_vae(
            lambda vae: (
                torch.cat([vae.decode(one[None]).sample for one in scaled])
                .clamp(-1, 1)
                .float()
                .cpu()
            )
        )

    def _with_vae(self, work: Callable[[Any], Any]) -> Any:
        """The VAE is on the device for this work only: learning needs the memory, and pictures are
        few.

        A picture of 1024 pixels takes more than a step of learning does. Where that does not fit
        beside the U-Net, the U-Net waits in main memory.
        """
        try:
            return work(nn.Module.to(self.vae, self.device))
        except torch.cuda.OutOfMemoryError:
            pass  # what the attempt holds is free again behind this block
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

        Each token of `words` found in a prompt (whole word, any case) stands for its vectors (k,
        d); gradients flow into them.
        """
        words = words or {}
        ids, slot = torch.tensor(
            [self.tokenize(prompt, words) for prompt in prompts], device=self.device
        ).unbind(1)
        behind = self._behind(ids)
        vectors = torch.cat(
            [word.to(self.device) for word in words.values()]
            or [torch.zeros(1, self.word_width, device=self.device)]
        )
        encoders = zip(self.text_encoders, vectors.split(self.word_widths, 1), strict=True)
        features, pooled = zip(
            *(
                encoder.encode(ids.masked_fill(behind, encoder.pad), slot, part)
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
        """Which positions lie behind the end of each prompt, (n, 77) bool."""
        return self._behind(
            torch.tensor(
                [self.tokenize(prompt, words)[0] for prompt in prompts], device=self.device
            )
        )

    def _behind(self, ids: Tensor) -> Tensor:
        return ids.eq(int(self.tokenizer.eos_token_id)).cumsum(1) > 1  # type: ignore[arg-type]

    def context(self, features: Tensor) -> Tensor:
        """The rows of text features that cross-attention sees, (n, 77, d)."""
        return features[:, : self.tokenizer.model_max_length]

    def tokenize(self, prompt: str, words: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
        """77 token numbers, padded with the end's, and for each position which of all the words'
        vectors replaces it (-1: none).
        """
        slots, count = {}, 0
        for token, word in words.items():
            slots[token.lower()] = range(count, count := count + len(word))
        longest, end = self.tokenizer.model_max_length, int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        ids, slot = [int(self.tokenizer.bos_token_id)], [-1]  # type: ignore[arg-type]
        for piece in (
            re.split(
                rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", prompt, flags=re.IGNORECASE
            )
            if words
            else [prompt]
        ):
            if found := slots.get(piece.lower()):
                ids, slot = (
                    [*ids, *[0] * len(found)],
                    [*slot, *found],
                )  # any number but the end's, where the pooled text is taken
            elif piece.strip():
                new = self._ids(piece)
                ids, slot = [*ids, *new], [*slot, *[-1] * len(new)]
        ids, slot = ids[: longest - 1], slot[: longest - 1]
        rest = longest - len(ids)
        return [*ids, *[end] * rest], [*slot, *[-1] * rest]

    def word_start(self, noun: str, generator: torch.Generator, count: int = 1) -> Tensor:
        """Where a new word begins, (count, d) float32: the mean vector of the class noun's tokens
        plus a little noise; without a noun random.
        """
        ids = self._ids(noun) if noun else []
        return torch.cat(
            [encoder.word_start(ids, generator, count) for encoder in self.text_encoders], 1
        )

    def word_of_vocabulary(self, word: str) -> Tensor | None:
        """The vector of a word that is one token, (1, d) float32; None for another."""
        return (
            torch.cat([encoder.vectors(self._ids(word)) for encoder in self.text_encoders], 1)
            if self.is_known_word(word)
            else None
        )

    def is_known_word(self, token: str) -> bool:
        """Whether the tokenizer has this word as one token of its own, so that ordinary prompts may
        use it.
        """
        return len(self._ids(token)) == 1

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """The net's prediction, float32, shaped as `noisy`.

        timestep (n,), features as `encode_prompts` gives them.
        """
        dtype, added = self.unet.dtype, None
        if (
            pooled := self.text_encoders[-1].pooled_width
        ):  # SDXL wants to know the picture's size, where it was cut out, and the size to draw
            height, width = (8 * side for side in noisy.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(
                len(noisy), -1
            )
            added = {"text_embeds": features[:, -1, :pooled].to(dtype), "time_ids": sizes}
        # adapters stay in float32; torch before 2.3 refuses to hear of autocast to float32, even
        # when it is off
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext():
            return self.unet(
                noisy.to(dtype), timestep, self.context(features).to(dtype), added_cond_kwargs=added
            ).sample.float()


class FrozenText:
    """Text features of prompts whose words do not change any more, each encoded once: prompts (k,)
    -> (k, 77 or 78, d).
    """

    def __init__(self, backbone: Backbone, words: Mapping[str, Tensor]) -> None:
        self.backbone, self.words, self.known = backbone, words, {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in self.known:
                self.known[prompt] = self.backbone.encode_prompts([prompt], self.words)[0]
        return torch.stack([self.known[prompt] for prompt in prompts])

"""What every stage sees of a checkpoint: encode pictures, encode prompts, predict; no model family.

Shapes: n pictures, latents (n, 4, h/8, w/8), text features (n, 77, d); pictures are float32 in
-1..1. A word is k vectors, (k, d) float32; with two text encoders a vector is both encoders' vectors
concatenated, as their features are. The pooled text that SDXL's net takes too is one row more of the
features, padded with zeros; `Backbone.context` gives the rows that cross-attention sees.

What is learned from is one chunk of 75 tokens, read as plain text (`encode_prompts`); what is drawn
has any number of chunks, and weights (`encode_drawn`, `emphasis`).
"""

from __future__ import annotations

import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..emphasis import Token, chunks, weighted_texts
from ..errors import SettingError, excerpt
from ..mentions import split
from .overflow import widen_overflowing
from .text import TextEncoder, weighted

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
    def clip_skip(self) -> int:
        """Which layer of the text encoder is used, counted from the end."""
        return self.text_encoders[0].clip_skip

    def with_clip_skip(self, clip_skip: int) -> Backbone:
        """The same checkpoint, whose text features are those of another layer, normed as the last
        layer's are (AUTOMATIC1111's "Clip skip"); for SD1.x.
        """
        encoders = [replace(encoder, clip_skip=clip_skip) for encoder in self.text_encoders]
        return replace(self, text_encoders=encoders)

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
        features, pooled = self._encode(ids, slot, words)
        return torch.cat([torch.cat(features, 2), *pooled], 1)

    @torch.no_grad()
    def encode_drawn(self, prompt: str, words: Mapping[str, Tensor] | None = None) -> Tensor:
        """Text features of a prompt that is drawn, (1, 77 c, d) with c chunks, or a row more: in chunks
        of 75 tokens, with weights, as AUTOMATIC1111 encodes it (`emphasis`). Pooled text is the first
        chunk's. A short prompt without brackets gets what `encode_prompts` gives it.

        Errors: SettingError for weights that float32 can't hold.
        """
        words = words or {}
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = []
        for chunk in self.chunks(prompt, words):
            filled = [Token(start), *chunk]  # type: ignore[arg-type]
            rest = self.tokenizer.model_max_length - len(filled)
            rows.append([*filled, *[Token(end)] * rest])  # type: ignore[arg-type]
        ids, slot = (
            torch.tensor([[getattr(token, part) for token in row] for row in rows]).to(self.device)
            for part in ("id", "vector")
        )
        weights = torch.tensor([[token.weight for token in row] for row in rows])
        features, pooled = self._encode(ids, slot, words)
        chunked = torch.cat([weighted(one, weights) for one in features], 2)
        if not chunked.isfinite().all():
            raise SettingError(
                f"The weights of the prompt {excerpt(prompt)} are too large. Give weights between 0 and "
                "2, as in (a V1 dog:1.2)."
            )
        return torch.cat([chunked.flatten(0, 1)[None], *(row[:1] for row in pooled)], 1)

    def _encode(
        self, ids: Tensor, slot: Tensor, words: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each encoder's features (n, 77, d'), and pooled text as a row of all, (n, 1, d), if any."""
        padding = self._after_end(ids)
        vectors = torch.cat(
            [word.to(self.device) for word in words.values()]
            or [torch.zeros(1, self.word_width, device=self.device)]
        )
        encoders = zip(self.text_encoders, vectors.split(self.word_widths, 1), strict=True)
        features, rows = [], []
        for encoder, part in encoders:
            one, pooled = encoder.encode(ids.masked_fill(padding, encoder.pad), slot, part)
            features.append(one)
            if pooled is not None:
                rows.append(F.pad(pooled, (0, self.word_width - pooled.shape[1]))[:, None])
        return features, rows

    def padding(self, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
        """Which positions come after the end of each prompt, (n, 77) bool."""
        ids = [self.tokenize(prompt, words)[0] for prompt in prompts]
        return self._after_end(torch.tensor(ids, device=self.device))

    def _after_end(self, ids: Tensor) -> Tensor:
        return ids.eq(int(self.tokenizer.eos_token_id)).cumsum(1) > 1  # type: ignore[arg-type]

    def context(self, features: Tensor) -> Tensor:
        """The rows of text features that cross-attention sees, (n, 77, d) or (n, 77 c, d)."""
        return features[:, :-1] if self.text_encoders[-1].pooled_width else features

    def lengthened(self, features: Tensor, length: int) -> Tensor:
        """The same text in more positions, a multiple of those it has: all are repeated equally often,
        so that attention to them gives the same.
        """
        context = self.context(features)
        rest = features[:, context.shape[1] :]
        return torch.cat([context.repeat(1, length // context.shape[1], 1), rest], 1)

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
        tokens = [token for unit in self._units(prompt, words) for token in unit]
        start = int(self.tokenizer.bos_token_id)  # type: ignore[arg-type]
        return [start, *(token.id for token in tokens)], [-1, *(token.vector for token in tokens)]

    def _units(
        self, text: str, words: Mapping[str, Tensor], weight: float = 1.0
    ) -> Iterator[list[Token]]:
        """The text's tokens one by one, and those of a learned word together."""
        first = 0
        vectors = {}
        for token, word in words.items():
            vectors[token.lower()] = range(first, first + len(word))
            first += len(word)
        for number, piece in enumerate(split(text, words)):
            if number % 2:
                # any id but the end token's, which is where the pooled text is taken
                yield [Token(0, vector, weight) for vector in vectors[piece.lower()]]
            elif piece.strip():
                yield from ([Token(one, -1, weight)] for one in self.token_ids(piece))

    def chunks(self, prompt: str, words: Mapping[str, Tensor]) -> list[list[Token]]:
        """The tokens of a prompt that is drawn, in chunks of at most 75."""
        units: list[list[Token] | None] = []
        for part in weighted_texts(prompt):
            units += [None] if part is None else self._units(part.text, words, part.weight)
        return chunks(units, self.token_ids(",")[0])

    def drawn_positions(self, prompt: str) -> tuple[list[int], list[int], int]:
        """The ids of a drawn prompt's tokens, without learned words; where each is among the positions
        of `encode_drawn`; and the number of these.
        """
        ids, positions = [], []
        width = self.tokenizer.model_max_length
        found = self.chunks(prompt, {})
        for number, chunk in enumerate(found):
            ids += [token.id for token in chunk]
            positions += [number * width + 1 + place for place in range(len(chunk))]
        return ids, positions, width * len(found)

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
        return math.lcm(*(self.backbone.context(self._one(prompt)).shape[1] for prompt in prompts))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        length = self.length(prompts)
        return torch.cat([self.backbone.lengthened(self._one(one), length) for one in prompts])

"""SD1.x, SD2.x and SDXL: a U-Net of diffusers, one or two CLIP text encoders, latents of 4 channels.

Text features are (n, 77, d), or (n, 77 c, d) of a drawn prompt in c chunks; with two text encoders a
feature is both encoders' concatenated, and so is a word's vector. The pooled text that SDXL's net
takes too is one row more of the features, padded with zeros.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..emphasis import Token, chunks, weighted_texts
from ..mentions import split
from .backbone import Backbone, finite
from .text import TextEncoder, weighted

# The basic colour terms (Berlin and Kay 1969): modifiers that every vocabulary has
COLORS = (
    *("black", "white", "red", "green", "yellow", "blue"),
    *("brown", "orange", "pink", "purple", "gray"),
)


@dataclass(eq=False, kw_only=True)
class StableBackbone(Backbone):
    """A loaded checkpoint of the Stable Diffusion family."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: CLIPTokenizer
    text_encoders: Sequence[TextEncoder]

    @property
    def parts(self) -> list[nn.Module]:
        return [self.unet, self.vae, *(encoder.model for encoder in self.text_encoders)]

    @property
    def clip_skip(self) -> int:
        return self.text_encoders[0].clip_skip

    def with_clip_skip(self, clip_skip: int) -> StableBackbone:
        """The same checkpoint, whose text features are those of another layer, normed as the last
        layer's are (AUTOMATIC1111's "Clip skip"); for SD1.x.
        """
        encoders = [replace(encoder, clip_skip=clip_skip) for encoder in self.text_encoders]
        return replace(self, text_encoders=encoders)

    @property
    def word_widths(self) -> list[int]:
        return [encoder.width for encoder in self.text_encoders]

    def _to_latent(self, vae: Any, picture: Tensor) -> Tensor:
        encoded = vae.encode(picture)
        is_tiny = isinstance(self.vae, AutoencoderTiny)
        latent = encoded.latents if is_tiny else encoded.latent_dist.mean
        return latent * self.vae.config["scaling_factor"]

    def _to_picture(self, vae: Any, latent: Tensor) -> Tensor:
        return vae.decode(latent / self.vae.config["scaling_factor"]).sample

    def encode_prompts(
        self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Text features (n, 77, d), or (n, 78, d) with pooled text."""
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
        return torch.cat(
            [finite(chunked, prompt).flatten(0, 1)[None], *(row[:1] for row in pooled)], 1
        )

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
        ids = [self.tokenize(prompt, words)[0] for prompt in prompts]
        return self._after_end(torch.tensor(ids, device=self.device))

    def _after_end(self, ids: Tensor) -> Tensor:
        return ids.eq(int(self.tokenizer.eos_token_id)).cumsum(1) > 1  # type: ignore[arg-type]

    def context(self, features: Tensor) -> Tensor:
        return features[:, :-1] if self.text_encoders[-1].pooled_width else features

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

    def second_word(self, prompt: str, token: str, words: Mapping[str, Tensor]) -> tuple[int, int]:
        ids, slots = self.tokenize(prompt, words)
        learned = [k for k, slot in enumerate(slots) if slot >= 0]
        before_padding = [
            k
            for k, (one, slot) in enumerate(zip(ids, slots, strict=True))
            if slot >= 0 or one != ids[-1]
        ]
        return max(learned) + 1 - len(words[token]), max(before_padding) + 1

    def not_read(self, prompt: str, words: Mapping[str, Tensor]) -> str:
        """As `Backbone.not_read`; the text encoder takes 77 positions with start and end."""
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
        ids, positions = [], []
        width = self.tokenizer.model_max_length
        found = self.chunks(prompt, {})
        for number, chunk in enumerate(found):
            ids += [token.id for token in chunk]
            positions += [number * width + 1 + place for place in range(len(chunk))]
        return ids, positions, width * len(found)

    @property
    def last_block(self) -> nn.Module:
        return self.unet.up_blocks[-1]

    def word_start(self, noun: str, generator: torch.Generator, count: int = 1) -> Tensor:
        """The initial vectors of a new word, (count, d) float32.

        In front of a class noun it starts as a modifier, from the mean of `COLORS` and a little noise:
        started from the noun, it has to unlearn being a thing (benchmarks/LOG.md, 2026-12-01).
        Without a noun it starts at random.
        """
        ids = [token for color in COLORS for token in self.token_ids(color)] if noun else []
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

    def token_ids(self, text: str) -> list[int]:
        # not verbose: too many tokens are cut off by `tokenize`, with no need for a warning
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _answer(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        dtype = self.unet.dtype
        added = None
        if pooled := self.text_encoders[-1].pooled_width:
            # SDXL is conditioned on the picture's size, its crop's position, and the size to draw
            height, width = (8 * side for side in noisy.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(
                len(noisy), -1
            )
            added = {"text_embeds": features[:, -1, :pooled].to(dtype), "time_ids": sizes}
        given = noisy.to(dtype), timestep, self.context(features).to(dtype)
        return self.unet(*given, added_cond_kwargs=added).sample

"""Anima: a transformer of 2 billion parameters (Cosmos-Predict2's) that is a rectified flow, and reads
text by two tokenizers.

    Qwen's tokens -> Qwen3-0.6B: states (s, d)
    T5's tokens   -> the conditioner, which attends to the states: a row for each token, (t, d)
                  -> rows of 0 behind them: c (512, d)
    K, V          =  W c

K and V have no bias, so behind a prompt both are 0, whatever a LoRA does. Nothing of a concept can
leak into the padding there, and the closed form is as exact as with CLIP.

A concept's name is plain text and has no vectors: what it looks like is in K and V alone. Hosts give
both tokenizers the same text, and T5's tokens go into an integer tensor, so in ComfyUI an embedding
in a prompt fails (comfy/text_encoders/anima.py); a name works in every program that loads a LoRA.

Latents are (n, 16, h/8, w/8): one frame of Qwen-Image's video VAE.

Source: comfy/ldm/anima/model.py, comfy/text_encoders/anima.py and supported_models.Anima of ComfyUI
0.33; diffusers 0.42, modular_pipelines/anima.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..emphasis import Text, weighted_texts
from ..mentions import split
from .backbone import Backbone, finite

END_OF_TEXT = "<|endoftext|>"  # Qwen's, which also stands for an empty prompt


@dataclass(eq=False, kw_only=True)
class AnimaBackbone(Backbone):
    """A loaded Anima; `tokenizer` is T5's, whose tokens are the positions of text features."""

    conditioner: Any
    text_encoder: Any
    qwen_tokenizer: Any
    preset: str = "anima"
    prediction: str = "flow_prediction"

    latent_channels = 16

    @property
    def parts(self) -> list[nn.Module]:
        return [self.unet, self.vae, self.text_encoder, self.conditioner]

    @property
    def word_widths(self) -> list[int]:
        return [self.text_encoder.config.hidden_size]

    @property
    def last_block(self) -> nn.Module:
        return self.unet.transformer_blocks[-1]

    def word_start(self, noun: str, generator: torch.Generator, count: int = 0) -> Tensor:
        """No vectors, (0, d)."""
        assert count == 0
        return torch.zeros(0, self.word_width)

    def word_of_vocabulary(self, word: str) -> Tensor:
        """No vectors, (0, d)."""
        return torch.zeros(0, self.word_width)

    # --- text ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Text features (n, 512, d); what is longer is cut off, as by diffusers."""
        t5_ids = [self._cut_ids(prompt) for prompt in prompts]
        return self._encode([self._qwen_ids([Text(prompt)]) for prompt in prompts], t5_ids)

    @torch.no_grad()
    def encode_drawn(self, prompt: str, words: Mapping[str, Tensor] | None = None) -> Tensor:
        """Text features (1, t, d), those of each of T5's tokens times its weight. As in ComfyUI and
        Forge Neo, t is 512 or the number of tokens of a longer prompt.

        Errors: SettingError for weights that float32 can't hold.
        """
        texts = self._texts(prompt)
        features = self._encode([self._qwen_ids(texts)], [self._t5_ids(texts)])
        weights = [text.weight for text in texts for _ in self.token_ids(text.text)]
        weights = torch.tensor([*weights, 1.0]).to(features)
        weighted = features * F.pad(weights, (0, features.shape[1] - len(weights)))[:, None]
        return finite(weighted, prompt)

    @contextmanager
    def text_aside(self) -> Iterator[None]:
        texts = (self.text_encoder, self.conditioner)
        for model in texts:
            nn.Module.to(model, "cpu")
        try:
            yield
        finally:
            for model in texts:
                nn.Module.to(model, self.device)

    def _texts(self, prompt: str) -> list[Text]:
        """The parts of a prompt that is drawn. It has no chunks, so BREAK is text, as in ComfyUI."""
        return [text for text in weighted_texts(prompt, breaks=False) if text is not None]

    def _encode(self, qwen_ids: Sequence[list[int]], t5_ids: Sequence[list[int]]) -> Tensor:
        """Text features (n, t, d) of prompts by the ids of both tokenizers."""
        ids, mask = self._batch(qwen_ids)
        # causal, so no state depends on what is behind its prompt
        states = self.text_encoder(ids).last_hidden_state
        return self.conditioner(states, *self._batch(t5_ids), mask).to(self.device)

    def _batch(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and which of them are not padding, (n, longest)."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[k < len(row) for k in range(longest)] for row in rows])
        place = self.text_encoder.device
        return ids.to(place), mask.to(place)

    def _qwen_ids(self, texts: Sequence[Text]) -> list[int]:
        ids = [
            one
            for text in texts
            for one in self.qwen_tokenizer(text.text, add_special_tokens=False)["input_ids"]
        ]
        return ids or [self.qwen_tokenizer.convert_tokens_to_ids(END_OF_TEXT)]

    def _t5_ids(self, texts: Sequence[Text]) -> list[int]:
        """With the end token."""
        ids = [one for text in texts for one in self.token_ids(text.text)]
        return [*ids, self.tokenizer.eos_token_id]

    def _cut_ids(self, prompt: str) -> list[int]:
        """T5's ids of a prompt that is not drawn, at most 512 with the end token."""
        return [*self.token_ids(prompt)[: self.positions - 1], self.tokenizer.eos_token_id]

    @property
    def positions(self) -> int:
        """The least that text features have, and the most of what is learned from: 512."""
        return self.conditioner.config["min_sequence_length"]

    def token_ids(self, text: str) -> list[int]:
        """T5's tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def padding(self, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
        lengths = [[len(self._cut_ids(prompt))] for prompt in prompts]
        places = torch.arange(self.positions, device=self.device)
        return places >= torch.tensor(lengths, device=self.device)

    def second_word(self, prompt: str, token: str, words: Mapping[str, Tensor]) -> tuple[int, int]:
        ends = self._ends(prompt)
        *before, _word, _after = split(prompt, words)
        place = len("".join(before))
        start = next(number for number, end in enumerate(ends) if end > place)
        return start, min(len(ends) + 1, self.positions)

    def not_read(self, prompt: str, words: Mapping[str, Tensor]) -> str:
        ends = self._ends(prompt)
        if len(ends) < self.positions:
            return ""
        return prompt[ends[self.positions - 2] :].strip()

    def _ends(self, prompt: str) -> list[int]:
        """Where in the prompt each of T5's tokens ends."""
        read = self.tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [end for _, end in read["offset_mapping"]]

    def drawn_positions(self, prompt: str) -> tuple[list[int], list[int], int]:
        *ids, _end = self._t5_ids(self._texts(prompt))
        return ids, list(range(len(ids))), max(self.positions, len(ids) + 1)

    # --- pictures -----------------------------------------------------------------------------------

    def _to_latent(self, vae: Any, picture: Tensor) -> Tensor:
        mean, deviation = self._latent_statistics
        return ((vae.encode(picture[:, :, None]).latent_dist.mean - mean) / deviation)[:, :, 0]

    def _to_picture(self, vae: Any, latent: Tensor) -> Tensor:
        mean, deviation = self._latent_statistics
        return vae.decode(latent[:, :, None] * deviation + mean).sample[:, :, 0]

    @property
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, (1, 16, 1, 1, 1)."""
        mean, deviation = (
            torch.tensor(self.vae.config[name], device=self.device).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, deviation

    def _answer(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """eps - z_0. The net is told the share of noise, t / 1000."""
        dtype = self.unet.dtype
        height, width = noisy.shape[-2:]
        # it sees patches of 2 x 2; ComfyUI fills odd sides in the same way
        frame = F.pad(noisy, (0, width % 2, 0, height % 2), mode="circular")[:, :, None]
        mask = torch.zeros_like(frame[:, :1])  # of what is no picture: nothing
        predicted = self.unet(
            hidden_states=torch.cat([frame, mask], 1).to(dtype),
            timestep=timestep / 1000,
            encoder_hidden_states=features.to(dtype),
        ).sample
        return predicted[:, :, 0, :height, :width]

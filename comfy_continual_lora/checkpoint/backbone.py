"""What every stage sees of a checkpoint: encode pictures, encode prompts, predict the noise. Never a model family.

Shapes: n pictures, latents (n, 4, h/8, w/8), text features (n, 77, d); pictures are float32 in -1..1. Word vectors are (d,) float32.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

KV_MODULES = r".*\.attn2\.to_[kv]"


@dataclass(eq=False)
class Backbone:
    """A loaded checkpoint. All parts are frozen; `unet` may carry adapters."""

    path: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    preset: str  # which row of settings.PRESETS suits it
    size: int  # pixels a side it was trained at
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False).eval()

    def to(self, device: torch.device) -> Backbone:
        """Move every part to `device`, in place."""
        self.device = device
        for part in (self.unet, self.vae, self.text_encoder):
            nn.Module.to(part, device)
        return self

    @cached_property
    def kv_layers(self) -> dict[str, nn.Linear]:
        """The layers an adapter changes, by their diffusers names: K and V of every cross-attention. Taken before any adapter is attached."""
        return {name: module for name, module in self.unet.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(KV_MODULES, name)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the K/V weights: says whether a stack was made for this checkpoint."""
        digest = hashlib.sha256()
        for name, layer in sorted(self.kv_layers.items()):
            digest.update(f"{name}{tuple(layer.weight.shape)}".encode())
            digest.update(layer.weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def gradient_scale(self) -> float:
        """How many times larger gradients travel through the net, so that fp16 does not lose small ones."""
        return 1024.0 if self.unet.dtype == torch.float16 else 1.0

    @property
    def word_width(self) -> int:
        return self.token_table.weight.shape[1]

    @property
    def token_table(self) -> nn.Embedding:
        table = self.text_encoder.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> latents (n, 4, h/8, w/8), scaled; the mean of the posterior, so the same picture gives the same latent."""
        encoded = [self.vae.encode(image[None].to(self.device)) for image in images]
        latents = [e.latents if isinstance(self.vae, AutoencoderTiny) else e.latent_dist.mean for e in encoded]  # type: ignore[union-attr]
        return torch.cat(latents) * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (n, 4, h, w) -> pictures (n, 3, 8h, 8w) in -1..1 on the CPU."""
        scaled = latents / self.vae.config["scaling_factor"]
        return torch.cat([self.vae.decode(one[None]).sample for one in scaled]).clamp(-1, 1).float().cpu()  # type: ignore[union-attr]

    def encode_prompts(self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None) -> Tensor:
        """Text features (n, 77, d). Each token of `words` found in a prompt (whole word, any case) stands for its vector; gradients flow into it."""
        words = words or {}
        rows, slots = [], []
        for prompt in prompts:
            ids, slot = self.tokenize(prompt, list(words))
            rows.append(ids)
            slots.append(slot)
        ids, slot = torch.tensor(rows, device=self.device), torch.tensor(slots, device=self.device)
        if not words:
            return self.text_encoder(ids).last_hidden_state
        vectors = torch.stack([vector.to(self.device) for vector in words.values()])
        with _replaced(self.token_table, slot, vectors):
            return self.text_encoder(ids).last_hidden_state

    def tokenize(self, prompt: str, tokens: list[str]) -> tuple[list[int], list[int]]:
        """77 token numbers, and for each position which word's vector replaces it (-1: none)."""
        longest, end = self.tokenizer.model_max_length, int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        ids, slot = [int(self.tokenizer.bos_token_id)], [-1]  # type: ignore[arg-type]
        for piece in re.split(rf"(?<!\w)({'|'.join(map(re.escape, tokens))})(?!\w)", prompt, flags=re.IGNORECASE) if tokens else [prompt]:
            found = next((i for i, token in enumerate(tokens) if token.lower() == piece.lower()), None)
            if found is not None:
                ids, slot = [*ids, end], [*slot, found]
            elif piece.strip():
                new = list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
                ids, slot = [*ids, *new], [*slot, *[-1] * len(new)]
        ids, slot = ids[: longest - 1], slot[: longest - 1]
        rest = longest - len(ids)
        return [*ids, *[end] * rest], [*slot, *[-1] * rest]

    def word_start(self, noun: str, generator: torch.Generator) -> Tensor:
        """Where a new word begins: the mean vector of the class noun's tokens plus a little noise, (d,) float32; without a noun a random vector."""
        if not noun:
            rows = self.token_table.weight.detach().float().cpu()
            return rows.mean(0) + rows.std(0) * torch.randn(rows.shape[1], generator=generator)
        ids = self.tokenizer(noun, add_special_tokens=False)["input_ids"]
        rows = self.token_table.weight[ids].detach().float().cpu()
        noise = torch.randn(rows.shape[1], generator=generator) * rows.std() * 0.1
        return rows.mean(0) + noise

    def is_known_word(self, token: str) -> bool:
        """Whether the tokenizer has this word as one token of its own, so that ordinary prompts may use it."""
        return len(self.tokenizer(token, add_special_tokens=False)["input_ids"]) == 1

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """The net's prediction, float32, shaped as `noisy`. timestep (n,), features (n, 77, d)."""
        dtype = self.unet.dtype
        # adapters stay in float32; torch before 2.3 refuses to hear of autocast to float32, even when it is off
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext():
            return self.unet(noisy.to(dtype), timestep, features.to(dtype)).sample.float()


class FrozenText:
    """Text features of prompts whose words do not change any more, each encoded once: prompts (k,) -> (k, 77, d)."""

    def __init__(self, backbone: Backbone, words: Mapping[str, Tensor]) -> None:
        self.backbone, self.words, self.known = backbone, words, {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in self.known:
                self.known[prompt] = self.backbone.encode_prompts([prompt], self.words)[0]
        return torch.stack([self.known[prompt] for prompt in prompts])


@contextmanager
def _replaced(table: nn.Embedding, slot: Tensor, vectors: Tensor) -> Iterator[None]:
    """While inside, the embedding table gives vectors[slot] where slot >= 0."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.where((slot >= 0)[..., None], vectors[slot.clamp(min=0)].to(output.dtype), output)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

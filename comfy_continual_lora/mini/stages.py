"""The stages of the mini-SD's recipe that train or run a net; `pretrain` says what each is for.

in: a `Run`, whose folder holds what earlier stages wrote - out: OUT/<stage>.safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from ..diffusion import add_noise, alphas_cumprod, loss_per_example
from . import parts, world
from .drawing import draw_abstract
from .training import Run, fit, rank
from .trainset import PICTURES, SEED, Pictures, captions, scenes, to_tensor


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Cross-entropy over every attribute in `labels`; -1 marks what a picture does not have."""
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for key, target in labels.items():
        if key.startswith("colors"):
            labelled = target[:, 0] >= 0
            total = total + 10 * F.binary_cross_entropy_with_logits(
                logits[key][labelled].float(), target[labelled].float()
            )
        elif (target >= 0).any():
            total = total + F.cross_entropy(logits[key].float(), target, ignore_index=-1)
    return total


def train_reader(run: Run, steps: int = 3400, n: int = 96) -> None:
    pictures = Pictures(run.out / "pictures.npy")
    labels = parts.labels(scenes())
    model = parts.Reader()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, n, stream=1)
        images = pictures.images(indices, run.device)
        if step % 2:  # generated images are slightly soft and noisy, and must be read all the same
            if step % 4 == 1:
                images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(images.shape, generator=generator).to(run.device)
            images = images + 0.08 * noise
        with run.autocast():
            logits = model(images.contiguous(memory_format=torch.channels_last))
        targets = {key: values[indices].to(run.device) for key, values in labels.items()}
        return attribute_loss(logits, targets), {}

    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(run, "reader", model, loss, steps=steps, rate=2e-3)
    rng = np.random.default_rng(99)
    unseen = [world.random_scene(rng) for _ in range(1000)]
    images = to_tensor(np.stack([world.draw_scene(scene, rng) for scene in unseen]))
    run.log(stage="reader", accuracy_on_real=parts.read_accuracy(model, images, unseen))
    run.save("reader", model)


def train_clip(run: Run, steps: int = 1500, n: int = 128) -> None:
    """Contrastive loss, plus an attribute loss on both towers.

    With the contrastive loss alone, background and colours dominate and shapes are not learned.
    """
    pictures = Pictures(run.out / "pictures.npy")
    model = parts.new_clip()
    if (run.out / "clip.start.safetensors").exists():
        model.load_state_dict(load_file(run.out / "clip.start.safetensors"))
    said = Captions(run.device)
    image_heads = parts.AttributeHeads(parts.VISION_WIDTH)
    text_heads = parts.AttributeHeads(parts.TEXT_WIDTH)
    rows = torch.arange(n, device=run.device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, n, stream=2)
        targets = said.targets(indices)
        with run.autocast():
            pooled, features = said.read(model, indices)
            text_loss = attribute_loss(text_heads(features), targets)
        loss_parts = {"said": float(text_loss.detach())}
        if step % 4:  # the text tower is cheap: it gets three steps of its own to one of both
            return 0.3 * text_loss, loss_parts
        with run.autocast():
            images = pictures.images(indices, run.device)
            vision = model.vision_model(pixel_values=images).pooler_output
            image_features = F.normalize(model.visual_projection(vision).float(), dim=-1)
            text_features = F.normalize(model.text_projection(pooled).float(), dim=-1)
            image_loss = attribute_loss(image_heads(vision), targets)
        logits = model.logit_scale.clamp(max=4.0).exp() * image_features @ text_features.T
        contrastive = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        loss_parts["contrastive"] = float(contrastive.detach())
        loss_parts["seen"] = float(image_loss.detach())
        loss_parts["top1"] = float((logits.argmax(1) == rows).float().mean())
        return contrastive + 0.3 * image_loss + 0.3 * text_loss, loss_parts

    both = nn.ModuleList([model, image_heads, text_heads])
    fit(run, "clip", both, loss, steps=steps, rate=1e-3)
    run.save("clip", model)


class Captions:
    """The captions of the training set and what they say, for text towers that learn to read them."""

    def __init__(self, device: torch.device) -> None:
        every, vocabulary = scenes(), parts.Vocabulary()
        self.device = device
        self.labels = parts.labels(every)
        self.ids = vocabulary.encode([scene.caption for scene in every])
        self.end = (self.ids == vocabulary.end).int().argmax(1)
        # The tower is causal, so a caption's features do not depend on what follows it, and the
        # features of all padding are much alike: the longest caption and two more positions are
        # enough.
        self.longest = int(self.end.max()) + 2

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self, indices: np.ndarray) -> dict[str, Tensor]:
        """What these captions (n,) say."""
        return {key: values[indices].to(self.device) for key, values in self.labels.items()}

    def read(self, model: CLIPModel, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pooled features of these captions, and those of their end token or of some padding after
        it, as the U-Net sees all of it; (n, width) each.
        """
        # 0, 1, 2, ..., then any later one of the 77, so that padding is learned at all positions
        later = torch.randint(self.longest - 1, 77, (1,))
        text = model.text_model(
            input_ids=self.ids[indices, : self.longest].to(self.device),
            position_ids=torch.cat([torch.arange(self.longest - 1), later])[None].to(self.device),
        )
        end = self.end[indices]
        position = end + (torch.rand(len(indices)) * (self.longest - end)).long()
        rows = torch.arange(len(indices), device=self.device)
        return text.pooler_output, text.last_hidden_state[rows, position.to(self.device)]


def train_autoencoder(run: Run, steps: int, n: int = 8) -> None:
    pictures = Pictures(run.out / "pictures.npy")
    model = parts.SlimAutoencoder()
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    process = rank()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, n - n // 4, stream=30 + process)
        rng = np.random.default_rng((SEED, 30 + process, step))
        abstract = np.stack([draw_abstract(rng) for _ in range(n // 4)])
        images = torch.cat([pictures.images(indices, run.device), to_tensor(abstract, run.device)])
        images = images.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            latents = model.encode(images).float()
            generator = torch.Generator().manual_seed(2 * step + process)
            noise = torch.randn(latents.shape, generator=generator).to(run.device)
            decoded = model.decode(latents + 0.05 * noise).float()
        error = F.smooth_l1_loss(decoded, images, beta=0.1)
        edges = sum((decoded - images).diff(dim=d).abs().mean() for d in (2, 3))
        variance_error = latents.var((0, 2, 3)).sub(1).square().mean()
        spread = variance_error + latents.mean((0, 2, 3)).square().mean()
        squared = (decoded.detach() - images)[: len(indices)].square().mean()
        psnr = float(-10 * torch.log10(squared / 4))
        loss_parts = {"psnr": psnr, "spread": float(spread.detach())}
        return error + 0.25 * edges + 0.01 * spread, loss_parts

    fit(run, "autoencoder", model, loss, steps=steps, rate=1e-3, average_every=4, weight_decay=0.0)
    if process == 0:
        parts.normalise_latents(model, pictures.images(np.arange(0, 512)))
        run.save("autoencoder", model)


@torch.no_grad()
def encode_latents(run: Run) -> None:
    """The latents of every picture, float16 (pictures, 4, 16, 16)."""
    pictures = Pictures(run.out / "pictures.npy")
    model = parts.SlimAutoencoder()
    model.load_state_dict(load_file(run.out / "autoencoder.safetensors"))
    nn.Module.to(model, run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = len(pictures.array)
    latents = torch.empty(count, 4, 16, 16, dtype=torch.float16)
    with run.autocast():
        for start in range(0, count, 64):
            chunk = np.arange(start, min(start + 64, count))
            images = pictures.images(chunk, run.device)
            images = images.contiguous(memory_format=torch.channels_last)
            latents[start : start + 64] = model.encode(images)
    save_file({"latents": latents}, run.out / "latents.safetensors")
    mean, std = float(latents.float().mean()), float(latents.float().std())
    run.log(stage="latents", mean=mean, std=std)


@torch.no_grad()
def encode_captions(run: Run, count: int = PICTURES, width: int = parts.TEXT_WIDTH) -> None:
    """The text features of each distinct caption of so many pictures, in sorted order, float16
    (captions, 77, width).
    """
    clip = parts.new_clip(text_width=width).eval()
    clip.load_state_dict(load_file(run.out / "clip.safetensors"))
    nn.Module.to(clip, run.device)
    ids = parts.Vocabulary().encode(sorted(set(captions(scenes(count)))))
    features = torch.empty(len(ids), 77, width, dtype=torch.float16)
    with run.autocast():
        for start in range(0, len(ids), 128):
            text = clip.text_model(input_ids=ids[start : start + 128].to(run.device))
            features[start : start + 128] = text.last_hidden_state
    save_file({"features": features}, run.out / "features.safetensors")
    run.log(stage="features", captions=len(ids))


def train_unet(run: Run, steps: int, n: int = 32, width: int = parts.TEXT_WIDTH) -> None:
    process = rank()
    latents = load_file(run.out / "latents.safetensors")["latents"]
    features = load_file(run.out / "features.safetensors")["features"]
    every = scenes(len(latents))
    text = captions(every)
    row_of = {caption: row for row, caption in enumerate(sorted(set(text)))}
    rows = torch.tensor([row_of[caption] for caption in text])
    model = parts.new_unet(width)
    nn.Module.to(model, run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.device.type == "cpu":
        # plain matrix products are faster there than the fused attention's bf16 backward
        model.set_attn_processor(AttnProcessor())
    predict = torch.compile(model)
    alphas = alphas_cumprod().to(run.device)
    count = torch.tensor([len(scene.things) for scene in every])
    pairs = np.flatnonzero(count.numpy() == 2)
    weights_by_count = torch.stack(
        [_foreground_weights(((64, 66),), 46), _foreground_weights(((33, 66), (95, 66)), 32)]
    ).to(run.device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((SEED, 4 + process, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        # two pictures in three have two things
        index = rng.integers(0, len(latents), n)
        index = torch.from_numpy(np.where(rng.random(n) < 0.5, rng.choice(pairs, n), index))
        # stratified, and more often where the noise still hides what the picture shows
        quantile = (np.arange(n) + rng.random(n)) / n
        timestep = torch.from_numpy(quantile**0.7 * 1000).long().to(run.device)
        clean = latents[index].to(run.device).float()
        noise = torch.randn(n, 4, 16, 16, generator=generator).to(run.device)
        noisy = add_noise(clean, noise, timestep, alphas)
        caption = torch.where(torch.rand(n, generator=generator) < 0.1, rows[0], rows[index + 1])
        with run.autocast():
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            predicted = predict(noisy, timestep, features[caption].to(run.device).float()).sample
        error = loss_per_example(predicted, noise, weights_by_count[count[index] - 1])
        # What a thing is gets decided at high noise, where this error is small; 1 / alpha weighs it
        # as the error of v would be.
        return (error / alphas[timestep]).mean() * 0.4, {"mse": float(error.detach().mean())}

    if (run.out / "unet.start.safetensors").exists():
        model.load_state_dict(load_file(run.out / "unet.start.safetensors"))
    fit(run, "unet", model, loss, steps=steps, rate=1.2e-3, ema=0.9995, average_every=4)
    if process == 0:
        run.save("unet", model)


def _foreground_weights(centers: Sequence[tuple[int, int]], radius: int) -> Tensor:
    """(1, 16, 16): 1 where the things stand, 0.3 on the background.

    The background is learned long before them, and is mostly texture that nobody can predict.
    """
    axis = torch.arange(16)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) * 8.0 + 4.0
    inside = [(grid - torch.tensor(center)).norm(dim=-1) < radius + 4 for center in centers]
    return torch.where(torch.stack(inside).any(0), 1.0, 0.3)[None]

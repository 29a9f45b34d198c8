"""Make the second miniature: one command, resumable, stage after stage.

    python benchmarks/second/train.py OUT --device cuda --processes 16      # a GPU; never run
    python benchmarks/second/train.py OUT --pictures 600 --scale 0.002      # tries it in minutes

in: nothing (the world is drawn) - out: OUT/*.safetensors, the parts; OUT/second.safetensors, a
checkpoint in SD1.x's layout; OUT/clip, its CLIP as transformers saves it; OUT/log.jsonl.

    pictures     120,000 captioned pictures
    reader       reads a picture's contents; trained on real pictures only (quality.py)
    clip         image and text tower, the contrastive loss alone
    autoencoder  KL, f = 8, 4 channels
    latents      every picture encoded once
    unet         predicts eps; scaled-linear betas, errors weighted as those of v, caption dropout
                 0.1, EMA
    pack         the checkpoint

`--twin` makes the same with SDXL's two text encoders, pooled text, sizes and v-prediction besides:
stages clip2, unet2 and pack2, OUT/twin.safetensors. `--anima` makes an Anima besides, `anima.STAGES`.

Each stage goes on from its snapshot, and one whose file exists is skipped, so the command can be given
any number of short turns. `--seed` draws another training set and starts from other weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import anima
import dataset
import nets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from pack import write_checkpoint, write_twin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from comfy_continual_lora.diffusion import add_noise, alphas_cumprod, loss_per_example
from comfy_continual_lora.mini.stages import attribute_loss
from comfy_continual_lora.mini.training import Loss, Run, fit

STAGES = ("pictures", "reader", "clip", "autoencoder", "latents", "unet", "pack")
TWIN = ("clip2", "unet2", "pack2")
STEPS = {
    "reader": 3000,
    "autoencoder": 9000,
    **dict.fromkeys(("clip", "clip2"), 4000),
    **dict.fromkeys(("unet", "unet2"), 14_000),
    **anima.STEPS,
}
BATCHES = {
    "reader": 256,
    "autoencoder": 64,
    **dict.fromkeys(("clip", "clip2"), 1024),
    **dict.fromkeys(("unet", "unet2"), 512),
    **anima.BATCHES,
}
Coder = Callable[[Tensor], Tensor]


class Recipe:
    """The stages, in one folder, on one device."""

    all_steps, all_batches, sizes = STEPS, BATCHES, anima.Sizes()

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run = Run(arguments.out, torch.device(arguments.device))
        self.seed: int = arguments.seed

    @cached_property
    def data(self) -> Any:
        """What is learned from, as a `dataset.Dataset` gives it."""
        return dataset.Dataset(self.run.out, self.seed, self.run.device)

    def steps(self, stage: str) -> int:
        return max(4, round(self.all_steps[stage] * self.arguments.scale))

    def batch(self, stage: str) -> int:
        return max(4, round(self.all_batches[stage] * min(1.0, 4 * self.arguments.scale)))

    def fast(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.arguments.compile else module  # type: ignore[return-value]

    def fit(self, name: str, model: nn.Module, loss: Loss, **options: float) -> None:
        """Train it for the steps of this stage. `options`: as of `mini.training.fit`."""
        fit(self.run, name, model, loss, steps=self.steps(name), **options)  # type: ignore[arg-type]

    def reader_of_places(self) -> Coder | None:
        """What a reader sees in each place of pictures, (n, 64, anima.PLACE), if it is to help."""
        return None

    def train_autoencoder(self, name: str, model: nn.Module, encode: Coder, decode: Coder) -> None:
        """`encode`: pictures -> the posterior's means and logarithms of variances, (n, 2c, 16, 16);
        `decode`: latents -> pictures.
        """
        n = self.batch(name)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            images = self.data.images(self.data.indices(step, n, stream=3))
            images = images.contiguous(memory_format=torch.channels_last)
            with self.run.autocast():
                mean, log_variance = encode(images).float().chunk(2, dim=1)
                log_variance = log_variance.clamp(-30, 20)
                latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
                decoded = decode(latents).float()
            error = F.smooth_l1_loss(decoded, images, beta=0.1)
            edges = sum((decoded - images).diff(dim=d).abs().mean() for d in (2, 3))
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            squared = (decoded.detach() - images).square().mean()
            found = {"psnr": float(-10 * torch.log10(squared / 4))}
            return error + 0.25 * edges + 1e-4 * divergence, found

        self.fit(name, model, loss, rate=6e-4, weight_decay=0.0, ema=0.999)

    @torch.no_grad()
    def encoded(self, encode: Coder, count: int | None = None) -> Tensor:
        """What `encode` makes of the first `count` pictures, or of all; float32 on the CPU."""
        count = min(count or len(self.data), len(self.data))
        starts = range(0, count, 256)
        rows = (np.arange(start, min(start + 256, count)) for start in starts)
        return torch.cat([encode(self.data.images(part)).float().cpu() for part in rows])

    # --- stages -------------------------------------------------------------------------------

    def pictures(self) -> None:
        dataset.draw(self.run.out, self.seed, self.arguments.pictures, self.arguments.processes)
        self.run.log(stage="pictures", count=self.arguments.pictures)

    def reader(self) -> None:
        model, n = nets.Reader(), self.batch("reader")
        predict = self.fast(model)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            indices = self.data.indices(step, n, stream=1)
            images = self.data.images(indices)
            if step % 2:  # generated pictures are slightly soft and noisy
                if step % 4 == 1:
                    images = F.interpolate(
                        F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear"
                    )
                images = images + 0.08 * torch.randn_like(images)
            with self.run.autocast():
                logits = predict(images)
            targets = {k: v[indices].to(self.run.device) for k, v in self.data.labels.items()}
            return attribute_loss(logits, targets), {}

        self.fit("reader", model, loss, rate=2e-3)
        self.run.save("reader", model)

    def clip(self) -> None:
        self._train_clip("clip")

    def clip2(self) -> None:
        self._train_clip("clip2")

    def _train_clip(self, name: str) -> None:
        vocabulary, n = nets.Vocabulary(), self.batch(name)
        model = nets.new_clip(len(vocabulary.tokens), openclip=name == "clip2")
        ids = vocabulary.encode(self.data.captions)
        # the tower is causal: what follows the end of a caption does not matter
        longest = int((ids == vocabulary.end).int().argmax(1).max()) + 1
        ids = ids[:, :longest].to(self.run.device)
        rows = torch.arange(n, device=self.run.device)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            indices = self.data.indices(step, n, stream=2 if name == "clip" else 20)
            with self.run.autocast():
                text = model.text_model(input_ids=ids[torch.from_numpy(indices)]).pooler_output
                pixels = nets.normalised(self.data.images(indices))
                image = model.vision_model(pixel_values=pixels).pooler_output
                seen = F.normalize(model.visual_projection(image).float(), dim=-1)
                said = F.normalize(model.text_projection(text).float(), dim=-1)
            logits = model.logit_scale.clamp(max=4.6).exp() * seen @ said.T
            contrastive = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
            return contrastive, {"top1": float((logits.argmax(1) == rows).float().mean())}

        self.fit(name, model, loss, rate=5e-4, weight_decay=0.1)
        self.run.save(name, model)

    def autoencoder(self) -> None:
        model: Any = nets.new_autoencoder()
        nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        encode, decode = self.fast(model.encoder), self.fast(model.decoder)
        narrow, widen = model.quant_conv, model.post_quant_conv
        self.train_autoencoder(
            "autoencoder", model, lambda x: narrow(encode(x)), lambda z: decode(widen(z))
        )
        nn.Module.to(model, self.run.device)
        latents = self.encoded(lambda images: model.encode(images).latent_dist.mean, 512)
        _scale_latents(model, 1 / nets.FACTOR / float(latents.std()))
        nn.Module.to(model, "cpu")
        self.run.save("autoencoder", model)

    def latents(self) -> None:
        model: Any = nets.new_autoencoder().eval()
        model.load_state_dict(load_file(self.run.out / "autoencoder.safetensors"))
        nn.Module.to(model, self.run.device)
        latents = self.encoded(lambda images: nets.FACTOR * model.encode(images).latent_dist.mean)
        save_file({"latents": latents.half().contiguous()}, self.run.out / "latents.safetensors")
        self.run.log(stage="latents", mean=float(latents.mean()), std=float(latents.std()))

    def unet(self) -> None:
        self._train_unet("unet", twin=False)

    def unet2(self) -> None:
        self._train_unet("unet2", twin=True)

    def _train_unet(self, name: str, *, twin: bool) -> None:
        n, device = self.batch(name), self.run.device
        latents = load_file(self.run.out / "latents.safetensors")["latents"].to(device)
        clips = [_trained_clip(self.run.out, one) for one in ("clip", "clip2")[: 1 + twin]]
        text = nets.Texts(clips).to(device).eval()
        ids = nets.Vocabulary().encode(["", *self.data.captions]).to(device)
        model = nets.new_unet(twin=twin)
        nn.Module.to(model, device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        predict, alphas = self.fast(model), alphas_cumprod().to(device)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            index = torch.from_numpy(self.data.indices(step, n, stream=4)).to(device)
            rng = np.random.default_rng((self.seed, 5, step))
            generator = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
            # stratified, and more often where the noise still hides what the picture shows
            quantile = (np.arange(n) + rng.random(n)) / n
            timestep = torch.from_numpy(quantile**0.7 * 1000).long().clamp(max=999).to(device)
            noise = torch.randn(n, 4, 16, 16, generator=generator, device=device)
            clean, alpha = latents[index].float(), alphas[timestep].view(-1, 1, 1, 1)
            noisy = add_noise(clean, noise, timestep, alphas)
            said = torch.rand(n, generator=generator, device=device) >= 0.1
            with torch.no_grad(), self.run.autocast():
                features, added = text(ids[(index + 1) * said])
            with self.run.autocast():
                noisy = noisy.contiguous(memory_format=torch.channels_last)
                predicted = predict(noisy, timestep, features, added_cond_kwargs=added).sample
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            error = loss_per_example(predicted.float(), velocity if twin else noise)
            # What a thing is gets decided at high noise, where eps' error is small; 1 / alpha weighs
            # it as the error of v.
            weighed = error if twin else error / alphas[timestep]
            return weighed.mean() * 0.4, {"mse": float(error.detach().mean())}

        self.fit(name, model, loss, rate=6e-4, ema=0.9995)
        self.run.save(name, model)

    def pack(self) -> None:
        write_checkpoint(self.run.out)
        self.run.log(stage="pack", bytes=(self.run.out / "second.safetensors").stat().st_size)

    def pack2(self) -> None:
        write_twin(self.run.out)
        self.run.log(stage="pack2", bytes=(self.run.out / "twin.safetensors").stat().st_size)


@torch.no_grad()
def _scale_latents(model: AutoencoderKL, factor: float) -> None:
    """Multiply the latents, so that FACTOR gives them a variance of 1, as SD1.x's is."""
    assert model.quant_conv is not None
    assert model.post_quant_conv is not None
    channels = model.config["latent_channels"]
    model.quant_conv.weight[:channels] *= factor
    assert model.quant_conv.bias is not None
    model.quant_conv.bias[:channels] *= factor
    model.quant_conv.bias[channels:] += 2 * float(np.log(factor))
    model.post_quant_conv.weight /= factor


def _trained_clip(out: Path, name: str) -> CLIPModel:
    clip = nets.new_clip(len(nets.Vocabulary().tokens), openclip=name == "clip2")
    clip.load_state_dict(load_file(out / f"{name}.safetensors"))
    return clip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make the second miniature; run it again to go on where it stopped."
    )
    parser.add_argument("out", type=Path, help="folder for data, snapshots and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=2, help="that draw pictures")
    parser.add_argument("--pictures", type=int, default=120_000)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps, to try it")
    parser.add_argument("--compile", action="store_true", help="compile the nets (a minute each)")
    parser.add_argument("--twin", action="store_true", help="make the one like SDXL as well")
    parser.add_argument("--anima", action="store_true", help="make an Anima as well")
    parser.add_argument("--stages", help="only these")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    recipe = Recipe(arguments)
    every = (*STAGES, *TWIN) if arguments.twin else STAGES
    stages: dict[str, Callable[[], None]] = {name: getattr(recipe, name) for name in every}
    if arguments.anima:
        stages |= {name: partial(getattr(anima, name), recipe) for name in anima.STAGES}
    for stage in arguments.stages.split(",") if arguments.stages else stages:
        if not (arguments.out / f"{stage}.safetensors").exists():
            stages[stage]()


if __name__ == "__main__":
    main()

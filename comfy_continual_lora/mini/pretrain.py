"""The recipe that made the mini-SD: one command, resumable, stage after stage.

    python -m comfy_continual_lora.mini.pretrain OUT --processes 2       on CPUs: several one-thread
    processes train the large parts together
    python -m comfy_continual_lora.mini.pretrain OUT --device cuda

in: nothing (the world is drawn) - out: OUT/*.safetensors, the parts of the mini-SD, and
OUT/log.jsonl.

stages   pictures     64,000 captioned pictures of the world
         reader       a small CNN that reads shape, pattern, colours and background off a picture:
         the judge, trained on real pictures only
         clip         image and text tower (contrastive, with an attribute loss on both); the text
         tower is the text encoder
         autoencoder  a slim TAESD, f = 8, 4 channels of unit variance
         latents      every picture encoded once
         features     every caption encoded once
         unet         eps-prediction, scaled-linear betas, errors weighed as those of v, caption
         dropout 0.1, EMA
         pack         the shipped files

Each stage keeps a snapshot and goes on from it; a finished stage (OUT/<stage>.safetensors is there)
is skipped. The order of the data is a function
of seed and step, so a resumed run sees what an undisturbed one would. To train a finished U-Net
longer, remove OUT/unet.safetensors and raise
--unet-steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..diffusion import add_noise, alphas_cumprod, loss_per_example
from . import parts, weights, world
from .drawing import SIZE, draw_abstract

PICTURES = 64_000
SEED = 20
DEVICE = torch.device("cpu")  # main() changes it


def scene(index: int) -> tuple[world.Scene, np.random.Generator]:
    """Picture `index` of the training set: what is in it, and the generator that draws it."""
    rng = np.random.default_rng((SEED, index))
    return world.random_scene(rng), rng


def scenes() -> list[world.Scene]:
    """What is in every picture of the training set."""
    return [scene(index)[0] for index in range(PICTURES)]


def log(out: Path, **row: object) -> None:
    row = {"time": time.strftime("%H:%M:%S"), **row}
    print(json.dumps(row), flush=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


# --- pictures
# --------------------------------------------------------------------------------------------------


def _draw_range(path: str, start: int, stop: int) -> None:
    array = np.lib.format.open_memmap(path, "r+")
    for index in range(start, stop):
        array[index] = world.draw_scene(*scene(index))


def stage_pictures(out: Path, processes: int) -> None:
    path = out / "pictures.npy"
    if path.exists():
        return
    partial = out / "pictures.partial.npy"
    np.lib.format.open_memmap(partial, "w+", np.uint8, (PICTURES, SIZE, SIZE, 3)).flush()
    bounds = np.linspace(0, PICTURES, processes + 1).astype(int)
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_draw_range, args=(str(partial), a, b)) for a, b in pairwise(bounds)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"drawing the pictures failed with exit status {worker.exitcode}")
    partial.rename(path)
    log(out, stage="pictures", count=PICTURES)


class Pictures:
    """The drawn training set; `batch(step, n)` is a function of its arguments, so order survives a
    resume.
    """

    def __init__(self, out: Path) -> None:
        self.array = np.load(out / "pictures.npy", mmap_mode="r")

    def indices(self, step: int, n: int, stream: int = 0) -> np.ndarray:
        return np.sort(
            np.random.default_rng((SEED, stream, step)).choice(PICTURES, n, replace=False)
        )

    def images(self, indices: np.ndarray) -> Tensor:
        """(n, 3, 128, 128) in -1..1."""
        return to_tensor(self.array[indices])


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in -1..1."""
    return (
        torch.from_numpy(np.ascontiguousarray(pictures))
        .to(DEVICE)
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1)
    )


def fast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


# --- the loop all stages share
# --------------------------------------------------------------------------------------------------


def fit(
    out: Path,
    name: str,
    model: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    rate: float,
    ema: float = 0.0,
    average_every: int = 0,
    snapshot_every: int = 250,
    weight_decay: float = 0.01,
) -> None:
    """Train `model` in place on `loss(step)`: warm-up, constant rate, linear decay over the last
    two fifths; ends with the EMA weights if asked for.

    Several processes (torch.distributed is initialised) average their parameters every
    `average_every` steps.
    """
    model = model.to(DEVICE)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    parallel = dist.is_initialized()
    main = not parallel or dist.get_rank() == 0
    path, step, averaged = out / f"{name}.snapshot.pt", 0, None
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, averaged = state["step"], state["averaged"]
    if ema and averaged is None:
        averaged = [p.detach().clone() for p in model.parameters()]
    started, first, sums, model = time.time(), step, {}, model.train()

    def save() -> None:
        if main:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "averaged": averaged,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(
                (step + 1) / 100, 1.0, max(0.02, (steps - step) / (0.4 * steps))
            )
        value, parts_of_it = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if parallel and (step % average_every == 0 or step == steps):
            _average(list(model.parameters()))
        if averaged is not None and step % 4 == 0:
            torch._foreach_lerp_(
                averaged,
                [p.detach() for p in model.parameters()],
                1 - min(ema, (1 + step) / (10 + step)) ** 4,
            )
        for key, part in {"loss": float(value.detach()), **parts_of_it}.items():
            sums.setdefault(key, []).append(part)
        if step % 100 == 0 and main:
            means = {k: round(float(np.mean(v)), 4) for k, v in sums.items()}
            log(
                out,
                stage=name,
                step=step,
                of=steps,
                **means,
                seconds_per_step=round((time.time() - started) / (step - first), 3),
            )
            sums = {}
        if step % snapshot_every == 0:
            save()
    save()
    if averaged is not None:
        with torch.no_grad():
            for p, a in zip(model.parameters(), averaged, strict=True):
                p.copy_(a)
    model.to("cpu").eval()


@torch.no_grad()
def _average(parameters: list[nn.Parameter]) -> None:
    """Every process gets the mean of all processes' parameters."""
    flat = torch.cat([p.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    for p, mean in zip(
        parameters,
        (flat / dist.get_world_size()).split([p.numel() for p in parameters]),
        strict=True,
    ):
        p.copy_(mean.view(p.shape))


def keep(out: Path, name: str, model: nn.Module) -> None:
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{name}.safetensors"
    )


# --- reader
# --------------------------------------------------------------------------------------------------


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Cross-entropy over every attribute the labels know; -1 marks what a picture does not have."""
    total = torch.zeros((), device=DEVICE)
    for key, target in labels.items():
        if key.startswith("colors"):
            known = target[:, 0] >= 0
            total = total + 10 * F.binary_cross_entropy_with_logits(
                logits[key][known].float(), target[known].float()
            )
        else:
            total = total + F.cross_entropy(logits[key].float(), target, ignore_index=-1)
    return total


def stage_reader(out: Path, steps: int = 3400, n: int = 96) -> None:
    pictures, model = Pictures(out), parts.Reader()
    labels = parts.labels(scenes())

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, n, stream=1)
        images, generator = pictures.images(indices), torch.Generator().manual_seed(step)
        if step % 2:  # a drawn picture is a little soft and noisy; a judge must not mind
            images = (
                F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
                if step % 4 == 1
                else images
            )
            images = images + 0.08 * torch.randn(images.shape, generator=generator).to(DEVICE)
        with fast():
            logits = model(images.contiguous(memory_format=torch.channels_last))
        return attribute_loss(logits, {k: v[indices].to(DEVICE) for k, v in labels.items()}), {}

    fit(out, "reader", model.to(memory_format=torch.channels_last), loss, steps=steps, rate=2e-3)  # pyright: ignore[reportCallIssue]
    rng = np.random.default_rng(99)
    unseen = [world.random_scene(rng) for _ in range(1000)]
    images = to_tensor(np.stack([world.draw_scene(s, rng) for s in unseen]))
    log(out, stage="reader", accuracy_on_real=parts.read_accuracy(model, images.cpu(), unseen))
    keep(out, "reader", model)


# --- clip
# --------------------------------------------------------------------------------------------------


def stage_clip(out: Path, steps: int = 1500, n: int = 128) -> None:
    """Contrastive, and both towers name the attributes too: with contrast alone background and
    colours win, and the shapes stay unlearned.
    """
    pictures, model, vocabulary = Pictures(out), parts.new_clip(), parts.Vocabulary()
    if (out / "clip.start.safetensors").exists():
        model.load_state_dict(load_file(out / "clip.start.safetensors"))
    shown = scenes()
    labels, ids = parts.labels(shown), vocabulary.encode([s.caption for s in shown])
    end = (ids == vocabulary.end).int().argmax(1)
    longest = (
        int(end.max()) + 2
    )  # causal: what follows changes nothing before it; the features of all padding are much alike
    seen, said = parts.AttributeHeads(parts.VISION_WIDTH), parts.AttributeHeads(parts.TEXT_WIDTH)
    both = nn.ModuleList([model, seen, said])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices = pictures.indices(step, n, stream=2)
        truth, rows = (
            {k: v[indices].to(DEVICE) for k, v in labels.items()},
            torch.arange(n, device=DEVICE),
        )
        with fast():
            text = model.text_model(
                input_ids=ids[indices, :longest].to(DEVICE),
                position_ids=_positions(longest).to(DEVICE),
            )
            padding = (end[indices] + (torch.rand(n) * (longest - end[indices])).long()).to(
                DEVICE
            )  # the end or some padding: the U-Net sees all of it
            spoken = attribute_loss(said(text.last_hidden_state[rows, padding]), truth)
        told = {"said": float(spoken.detach())}
        if step % 4:  # the text tower is cheap: three steps of its own between two of both
            return 0.3 * spoken, told
        with fast():
            vision = model.vision_model(pixel_values=pictures.images(indices)).pooler_output
            image_features = F.normalize(model.visual_projection(vision).float(), dim=-1)
            text_features = F.normalize(model.text_projection(text.pooler_output).float(), dim=-1)
            named = attribute_loss(seen(vision), truth)
        logits = model.logit_scale.clamp(max=4.0).exp() * image_features @ text_features.T
        contrastive = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        told |= {"contrastive": float(contrastive.detach()), "seen": float(named.detach())}
        told["top1"] = float((logits.argmax(1) == rows).float().mean())
        return contrastive + 0.3 * named + 0.3 * spoken, told

    fit(out, "clip", both, loss, steps=steps, rate=1e-3)
    keep(out, "clip", model)


def _positions(longest: int) -> Tensor:
    """0, 1, 2, ..., but the last one is any later place of the 77, so that padding is learned in
    all of them.
    """
    return torch.cat([torch.arange(longest - 1), torch.randint(longest - 1, 77, (1,))])[None]


# --- autoencoder
# --------------------------------------------------------------------------------------------------


def stage_autoencoder(out: Path, steps: int, n: int = 8) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    pictures, model = Pictures(out), parts.SlimAutoencoder()
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        indices, rng = (
            pictures.indices(step, n - n // 4, stream=30 + rank),
            np.random.default_rng((SEED, 30 + rank, step)),
        )
        abstract = to_tensor(np.stack([draw_abstract(rng) for _ in range(n // 4)]))
        images = torch.cat([pictures.images(indices), abstract]).contiguous(
            memory_format=torch.channels_last
        )
        with fast():
            latents = model.encode(images).float()
            noise = torch.randn(
                latents.shape, generator=torch.Generator().manual_seed(2 * step + rank)
            )
            drawn = model.decode(latents + 0.05 * noise.to(DEVICE)).float()
        error = F.smooth_l1_loss(drawn, images, beta=0.1)
        edges = sum(((drawn - images).diff(dim=d)).abs().mean() for d in (2, 3))
        spread = (
            latents.var((0, 2, 3)).sub(1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        )
        psnr = float(
            -10 * torch.log10((drawn.detach() - images)[: len(indices)].square().mean() / 4)
        )
        return error + 0.25 * edges + 0.01 * spread, {
            "psnr": psnr,
            "spread": float(spread.detach()),
        }

    fit(out, "autoencoder", model, loss, steps=steps, rate=1e-3, average_every=4, weight_decay=0.0)
    if rank:
        return
    parts.normalise_latents(model, pictures.images(np.arange(0, 512)).cpu())
    keep(out, "autoencoder", model)


# --- latents and unet
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def stage_latents(out: Path) -> None:
    path = out / "latents.safetensors"
    if path.exists():
        return
    pictures, model = Pictures(out), parts.SlimAutoencoder()
    model.load_state_dict(load_file(out / "autoencoder.safetensors"))
    latents = torch.empty(PICTURES, 4, 16, 16, dtype=torch.float16)
    model = model.to(DEVICE, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with fast():
        for start in range(0, PICTURES, 64):
            images = pictures.images(np.arange(start, start + 64)).contiguous(
                memory_format=torch.channels_last
            )
            latents[start : start + 64] = model.encode(images)
    save_file({"latents": latents}, path)
    log(out, stage="latents", mean=float(latents.float().mean()), std=float(latents.float().std()))


def captions(shown: Sequence[world.Scene]) -> list[str]:
    """The caption of every picture, and before them the empty one."""
    return ["", *(s.caption for s in shown)]


@torch.no_grad()
def stage_features(out: Path) -> None:
    """What the text encoder makes of each distinct caption, float16 (captions, 77, 256)."""
    clip, vocabulary = parts.new_clip().eval(), parts.Vocabulary()
    clip.load_state_dict(load_file(out / "clip.safetensors"))
    nn.Module.to(clip, DEVICE)
    ids = vocabulary.encode(sorted(set(captions(scenes()))))
    features = torch.empty(len(ids), 77, parts.TEXT_WIDTH, dtype=torch.float16)
    with fast():
        for start in range(0, len(ids), 128):
            features[start : start + 128] = clip.text_model(
                input_ids=ids[start : start + 128].to(DEVICE)
            ).last_hidden_state
    save_file({"features": features}, out / "features.safetensors")
    log(out, stage="features", captions=len(ids))


def stage_unet(out: Path, steps: int, n: int = 32) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    latents = load_file(out / "latents.safetensors")["latents"]
    features = load_file(out / "features.safetensors")["features"]
    shown = scenes()
    text = captions(shown)
    row_of = {caption: row for row, caption in enumerate(sorted(set(text)))}
    rows = torch.tensor([row_of[c] for c in text])
    model = parts.new_unet().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    nn.Module.to(model, DEVICE)
    if (
        DEVICE.type == "cpu"
    ):  # plain matrix products are faster there than the fused attention's bf16 backward
        model.set_attn_processor(AttnProcessor())
    predict = torch.compile(model)
    alphas = alphas_cumprod().to(DEVICE)
    together = np.array([i for i, s in enumerate(shown) if len(s.things) == 2])
    place = torch.stack(
        [_weight_of_place(((64, 66),), 46), _weight_of_place(((33, 66), (95, 66)), 32)]
    ).to(DEVICE)
    count = torch.tensor([len(s.things) for s in shown])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((SEED, 4 + rank, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        index = rng.integers(0, PICTURES, n)
        index = np.where(
            rng.random(n) < 0.5, rng.choice(together, n), index
        )  # two pictures in three have two things
        index = torch.from_numpy(index)
        part = (
            np.arange(n) + rng.random(n)
        ) / n  # stratified, and more often where the noise still hides what the picture shows
        timestep = torch.from_numpy(part**0.7 * 1000).long().to(DEVICE)
        clean, noise = (
            latents[index].to(DEVICE).float(),
            torch.randn(n, 4, 16, 16, generator=generator).to(DEVICE),
        )
        noisy = add_noise(clean, noise, timestep, alphas)
        caption = torch.where(torch.rand(n, generator=generator) < 0.1, rows[0], rows[index + 1])
        with fast():
            predicted = predict(
                noisy.contiguous(memory_format=torch.channels_last),
                timestep,
                features[caption].to(DEVICE).float(),
            ).sample
        error = loss_per_example(predicted, noise, place[count[index] - 1])
        # What a thing is gets decided at high noise, where this error is small; 1 / alpha weighs it
        # as the error of v would be.
        return (error / alphas[timestep]).mean() * 0.4, {"mse": float(error.detach().mean())}

    if (out / "unet.start.safetensors").exists():
        model.load_state_dict(load_file(out / "unet.start.safetensors"))
    fit(out, "unet", model, loss, steps=steps, rate=1.2e-3, ema=0.9995, average_every=4)
    if rank == 0:
        keep(out, "unet", model)


def _weight_of_place(centers: Sequence[tuple[int, int]], radius: int) -> Tensor:
    """(1, 16, 16): 1 where the things stand, less on the background, which is learned long before
    them and is mostly texture nobody can predict.
    """
    grid = (
        torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy"), -1) * 8.0
        + 4.0
    )
    inside = [(grid - torch.tensor(c)).norm(dim=-1) < radius + 4 for c in centers]
    return torch.where(torch.stack(inside).any(0), 1.0, 0.3)[None]


def _process(
    rank: int, stage: Callable[[Path, int], None], processes: int, out: Path, steps: int
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)  # every process starts from the same weights
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(out / 'rendezvous').absolute()}",
        rank=rank,
        world_size=processes,
    )
    stage(out, steps)


def _together(stage: Callable[[Path, int], None], processes: int, out: Path, steps: int) -> None:
    """Train one stage in several one-thread processes, each on its own pictures, averaging their
    weights: faster than one process with threads.
    """
    if processes == 1:
        return stage(out, steps)
    (out / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_process, (stage, processes, out, steps), processes)


# --- the command
# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the mini-SD from nothing; run again to go on where it stopped."
    )
    parser.add_argument("out", type=Path, help="folder for data, snapshots and results")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="CPU processes that draw pictures and train the U-Net together",
    )
    parser.add_argument(
        "--autoencoder-steps",
        type=int,
        default=5000,
        help="autoencoder steps of 8 pictures per process",
    )
    parser.add_argument(
        "--unet-steps", type=int, default=9000, help="U-Net steps of 32 pictures per process"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with one process")
    parser.add_argument(
        "--continue-shipped",
        action="store_true",
        help="in an empty folder: train the shipped U-Net further, in the shipped latents",
    )
    parser.add_argument(
        "--stages",
        default="pictures,reader,clip,autoencoder,latents,features,unet,pack",
        help="which stages, in this order",
    )
    args = parser.parse_args()
    global DEVICE
    DEVICE = torch.device(args.device)
    if DEVICE.type != "cpu" and args.processes != 1:
        parser.error("--device other than cpu goes with --processes 1")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    if args.continue_shipped and not (out / "clip.safetensors").exists():
        weights.unpack(out)
        (out / "unet.safetensors").rename(out / "unet.start.safetensors")
    for stage in args.stages.split(","):
        if (out / f"{stage}.safetensors").exists():
            continue
        match stage:
            case "pictures":
                stage_pictures(out, args.processes)
            case "autoencoder":
                _together(stage_autoencoder, args.processes, out, args.autoencoder_steps)
            case "unet":
                _together(stage_unet, args.processes, out, args.unet_steps)
            case "pack":
                weights.pack(out)
            case _:
                {
                    "reader": stage_reader,
                    "clip": stage_clip,
                    "latents": stage_latents,
                    "features": stage_features,
                }[stage](out)


if __name__ == "__main__":
    main()

"""Three learned things in one prompt: how much do their looks mix?

    python benchmarks/retention/three.py OUT [--split pairs] [--seeds 0,1,2] [--noises 2]

in: nothing - out: OUT/three.safetensors, a checkpoint; OUT/three.json; a sheet of pictures for each
seed and way; OUT/SPLIT-SEED, the stack of six concepts that `together` learns.

The mini-SD has never seen three things, and draws two and a half for three nouns. So its U-Net is
first trained on, half with pictures of three, which are 192 x 128. The ways and measures are those of
`together`, where each thing has two others to be taken for (chance is 2/3), and one way more:

    words     "a photo of a red mug and a green and white striped fish and a blue dog on grass" by the
              checkpoint alone: what it reaches with words that it knows
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import judging
import numpy as np
import together
import torch
from beside import alone
from diffusers.models.attention_processor import AttnProcessor
from judges import Judges, load_judges
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfy_continual_lora import concepts, report, sample, store
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.areas import FINE, AreaSettings
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import add_noise, alphas_cumprod, loss_per_example
from comfy_continual_lora.mini import parts, trainset, weights, world
from comfy_continual_lora.mini.drawing import SIZE, draw_background, draw_look
from comfy_continual_lora.mini.looks import Look
from comfy_continual_lora.mini.training import Run, fit
from comfy_continual_lora.settings import LearnSettings

WIDTH = 192
WAYS = "words,nouns,mixed,areas,beside,alone"
TRIPLES = ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1))
PLACES = judging.LEFT, judging.RIGHT, slice(126, 192)  # columns of the three things
TRAINED_ON = 3_000  # pictures of three, and as many of one and of two


class Triple(NamedTuple):
    """Three concepts that a picture is to show, from left to right, and what they are on."""

    concepts: tuple[world.Concept, ...]
    ground: str


# --- a checkpoint that draws three ----------------------------------------------------------------


def draw_three(looks: Sequence[Look], background: str, rng: np.random.Generator) -> np.ndarray:
    """Three things side by side, uint8 (128, 192, 3): two in each half's window of 128."""
    picture = np.pad(
        draw_background(background, rng), ((0, 0), (0, WIDTH - SIZE), (0, 0)), "reflect"
    )
    for look, start, x in zip(looks, (0, 0, WIDTH - SIZE), (33, 95, 95), strict=True):
        right, down = rng.uniform(-2, 2, 2)
        window = picture[:, start : start + SIZE]
        draw_look(window, look, (x + right, 66 + down), rng.uniform(30, 32), rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _training_set(backbone: Backbone) -> dict[str, Tensor]:
    """Latents of pictures of three and of fewer, and text features of their captions."""
    rng = np.random.default_rng(31)
    found: dict[str, Tensor] = {}
    for name in ("three", "fewer"):
        scenes = [
            world.random_scene(rng, 3 if name == "three" else None) for _ in range(TRAINED_ON)
        ]
        latents, features = [], []
        for start in range(0, TRAINED_ON, 50):
            part = scenes[start : start + 50]
            drawn = [
                draw_three([thing.look for thing in one.things], one.background, rng)
                if name == "three"
                else world.draw_scene(one, rng)
                for one in part
            ]
            images = trainset.to_tensor(np.stack(drawn))
            latents.append(torch.stack(backbone.encode_images(images)).half())
            features.append(backbone.encode_prompts([one.caption for one in part]).half())
        found |= {name: torch.cat(latents), f"{name} text": torch.cat(features)}
    return found | {"empty": backbone.encode_prompts([""]).half()}


def train(run: Run, steps: int, n: int = 12) -> None:
    """Train the mini-SD's U-Net on with n pictures of three and n of fewer a step."""
    weights.unpack(run.out)
    weights.write_checkpoint(run.out / "mini.safetensors")
    if not (run.out / "set.safetensors").exists():
        with torch.no_grad():
            backbone = load_backbone(run.out / "mini.safetensors", device="cpu")
            save_file(_training_set(backbone), run.out / "set.safetensors")
    known = load_file(run.out / "set.safetensors")
    model = parts.new_unet()
    model.load_state_dict(load_file(run.out / "unet.safetensors"))
    model.set_attn_processor(AttnProcessor())
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    alphas = alphas_cumprod()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((trainset.SEED, 32, step))
        generator = torch.Generator().manual_seed(step)
        losses = []
        for name in ("three", "fewer"):
            index = torch.from_numpy(rng.integers(0, TRAINED_ON, n))
            timestep = torch.from_numpy(((np.arange(n) + rng.random(n)) / n) ** 0.7 * 1000).long()
            clean, text = known[name][index].float(), known[f"{name} text"][index].float()
            text[torch.from_numpy(rng.random(n) < 0.1)] = known["empty"].float()
            noise = torch.randn(clean.shape, generator=generator)
            noisy = add_noise(clean, noise, timestep, alphas)
            predicted = model(noisy.contiguous(memory_format=torch.channels_last), timestep, text)
            losses.append(loss_per_example(predicted.sample, noise) / alphas[timestep])
        three, fewer = (loss.mean() for loss in losses)
        return 0.2 * (three + fewer), {
            "three": float(three.detach()),
            "fewer": float(fewer.detach()),
        }

    fit(run, "three", model, loss, steps=steps, rate=4e-4, ema=0.995, snapshot_every=50)
    run.save("unet", model)
    state = weights.complete(weights.joined(run.out), parts.Vocabulary().tokens)
    metadata = {**weights.METADATA, "modelspec.title": "mini-SD that draws three things"}
    save_file(state, run.out / "three.safetensors", metadata)


# --- measured -------------------------------------------------------------------------------------


def measured(
    way: str,
    backbone: Backbone,
    stack: store.ConceptStack,
    known: Sequence[world.Concept],
    noises: int,
    judges: Judges,
) -> tuple[dict[str, Any], Tensor]:
    asked = [(three, ground) for three in TRIPLES for ground in together.GROUNDS] * noises
    names = [record.noun if way == "nouns" else record.name for record in stack.records]
    if way == "words":
        known, names = _named_things(len(asked))
        asked = [((3 * n, 3 * n + 1, 3 * n + 2), ground) for n, (_, ground) in enumerate(asked)]
    bare = way in ("words", "nouns")
    places = [world.BACKGROUNDS[ground] for _, ground in asked]
    whole = [
        f"a photo of a {names[a]} and a {names[b]} and a {names[c]} {place}"
        for ((a, b, c), _), place in zip(asked, places, strict=True)
    ]
    single = [
        [f"a photo of a {names[n]} {place}" for n in three]
        for (three, _), place in zip(asked, places, strict=True)
    ]
    columns: list[Any] = list(zip(*single, strict=True))
    drawing = together.DRAWING
    if way == "beside":
        columns = [single]
    elif way != "alone":
        columns = [whole]
        drawing = replace(drawing, width=WIDTH)
    began = time.perf_counter()
    with attached(backbone, None if bare else stack.adapter):
        drawn = [
            sample.draw(
                backbone,
                {} if bare else stack.tokens,
                prompts,
                range(len(asked)),
                drawing.resolved(backbone.preset),
                nouns=stack.nouns if way == "areas" else None,
                areas=AreaSettings(FINE[backbone.preset]),
            )
            for prompts in columns
        ]
    seconds = (time.perf_counter() - began) / len(asked)
    pictures = torch.cat(drawn, 3)
    scenes = [Triple(tuple(known[n] for n in three), ground) for three, ground in asked]
    row = {"way": way, "things": 3 * len(asked), "seconds": seconds}
    return row | judged(pictures, scenes, judges), pictures


def _named_things(scenes: int) -> tuple[list[world.Concept], list[str]]:
    """Three things of the world for each scene, of different shapes, and the words for them."""
    rng = np.random.default_rng(33)
    found: list[world.Concept] = []
    phrases = []
    while len(found) < 3 * scenes:
        thing = world.random_thing(rng)
        taken = [one.noun for one in found[len(found) // 3 * 3 :]]
        if thing.color_names and thing.look.shape not in taken:
            found.append(world.Concept(thing.phrase, thing.look.shape, thing.look))
            phrases.append(thing.phrase.split(" ", 1)[1])  # the prompt has an article
    return found, phrases


def judged(pictures: Tensor, scenes: Sequence[Triple], judges: Judges) -> dict[str, float]:
    """The measures of pictures (n, 3, 128, width): of three things in 192, else of three pictures of
    one thing, which may overlap.
    """
    wide = pictures.shape[3] == WIDTH
    row: dict[str, float] = {}
    for name, features in (("bled", judging.features_of), ("bled_2", judges.features)):
        drawn = _features(pictures, features)
        own, *others = (_features(real_pictures(scenes, wide, turn), features) for turn in range(3))
        near = (drawn * own).sum(2)
        other = torch.stack([(drawn * one).sum(2) for one in others]).amax(0)
        row |= {name: float((other > near).float().mean()), "near": float(near.mean())}
    return row | {"shapes": float(_has_shape(pictures, scenes, wide).mean())}


def _features(pictures: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the three things, (3, n, d), of length 1."""
    if pictures.shape[3] == WIDTH:
        return torch.stack([judging.features_at(place, pictures, features) for place in PLACES])
    return torch.stack([judging.unit(features(one)) for one in _single(pictures)])


def _single(pictures: Tensor) -> Iterator[Tensor]:
    """The three pictures of one thing that one of another width consists of."""
    step = (pictures.shape[3] - SIZE) // 2
    return (pictures[..., k * step : k * step + SIZE] for k in range(3))


def real_pictures(scenes: Sequence[Triple], wide: bool, turn: int) -> Tensor:
    """As the world draws them, in an order that is turned by so many places."""
    turned = [[one.concepts[(k + turn) % 3] for k in range(3)] for one in scenes]
    grounds = [one.ground for one in scenes]
    if not wide:
        return torch.cat([alone(place, grounds) for place in zip(*turned, strict=True)], 3)
    drawn = [
        draw_three([concept.look for concept in three], ground, np.random.default_rng(0))
        for three, ground in zip(turned, grounds, strict=True)
    ]
    return trainset.to_tensor(np.stack(drawn))


def _has_shape(pictures: Tensor, scenes: Sequence[Triple], wide: bool) -> Tensor:
    """Whether each thing has its shape, (3 n,) 0 or 1, by the attribute reader."""
    if wide:
        left, right = pictures[..., :SIZE], pictures[..., -SIZE:]
        seen = [(left, "shape_a"), (left, "shape_b"), (right, "shape_b")]
    else:
        seen = [(one, "shape_a") for one in _single(pictures)]
    return torch.cat(
        [
            judging.has_shape(picture, head, [scene.concepts[k] for scene in scenes])
            for k, (picture, head) in enumerate(seen)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure three learned things in one prompt.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="pairs", choices=world.SPLITS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=WAYS)
    parser.add_argument("--noises", type=int, default=2, help="pictures of each three and ground")
    parser.add_argument(
        "--train", type=int, default=1000, help="steps of the checkpoint that draws three"
    )
    parser.add_argument("--steps", type=int, default=200, help="of learning, per concept")
    parser.add_argument("--judges", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "three.safetensors"
    if not checkpoint.exists():
        train(Run(arguments.out, torch.device("cpu")), arguments.train)
    judges = load_judges(arguments.judges)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        folder = arguments.out / f"{arguments.split}-{seed}"
        settings = LearnSettings(
            method="retention", steps=arguments.steps, seed=seed, precision="fp32", size=SIZE
        )
        backbone, stack = together.learned(folder, arguments.split, seed, settings, checkpoint)
        known = together.sequence(arguments.split, seed)
        for way in arguments.ways.split(","):
            row, pictures = measured(way, backbone, stack, known, arguments.noises, judges)
            rows.append({"split": arguments.split, "seed": seed, **row})
            print(json.dumps(rows[-1]), flush=True)
            sheet = report.grid([concepts.to_pil(picture) for picture in pictures], 4)
            sheet.save(arguments.out / f"{arguments.split}-{seed}-{way}.png")
        (arguments.out / "three.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Several learned things in one prompt: how much do their looks mix, and is each as it should be?

    python benchmarks/retention/together.py OUT [--split development] [--seeds 0,1,2]
        [--ways mixed,areas,beside,alone] [--noises 2] [--steps 200] [--judges FOLDER]
        [--checkpoint FOLDER] [--set rate=1e-3]

in: nothing (concepts of the mini-SD's world), or another checkpoint of that world - out:
OUT/together.json, and for each seed and way a sheet of the pictures. OUT/SPLIT-SEED holds the stack,
which is learned once by `retention`: six concepts, four of different nouns and two more on the nouns
of the first two.

Pairs of different nouns, pairs of one noun, each on four grounds and with `--noises` seeds:

    mixed     "a photo of a V1 mug and a V2 fish on grass", text features as they are
    areas     the same prompt, each in the area of its noun (`comfy_continual_lora.areas`); further
              ways are "areas sharpness=30" and so on
    beside    "a photo of a V1 mug on grass" and, to the right of it, "a photo of a V2 fish on grass"
    alone     both of these as pictures of their own: the best that can be had
    nouns     "a photo of a mug and a fish on grass" by the checkpoint alone: the shapes it reaches
    halves    as `areas`, but the areas are given: the left half and the right one
    masked    as FreeFuse (arXiv 2510.23515) masks LoRAs: the whole prompt everywhere, each concept's
              own adapter in its area alone, the areas found as by `areas`

    bled      share of things that look more like the other one of the two, in its place, than like
              themselves, by the mini-CLIP's features (a coin gets .5); `bled_2` by an encoder that has
              seen no caption (`judges`)
    shapes    share of things that have their shape, by the attribute reader
    near      mean cosine of a thing's features by that encoder and those of a real picture of it in
              its place; for `beside` and `alone` of whole pictures of one thing
    seconds   for a picture
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import judging
import numpy as np
import torch
import torch.nn.functional as F
from beside import judged_beside, nearness_beside
from judges import Judges, load_judges
from judging import PairScene
from torch import Tensor

from comfy_continual_lora import (
    concepts,
    pipeline,
    report,
    requests,
    sample,
    store,
    targets,
    together,
)
from comfy_continual_lora.adapters.adapter import attached, factored, layers_of
from comfy_continual_lora.areas import FINE, AreaSettings
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mentions import Mentions
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import DrawSettings, LearnSettings

DRAWING = DrawSettings(steps=15, guidance=4.0, size=128)
GROUNDS = list(world.BACKGROUNDS)[:4]
KINDS = {
    "different nouns": ((0, 1), (1, 2), (2, 3), (3, 0)),
    "one noun": ((0, 4), (5, 1)),
}


def sequence(split: str, seed: int) -> list[world.Concept]:
    """Four concepts of different nouns, then two on the nouns of the first two."""
    pool = world.concepts(split)
    order = [pool[int(n)] for n in np.random.default_rng(seed).permutation(len(pool))]
    chosen: list[world.Concept] = []
    for one in order:
        if len(chosen) < 4 and one.noun not in {other.noun for other in chosen}:
            chosen.append(one)
    rest = [one for one in order if one not in chosen]
    for first, other in zip(chosen[:2], rest, strict=False):
        look = replace(other.look, shape=first.noun)
        chosen.append(world.Concept(f"{other.name}-on-{first.noun}", first.noun, look))
    return chosen


def learned(
    folder: Path, split: str, seed: int, settings: LearnSettings, checkpoint: Path | None
) -> tuple[Backbone, store.ConceptStack]:
    """The stack of these concepts, learned as far as it is not yet; `checkpoint`: None for the mini-SD."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint or folder / "mini.safetensors"
    if not path.exists():
        write_checkpoint(path)
    kept = folder / "mini.concepts.safetensors"
    for number, concept in enumerate(sequence(split, seed), start=1):
        token = f"V{number}"
        pictures = world.save_pictures(concept, folder / token)
        request = requests.LearnRequest(
            path, pictures, token, concept.noun, settings, stack=kept, device="cpu"
        )
        if pipeline.learned_before(request) is None:
            pipeline.learn_concept(request)
            print(f"{split} {seed}: learned {concept.name}", flush=True)
    return load_backbone(path, device="cpu"), store.open_stack(kept)


class Pair(NamedTuple):
    left: int
    right: int
    ground: str
    noise: int


def pairs(kind: str, noises: int) -> list[Pair]:
    grid = [(a, b, ground) for a, b in KINDS[kind] for ground in GROUNDS]
    return [
        Pair(*one, number + len(grid) * turn)
        for turn in range(noises)
        for number, one in enumerate(grid)
    ]


def drawn(way: str, backbone: Backbone, stack: store.ConceptStack, asked: Sequence[Pair]) -> Tensor:
    """Pictures of the pairs, (n, 3, 128, width)."""
    name, *changes = way.split()
    apart = name in ("areas", "halves", "masked")
    names = [record.noun if name == "nouns" else record.name for record in stack.records]
    nouns = stack.nouns if apart else None
    drawing = DRAWING.resolved(backbone.preset)
    settings = AreaSettings(
        FINE[backbone.preset],
        **_values(changes),
    )
    columns: list[list[str | Sequence[str]]] = [[], []]
    for a, b, ground, _ in asked:
        place = world.BACKGROUNDS[ground]
        left, right = (f"a photo of a {names[n]} {place}" for n in (a, b))
        if name == "beside":
            columns[0].append([left, right])
        elif name == "alone":
            columns[0].append(left)
            columns[1].append(right)
        else:
            columns[0].append(f"a photo of a {names[a]} and a {names[b]} {place}")
    seeds = [one.noise for one in asked]
    with attached(backbone, None if name == "nouns" else stack.adapter), _changed(name, stack):
        words = {} if name == "nouns" else stack.tokens
        return torch.cat(
            [
                sample.draw(backbone, words, prompts, seeds, drawing, nouns=nouns, areas=settings)
                for prompts in columns
                if prompts
            ],
            3,
        )


def _values(options: Sequence[str]) -> dict[str, Any]:
    """Of "name=value" each."""
    return {key: json.loads(value) for key, value in (one.split("=") for one in options)}


@contextmanager
def _changed(name: str, stack: store.ConceptStack) -> Iterator[None]:
    """Inside the block learned things are kept apart in the way that is compared."""
    if name == "halves":
        masks = torch.zeros(1, 2, 1, 2)
        masks[0, 0, 0, 0] = masks[0, 1, 0, 1] = 1
        change: Any = mock.patch.object(
            sample, "drawn_together", partial(together.drawn_together, given=masks)
        )
    elif name == "masked":
        change = mock.patch.object(together, "Together", partial(_MaskedLoras, stack))
    else:
        change = nullcontext()
    with change:
        yield


class _MaskedLoras(together.Together):
    """The whole prompt everywhere, by each concept's own adapter in its area, by none elsewhere."""

    def __init__(
        self,
        stack: store.ConceptStack,
        backbone: Backbone,
        text: FrozenText,
        scenes: Sequence[Mentions],
        *arguments: Any,
        **more: Any,
    ) -> None:
        super().__init__(backbone, text, scenes, *arguments, **more)
        self.scenes = scenes
        self.whole = backbone.context(text([scene.whole for scene in scenes]))
        self.adapters = {
            token: layers_of(adapter)
            for token, adapter in zip(stack.tokens, targets.own_adapters(stack), strict=True)
            if adapter
        }
        self.names = {
            id(module): name
            for name, module in backbone.unet.named_modules()
            if name.endswith(".attn2")
        }

    def own_of(self, attn: Any, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        keys_values = []
        for k in range(len(self.own)):
            parts = []
            for part in ("to_k", "to_v"):
                linear = getattr(attn, part)
                base = F.linear(self.whole, getattr(linear, "base_layer", linear).weight)
                for row, scene in enumerate(self.scenes):
                    layer = self.adapters[scene.tokens[k]][f"{self.names[id(attn)]}.{part}"]
                    left, right = factored(layer, self.whole.shape[2])
                    base[row] += self.whole[row] @ right.T @ left.T
                parts.append(base.to(dtype))
            keys_values.append((parts[0], parts[1]))
        return keys_values


def measured(
    way: str,
    backbone: Backbone,
    stack: store.ConceptStack,
    known: Sequence[world.Concept],
    kind: str,
    noises: int,
    judges: Judges,
) -> tuple[dict[str, Any], Tensor]:
    asked = pairs(kind, noises)
    scenes = [PairScene(known[a], known[b], ground) for a, b, ground, _ in asked]
    began = time.perf_counter()
    pictures = drawn(way, backbone, stack, asked)
    seconds = (time.perf_counter() - began) / len(asked)
    row: dict[str, Any] = {"way": way, "kind": kind, "things": 2 * len(asked), "seconds": seconds}
    if pictures.shape[3] == pictures.shape[2]:
        row |= {
            "bled": judging.bleeding(pictures, scenes),
            "bled_2": judging.bleeding(pictures, scenes, judges.features),
            "shapes": judging.right_shapes(pictures, scenes),
            "near": judging.nearness(pictures, scenes, judges.features),
        }
    else:
        bled, shapes = judged_beside(pictures, scenes)
        bled_2, _ = judged_beside(pictures, scenes, judges.features)
        near = nearness_beside(pictures, scenes, judges.features)
        row |= {"bled": bled, "bled_2": bled_2, "shapes": shapes, "near": near}
    return row, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure several learned things in one prompt.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="development", choices=world.SPLITS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default="mixed,areas,beside,alone,nouns")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--noises", type=int, default=2, help="pictures of each pair on each ground"
    )
    parser.add_argument("--steps", type=int, default=200, help="of learning, per concept")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--judges", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    judges = load_judges(arguments.judges)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        folder = arguments.out / f"{arguments.split}-{seed}"
        settings = LearnSettings(
            method="retention",
            steps=arguments.steps,
            seed=seed,
            precision="fp32",
            size=128,
            **_values(arguments.set),
        )
        backbone, stack = learned(folder, arguments.split, seed, settings, arguments.checkpoint)
        known = sequence(arguments.split, seed)
        for way in arguments.ways.split(","):
            for kind in arguments.kinds.split(","):
                row, pictures = measured(
                    way, backbone, stack, known, kind, arguments.noises, judges
                )
                row = {"split": arguments.split, "seed": seed, **row}
                rows.append(row)
                print(
                    json.dumps(
                        {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                    ),
                    flush=True,
                )
                sheet = report.grid([concepts.to_pil(picture) for picture in pictures], 8)
                sheet.save(
                    arguments.out / f"{arguments.split}-{seed}-{way}-{kind}.png".replace(" ", "-")
                )
        (arguments.out / "together.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

r"""Which settings remember most and still learn: a sequence of development concepts, once for every
combination of settings and seed.

    python benchmarks/sweeps/sweep.py benchmarks/sweeps/lambda.jsonl --seeds 0,1 \
        --set method=lora_ewc,lora_ewc_dc --set ewc_strength=1e-4,1e-3 [--checkpoint FOLDER]

Input: nothing, or another checkpoint of the mini-SD's world than the mini-SD. Output: a line of JSON
for each run, appended; runs that are there already are skipped, so it goes on where it stopped.
`--table` prints what the file holds.

All figures are on pictures of the concepts that were not learned from, with one fixed set of
noises: the error of the noise prediction (mean over c, h, w, 24 stratified timesteps), so that no
drawing and no judge is between the method and its figure.

    learned     error with the checkpoint alone minus error right after learning, mean over
                concepts; larger is better
    kept        the same with the last adapter instead; larger is better
    newest      learned, of the last concept alone: does protection stop learning?
    prior       error on ordinary pictures of the world, with their captions and with the empty one:
                the last adapter's minus the checkpoint's; smaller is better. Guidance subtracts the
                empty prompt, so what leaks into it comes out in its complement
    accuracy    share of the held-out pictures whose likeliest concept by DC scores is the right
                one, after the last concept
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfy_continual_lora import classifier, pipeline, requests, store
from comfy_continual_lora.adapters.adapter import Adapter, attached
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import generator_for, stratified
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings, ScoreSettings

DRAWS = 24
COLUMNS = (
    "learned",
    "kept",
    "learned_of_earlier",
    "kept_of_earlier",
    "newest",
    "prior",
    "accuracy",
    "seconds",
)


def sequence(count: int, seed: int) -> list[world.Concept]:
    """`count` development concepts in the order of this seed."""
    concepts = world.concepts("development")
    order = np.random.default_rng(seed).permutation(len(concepts))
    return [concepts[int(i)] for i in order[:count]]


@torch.no_grad()
def held_out_error(
    backbone: Backbone, adapter: Adapter | None, latents: Sequence[Tensor], features: Tensor
) -> float:
    """Error on every latent (c, h, w) with the same timesteps and noises, for one prompt (t, d)."""
    timestep = stratified(DRAWS, generator_for("held out")).to(backbone.device)
    generator = generator_for("held out noise")
    noise = torch.randn((DRAWS, *latents[0].shape), generator=generator).to(backbone.device)
    with attached(backbone, adapter):
        errors = [
            classifier.trial_errors(backbone, z.expand_as(noise), noise, timestep, features[None])
            for z in latents
        ]
    return float(torch.cat(errors).mean())


def held_out(backbone: Backbone, concept: world.Concept) -> list[Tensor]:
    """Latents (c, h, w) of five pictures of the concept that are never learned from."""
    pictures = list(world.concept_pictures(concept, 5, seed=1))
    return backbone.encode_images(trainset.to_tensor(np.stack(pictures)))


def prompts_of(concept: world.Concept, token: str) -> list[str]:
    """With the word, and with the bare noun."""
    return [f"a photo of a {token} {concept.noun}", f"a photo of a {concept.noun}"]


def gain(
    backbone: Backbone,
    adapter: Adapter | None,
    text: FrozenText,
    token: str,
    concept: world.Concept,
) -> float:
    """Error on pictures that were not learned from: the checkpoint's with the bare noun minus the
    adapter's with the word.
    """
    latents = held_out(backbone, concept)
    own, bare = text(prompts_of(concept, token))
    before = held_out_error(backbone, None, latents, bare)
    return before - held_out_error(backbone, adapter, latents, own)


def run(
    settings: dict[str, Any], count: int, seed: int, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Learn the sequence and measure it; `checkpoint`: None for the mini-SD."""
    torch.set_num_threads(1)
    started, concepts = time.time(), sequence(count, seed)
    tokens = [f"V{number}" for number in range(1, count + 1)]
    chosen = LearnSettings(**{"seed": seed, "precision": "fp32", "size": 128, **settings})
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint or Path(folder) / "mini.safetensors"
        kept_in = Path(folder) / "stack.safetensors"
        if checkpoint is None:
            write_checkpoint(path)
        backbone = load_backbone(path, device="cpu")
        held = [held_out(backbone, concept) for concept in concepts]
        before, after = (
            [],
            [],
        )  # errors of each concept: of the checkpoint, and right after learning
        for token, concept, latents in zip(tokens, concepts, held, strict=True):
            pictures = world.save_pictures(concept, Path(folder) / token)
            request = requests.LearnRequest(
                path, pictures, token, concept.noun, chosen, stack=kept_in, device="cpu"
            )
            pipeline.learn_concept(request)
            stack = store.load_stack(kept_in, backbone.fingerprint)
            text = FrozenText(backbone, stack.tokens)
            own, bare = text(prompts_of(concept, token))
            before.append(held_out_error(backbone, None, latents, bare))
            after.append(held_out_error(backbone, stack.adapter, latents, own))
        prompts = [f"a photo of a {t} {c.noun}" for t, c in zip(tokens, concepts, strict=True)]
        features = dict(zip(tokens, text(prompts), strict=True))
        end = [
            held_out_error(backbone, stack.adapter, latents, features[token])
            for latents, token in zip(held, tokens, strict=True)
        ]
        prior = prior_error(backbone, stack.adapter) - prior_error(backbone, None)
        right = dc_right(backbone, stack, features, dict(zip(tokens, held, strict=True)))
    learned = [base - own for base, own in zip(before, after, strict=True)]
    kept = [base - last for base, last in zip(before, end, strict=True)]
    return {
        "settings": settings,
        "concepts": count,
        "seed": seed,
        **({"checkpoint": checkpoint.name} if checkpoint else {}),
        "learned": _mean(learned),
        "kept": _mean(kept),
        "kept_of_earlier": _mean(kept[:-1]),
        "learned_of_earlier": _mean(learned[:-1]),
        "newest": round(learned[-1], 5),
        "prior": round(prior, 5),
        "accuracy": _mean(right),
        "tau": stack.tau,
        "seconds": round(time.time() - started, 1),
    }


def dc_right(
    backbone: Backbone,
    stack: store.ConceptStack,
    features: dict[str, Tensor],
    held: dict[str, list[Tensor]],
) -> list[float]:
    """Whether DC scores give each held-out picture to its own word, 0 or 1."""
    tau, settings, right = stack.tau or 1.0, ScoreSettings(), []
    with attached(backbone, stack.adapter):
        for token, latents in held.items():
            for latent in latents:
                scores = classifier.classify(backbone, latent, features, tau, settings)
                right.append(float(scores.best == token))
    return right


def prior_error(backbone: Backbone, adapter: Adapter | None) -> float:
    """Error on 12 ordinary pictures, each with its caption and with the empty one."""
    rng = np.random.default_rng(2025)
    scenes = [world.random_scene(rng) for _ in range(12)]
    pictures = np.stack([world.draw_scene(scene, rng) for scene in scenes])
    latents = backbone.encode_images(trainset.to_tensor(pictures))
    empty, *captions = backbone.encode_prompts(["", *(scene.caption for scene in scenes)])
    errors = []
    for latent, caption in zip(latents, captions, strict=True):
        errors += [held_out_error(backbone, adapter, [latent], f) for f in (empty, caption)]
    return sum(errors) / len(errors)


def _mean(values: list[float]) -> float:
    return round(sum(values) / max(1, len(values)), 5)


def _job(checkpoint: Path | None, job: tuple[dict[str, Any], int, int]) -> dict[str, Any]:
    return run(*job, checkpoint)


def combinations(options: list[str]) -> list[dict[str, Any]]:
    """ "name=a,b" of every --set, multiplied out; values take the setting's type."""
    types = {"int": int, "float": float}
    kinds = {f.name: types.get(str(f.type).split(" ")[0], str) for f in fields(LearnSettings)}
    axes = []
    for option in options:
        name, _, values = option.partition("=")
        axes.append([(name, kinds[name](value)) for value in values.split(",")])
    return [dict(choice) for choice in itertools.product(*axes)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The runs a file holds; none while there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def runs_in(path: Path) -> set[str]:
    """What every run a file holds was told to do, as `_key` writes it."""
    return {
        _key((row["settings"], row["concepts"], row["seed"]), row.get("checkpoint"))
        for row in rows_of(path)
    }


def _key(job: tuple[dict[str, Any], int, int], checkpoint: str | None) -> str:
    return json.dumps([*job, checkpoint])


def table(path: Path, columns: Sequence[str] = COLUMNS) -> str:
    """The runs of a file, averaged over seeds."""
    groups: dict[str, list[dict]] = {}
    for row in rows_of(path):
        alike = [row["settings"], row["concepts"], row.get("checkpoint")]
        groups.setdefault(json.dumps(alike), []).append(row)
    lines = [
        "| settings | concepts | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for key, rows in groups.items():
        settings, count, checkpoint = json.loads(key)
        chosen = [f"{name}={_shown(value)}" for name, value in settings.items()]
        label = ", ".join([*chosen, *([checkpoint] if checkpoint else [])])
        cells = [_mean_and_deviation([row[column] for row in rows]) for column in columns]
        lines.append(f"| {label} | {count} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Try settings on sequences of development concepts."
    )
    parser.add_argument(
        "out", type=Path, help="file of JSON lines; runs it holds are not run again"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="values of one setting; several are multiplied out",
    )
    parser.add_argument("--concepts", type=int, default=4)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    arguments = parser.parse_args()
    if not arguments.table:
        done = runs_in(arguments.out)
        name = arguments.checkpoint.name if arguments.checkpoint else None
        jobs = [
            (settings, arguments.concepts, int(seed))
            for seed in arguments.seeds.split(",")
            for settings in combinations(arguments.set)
        ]
        jobs = [job for job in jobs if _key(job, name) not in done]
        with (
            get_context("spawn").Pool(arguments.processes) as pool,
            arguments.out.open("a") as file,
        ):
            for row in pool.imap_unordered(partial(_job, arguments.checkpoint), jobs):
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(table(arguments.out))


if __name__ == "__main__":
    main()

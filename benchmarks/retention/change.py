"""One concept taken out of a stack, and two stacks put together: what becomes of it, and of the
others?

    python benchmarks/retention/change.py OUT RUN OTHER [--token V3]

in: two folders of `run.py`, learned in sequence from different seeds, with the mini-SD and the
stack - out: OUT/change.json, tables on the screen,
and pictures: OUT/forgotten.png and OUT/merged.png (a row for each concept: a real picture, three
drawn before, the same three after), OUT/both.png
(a thing of each stack in one picture). RUN forgets `token`; the first three concepts of RUN and of
OTHER are merged. Distances are MMD^2 of
mini-CLIP features (`metrics`), times 1000; prompts, seeds, solver and guidance as in `run.py`.

    real before, after    of what is drawn from the concept's real pictures
    moved                 of what is drawn after from what was drawn before, with the same seeds;
    nothing moved gives about -.6
    seeds                 of what other seeds draw before: what two draws of one stack differ by
    noun                  of what the forgotten concept's prompt draws from what the bare checkpoint
    draws for its class noun, same seeds
    named                 share of the forgotten one's training pictures that DC scores give to its
    prompt rather than to its noun's; the bare
                          checkpoint's share is what has to come out, since "V3" is then but a word
                          that says something or other
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import run as retention
import torch
from torch import Tensor

from comfy_continual_lora import (
    classifier,
    concepts,
    lora,
    metrics,
    pipeline,
    report,
    requests,
    sample,
    store,
)
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.settings import ScoreSettings


@dataclass(frozen=True)
class Run:
    """A folder of run.py, and how many pictures are drawn of a concept here."""

    folder: Path
    pictures: int

    @property
    def job(self) -> retention.Job:
        """From the folder's name: method-concepts-seed-steps, and -pictures where they were not as
        many as usual.
        """
        found = re.fullmatch(r"(.+)-(\d+)-(\d+)-(\d+)(?:-\d+p)?", self.folder.name)
        assert found, self.folder
        return retention.Job(
            found[1],
            int(found[3]),
            int(found[2]),
            self.pictures,
            self.folder.parents[1],
            int(found[4]),
        )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "mini.safetensors"

    def drawn(
        self, backbone: Backbone, stack: store.ConceptStack | None, name: str, first_seed: int = 0
    ) -> Tensor:
        """Pictures of one prompt in the benchmark's places, (n, 3, 128, 128); no stack: of the bare
        checkpoint.
        """
        prompts = [prompt.format(name) for prompt in self.job.prompts]
        with lora.attached(backbone, stack.adapter if stack else None):
            return sample.draw(
                backbone,
                stack.tokens if stack else {},
                prompts,
                range(first_seed, first_seed + self.pictures),
                retention.DRAWING,
            )


def apart(first: Tensor, second: Tensor) -> float:
    one, other = (retention.unit(retention.features_of(pictures)) for pictures in (first, second))
    return round(1000 * metrics.mmd2(one, other), 2)


def named(
    backbone: Backbone, stack: store.ConceptStack, concept: world.Concept, token: str
) -> float:
    """Share of the training pictures that are likelier with the word than with the noun alone."""
    prompts = [f"a photo of a {token} {concept.noun}", f"a photo of a {concept.noun}"]
    word, noun = FrozenText(backbone, stack.tokens)(prompts)
    features = {"word": word, "noun": noun}
    latents = backbone.encode_images(
        trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 5))))
    )
    with lora.attached(backbone, stack.adapter):
        found = [
            classifier.classify(
                backbone, z, features, stack.tau or 1.0, ScoreSettings(stages=1)
            ).best
            for z in latents
        ]
    return found.count("word") / len(found)


def forget(out: Path, run: Run, token: str) -> list[dict[str, Any]]:
    path, backbone = (
        out / "forgotten.concepts.safetensors",
        load_backbone(run.checkpoint, device="cpu"),
    )
    shutil.copy(store.stack_path(run.checkpoint), path)
    before = store.load_stack(path, backbone.fingerprint)
    pipeline.forget(requests.ForgetRequest(run.checkpoint, token, stack=path, device="cpu"))
    after = store.load_stack(path, backbone.fingerprint)
    rows, shown = [], []
    for number, concept in enumerate(run.job.sequence, start=1):
        name, real = f"V{number} {concept.noun}", retention.real_pictures(concept, run.pictures)
        old, other, new = (
            run.drawn(backbone, stack, name, seed)
            for stack, seed in ((before, 0), (before, run.pictures), (after, 0))
        )
        row: dict[str, Any] = {
            "concept": name,
            "real before": apart(real, old),
            "real after": apart(real, new),
            "moved": apart(old, new),
        }
        row["seeds"] = apart(old, other)
        if f"V{number}" == token:
            row["noun"] = apart(new, run.drawn(backbone, None, concept.noun))
            bare = store.ConceptStack(backbone.fingerprint)
            row |= {
                f"named {when}": named(backbone, stack, concept, token)
                for when, stack in (("before", before), ("after", after), ("bare", bare))
            }
        rows.append(row)
        shown += [real[1], *old[1:4], *new[1:4]]
    report.grid([concepts.to_pil(picture) for picture in shown], 7).save(out / "forgotten.png")
    return rows


def merge(out: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    checkpoint, paths = runs[0].checkpoint, [out / f"{n}.concepts.safetensors" for n in (1, 2)]
    backbone = load_backbone(checkpoint, device="cpu")
    halves = [
        store.load_stack(store.stack_path(run.checkpoint), backbone.fingerprint).as_of(3)
        for run in runs
    ]
    for half, path in zip(halves, paths, strict=True):
        store.save_stack(half, path)
    renamed = pipeline.merge(
        requests.MergeRequest(checkpoint, paths[1], stack=paths[0], device="cpu")
    ).renamed
    both = store.load_stack(paths[0], backbone.fingerprint)
    rows, shown, pairs = [], [], []
    for number in range(3):
        names = []
        for n, (run, half) in enumerate(zip(runs, halves, strict=True)):
            concept, token = run.job.sequence[number], f"V{number + 1}"
            name, now = (
                f"{word} {concept.noun}"
                for word in (token, renamed.get(token, token) if n else token)
            )
            real, old, new = (
                retention.real_pictures(concept, run.pictures),
                run.drawn(backbone, half, name),
                run.drawn(backbone, both, now),
            )
            rows.append(
                {
                    "concept": now,
                    "real before": apart(real, old),
                    "real after": apart(real, new),
                    "moved": apart(old, new),
                }
            )
            shown += [real[1], *old[1:4], *new[1:4]]
            names.append(now)
        pairs += [
            f"a photo of a {names[0]} and a {names[1]} {place}"
            for place in list(world.BACKGROUNDS.values())[:4]
        ]
    report.grid([concepts.to_pil(picture) for picture in shown], 7).save(out / "merged.png")
    with lora.attached(backbone, both.adapter):
        pictures = sample.draw(backbone, both.tokens, pairs, range(len(pairs)), retention.DRAWING)
    report.grid([concepts.to_pil(picture) for picture in pictures], 4).save(out / "both.png")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(
        [
            *lines,
            *(
                "| " + " | ".join(str(row.get(column, "")) for column in columns) + " |"
                for row in rows
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure forgetting one concept on purpose, and merging two stacks."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--token", default="V3")
    parser.add_argument(
        "--pictures", type=int, default=retention.PICTURES, help="drawn of each concept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [Run(folder, arguments.pictures) for folder in arguments.runs]
    found = {
        "forgotten": forget(arguments.out, runs[0], arguments.token),
        "merged": merge(arguments.out, runs),
    }
    (arguments.out / "change.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n\n".join(map(table, found.values())))


if __name__ == "__main__":
    main()

"""One concept taken out of a stack, and two stacks put together: what becomes of it, and of the
others?

    python benchmarks/retention/change.py OUT RUN OTHER [--token V3]

Input: two folders of `run.py`, learned in sequence from different seeds, with the mini-SD and the
stack. Output: OUT/change.json, tables on the screen, and pictures: OUT/forgotten.png and
OUT/merged.png (a row for each concept: a real picture, three drawn before, the same three after),
OUT/both.png (a thing of each stack in one picture).

RUN forgets `token`; the first three concepts of RUN and of OTHER are merged. Distances are MMD^2 of
mini-CLIP features (`metrics`), times 1000; prompts, seeds, solver and guidance as in `run.py`.

    real before, after    of what is drawn from the concept's real pictures
    moved                 of what is drawn after from what was drawn before, with the same seeds;
                          nothing moved gives about -.6
    seeds                 of what other seeds draw before: what two draws of one stack differ by
    noun                  of what the forgotten concept's prompt draws from what the bare checkpoint
                          draws for its class noun, same seeds
    named                 share of the forgotten one's training pictures that DC scores give to its
                          prompt rather than to its noun's; the bare checkpoint's share is what has
                          to come out, since "V3" is then a word that means something or other
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judging
import torch
from jobs import DRAWING, PICTURES, Job
from subjects import training_pictures
from torch import Tensor

from comfy_continual_lora import (
    classifier,
    concepts,
    consolidation,
    metrics,
    pipeline,
    report,
    requests,
    sample,
    store,
)
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.settings import ScoreSettings


@dataclass(frozen=True)
class Run:
    """A folder of run.py, and how many pictures are drawn of a concept here."""

    folder: Path
    pictures: int

    @property
    def job(self) -> Job:
        """From the folder's name: method-concepts-seed-steps, and -pictures if their number is not
        the usual one.
        """
        match = re.fullmatch(r"(.+)-(\d+)-(\d+)-(\d+)(?:-\d+p)?", self.folder.name)
        assert match, self.folder
        variant = match[1]
        concepts, seed, steps = (int(number) for number in match.groups()[1:])
        return Job(variant, seed, concepts, self.pictures, self.folder.parents[1], steps)

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
        seeds = range(first_seed, first_seed + self.pictures)
        words = stack.tokens if stack else {}
        with attached(backbone, stack.adapter if stack else None):
            return sample.draw(backbone, words, prompts, seeds, DRAWING)


def distance(first: Tensor, second: Tensor) -> float:
    """MMD^2 of two sets of pictures, times 1000."""
    one, other = (judging.unit(judging.features_of(pictures)) for pictures in (first, second))
    return round(1000 * metrics.mmd2(one, other), 2)


def distances(real: Tensor, old: Tensor, new: Tensor) -> dict[str, float]:
    return {
        "real before": distance(real, old),
        "real after": distance(real, new),
        "moved": distance(old, new),
    }


def named(
    backbone: Backbone, stack: store.ConceptStack, concept: world.Concept, token: str
) -> float:
    """Share of the training pictures that are likelier with the word than with the noun alone."""
    prompts = [f"a photo of a {token} {concept.noun}", f"a photo of a {concept.noun}"]
    word, noun = FrozenText(backbone, stack.tokens)(prompts)
    features = {"word": word, "noun": noun}
    latents = backbone.encode_images(training_pictures(concept))
    tau, settings = stack.tau or 1.0, ScoreSettings(stages=1)
    with attached(backbone, stack.adapter):
        scores = [classifier.classify(backbone, z, features, tau, settings) for z in latents]
    return [score.best for score in scores].count("word") / len(scores)


def forget(out: Path, run: Run, token: str) -> list[dict[str, Any]]:
    path = out / "forgotten.concepts.safetensors"
    backbone = load_backbone(run.checkpoint, device="cpu")
    shutil.copy(store.stack_path(run.checkpoint), path)
    before = store.load_stack(path, backbone.fingerprint)
    pipeline.forget(requests.ForgetRequest(run.checkpoint, token, stack=path, device="cpu"))
    after = store.load_stack(path, backbone.fingerprint)
    bare = store.ConceptStack(backbone.fingerprint)
    rows, pictures = [], []
    for number, concept in enumerate(run.job.sequence, start=1):
        name = f"V{number} {concept.noun}"
        real = judging.real_pictures(concept, run.pictures)
        old = run.drawn(backbone, before, name)
        other_seeds = run.drawn(backbone, before, name, first_seed=run.pictures)
        new = run.drawn(backbone, after, name)
        row: dict[str, Any] = {"concept": name, **distances(real, old, new)}
        row["seeds"] = distance(old, other_seeds)
        if f"V{number}" == token:
            row["noun"] = distance(new, run.drawn(backbone, None, concept.noun))
            for when, stack in (("before", before), ("after", after), ("bare", bare)):
                row[f"named {when}"] = named(backbone, stack, concept, token)
        rows.append(row)
        pictures += [real[1], *old[1:4], *new[1:4]]
    _save_grid(pictures, 7, out / "forgotten.png")
    return rows


def merge(out: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    checkpoint = runs[0].checkpoint
    paths = [out / f"{n}.concepts.safetensors" for n in (1, 2)]
    backbone = load_backbone(checkpoint, device="cpu")
    halves = []
    for run, path in zip(runs, paths, strict=True):
        whole = store.load_stack(store.stack_path(run.checkpoint), backbone.fingerprint)
        halves.append(consolidation.as_of(whole, 3))
        store.save_stack(halves[-1], path)
    request = requests.MergeRequest(checkpoint, paths[1], stack=paths[0], device="cpu")
    renamed = pipeline.merge(request).renamed
    both = store.load_stack(paths[0], backbone.fingerprint)
    rows, pictures, prompts = [], [], []
    for number in range(3):
        token, names = f"V{number + 1}", []
        for run, half, new_token in zip(
            runs, halves, (token, renamed.get(token, token)), strict=True
        ):
            concept = run.job.sequence[number]
            name = f"{new_token} {concept.noun}"
            real = judging.real_pictures(concept, run.pictures)
            old = run.drawn(backbone, half, f"{token} {concept.noun}")
            new = run.drawn(backbone, both, name)
            rows.append({"concept": name, **distances(real, old, new)})
            pictures += [real[1], *old[1:4], *new[1:4]]
            names.append(name)
        both_named = f"a photo of a {names[0]} and a {names[1]}"
        prompts += [f"{both_named} {place}" for place in list(world.BACKGROUNDS.values())[:4]]
    _save_grid(pictures, 7, out / "merged.png")
    with attached(backbone, both.adapter):
        drawn = sample.draw(backbone, both.tokens, prompts, range(len(prompts)), DRAWING)
    _save_grid(drawn, 4, out / "both.png")
    return rows


def _save_grid(pictures: Iterable[Tensor], columns: int, path: Path) -> None:
    report.grid([concepts.to_pil(picture) for picture in pictures], columns).save(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(row.get(column, "")) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure forgetting one concept on purpose, and merging two stacks."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--token", default="V3")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="drawn of each concept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [Run(folder, arguments.pictures) for folder in arguments.runs]
    tables = {
        "forgotten": forget(arguments.out, runs[0], arguments.token),
        "merged": merge(arguments.out, runs),
    }
    (arguments.out / "change.json").write_text(json.dumps(tables, indent=1) + "\n")
    print("\n\n".join(map(table, tables.values())))


if __name__ == "__main__":
    main()

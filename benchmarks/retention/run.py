"""How much is remembered: every method learns the same sequences of concepts; what each concept
looks like after every later one is measured.

    python benchmarks/retention/run.py benchmarks/retention/results                        the
    six-concept table (hours on two cores)
    python benchmarks/retention/run.py OUT --quick                                         three
    methods, three concepts: minutes
    python benchmarks/retention/run.py OUT --concepts 20 --methods lora,lora_dsc_ewc_dc     a long
    sequence
    python benchmarks/retention/run.py OUT --ray                                           the same
    jobs on a Ray cluster (pip install -e ".[ray]")
    python benchmarks/retention/run.py OUT --split development --methods "lora,lora rank=4
    rate=1e-3"         settings beside each other

in: nothing (concepts of the reporting split, in an order drawn from the seed) - out: OUT/rows.jsonl
(a line for each job that is done), table.json (a row for each method and seed), table.csv,
table.md (and a paired test of each method against `retention`), matrices.json (R[i, j]), heat maps,
A_MMD and F_MMD over the number
of concepts, and a strip of pictures for each method. A job that is done is not done again, and one
that was stopped goes on: the stack on disk knows
what it has learned. Prompts, seeds, solver and guidance are the same for all methods.

    A_MMD, F_MMD, BwT_MMD, KID    metrics.py, on the mini-CLIP's image features; lower is better,
    BwT_MMD higher
    I2I, T2I                      mean cosine of drawn and real pictures; of drawn pictures and
    their prompts without the word
    newest_mmd                    R[N, N]: has the newest concept been learned?
    dc_accuracy                   share of some 30 training pictures (50 at most) that DC scores
    give to their own concept at the end
    both                          share of things of the right shape in pictures of two concepts at
    once, by the attribute reader
    bled                          share of things in such pictures that look more like the other one
    of the two than like themselves
Two bounds: `joint` learns all concepts at once with all pictures, `separate` has a LoRA of its own
for each concept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from comfy_continual_lora import (
    classifier,
    concepts,
    diffusion,
    metrics,
    pipeline,
    report,
    requests,
    sample,
    store,
    training,
)
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.mini import drawing, trainset, weights, world
from comfy_continual_lora.presets import METHODS, TEMPLATES
from comfy_continual_lora.settings import (
    DrawSettings,
    LearnSettings,
    ScoreSettings,
)

ROWS = (*METHODS, *(f"{name} adapter=vera" for name in ("lora", "lora_ewc", "lora_ewc_dc")))
BOUNDS = ("joint", "separate")
DRAWING, PICTURES = DrawSettings(steps=15, guidance=4.0), 16
FULL = {"concepts": 6, "seeds": "0,1,2", "methods": ",".join([*ROWS, *BOUNDS])}
QUICK = {"concepts": 3, "seeds": "0", "methods": "lora_dsc_ewc_dc,lora,retention"}
# Jha et al. 2025: SD1.4, CustomConcept101, six tasks, three seeds. Their units are not ours, so
# only orderings can be compared.
PAPER = {
    "textual_inversion": {"a_mmd": 185.74, "f_mmd": 0, "kid": 205.69, "i2i": 60.74, "t2i": 22.86},
    "custom_diffusion": {"a_mmd": 121.89, "f_mmd": 0.62, "kid": 179.4, "i2i": 69.53, "t2i": 22.55},
    "custom_diffusion_ewc": {
        "a_mmd": 121.02,
        "f_mmd": 0.506,
        "kid": 177.99,
        "i2i": 69.44,
        "t2i": 22.58,
    },
    "lora": {"a_mmd": 176.38, "f_mmd": 0.052, "kid": 203.11, "i2i": 61.30, "t2i": 22.97},
    "c_lora": {"a_mmd": 117.2, "f_mmd": 0.034, "kid": 173.8, "i2i": 64.89, "t2i": 23.07},
    "lora_ewc": {"a_mmd": 105.07, "f_mmd": 0.008, "kid": 156.91, "i2i": 73.19, "t2i": 22.15},
    "lora_ewc_dc": {"a_mmd": 102.81, "f_mmd": 0.00052, "kid": 154.25, "i2i": 73.41, "t2i": 22.97},
    "lora_dsc": {"a_mmd": 198.45, "f_mmd": 0.049, "kid": 187.2, "i2i": 73.36, "t2i": 22.57},
    "lora_dsc_ewc": {"a_mmd": 98.0, "f_mmd": 0.02, "kid": 143.92, "i2i": 72.92, "t2i": 22.89},
    "lora_dsc_ewc_dc": {"a_mmd": 94.1, "f_mmd": 0.003, "kid": 140.18, "i2i": 73.17, "t2i": 22.84},
}
COLUMNS = (
    "a_mmd",
    "f_mmd",
    "bwt_mmd",
    "kid",
    "i2i",
    "t2i",
    "newest_mmd",
    "dc_accuracy",
    "both",
    "bled",
    "seconds_per_concept",
    "bytes_per_concept",
)


@dataclass(frozen=True)
class Job:
    row: str  # a method or a bound, and settings of it: "lora rank=4 rate=1e-3"
    seed: int
    concepts: int
    pictures: int
    out: Path
    steps: int  # a concept
    split: str = "reporting"
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        more = f"-{self.pictures}p" if self.pictures != PICTURES else ""
        return (
            self.out
            / "runs"
            / f"{self.row.replace(' ', '-')}-{self.concepts}-{self.seed}-{self.steps}{more}"
        )

    @property
    def settings(self) -> LearnSettings:
        """The bounds learn as plain LoRA does."""
        method, *changes = self.row.split()
        chosen = {
            name: _value(text) for name, _, text in (change.partition("=") for change in changes)
        }
        return LearnSettings(
            method="lora" if method in BOUNDS else method,
            **{"seed": self.seed, "steps": self.steps, "precision": "fp32", **chosen},
        )

    @property
    def sequence(self) -> list[world.Concept]:
        every = world.concepts(self.split, max(world.CONCEPTS_PER_SPLIT, self.concepts))
        order = np.random.default_rng(self.seed).permutation(len(every))
        return [every[int(i)] for i in order[: self.concepts]]

    @property
    def looked_at(self) -> list[int]:
        """After which concepts, counted from 0, all so far are drawn: each of the first six, then
        fewer and fewer, and the last.
        """
        return sorted(
            {
                n
                for n in (0, 1, 2, 3, 4, 5, 7, 9, 14, 19, 29, 39, 49, 74, 99, 149)
                if n < self.concepts
            }
            | {self.concepts - 1}
        )

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(i, j): after concept i, concept j is drawn."""
        return sorted(
            {(i, j) for i in self.looked_at for j in range(i + 1)}
            | {(j, j) for j in range(self.concepts)}
        )

    @property
    def prompts(self) -> list[str]:
        """One a picture, {} stands for the concept; the places of the real pictures that were not
        learned from.
        """
        places = list(world.BACKGROUNDS.values())
        return [f"a photo of a {{}} {places[n % len(places)]}" for n in range(self.pictures)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- one job: learn the sequence, draw it, measure it
# --------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """The row of one method and seed."""
    done = read_rows(job.out)
    if job.folder.name in done:
        return done[job.folder.name]
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a GPU's row is to stand beside a CPU's
    job.folder.mkdir(parents=True, exist_ok=True)
    versions, seconds, size = {"joint": _joint, "separate": _separate}.get(
        job.row.split()[0], _in_sequence
    )(job)
    backbone = load_backbone(job.folder / "mini.safetensors", device=job.device)
    names = [f"V{n} {c.noun}" for n, c in enumerate(job.sequence, start=1)]
    real = [features_of(real_pictures(concept, job.pictures)) for concept in job.sequence]
    # a bound has one stack for many versions: what it draws of a concept is drawn once, under the
    # last of them
    under = {
        (i, j): max(a for (a, b), other in versions.items() if b == j and other is stack)
        for (i, j), stack in versions.items()
    }
    drawn = {
        (i, j): features_of(_drawn(job, backbone, stack, names[j], f"{under[i, j]}-{j}"))
        for (i, j), stack in versions.items()
    }
    matrix = metrics.retention_matrix(real, drawn)
    last, count = job.concepts - 1, job.concepts
    end = [drawn[last, j] for j in range(count)]
    plain = [weights.text_features([p.format(c.noun) for p in job.prompts]) for c in job.sequence]
    stack = versions[last, last]
    separate = job.row.startswith("separate")
    both, bled = (None, None) if separate else _two(job, backbone, stack)
    row = {
        "method": job.row,
        "seed": job.seed,
        "concepts": count,
        "a_mmd": metrics.a_mmd(matrix),
        "f_mmd": metrics.f_mmd(drawn, count),
        "bwt_mmd": metrics.bwt_mmd(matrix),
        "over": [
            [n, metrics.a_mmd(matrix[:n, :n]), metrics.f_mmd(drawn, n)]
            for n in (i + 1 for i in job.looked_at[1:])
        ],
        "kid": _mean(metrics.kid(unit(r), unit(d)) for r, d in zip(real, end, strict=True)),
        "i2i": _mean(metrics.similarity(r, d) for r, d in zip(real, end, strict=True)),
        "t2i": _mean(metrics.paired_similarity(d, t) for d, t in zip(end, plain, strict=True)),
        "newest_mmd": float(matrix[-1, -1]),
        "dc_accuracy": None if separate else _accuracy(job, backbone, stack),
        "both": both,
        "bled": bled,
        "device": job.device,
        "seconds_per_concept": seconds / count,
        "bytes_per_concept": size / count,
        "matrix": [[_number(v) for v in row] for row in matrix.tolist()],
    }
    seen = [Image.open(job.folder / "drawn" / f"{under[i, 0]}-0" / "1.png") for i in job.looked_at]
    report.grid([concepts.to_pil(real_pictures(job.sequence[0], 2)[1]), *seen], len(seen) + 1).save(
        job.folder / "first-concept.jpg", quality=90
    )
    append_row(job.out, job.folder.name, row)
    return row


# --- the rows that are done: OUT/rows.jsonl, one JSON object a line, named by its run's folder
# --------------------------------------------------------------------------------------------------


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Every row of a results folder by the name of its run's folder; none where none is done yet."""
    path = out / "rows.jsonl"
    lines = _whole_lines(path.read_text()) if path.exists() else []
    return {row.pop("run"): row for row in map(json.loads, lines)}


def append_row(out: Path, run: str, row: Mapping[str, Any]) -> None:
    """One process at a time; what a killed one left of its line is cut off first."""
    with FileLock(out / ".rows.jsonl.lock"), (out / "rows.jsonl").open("a+b") as file:
        file.seek(0)
        lines = _whole_lines(file.read().decode())
        whole = "\n".join(lines).encode()
        file.truncate(len(whole))
        start = "\n" if lines else ""
        file.write(f"{start}{json.dumps({'run': run, **row})}\n".encode())


def _whole_lines(text: str) -> list[str]:
    """The lines of a file of rows, without the part of one that a killed process leaves."""
    *lines, last = text.split("\n")
    with contextlib.suppress(ValueError):
        json.loads(last)
        lines.append(last)
    return lines


def _in_sequence(job: Job) -> tuple[dict[tuple[int, int], store.ConceptStack], float, int]:
    """The stack after every concept, the CPU seconds it took (other jobs on the machine do not
    count), the bytes it has on disk.
    """
    checkpoint, spent = _checkpoint(job), job.folder / "seconds.json"
    seconds = json.loads(spent.read_text()) if spent.exists() else {}
    for number, concept in enumerate(job.sequence, start=1):
        files = world.save_pictures(concept, job.folder / "pictures" / f"V{number}")
        request = requests.LearnRequest(
            checkpoint, files, f"V{number}", concept.noun, job.settings, device=job.device
        )
        if pipeline.learned_before(request) is None:
            started = time.process_time()
            pipeline.learn_concept(request)
            seconds[request.token] = time.process_time() - started
            spent.write_text(json.dumps(seconds))
        shutil.rmtree(job.folder / "pictures" / f"V{number}")  # no later concept can look at them
    path = store.stack_path(checkpoint)
    stack = store.open_stack(path)
    versions = {i: stack.as_of(i + 1) for i in range(job.concepts)}
    return (
        {(i, j): versions[i] for i, j in job.versions},
        sum(seconds.values()),
        path.stat().st_size,
    )


def _separate(job: Job) -> tuple[dict[tuple[int, int], store.ConceptStack], float, int]:
    """One stack for each concept: nothing can be forgotten, and nothing is shared."""
    checkpoint, stacks, size, seconds = _checkpoint(job), [], 0, 0.0
    for j, concept in enumerate(job.sequence):
        stack_file = job.folder / f"{j}.concepts.safetensors"
        if not stack_file.exists():
            files = world.save_pictures(concept, job.folder / "pictures" / f"V{j + 1}")
            started = time.process_time()
            request = requests.LearnRequest(
                checkpoint,
                files,
                f"V{j + 1}",
                concept.noun,
                job.settings,
                stack=stack_file,
                device=job.device,
            )
            pipeline.learn_concept(request)
            seconds += time.process_time() - started
        size += stack_file.stat().st_size
        stacks.append(store.open_stack(stack_file))
    return {(i, j): stacks[j] for i, j in job.versions}, seconds, size


def _joint(job: Job) -> tuple[dict[tuple[int, int], store.ConceptStack], float, int]:
    """All concepts at once, each with as many steps as it would have in sequence: what a method
    that keeps every picture reaches.
    """
    checkpoint = _checkpoint(job)
    backbone, settings = load_backbone(checkpoint, device=job.device), job.settings.resolved("mini")
    generator, started = torch.Generator().manual_seed(job.seed), time.process_time()
    adapter = new_adapter(backbone, settings.rank, generator)
    latents, prompts = [], []
    starts = {
        f"V{n}": backbone.word_start(c.noun, generator, settings.vectors)
        for n, c in enumerate(job.sequence, start=1)
    }
    words = {
        token: torch.nn.Parameter(start.to(backbone.device)) for token, start in starts.items()
    }
    for token, concept in zip(words, job.sequence, strict=True):
        pictures = trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 5))))
        latents += backbone.encode_images(pictures)
        prompts += [concepts.prompts_for(token, concept.noun, TEMPLATES, None)] * len(pictures)
    with attached(backbone, adapter, trainable=True) as factors:
        groups = [{"params": list(words.values()), "lr": settings.token_rate, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [*groups, {"params": list(factors.values()), "lr": settings.rate, "weight_decay": 0.01}]
        )
        trained = {**{f"word {token}": word for token, word in words.items()}, **factors}
        run = training.Run(
            "joint",
            trained,
            optimizer,
            settings,
            settings.steps * job.concepts,
            1.0,
            job.folder / "joint.snapshot",
            {"joint": job.seed},
        )

        def terms(step: int, rows: slice) -> dict[str, Tensor]:
            draw = diffusion.generator_for(job.seed, step)
            pick, clean, timestep, noise = (
                drawn[rows] for drawn in diffusion.random_batch(latents, settings.batch, draw)
            )
            chosen = [diffusion.one_of(prompts[int(i)], draw) for i in pick]
            noisy, target = diffusion.noised(backbone, clean, noise, timestep)
            predicted = backbone.predict(noisy, timestep, backbone.encode_prompts(chosen, words))
            weight = diffusion.timestep_weight(backbone, timestep, settings.weighting)
            return {"denoising": (weight * diffusion.loss_per_example(predicted, target)).mean()}

        run.train(terms, settings.batch, lambda _progress: None)
        stack = store.ConceptStack(backbone.fingerprint, rank=settings.rank, tau=0.01)
        for n, (token, concept) in enumerate(zip(words, job.sequence, strict=True)):
            record = store.ConceptRecord(
                str(n),
                token,
                concept.noun,
                "joint",
                5,
                settings.steps,
                job.seed,
                [],
                [],
                "",
                0.0,
                "",
                {},
            )
            stack.records.append(record)
            stack.words[record.id] = words[token].detach().cpu()
        stack.adapter = {k: v.detach().cpu().clone() for k, v in factors.items()}
    size = sum(t.nbytes for t in (*stack.adapter.values(), *stack.words.values()))
    return dict.fromkeys(job.versions, stack), time.process_time() - started, size


def _checkpoint(job: Job) -> Path:
    path = job.folder / "mini.safetensors"
    if not path.exists():
        weights.write_checkpoint(path)
    return path


def real_pictures(concept: world.Concept, count: int) -> Tensor:
    """Pictures of the concept that were not learned from."""
    pictures = [
        p
        for seed in range(1, 2 + count // 10)
        for p in world.concept_pictures(concept, 10, seed=seed)
    ][:count]
    return trainset.to_tensor(np.stack(pictures))


def left_by(folder: Path) -> tuple[Backbone, store.ConceptStack, list[world.Concept]]:
    """What a finished run of a method left in its folder: the checkpoint, its stack and the
    concepts on it.
    """
    row = read_rows(folder.absolute().parents[1])[folder.name]
    sequence = Job(row["method"], row["seed"], row["concepts"], PICTURES, folder, 0).sequence
    return (
        load_backbone(folder / "mini.safetensors", device="cpu"),
        store.open_stack(folder / "mini.concepts.safetensors"),
        sequence,
    )


def _drawn(job: Job, backbone: Backbone, stack: store.ConceptStack, name: str, key: str) -> Tensor:
    """Pictures of one concept, (n, 3, 128, 128); drawn once and kept as PNG."""
    folder = job.folder / "drawn" / key
    files = [folder / f"{n}.png" for n in range(job.pictures)]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        with attached(backbone, stack.adapter):
            pictures = sample.draw(
                backbone,
                stack.tokens,
                [p.format(name) for p in job.prompts],
                range(job.pictures),
                DRAWING,
            )
        for file, picture in zip(files, pictures, strict=True):
            concepts.to_pil(picture).save(file)
    return torch.stack([concepts.to_tensor(Image.open(file)) for file in files])


def features_of(pictures: Tensor) -> Tensor:
    return torch.cat([weights.vision_features(chunk) for chunk in pictures.split(32)])


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _accuracy(job: Job, backbone: Backbone, stack: store.ConceptStack) -> float | None:
    """DC accuracy on training pictures of fifty concepts at most, spread over the sequence, among
    all learned ones.
    """
    if stack.tau is None:
        return None
    prompts = {f"V{n}": f"a photo of a V{n} {c.noun}" for n, c in enumerate(job.sequence, start=1)}
    features, right = (
        dict(zip(prompts, FrozenText(backbone, stack.tokens)(list(prompts.values())), strict=True)),
        [],
    )
    with attached(backbone, stack.adapter):
        for token, concept in list(zip(prompts, job.sequence, strict=True))[
            :: -(-job.concepts // 50)
        ]:
            pictures = trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 5))))
            for latent in backbone.encode_images(pictures[: max(1, 30 // job.concepts)]):
                found = classifier.classify(
                    backbone, latent, features, stack.tau, ScoreSettings(trials=16)
                )
                right.append(float(found.best == token))
    return _mean(right)


def _two(job: Job, backbone: Backbone, stack: store.ConceptStack) -> tuple[float, float]:
    """Neighbours of the sequence in one picture: the shares of things that have their shape, and
    that look like the other one of the two.
    """
    pairs = [(n, n + 1) for n in range(job.concepts - 1)]
    places = list(world.BACKGROUNDS)[:4]
    asked = [(job.sequence[a], job.sequence[b], place) for a, b in pairs for place in places]
    names = [f"a V{n} {c.noun}" for n, c in enumerate(job.sequence, start=1)]
    prompts = [
        f"a photo of {names[a]} and {names[b]} {world.BACKGROUNDS[place]}"
        for a, b in pairs
        for place in places
    ]
    with attached(backbone, stack.adapter):
        pictures = sample.draw(backbone, stack.tokens, prompts, range(len(prompts)), DRAWING)
    report.grid([concepts.to_pil(p) for p in pictures], len(places)).save(job.folder / "both.png")
    right = [
        shaped(pictures, f"shape_{side}", [scene[:2][n] for scene in asked])
        for n, side in enumerate("ab")
    ]
    return float(torch.cat(right).mean()), bleeding(pictures, asked)


@torch.no_grad()
def shaped(pictures: Tensor, thing: str, wanted: Sequence[world.Concept]) -> Tensor:
    """Whether the attribute reader sees each concept's shape in its picture, (n,) 0 or 1; `thing`:
    "shape_a", the left or only one, or "shape_b".
    """
    indices = torch.tensor([list(world.SHAPES).index(concept.noun) for concept in wanted])
    return (weights.load_reader()(pictures)[thing].argmax(1) == indices).float()


def bleeding(pictures: Tensor, asked: Sequence[tuple[world.Concept, world.Concept, str]]) -> float:
    """Share of things in pictures of two, (n, 3, 128, 128), that look more like the other one in
    their place than like themselves.

    `asked` says of each picture which is left, which is right, and on what ground. By features of
    the thing cut out (mini-CLIP).
    The world's own pictures get .02, with the things exchanged .97, with one thing twice .5 (29
    pairs of reporting concepts, four grounds each).
    """

    def real(left: world.Concept, right: world.Concept, place: str) -> np.ndarray:
        things = tuple(world.Thing(c.look, (), "") for c in (left, right))
        return world.draw_scene(world.Scene(things, place, ""), np.random.default_rng(0))

    in_order = trainset.to_tensor(np.stack([real(a, b, place) for a, b, place in asked]))
    turned = trainset.to_tensor(np.stack([real(b, a, place) for a, b, place in asked]))
    found = []
    for columns in (
        slice(0, 66),
        slice(62, 128),
    ):  # where the world puts the left and the right one
        own, other, drawn = (
            unit(
                features_of(
                    torch.nn.functional.interpolate(
                        p[:, :, 33:99, columns], (drawing.SIZE, drawing.SIZE), mode="bilinear"
                    )
                )
            )
            for p in (in_order, turned, pictures)
        )
        found.append(((drawn * other).sum(1) > (drawn * own).sum(1)).float())
    return float(torch.cat(found).mean())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _number(value: float) -> float | None:
    return None if value != value else value


# --- all jobs
# --------------------------------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], processes: int, ray: bool) -> list[dict[str, Any]]:
    """Every job, spread over processes of this machine or over a Ray cluster; rows come back in the
    jobs' order.
    """
    if ray:
        from ray.util.multiprocessing import Pool  # pyright: ignore[reportMissingImports]

        with Pool(processes) as pool:
            return list(pool.imap(_tell, jobs))
    if processes == 1:
        return [_tell(job) for job in jobs]
    with get_context("spawn").Pool(processes) as pool:
        return list(pool.imap(_tell, jobs, chunksize=1))


def _tell(job: Job) -> dict[str, Any]:
    row = run(job)
    print(
        f"{job.row:<24} seed {job.seed}  A_MMD {row['a_mmd']:.4f}  newest {row['newest_mmd']:.4f}",
        flush=True,
    )
    return row


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """table.json, table.csv, table.md, matrices.json."""
    plain = [
        {
            "device": "cpu",
            **{key: value for key, value in row.items() if key not in ("matrix", "over")},
        }
        for row in rows
    ]
    (out / "table.json").write_text(json.dumps(plain, indent=1) + "\n")
    (out / "matrices.json").write_text(
        json.dumps([{k: row[k] for k in ("method", "seed", "matrix")} for row in rows]) + "\n"
    )
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, plain[0].keys())
        writer.writeheader()
        writer.writerows(plain)
    methods = list(dict.fromkeys(row["method"] for row in plain))
    lines = ["| method | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in methods:
        mine = [row for row in plain if row["method"] == method]
        alike = {
            c: [row for row in mine if c != "seconds_per_concept" or row["device"] == "cpu"]
            for c in COLUMNS
        }  # a GPU's seconds are others
        lines.append(
            f"| {method} | {len(mine)} | "
            + " | ".join(
                _spread([row[c] for row in alike[c] if row[c] is not None]) for c in COLUMNS
            )
            + " |"
        )
    lines += ["", *_paired(rows), "", *_beside_paper(plain)]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def _paired(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How each method's distances at the end, R[N, j], differ from those of the default method, at
    the same seeds and concepts.

    Where the default method is there with settings only ("retention vectors=1"), from those of the
    shortest such row.
    p: of all ways to flip the signs of the differences, how many have so large a mean (two-sided;
    20,000 ways drawn, so never 0).
    """
    ends, seeds = (
        {(row["method"], row["seed"]): np.array(row["matrix"][-1], float) for row in rows},
        _seeds(rows),
    )
    default = min((m for m in seeds if m.split()[0] == LearnSettings().method), key=len, default="")
    lines = []
    for method in seeds:
        both = sorted(seeds[method] & seeds.get(default, set()))
        if method != default and both:
            apart = np.concatenate([ends[method, seed] - ends[default, seed] for seed in both])
            signs = np.random.default_rng(0).choice([-1, 1], (20_000, len(apart)))
            p = (1 + int((np.abs(signs @ apart) >= abs(apart.sum()) * (1 - 1e-9)).sum())) / (
                1 + len(signs)
            )  # the signs as they are among them
            lines.append(
                f"* `{method}`: {apart.mean():+.4f}, nearer in {int((apart < 0).sum())} of "
                f"{len(apart)}, p = {p:.2g}"
            )
    return (
        [
            (
                f"Distance of each concept at the end, minus the distance by `{default}`, at the "
                "seeds that both have:"
            ),
            "",
            *lines,
        ]
        if lines
        else []
    )


def _seeds(rows: Sequence[dict[str, Any]]) -> dict[str, set[int]]:
    """Of each method; they differ while a table is still being made."""
    return {
        method: {row["seed"] for row in rows if row["method"] == method}
        for method in dict.fromkeys(row["method"] for row in rows)
    }


def _beside_paper(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each figure the paper has too: the methods in order, here (at the seeds that all of them
    have) and there.
    """
    seeds = {method: own for method, own in _seeds(rows).items() if method in PAPER}
    shared = set.intersection(*seeds.values()) if seeds else set()
    if not shared or len(seeds) < 2:
        return []
    means = {
        m: {
            c: _mean(row[c] for row in rows if row["method"] == m and row["seed"] in shared)
            for c in PAPER["lora"]
        }
        for m in seeds
    }
    pairs = list(itertools.combinations(means, 2))
    at = ", ".join(map(str, sorted(shared)))
    lines = [
        (
            f"The paper's methods from best to worst at seed {at}; of their {len(pairs)} pairs so "
            "many are in the paper's order:"
        ),
        "",
    ]
    for column in PAPER["lora"]:
        alike = sum(
            (means[a][column] - means[b][column]) * (PAPER[a][column] - PAPER[b][column]) > 0
            for a, b in pairs
        )
        orders = [
            ", ".join(sorted(means, key=lambda m: t[m][column], reverse=column in ("i2i", "t2i")))
            for t in (means, PAPER)
        ]
        lines.append(f"* {column} ({alike}): here {orders[0]}; in the paper {orders[1]}")
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 0 if abs(values[0]) >= 100 else 1 if abs(values[0]) >= 10 else 4
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def draw(out: Path, rows: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> None:
    """A heat map of R for each method (mean over seeds), and strips: the first concept after each
    later one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row["method"] for row in rows))
    matrices = {
        m: np.mean([np.array(row["matrix"], float) for row in rows if row["method"] == m], axis=0)
        for m in methods
    }
    top = max(float(np.nanmax(m)) for m in matrices.values())
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.2 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, method in zip(axes.flat, methods, strict=False):
        axis.set_visible(True)
        axis.imshow(matrices[method], vmin=0, vmax=top, cmap="viridis_r")
        axis.set(
            title=method.replace(" ", "\n"),
            xlabel="concept",
            ylabel="after concept",
            xticks=[],
            yticks=[],
        )
    figure.suptitle(
        "R[i, j]: distance of the drawn pictures from the real ones (MMD², dark is far)"
    )
    figure.savefig(out / "heat-maps.png", dpi=90)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    for number, method in enumerate(methods):
        over = np.mean(
            [np.array(row["over"], float) for row in rows if row["method"] == method], axis=0
        )
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(
                over[:, 0],
                over[:, column],
                color=pyplot.get_cmap("tab20")(number),
                marker=".",
                label=method,
            )
    for axis, title in zip(axes, ("A_MMD", "F_MMD"), strict=True):
        axis.set(title=title, xlabel="concepts learned")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(out / "over-concepts.png", dpi=90, bbox_inches="tight")  # long names and all
    strips = [
        Image.open(next(j for j in jobs if j.row == method).folder / "first-concept.jpg")
        for method in methods
    ]
    shown = jobs[0].looked_at
    figure, axes = pyplot.subplots(
        len(methods),
        1,
        figsize=(1.3 * len(shown) + 1.3, 1.6 * len(methods) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, method, strip in zip(axes[:, 0], methods, strips, strict=True):
        axis.imshow(strip)
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_title(method, fontsize=9, loc="left")
    figure.suptitle(
        "The first concept: a real picture, then drawn after "
        f"{', '.join(str(n + 1) for n in shown)} concepts",
        fontsize=9,
    )
    figure.savefig(out / "first-concept.jpg", dpi=100, pil_kwargs={"quality": 85})


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how much each method remembers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int)
    parser.add_argument("--seeds")
    parser.add_argument(
        "--methods", help="with settings behind them where they are not the method's own"
    )
    parser.add_argument("--split", choices=("reporting", "development"), default="reporting")
    parser.add_argument("--steps", type=int, default=200, help="a concept")
    parser.add_argument(
        "--pictures", type=int, default=PICTURES, help="drawn for each version and concept"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; several processes can share a GPU"
    )
    parser.add_argument("--ray", action="store_true", help="spread over a Ray cluster")
    parser.add_argument(
        "--done",
        action="store_true",
        help="run nothing: tables and plots of the rows that are there, even while others are made",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="unless told otherwise lora, the paper's and retention; 3 concepts, 1 seed",
    )
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds, wanted = [int(s) for s in arguments.seeds.split(",")], arguments.methods.split(",")
    sizes = (
        arguments.concepts,
        arguments.pictures,
        arguments.out,
        arguments.steps,
        arguments.split,
        arguments.device,
    )
    jobs = [Job(name, seed, *sizes) for seed in seeds for name in wanted]
    for job in jobs:
        if job.row.split()[0] not in (*METHODS, *BOUNDS):
            parser.error(f"unknown method {job.row}; known: {', '.join([*METHODS, *BOUNDS])}")
        try:
            job.settings.check()
        except (TypeError, SettingError) as error:
            parser.error(f"{job.row}: {error}")
    if arguments.done:
        done = read_rows(arguments.out)
        jobs = [job for job in jobs if job.folder.name in done] or parser.error(
            f"no row is done in {arguments.out}"
        )
    rows = run_all(jobs, arguments.processes, arguments.ray)
    write(arguments.out, rows)
    draw(arguments.out, rows, jobs)
    print((arguments.out / "table.md").read_text())


if __name__ == "__main__":
    main()

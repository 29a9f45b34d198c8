"""How much is remembered: every method learns the same sequences of concepts; what each concept
looks like after every later one is measured.

    python benchmarks/retention/run.py benchmarks/retention/results
        the six-concept table (hours on two cores)
    python benchmarks/retention/run.py OUT --quick
        three methods, three concepts: minutes
    python benchmarks/retention/run.py OUT --concepts 20 --methods lora,lora_dsc_ewc_dc
        a long sequence
    python benchmarks/retention/run.py OUT --ray
        the same jobs on a Ray cluster (pip install -e ".[ray]"), whose machines see this folder
    python benchmarks/retention/run.py OUT --split development --methods "lora,lora rank=4 rate=1e-3"
        settings beside each other
    python benchmarks/retention/run.py OUT --split test --tuned benchmarks/retention/tuned.json
        the test split, with what `tune.py` found for each method on development concepts
    python benchmarks/retention/run.py OUT --checkpoint OUT/wide.safetensors
        concepts of the world, learned by another miniature that draws it (../second)
    python benchmarks/retention/run.py OUT --checkpoint sd15.safetensors --concepts FOLDER \
            --clip FOLDER
        the same on a real checkpoint and photographs (a folder for each subject), judged by a CLIP

Input: nothing (concepts of a split, in an order drawn from the seed), or a checkpoint, photographs
and a CLIP.
Output: OUT/rows.jsonl (a line for each finished job, with the commit, settings, device and versions
it was made with), table.json (a row for each method and seed), table.csv, table.md (and each method's
difference from `retention`), matrices.json (R[i, j]), heat maps, A_MMD and F_MMD over the number of
concepts, and a strip of pictures for each method.

A finished job is not run again, and one that was stopped goes on: the stack on disk knows what it
has learned. Prompts, seeds, solver and guidance are the same for all methods.

    A_MMD, F_MMD, BwT_MMD, KID    metrics.py, on the mini-CLIP's image features; lower is better,
                                  BwT_MMD higher
    f_zero                        F_MMD of what nothing moved: below 0, by the spread of the drawings
    a_rbf, second                 A_MMD by a Gaussian kernel, which also sees the spread; that on a
                                  second encoder's features, which no caption taught (judges.py)
    named                         share of pictures at the end that the second encoder finds nearest
                                  to their own concept's real ones
    shape, pattern, colors        of pictures at the end, by a reader of attributes: share that is
                                  right, and the distance of the colours (0 to 255)
    held_out, held_out_second...  the same of pictures by prompts as people write them, of words that
                                  no method protects
    leak_*, drift_*               what becomes of everything else: drift.py
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
for each concept, which is switched by hand. `base=retention` lets them, and rivals that merge, learn
as `retention` does. `lists=half` leaves words out of the lists that are protected (words.py).

    jobs.py, subjects.py, words.py     a job; what its sequence consists of; words of no list
    learning.py, rivals/               how it learns its sequence; methods of others
    judging.py, eyes.py, judges.py, drift.py    how that is measured, and by whom
    tables.py, plots.py                what is written
    tune.py                            the settings of every row
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import drift
import judging
import plots
import tables
import torch
import tune
from eyes import Eyes, eyes_of
from jobs import PICTURES, STEPS, Job, Real, append_row, read_rows
from judges import Judges, load_judges
from judging import mean, unit
from learning import Learned, checkpoint_of, learn
from PIL import Image
from rows import EARLIER, ROWS
from subjects import ORDERS, of_folder
from torch import Tensor

from comfy_continual_lora import concepts, metrics, report
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.mini import world

FULL = {"concepts": "6", "seeds": "0,1,2", "methods": ",".join(EARLIER)}
QUICK = {"concepts": "3", "seeds": "0", "methods": "lora_dsc_ewc_dc,lora,retention"}
HERE = Path(__file__).parent
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


# --- one job: learn the sequence, draw it, measure it ---------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """The row of one method and seed."""
    finished = read_rows(job.out)
    if job.folder.name in finished:
        return finished[job.folder.name]
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a GPU's row is to stand beside a CPU's
    job.folder.mkdir(parents=True, exist_ok=True)
    learned = learn(job)
    folders = drawn_folders(learned)
    row = measure(job, learned, folders)
    save_strip(job, folders)
    append_row(job.out, job.folder.name, row)
    return row


def drawn_folders(learned: Learned) -> dict[tuple[int, int], str]:
    """Where each cell's pictures are kept. A bound has one stack for many cells: what it draws of a
    concept is drawn once, under the last of them.
    """
    last: dict[tuple[int, int], int] = {}  # by stack and concept
    for (i, j), stack in learned.stacks.items():
        last[id(stack), j] = max(i, last.get((id(stack), j), i))
    return {(i, j): f"{last[id(stack), j]}-{j}" for (i, j), stack in learned.stacks.items()}


def measure(job: Job, learned: Learned, folders: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    count, last = job.concepts, job.concepts - 1
    backbone = load_backbone(checkpoint_of(job), device=job.device)
    eyes = eyes_of(job)
    judges = None if job.real else load_judges(job.judges)
    real = [subject.real(job.pictures) for subject in job.subjects]
    pictures = {
        (i, j): judging.drawn_pictures(job, backbone, stack, job.prompts_about(j), folders[i, j])
        for (i, j), stack in learned.stacks.items()
    }
    held_out = [
        judging.drawn_pictures(
            job, backbone, learned.stacks[last, j], job.held_out_prompts_about(j), f"held-out-{j}"
        )
        for j in range(count)
    ]
    drawn = {cell: eyes.features(own) for cell, own in pictures.items()}
    seen = [eyes.features(own) for own in real]
    matrix = metrics.retention_matrix(seen, drawn)
    end = [drawn[last, j] for j in range(count)]
    first = [drawn[j, j] for j in range(count)]
    by_second = partial(_second_opinion, judges, job.sequence, real)
    ends = {
        "a_mmd": matrix[-1].tolist(),
        "a_rbf": _distances(seen, end, metrics.gaussian),
        "held_out": _distances(seen, [eyes.features(own) for own in held_out], metrics.quadratic),
        **by_second([pictures[last, j] for j in range(count)]),
        **{f"held_out_{name}": values for name, values in by_second(held_out).items()},
    }
    at_end = [learned.stacks[last, j] for j in range(count)]
    distinct = list({id(stack): stack for stack in at_end}.values())
    stack = learned.stacks[last, last]
    accuracy = both = bled = None
    if len(distinct) == 1:
        accuracy = judging.dc_accuracy(job, backbone, stack)
        if not job.real:
            both, bled = judging.judge_pairs(job, backbone, stack)
    look = judges.features if judges else eyes.features
    return {
        "method": job.variant,
        "seed": job.seed,
        "concepts": count,
        "a_mmd": metrics.a_mmd(matrix),
        "f_mmd": metrics.f_mmd(drawn, count),
        "f_zero": mean(_distances(first, first, metrics.quadratic)),
        "bwt_mmd": metrics.bwt_mmd(matrix),
        "over": [
            [n, metrics.a_mmd(matrix[:n, :n]), metrics.f_mmd(drawn, n)]
            for n in (i + 1 for i in job.drawn_after if i)
        ],
        "kid": mean(metrics.kid(unit(r), unit(d)) for r, d in zip(seen, end, strict=True)),
        "i2i": mean(metrics.similarity(r, d) for r, d in zip(seen, end, strict=True)),
        "t2i": _t2i(job, eyes, end),
        "newest_mmd": float(matrix[-1, -1]),
        "dc_accuracy": accuracy,
        "both": both,
        "bled": bled,
        **{name: mean(values) for name, values in ends.items()},
        **drift.leaks(job, backbone, distinct),
        **drift.drifts(job, backbone, distinct, look),
        "device": job.device,
        "seconds_per_concept": learned.seconds / count,
        "bytes_per_concept": learned.size / count,
        "subjects": [subject.name for subject in job.subjects],
        "ends": ends,
        "matrix": [[_json_number(value) for value in line] for line in matrix.tolist()],
        "made_with": made_with(job, backbone),
    }


def _second_opinion(
    judges: Judges | None,
    sequence: Sequence[world.Concept],
    real: Sequence[Tensor],
    drawn: Sequence[Tensor],
) -> dict[str, list[float]]:
    """Of each concept's pictures: the distance by the second encoder, the share that it finds nearest
    to their own concept's real pictures, and what the reader of attributes sees. Nothing without
    judges.
    """
    if judges is None:
        return {}
    seen = [judges.features(pictures) for pictures in real]
    found = [judges.features(pictures) for pictures in drawn]
    means = torch.stack([unit(features).mean(0) for features in seen])
    nearest = [torch.cdist(unit(features), means).argmin(1) for features in found]
    pairs = zip(sequence, drawn, strict=True)
    read = [judges.agreement(pictures, concept) for concept, pictures in pairs]
    return {
        "second": _distances(seen, found, judges.kernel),
        "named": [float((own == j).float().mean()) for j, own in enumerate(nearest)],
        **{
            name: [float(one[name].mean()) for one in read]
            for name in ("shape", "pattern", "colors")
        },
    }


def _distances(
    real: Sequence[Tensor], drawn: Sequence[Tensor], kernel: metrics.Kernel
) -> list[float]:
    """MMD^2 of each concept's features, at length 1."""
    pairs = zip(real, drawn, strict=True)
    return [metrics.mmd2(unit(r), unit(d), kernel) for r, d in pairs]


def _t2i(job: Job, eyes: Eyes, end: Sequence[Tensor]) -> float:
    texts = [eyes.text([p.format(s.noun) for p in job.prompts]) for s in job.subjects]
    return mean(metrics.paired_similarity(d, t) for d, t in zip(end, texts, strict=True))


def made_with(job: Job, backbone: Backbone) -> dict[str, Any]:
    """What the row can be made again with."""
    settings = job.settings.resolved(backbone.preset)
    device = platform.processor() or platform.machine()
    if job.device.startswith("cuda"):
        device = torch.cuda.get_device_name(job.device)
    return {
        "commit": commit(),
        "device": device,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "split": job.split,
        "order": job.order,
        "checkpoint": backbone.fingerprint,
        "settings": asdict(settings),
        "drawing": asdict(job.drawing),
        "options": job.options,
    }


def commit() -> str | None:
    """The commit of this checkout, with "+" behind it if files of it are changed; where there is no
    git, what the variable COMMIT says.
    """
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=HERE,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def save_strip(job: Job, folders: Mapping[tuple[int, int], str]) -> None:
    """The first concept: a real picture, then drawn after each later concept."""
    real = concepts.to_pil(job.subjects[0].real(2)[1])
    drawn = [Image.open(job.folder / "drawn" / folders[i, 0] / "1.png") for i in job.strip]
    strip = report.grid([real, *drawn], len(drawn) + 1)
    strip.save(job.folder / "first-concept.jpg", quality=90)


def _json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


# --- all jobs -------------------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], processes: int, ray: bool) -> list[dict[str, Any]]:
    """Every job, spread over processes of this machine or over a Ray cluster; rows come back in the
    jobs' order, without those of jobs that failed.

    Errors: SystemExit if all of them failed.
    """
    if ray:
        from ray.util.multiprocessing import Pool  # pyright: ignore[reportMissingImports]

        with Pool(processes) as pool:
            found = list(pool.imap(_run_and_print, jobs))
    elif processes == 1:
        found = [_run_and_print(job) for job in jobs]
    else:
        with get_context("spawn").Pool(processes) as pool:
            found = list(pool.imap(_run_and_print, jobs, chunksize=1))
    rows = [row for row in found if row is not None]
    if not rows:
        raise SystemExit("No job succeeded; the errors are above.")
    return rows


def _run_and_print(job: Job) -> dict[str, Any] | None:
    """None if it failed, which leaves the others to go on."""
    try:
        row = run(job)
    except Exception:
        print(f"{job.variant:<24} seed {job.seed}  FAILED\n{traceback.format_exc()}", flush=True)
        return None
    figures = f"A_MMD {row['a_mmd']:.4f}  newest {row['newest_mmd']:.4f}"
    print(f"{job.variant:<24} seed {job.seed}  {figures}", flush=True)
    return row


def _jobs(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Job]:
    count, real = _sequence(arguments, parser)
    miniature = None if real else arguments.checkpoint
    new_job = partial(
        Job,
        concepts=count,
        pictures=arguments.pictures,
        out=arguments.out,
        steps=arguments.steps,
        split=arguments.split,
        device=arguments.device,
        common=tuple(arguments.set),
        ends=arguments.ends,
        real=real,
        miniature=miniature,
        judges=arguments.judges,
        order=arguments.order,
        drawing_steps=arguments.drawing_steps,
    )
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    variants = ROWS if arguments.methods == "all" else arguments.methods.split(",")
    tuned = tune.read(arguments.tuned) if arguments.tuned else {}
    jobs = []
    for seed in seeds:
        for variant in variants:
            if arguments.tuned and variant not in tuned:
                parser.error(f"{arguments.tuned} has no settings for {variant}; run tune.py")
            jobs.append(new_job(variant, seed, tuned=tuple(tuned.get(variant, ()))))
    try:
        for job in jobs:
            job.check()
    except (TypeError, ValueError, SettingError) as error:
        parser.error(str(error))
    if arguments.done:
        finished = read_rows(arguments.out)
        jobs = [job for job in jobs if job.folder.name in finished]
        if not jobs:
            parser.error(f"no row is done in {arguments.out}")
    return jobs


def _sequence(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[int, Real | None]:
    """How many concepts, and the checkpoint and photographs if they are not of the world."""
    if arguments.concepts.isdigit():
        if arguments.clip:
            parser.error("--clip judges photographs: --concepts FOLDER and --checkpoint")
        if arguments.checkpoint and not arguments.checkpoint.exists():
            parser.error(f"there is no {arguments.checkpoint}")
        return int(arguments.concepts), None
    if arguments.checkpoint is None or arguments.clip is None:
        parser.error("--concepts FOLDER (of photographs) needs --checkpoint and --clip FOLDER")
    real = Real(
        arguments.checkpoint,
        Path(arguments.concepts),
        arguments.clip,
        arguments.size,
    )
    try:
        found = len(of_folder(real.photographs, 0, real.size))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return min(found, arguments.count or found), real


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how much each method remembers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", help="how many; or a folder of photographs")
    parser.add_argument("--count", type=int, help="how many of the photographs' subjects")
    parser.add_argument("--seeds")
    parser.add_argument(
        "--methods",
        help="with settings behind them where they are not the method's own; all: every row",
    )
    parser.add_argument("--split", choices=world.SPLITS, default="reporting")
    parser.add_argument(
        "--order", choices=ORDERS, default="mixed", help="harder sequences (subjects.py)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="per concept")
    parser.add_argument(
        "--pictures", type=int, default=PICTURES, help="drawn for each version and concept"
    )
    parser.add_argument(
        "--ends",
        action="store_true",
        help="draw what was just learned and the end, nothing between",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="for every method"
    )
    parser.add_argument("--tuned", type=Path, help="file of tune.py: the settings of each method")
    parser.add_argument("--checkpoint", type=Path, help="instead of the mini-SD")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP that judges (transformers)")
    parser.add_argument(
        "--judges", type=Path, default=HERE, help="folder of judges.py; trained there if missing"
    )
    parser.add_argument("--size", type=int, default=512, help="of photographs and drawings")
    parser.add_argument("--drawing-steps", type=int, help="of each picture (15; of photographs 25)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; several processes can share a GPU"
    )
    parser.add_argument("--ray", action="store_true", help="spread over a Ray cluster")
    parser.add_argument(
        "--done",
        action="store_true",
        help="run nothing: tables and plots of the finished rows, even while others are made",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="by default lora, the paper's and retention; 3 concepts, 1 seed",
    )
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(arguments, parser)
    rows = run_all(jobs, arguments.processes, arguments.ray)
    tables.write(arguments.out, rows)
    plots.draw(arguments.out, rows, jobs)
    print((arguments.out / "table.md").read_text())
    if failed := len(jobs) - len(rows):
        raise SystemExit(f"{failed} of {len(jobs)} jobs failed; the errors are above.")


if __name__ == "__main__":
    main()

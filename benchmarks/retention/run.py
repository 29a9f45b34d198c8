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

Input: nothing (concepts of the reporting split, in an order drawn from the seed).
Output: OUT/rows.jsonl (a line for each finished job), table.json (a row for each method and seed),
table.csv, table.md (and a paired test of each method against `retention`), matrices.json (R[i, j]),
heat maps, A_MMD and F_MMD over the number of concepts, and a strip of pictures for each method.

A finished job is not run again, and one that was stopped goes on: the stack on disk knows what it
has learned. Prompts, seeds, solver and guidance are the same for all methods.

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

    jobs.py, learning.py, judging.py, tables.py, plots.py    a job, how it learns its sequence, how
                                                             that is measured, what is written
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import judging
import plots
import tables
import torch
from jobs import BOUNDS, PICTURES, Job, append_row, read_rows
from judging import features_of, mean, real_pictures, unit
from learning import Learned, learn
from PIL import Image
from torch import Tensor

from comfy_continual_lora import concepts, metrics, report
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.mini import weights
from comfy_continual_lora.presets import METHODS

VARIANTS = (*METHODS, *(f"{name} adapter=vera" for name in ("lora", "lora_ewc", "lora_ewc_dc")))
FULL = {"concepts": 6, "seeds": "0,1,2", "methods": ",".join([*VARIANTS, *BOUNDS])}
QUICK = {"concepts": 3, "seeds": "0", "methods": "lora_dsc_ewc_dc,lora,retention"}


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
    names, sequence = job.names, job.sequence
    backbone = load_backbone(job.folder / "mini.safetensors", device=job.device)
    real = [features_of(real_pictures(concept, job.pictures)) for concept in sequence]
    drawn: dict[tuple[int, int], Tensor] = {}
    for (i, j), stack in learned.stacks.items():
        pictures = judging.drawn_pictures(job, backbone, stack, names[j], folders[i, j])
        drawn[i, j] = features_of(pictures)
    matrix = metrics.retention_matrix(real, drawn)
    end = [drawn[last, j] for j in range(count)]
    real_and_end = list(zip(real, end, strict=True))
    prompts = [weights.text_features([p.format(c.noun) for p in job.prompts]) for c in sequence]
    stack = learned.stacks[last, last]
    accuracy = both = bled = None
    if job.method != "separate":
        both, bled = judging.judge_pairs(job, backbone, stack)
        accuracy = judging.dc_accuracy(job, backbone, stack)
    return {
        "method": job.variant,
        "seed": job.seed,
        "concepts": count,
        "a_mmd": metrics.a_mmd(matrix),
        "f_mmd": metrics.f_mmd(drawn, count),
        "bwt_mmd": metrics.bwt_mmd(matrix),
        "over": [
            [n, metrics.a_mmd(matrix[:n, :n]), metrics.f_mmd(drawn, n)]
            for n in (i + 1 for i in job.drawn_after[1:])
        ],
        "kid": mean(metrics.kid(unit(r), unit(d)) for r, d in real_and_end),
        "i2i": mean(metrics.similarity(r, d) for r, d in real_and_end),
        "t2i": mean(metrics.paired_similarity(d, t) for d, t in zip(end, prompts, strict=True)),
        "newest_mmd": float(matrix[-1, -1]),
        "dc_accuracy": accuracy,
        "both": both,
        "bled": bled,
        "device": job.device,
        "seconds_per_concept": learned.seconds / count,
        "bytes_per_concept": learned.size / count,
        "matrix": [[_json_number(value) for value in line] for line in matrix.tolist()],
    }


def save_strip(job: Job, folders: Mapping[tuple[int, int], str]) -> None:
    """The first concept: a real picture, then drawn after each later concept."""
    real = concepts.to_pil(real_pictures(job.sequence[0], 2)[1])
    drawn = [Image.open(job.folder / "drawn" / folders[i, 0] / "1.png") for i in job.drawn_after]
    strip = report.grid([real, *drawn], len(drawn) + 1)
    strip.save(job.folder / "first-concept.jpg", quality=90)


def _json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


# --- all jobs -------------------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], processes: int, ray: bool) -> list[dict[str, Any]]:
    """Every job, spread over processes of this machine or over a Ray cluster; rows come back in the
    jobs' order.
    """
    if ray:
        from ray.util.multiprocessing import Pool  # pyright: ignore[reportMissingImports]

        with Pool(processes) as pool:
            return list(pool.imap(_run_and_print, jobs))
    if processes == 1:
        return [_run_and_print(job) for job in jobs]
    with get_context("spawn").Pool(processes) as pool:
        return list(pool.imap(_run_and_print, jobs, chunksize=1))


def _run_and_print(job: Job) -> dict[str, Any]:
    row = run(job)
    figures = f"A_MMD {row['a_mmd']:.4f}  newest {row['newest_mmd']:.4f}"
    print(f"{job.variant:<24} seed {job.seed}  {figures}", flush=True)
    return row


def _jobs(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Job]:
    new_job = partial(
        Job,
        concepts=arguments.concepts,
        pictures=arguments.pictures,
        out=arguments.out,
        steps=arguments.steps,
        split=arguments.split,
        device=arguments.device,
    )
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    variants = arguments.methods.split(",")
    jobs = [new_job(variant, seed) for seed in seeds for variant in variants]
    methods = (*METHODS, *BOUNDS)
    for job in jobs:
        if job.method not in methods:
            parser.error(f"unknown method {job.variant}; known: {', '.join(methods)}")
        try:
            job.settings.check()
        except (TypeError, SettingError) as error:
            parser.error(f"{job.variant}: {error}")
    if arguments.done:
        finished = read_rows(arguments.out)
        jobs = [job for job in jobs if job.folder.name in finished]
        if not jobs:
            parser.error(f"no row is done in {arguments.out}")
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how much each method remembers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int)
    parser.add_argument("--seeds")
    parser.add_argument(
        "--methods", help="with settings behind them where they are not the method's own"
    )
    parser.add_argument("--split", choices=("reporting", "development"), default="reporting")
    parser.add_argument("--steps", type=int, default=200, help="per concept")
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


if __name__ == "__main__":
    main()

"""The settings of every row of the retention benchmark, found with the same number of trials each.

    python benchmarks/retention/tune.py benchmarks/retention/tuned.json [--methods lora,ties]
        [--concepts 2] [--steps 200] [--processes 2] [--set batch=4]

in: nothing - out: a JSON file with, for each row, every trial and, after the last one, the settings
chosen. A trial that the file has is not run again. `run.py --tuned` learns with it.

Each row has five trials on development concepts: three values of what matters most (for most the
learning rate), then two of something else beside the best of them. The measure is the `gain` of
sweeps/sweep.py at the end, mean over the concepts: how much the word lowers the error on pictures
that were not learned from. A row that merges learns each concept alone with the settings found for
that row, and has trials of its own options.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jobs import PICTURES, STEPS, Job
from learning import learn
from rows import ROWS

from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.files import write_whole
from comfy_continual_lora.mini.weights import write_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "sweeps"))
import sweep

AROUND = (0.3, 1.0, 3.0)  # the first three values, as multiples of the preset


@dataclass(frozen=True)
class Knob:
    name: str
    values: tuple[float, ...] = AROUND
    of_preset: bool = True  # the values are multiples of the mini-SD's preset, or of a rival's own


RATE, TOKEN_RATE, STRENGTH = Knob("rate"), Knob("token_rate"), Knob("ewc_strength")
WEIGHT = Knob("weight", (0.8, 1.0, 1.25))
PUBLISHED = Knob("rate", (1e-5, 1e-4, 1e-3), of_preset=False)  # Custom Diffusion's is 1e-5
KNOBS: dict[str, tuple[Knob, Knob]] = {
    "textual_inversion": (TOKEN_RATE, Knob("vectors", (1, 4, 8), of_preset=False)),
    "custom_diffusion": (PUBLISHED, Knob("rate")),
    "custom_diffusion_ewc": (PUBLISHED, STRENGTH),
    "lora": (RATE, TOKEN_RATE),
    "c_lora": (RATE, Knob("c_lora_weight", (1e6, 1e8, 1e10), of_preset=False)),
    "lora_ewc": (RATE, STRENGTH),
    "lora_ewc_dc": (RATE, STRENGTH),
    "lora_dsc": (RATE, Knob("dsc_rate", (0.2, 0.5, 1.0), of_preset=False)),
    "lora_dsc_ewc": (RATE, STRENGTH),
    "lora_dsc_ewc_dc": (RATE, STRENGTH),
    "retention": (RATE, TOKEN_RATE),
    "closed_form": (RATE, TOKEN_RATE),
    "joint": (RATE, TOKEN_RATE),
    "separate": (RATE, TOKEN_RATE),
    "orthogonal_adaptation": (RATE, TOKEN_RATE),
    "merge_reinit": (RATE, TOKEN_RATE),
    "o_lora": (RATE, Knob("weight")),
    "cidm": (RATE, Knob("power", (1.0, 4.0, 64.0), of_preset=False)),
    "plain_sum": (Knob("weight", (0.4, 0.7, 1.0), of_preset=False), WEIGHT),
    "ties": (Knob("density", (0.2, 0.5, 0.8), of_preset=False), WEIGHT),
    "dare": (Knob("density", (0.2, 0.5, 0.8), of_preset=False), WEIGHT),
    "magnitude": (Knob("density", (0.2, 0.5, 0.8), of_preset=False), WEIGHT),
    "custom_diffusion_merge": (
        Knob("ridge", (1e-6, 1e-4, 1e-2), of_preset=False),
        Knob("padding", (0.0, 0.0, 1.0), of_preset=False),
    ),
    "gradient_fusion": (
        Knob("iterations", (20, 50, 200), of_preset=False),
        Knob("padding", (0.0, 0.0, 1.0), of_preset=False),
    ),
    "solve": (Knob("ordinary_weight"), Knob("ridge")),
}


def tuned(path: Path, job: Job) -> dict[str, Any]:
    """The trials of one row, and the settings chosen; each trial is kept in the file at once."""
    torch.set_num_threads(1)
    first, second = KNOBS[job.method]
    earlier = _rows(path).get(job.variant, {}).get("trials", [])
    known = {tuple(trial["settings"]): trial for trial in earlier}
    trials: list[dict[str, Any]] = []
    chosen: tuple[str, ...] = job.tuned
    for knob, values in ((first, first.values), (second, _others(second))):
        for value in values:
            change = f"{knob.name}={json.dumps(_value(knob, value, job, chosen))}"
            names = (*(c for c in chosen if not c.startswith(f"{knob.name}=")), change)
            trials.append(known.get(names) or _trial(replace(job, tuned=names)))
            _write(path, job.variant, {"trials": trials})
        chosen = tuple(max(trials, key=lambda trial: trial["gain"])["settings"])
    row = {"chosen": chosen, "trials": trials}
    _write(path, job.variant, row)
    return row


def _trial(job: Job) -> dict[str, Any]:
    gains = gains_of(job)
    return {"settings": job.tuned, "gain": sum(gains) / len(gains), "gains": gains}


def _others(knob: Knob) -> tuple[float, ...]:
    """Without the middle one, which was tried already."""
    return (knob.values[0], knob.values[-1])


def _value(knob: Knob, value: float, job: Job, chosen: Sequence[str]) -> float:
    if not knob.of_preset:
        return int(value) if knob.name == "vectors" else value
    at_best = replace(job, tuned=tuple(chosen))
    if knob.name in at_best.options:
        return value * at_best.options[knob.name]
    return value * getattr(at_best.settings.resolved("mini"), knob.name)


def gains_of(job: Job) -> list[float]:
    """What each concept's word gains at the end."""
    with tempfile.TemporaryDirectory() as folder:
        # what rows that merge learn alone is kept for the next one
        where = job if job.merges else replace(job, out=Path(folder))
        stacks = learn(where).stacks
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        backbone = load_backbone(checkpoint, device=job.device)
        gains = []
        for j, (token, concept) in enumerate(zip(job.tokens, job.sequence, strict=True)):
            stack = stacks[job.concepts - 1, j]
            text = FrozenText(backbone, stack.tokens)
            gains.append(sweep.gain(backbone, stack.adapter, text, token, concept))
        return gains


# --- the file -------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, list[str]]:
    """The settings chosen for each row that had all its trials."""
    rows = _rows(path)
    return {variant: row["chosen"] for variant, row in rows.items() if "chosen" in row}


def _rows(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, variant: str, row: dict[str, Any]) -> None:
    """One process at a time."""
    with FileLock(path.with_suffix(".lock")):
        rows = {**_rows(path), variant: row}
        write_whole(path, json.dumps(rows, indent=1).encode() + b"\n")


def _tune(path: Path, job: Job) -> str:
    """The variant if it failed, which leaves the others to go on."""
    try:
        row = tuned(path, job)
    except Exception:
        print(f"{job.variant:<36} FAILED\n{traceback.format_exc()}", flush=True)
        return job.variant
    best = max(trial["gain"] for trial in row["trials"])
    print(f"{job.variant:<36} {best:.4f}  {' '.join(row['chosen'])}", flush=True)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the settings of every row.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default=",".join(ROWS))
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="per concept")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    new_job = partial(
        Job,
        seed=arguments.seed,
        concepts=arguments.concepts,
        pictures=PICTURES,
        out=arguments.out.with_suffix("").with_name(f"{arguments.out.stem}-alone"),
        steps=arguments.steps,
        split="development",
        device=arguments.device,
        common=tuple(arguments.set),
    )
    variants, failed = arguments.methods.split(","), []
    for only_merges in (False, True):  # a row that merges needs what `separate` was tuned to
        found = read(arguments.out)
        jobs = []
        for job in map(new_job, variants):
            if job.variant in found or job.merges != only_merges:
                continue
            if only_merges and job.alone.variant not in found:
                failed.append(job.variant)
                continue
            if only_merges:
                job = replace(job, tuned=tuple(found[job.alone.variant]))
            job.check()
            jobs.append(job)
        with get_context("spawn").Pool(arguments.processes) as pool:
            failed += filter(None, pool.imap(partial(_tune, arguments.out), jobs, chunksize=1))
    if failed:
        raise SystemExit(f"Not tuned: {', '.join(failed)}")


if __name__ == "__main__":
    main()

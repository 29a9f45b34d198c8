"""Which settings of DSC keep most: the newest concept of one and the same stack is consolidated
again and again, from the same start.

    python benchmarks/sweeps/consolidate.py benchmarks/sweeps/dsc.jsonl --seeds 0,1 --set
    dsc_steps=60,120 --set dsc_a1=0,1

in: nothing - out: a line of JSON for each run, appended; what is there already is not run again. A
seed's sequence of development concepts is
learned once by `lora_ewc_dc`, 200 steps a concept, and kept beside the file; its figures before any
consolidating are the first line.
Figures as in sweep.py:

    earlier    error that the concepts before the newest gain over the checkpoint, on held-out
    pictures with fixed noises; larger is better
    newest     the same of the newest concept; what consolidating must not take away
    prior      error added to ordinary pictures; smaller is better
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sweep import combinations, gain, prior_error, rows_of, sequence, table

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings, TrainSettings

STEPS = 200  # a concept
COLUMNS = ("earlier", "newest", "prior", "seconds")


def learned(checkpoint: Path, concepts: list[world.Concept], settings: LearnSettings) -> None:
    """Leave the stack of the sequence beside the checkpoint, and the pictures in a folder for each
    concept.
    """
    for number, concept in enumerate(concepts, start=1):
        files = world.save_pictures(concept, checkpoint.parent / f"V{number}")
        request = requests.LearnRequest(
            checkpoint, files, f"V{number}", concept.noun, settings, device="cpu"
        )
        if pipeline.learned_before(request) is None:
            pipeline.learn_concept(request)


def measured(checkpoint: Path, stack_file: Path, concepts: list[world.Concept]) -> dict[str, float]:
    backbone = load_backbone(checkpoint, device="cpu")
    stack = store.load_stack(stack_file, backbone.fingerprint)
    text = FrozenText(backbone, stack.tokens)
    gains = [
        gain(backbone, stack.adapter, text, f"V{number}", concept)
        for number, concept in enumerate(concepts, start=1)
    ]
    prior = prior_error(backbone, stack.adapter) - prior_error(backbone, None)
    return {
        "earlier": round(statistics.mean(gains[:-1]), 5),
        "newest": round(gains[-1], 5),
        "prior": round(prior, 5),
    }


def run(
    folder: Path, concepts: list[world.Concept], settings: dict[str, Any] | None
) -> dict[str, float]:
    """The sequence's stack as it is, or a copy of it whose newest concept is consolidated."""
    checkpoint, started = folder / "mini.safetensors", time.time()
    kept = store.stack_path(checkpoint)
    if settings is None:
        return {**measured(checkpoint, kept, concepts), "seconds": 0.0}
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copy(kept, place))
        chosen = TrainSettings(**settings, fisher_samples=1)  # nothing is learned after it
        pipeline.consolidate(
            requests.ConsolidateRequest(
                checkpoint, folder / f"V{len(concepts)}", chosen, stack=copy, device="cpu"
            )
        )
        seconds = round(time.time() - started, 1)
        return {**measured(checkpoint, copy, concepts), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Try settings of Diffusion Scores Consolidation on one stack of development concepts."
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
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {json.dumps([r["settings"], r["concepts"], r["seed"]]) for r in rows_of(arguments.out)}
    for seed in [] if arguments.table else [int(s) for s in arguments.seeds.split(",")]:
        folder = arguments.out.with_suffix("") / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mini.safetensors").exists():
            write_checkpoint(folder / "mini.safetensors")
        concepts = sequence(arguments.concepts, seed)
        learned(
            folder / "mini.safetensors",
            concepts,
            LearnSettings(method="lora_ewc_dc", steps=STEPS, seed=seed),
        )
        for chosen in [None, *combinations(arguments.set)]:
            if json.dumps([chosen or {}, arguments.concepts, seed]) in known:
                continue
            figures = run(folder, concepts, chosen if chosen is None else {"seed": seed, **chosen})
            row = {
                "settings": chosen or {},
                "concepts": arguments.concepts,
                "seed": seed,
                **figures,
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print(table(arguments.out, COLUMNS))


if __name__ == "__main__":
    main()

r"""Which settings of DSC keep most: the newest concept of one and the same stack is consolidated
again and again, from the same start.

    python benchmarks/sweeps/consolidate.py benchmarks/sweeps/dsc.jsonl --seeds 0,1 \
        --set dsc_steps=60,120 --set dsc_a1=0,1

Input: nothing. Output: a line of JSON for each run, appended; what is there already is not run
again. A seed's sequence of development concepts is learned once by `lora_ewc_dc`, 200 steps per
concept, and kept beside the file; its figures before any consolidating are the first line.

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
from sweep import combinations, gain, prior_error, runs_in, sequence, table

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings, TrainSettings

STEPS = 200  # per concept
COLUMNS = ("earlier", "newest", "prior", "seconds")


def learn_sequence(
    checkpoint: Path, concepts: list[world.Concept], settings: LearnSettings
) -> None:
    """Leave the stack beside the checkpoint, and each concept's pictures in a folder of its own."""
    for number, concept in enumerate(concepts, start=1):
        files = world.save_pictures(concept, checkpoint.parent / f"V{number}")
        request = requests.LearnRequest(
            checkpoint, files, f"V{number}", concept.noun, settings, device="cpu"
        )
        if pipeline.learned_before(request) is None:
            pipeline.learn_concept(request)


def measure(checkpoint: Path, stack_file: Path, concepts: list[world.Concept]) -> dict[str, float]:
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
    unconsolidated = store.stack_path(checkpoint)
    if settings is None:
        return {**measure(checkpoint, unconsolidated, concepts), "seconds": 0.0}
    pictures = folder / f"V{len(concepts)}"
    chosen = TrainSettings(**settings, fisher_samples=1)  # nothing is learned after it
    with tempfile.TemporaryDirectory() as temporary:
        stack = Path(shutil.copy(unconsolidated, temporary))
        request = requests.ConsolidateRequest(
            checkpoint, pictures, chosen, stack=stack, device="cpu"
        )
        pipeline.consolidate(request)
        seconds = round(time.time() - started, 1)
        return {**measure(checkpoint, stack, concepts), "seconds": seconds}


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
    done = runs_in(arguments.out)
    for seed in [] if arguments.table else [int(s) for s in arguments.seeds.split(",")]:
        folder = arguments.out.with_suffix("") / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "mini.safetensors"
        if not checkpoint.exists():
            write_checkpoint(checkpoint)
        concepts = sequence(arguments.concepts, seed)
        settings = LearnSettings(method="lora_ewc_dc", steps=STEPS, seed=seed)
        learn_sequence(checkpoint, concepts, settings)
        for chosen in [None, *combinations(arguments.set)]:
            row = {"settings": chosen or {}, "concepts": arguments.concepts, "seed": seed}
            if json.dumps(list(row.values())) in done:
                continue
            row |= run(folder, concepts, None if chosen is None else {"seed": seed, **chosen})
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print(table(arguments.out, COLUMNS))


if __name__ == "__main__":
    main()

"""What does learning do to words that are in no list and in no sample?

    python benchmarks/retention/leak.py OUT [--seeds 0,1] [--concepts 2] [--steps 150]
        [--variants "lora,retention,retention retention_language=0"]

in: nothing - out: OUT/leak.jsonl, a line for each variant and seed, and the same lines on the
screen. Some nouns, colours and places of the mini-SD's world are taken out of the lists that
`textspace` protects, and prompts with them out of the sample of `language`. Development concepts are
then learned one after the other. After each, the adapter's leak

    mean over layers of  E || delta c ||^2 / E || W0 c ||^2

is measured over the concept's own prompts, over captions of listed words, and over captions of the
words left out; over the latter also that of the concepts' own adapters together, which the solve was
given. `gain` is the error on pictures that were not learned from with the bare noun, minus
that with the word, for every concept at the end; `prior` what the adapter adds to the error on
pictures of other things.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comfy_continual_lora import pipeline, requests, store, targets, textspace
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "sweeps"))
import sweep
from jobs import PICTURES, Job
from rivals.rival import summed
from words import captions, leak, without


def measured(job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    concepts = job.sequence
    listed, left_out = job.words
    leaks = []
    with tempfile.TemporaryDirectory() as folder, without(left_out.all):
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        backbone = load_backbone(checkpoint, device="cpu")
        moments = {
            "listed": textspace.moment(backbone, {}, captions(listed)).cpu(),
            "left_out": textspace.moment(backbone, {}, captions(left_out)).cpu(),
        }
        for token, concept in zip(job.tokens, concepts, strict=True):
            pictures = world.save_pictures(concept, Path(folder) / token)
            pipeline.learn_concept(
                requests.LearnRequest(
                    checkpoint, pictures, token, concept.noun, job.settings, device="cpu"
                )
            )
            stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
            own = textspace.single_prompts(stack.records[-1])
            own_moment = textspace.moment(backbone, stack.tokens, own).cpu()
            found = {
                name: leak(backbone, stack.adapter, moment)
                for name, moment in {"own": own_moment, **moments}.items()
            }
            own_ones = [one for one in targets.own_adapters(stack) if one]
            found["left_out_before_the_solve"] = leak(
                backbone, summed(own_ones), moments["left_out"]
            )
            leaks.append(found)
        text = FrozenText(backbone, stack.tokens)
        gains = [
            sweep.gain(backbone, stack.adapter, text, token, concept)
            for token, concept in zip(job.tokens, concepts, strict=True)
        ]
        prior = sweep.prior_error(backbone, stack.adapter) - sweep.prior_error(backbone, None)
    return {
        "variant": job.variant,
        "seed": job.seed,
        "concepts": job.concepts,
        "steps": job.steps,
        "leaks": leaks,
        "gain": gains,
        "prior": prior,
        "left_out": left_out.all,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", default="lora,retention,retention retention_language=0")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        for variant in arguments.variants.split(","):
            job = Job(
                variant,
                seed,
                arguments.concepts,
                PICTURES,
                arguments.out,
                arguments.steps,
                split="development",
            )
            line = json.dumps(measured(job))
            print(line, flush=True)
            with (arguments.out / "leak.jsonl").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()

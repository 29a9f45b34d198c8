"""What protection costs, as ratios within one run: the methods against plain `lora`, EWC's penalty
a step, the Fisher by hooks against a loop.

    python benchmarks/cost/measure.py benchmarks/cost [--rounds 3] [--steps 300]

in: nothing - out: OUT/cost.json and a table on the screen. Each method learns its second concept of
a stack (the first has no memory to protect) in a
process of its own, in turns, so that noise of the machine meets all of them; seconds are those of
one CPU core, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from comfy_continual_lora import fisher as fishers
from comfy_continual_lora import pipeline, requests
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import generator_for
from comfy_continual_lora.ewc import Ewc
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.presets import METHODS
from comfy_continual_lora.settings import LearnSettings


def _learn_second(folder: str, method: str, steps: int, answer: multiprocessing.Queue) -> None:
    """CPU seconds and peak memory (MiB) of learning the second concept, by stage."""
    torch.set_num_threads(1)
    checkpoint, stages = Path(folder) / f"{method}.safetensors", {}
    write_checkpoint(checkpoint)
    settings = LearnSettings(method=method, steps=steps)
    concepts = world.concepts("development")
    for token, concept in zip(("V1", "V2"), concepts[:2], strict=True):
        pictures = world.save_pictures(concept, Path(folder) / f"{method}-{token}")
        first = (
            settings if token == "V2" else LearnSettings(method=method, steps=2, fisher_samples=8)
        )
        seen: dict[str, list[float]] = {}
        started = time.process_time()
        pipeline.learn_concept(
            requests.LearnRequest(checkpoint, pictures, token, concept.noun, first, device="cpu"),
            lambda p, seen=seen: seen.setdefault(p.stage, []).append(time.process_time()),
        )
        stages = {
            "all": time.process_time() - started,
            **{stage: times[-1] - times[0] for stage, times in seen.items()},
        }
    answer.put(
        {"seconds": stages, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    )


def compare_methods(methods: list[str], steps: int, rounds: int) -> dict[str, dict]:
    context, found = multiprocessing.get_context("spawn"), {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                answer = context.Queue()
                worker = context.Process(target=_learn_second, args=(folder, method, steps, answer))
                worker.start()
                found[method].append(answer.get())
                worker.join()
    plain = statistics.median(f["seconds"]["all"] for f in found["lora"])
    memory = statistics.median(f["mib"] for f in found["lora"])
    return {
        method: {
            "seconds": round(statistics.median(f["seconds"]["all"] for f in runs), 1),
            "of_lora": round(statistics.median(f["seconds"]["all"] for f in runs) / plain, 2),
            "memory_of_lora": round(statistics.median(f["mib"] for f in runs) / memory, 2),
            "stages": {
                k: round(statistics.median(f["seconds"].get(k, 0) for f in runs), 1)
                for k in runs[0]["seconds"]
            },
        }
        for method, runs in found.items()
    }


def _median_seconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            started = time.process_time()
            do()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def compare_parts(rounds: int) -> dict[str, float]:
    """EWC's penalty in a step of batch 8; 16 per-sample gradients by hooks and by a loop of single
    samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "mini.safetensors")
        backbone = load_backbone(Path(folder) / "mini.safetensors", device="cpu")
    generator = torch.Generator().manual_seed(0)
    adapter = new_adapter(backbone, 16, generator)
    latents, text = torch.randn(10, 4, 16, 16, generator=generator), FrozenText(backbone, {})
    target = fishers.FisherInputs(list(latents), "red mug", "mug", [], None)
    penalty = Ewc(1e-3, [(adapter, {k: torch.rand_like(v) for k, v in adapter.items()})])
    with attached(backbone, adapter, trainable=True) as factors:

        def batch(n: int) -> Callable[[], torch.Tensor]:
            return fishers._loss_of_batch(backbone, target, text, 2, n, generator_for(n))

        steps = _median_seconds(
            {
                "plain": lambda: batch(8)().mean().backward(),
                "penalty": lambda: (batch(8)().mean() + penalty(Step(factors))).backward(),
            },
            5 * rounds,
        )
        ways = _median_seconds(
            {
                "hooks": lambda: list(
                    fishers.per_sample_gradients(backbone, factors, batch(16), 16)
                ),
                "batch": lambda: batch(16)().mean().backward(),
                "loop": lambda: [
                    torch.autograd.grad(batch(1)()[0], list(factors.values())) for _ in range(16)
                ],
            },
            rounds,
        )
    return {
        "penalty_step_of_plain_step": round(steps["penalty"] / steps["plain"], 3),
        "loop_of_hooks": round(ways["loop"] / ways["hooks"], 2),
        "loop_of_batch": round(
            ways["loop"] / ways["batch"], 2
        ),  # the mean gradient alone, which no way of taking single ones can be faster than
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure what protection against forgetting costs."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", default=",".join(METHODS), help="none: only the parts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = (
        compare_methods(arguments.methods.split(","), arguments.steps, arguments.rounds)
        if arguments.methods
        else {}
    )
    row = {"parts": compare_parts(arguments.rounds), "methods": methods}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cost.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

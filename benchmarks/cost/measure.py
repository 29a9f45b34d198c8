"""What protection costs, as ratios within one run: the methods against plain `lora`, EWC's penalty
in a step, the Fisher by hooks against a loop.

    python benchmarks/cost/measure.py benchmarks/cost [--rounds 3] [--steps 300]

Input: nothing. Output: OUT/cost.json and a table on the screen.

Each method learns its second concept of a stack (the first has no earlier one to protect) in a
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
from typing import Any

import torch

from comfy_continual_lora import fisher, pipeline, requests
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import generator_for
from comfy_continual_lora.ewc import Ewc
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.presets import METHODS
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import LearnSettings


def _learn_second(folder: str, method: str, steps: int, results: multiprocessing.Queue) -> None:
    """CPU seconds and peak memory (MiB) of learning the second concept, by stage."""
    torch.set_num_threads(1)
    checkpoint, stages = Path(folder) / f"{method}.safetensors", {}
    write_checkpoint(checkpoint)
    first, second = world.concepts("development")[:2]
    quick = LearnSettings(method=method, steps=2, fisher_samples=8)
    measured = LearnSettings(method=method, steps=steps)
    for token, concept, settings in (("V1", first, quick), ("V2", second, measured)):
        pictures = world.save_pictures(concept, Path(folder) / f"{method}-{token}")
        request = requests.LearnRequest(
            checkpoint, pictures, token, concept.noun, settings, device="cpu"
        )
        times: dict[str, list[float]] = {}

        def record(progress: Progress, times: dict[str, list[float]] = times) -> None:
            times.setdefault(progress.stage, []).append(time.process_time())

        started = time.process_time()
        pipeline.learn_concept(request, record)
        stages = {"all": time.process_time() - started}
        stages |= {stage: marks[-1] - marks[0] for stage, marks in times.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put({"seconds": stages, "mib": peak})


def compare_methods(methods: list[str], steps: int, rounds: int) -> dict[str, dict]:
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                results = context.Queue()
                arguments = (folder, method, steps, results)
                worker = context.Process(target=_learn_second, args=arguments)
                worker.start()
                runs[method].append(results.get())
                worker.join()
    plain_seconds = _median_stage(runs["lora"], "all")
    plain_memory = _median_memory(runs["lora"])
    return {
        method: {
            "seconds": round(_median_stage(own, "all"), 1),
            "of_lora": round(_median_stage(own, "all") / plain_seconds, 2),
            "memory_of_lora": round(_median_memory(own) / plain_memory, 2),
            "stages": {stage: round(_median_stage(own, stage), 1) for stage in own[0]["seconds"]},
        }
        for method, own in runs.items()
    }


def _median_stage(runs: list[dict[str, Any]], stage: str) -> float:
    return statistics.median(run["seconds"].get(stage, 0) for run in runs)


def _median_memory(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["mib"] for run in runs)


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
    inputs = fisher.FisherInputs(list(latents), "red mug", "mug", [], None)
    penalty = Ewc(1e-3, [(adapter, {k: torch.rand_like(v) for k, v in adapter.items()})])
    with attached(backbone, adapter, trainable=True) as factors:
        weights = list(factors.values())

        def batch(n: int) -> Callable[[], torch.Tensor]:
            return fisher._loss_of_batch(backbone, inputs, text, 2, n, generator_for(n))

        def plain_step() -> None:
            batch(8)().mean().backward()

        def penalty_step() -> None:
            (batch(8)().mean() + penalty(Step(factors))).backward()

        def by_hooks() -> None:
            list(fisher.per_sample_gradients(backbone, factors, batch(16), 16))

        def by_batch() -> None:
            """The mean gradient alone: no way of taking single ones can be faster."""
            batch(16)().mean().backward()

        def by_loop() -> None:
            for _ in range(16):
                torch.autograd.grad(batch(1)()[0], weights)

        steps = _median_seconds({"plain": plain_step, "penalty": penalty_step}, 5 * rounds)
        ways = _median_seconds({"hooks": by_hooks, "batch": by_batch, "loop": by_loop}, rounds)
    return {
        "penalty_step_of_plain_step": round(steps["penalty"] / steps["plain"], 3),
        "loop_of_hooks": round(ways["loop"] / ways["hooks"], 2),
        "loop_of_batch": round(ways["loop"] / ways["batch"], 2),
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
    methods = {}
    if arguments.methods:
        names = arguments.methods.split(",")
        methods = compare_methods(names, arguments.steps, arguments.rounds)
    row = {"parts": compare_parts(arguments.rounds), "methods": methods}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cost.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

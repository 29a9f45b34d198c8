r"""How long drawing with a learned LoRA takes, beside diffusers' own pipeline with the same LoRA fused.

    python benchmarks/speed/drawing.py [--jobs mini,sd15] [--rounds 9] [--threads 1] [--keep FOLDER]

Input: nothing (SD1.5 is full-size with random weights). Output: results/<date>-drawing-<job>.json:
seconds of CPU and of the clock of one batch by each way, medians over the rounds, and as shares of
diffusers' in the same round.

    beside      the LoRA computed beside each layer at every step
    folded      the LoRA folded into the weights, as `draw` does it; folding and unfolding count
    diffusers   StableDiffusionPipeline with the same modules and solver; its LoRA was fused before

All draw the same prompts from the same noise, with guidance, in turns in one process. A round that
is not counted comes first. The largest difference of their pictures from diffusers' is written, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from machine import described, write_result
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_full_size as full_size  # noqa: E402

from comfy_continual_lora.adapters.adapter import attached, folded, new_adapter  # noqa: E402
from comfy_continual_lora.checkpoint.load import load_backbone  # noqa: E402
from comfy_continual_lora.mini.weights import write_checkpoint  # noqa: E402
from comfy_continual_lora.sample import draw, make_solver  # noqa: E402
from comfy_continual_lora.settings import DrawSettings  # noqa: E402

JOBS = {  # pixels a side, pictures at once, steps
    "mini": {"size": 128, "pictures": 4, "steps": 25},
    "sd15": {"size": 128, "pictures": 1, "steps": 4},
}
RANK, PROMPT, DELTA = 16, "a photo of a mug", 0.02


@dataclass(frozen=True)
class Taken:
    """One batch: seconds of CPU and of the clock, pictures (n, 3, h, w) in -1..1."""

    cpu: float
    clock: float
    pictures: Tensor


def timed(way: Callable[[], Tensor]) -> Taken:
    cpu, clock = time.process_time(), time.perf_counter()
    pictures = way()
    return Taken(time.process_time() - cpu, time.perf_counter() - clock, pictures)


def ways(path: Path, job: dict[str, int]) -> dict[str, Callable[[], Taken]]:
    """Each draws one batch."""
    backbone, generator = load_backbone(path, device="cpu"), torch.Generator().manual_seed(0)
    adapter = {
        name: tensor + DELTA * torch.randn(tensor.shape, generator=generator)
        for name, tensor in new_adapter(backbone, RANK, generator).items()
    }
    settings = DrawSettings(steps=job["steps"], size=job["size"]).resolved(backbone.preset)
    prompts, seeds = [PROMPT] * job["pictures"], list(range(job["pictures"]))
    shape = 4, job["size"] // 8, job["size"] // 8
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    pipeline: Any = StableDiffusionPipeline(
        vae=backbone.vae,  # type: ignore[arg-type]
        text_encoder=backbone.text_encoders[0].model,  # type: ignore[arg-type]
        tokenizer=backbone.tokenizer,
        unet=backbone.unet,
        scheduler=make_solver(settings, backbone),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def ours(carried: Callable[..., Any]) -> Tensor:
        with carried(backbone, adapter):
            return draw(backbone, {}, prompts, seeds, settings)

    def theirs() -> Tensor:
        drawn = pipeline(
            prompts,
            height=job["size"],
            width=job["size"],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            latents=torch.stack(noise),
            output_type="pt",
        )
        return drawn.images * 2 - 1

    def fused_before() -> Taken:
        with folded(backbone, adapter):
            return timed(theirs)

    return {
        "beside": lambda: timed(lambda: ours(attached)),
        "folded": lambda: timed(lambda: ours(folded)),
        "diffusers": fused_before,
    }


def compare(path: Path, job: dict[str, int], rounds: int) -> dict[str, Any]:
    runs: list[dict[str, Taken]] = []
    drawing = ways(path, job)
    for _ in range(rounds + 1):
        order = list(drawing) if len(runs) % 2 else list(reversed(drawing))
        runs.append({name: drawing[name]() for name in order})
        print({name: round(one.cpu, 3) for name, one in runs[-1].items()}, flush=True)
    return {"job": job, "rounds": rounds, "ways": {name: _row(runs[1:], name) for name in drawing}}


def _row(runs: list[dict[str, Taken]], name: str) -> dict[str, Any]:
    own, theirs = [run[name] for run in runs], [run["diffusers"] for run in runs]
    pairs = list(zip(own, theirs, strict=True))
    return {
        "cpu_seconds": _spread([one.cpu for one in own]),
        "clock_seconds": _spread([one.clock for one in own]),
        "cpu_of_diffusers": _spread([one.cpu / other.cpu for one, other in pairs]),
        "clock_of_diffusers": _spread([one.clock / other.clock for one, other in pairs]),
        "largest_difference": float((own[0].pictures - theirs[0].pictures).abs().max()),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure drawing beside diffusers' pipeline.")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, help="folder for the checkpoints (deleted at the end unless given)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.jobs.split(","):
            path = (arguments.keep or Path(temporary)) / f"{name}.safetensors"
            if not path.exists():
                write_checkpoint(path) if name == "mini" else full_size.write("sd1", path)
            machine = described(arguments.threads)
            row = compare(path, JOBS[name], arguments.rounds)
            write_result(f"drawing-{name}", {"machine": machine, "rank": RANK, **row})
            print(json.dumps(row["ways"], indent=1))


if __name__ == "__main__":
    main()

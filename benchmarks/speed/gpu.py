"""How fast and how small learning is on a GPU, at the full size of SD1.5 and SDXL with random
weights.

    python benchmarks/speed/gpu.py [--jobs "sd1 bf16,sd1 diffusers"] [--keep FOLDER]

in: nothing - out: results/<date>-gpu.json. A job is a kind of checkpoint and what is done, in a
process of its own that has the GPU to itself.
A step is one of method `lora`, rank 16, one picture of 512 pixels, or 1024 with SDXL; the first
five are not counted.

    KIND [method=NAME] FORMAT...
        `learn` by that method, with that --precision and these switches: checkpointing, compile,
        channels_last. within=8 allows no more than a card of 8 GiB has, half a GiB of it for the
        driver. Seconds a step, peaks of memory up to the end of the first step (with loading and
        the VAE) and after it, what `learn --plan` promised, seconds of each stage.
    KIND diffusers
        The loop of diffusers' train_text_to_image_lora.py with peft on K and V alone, bf16. It is
        given latents and text features, so it is as fast as that loop can be.
    KIND scores
        DC scores of one picture among 16 prompts, as `scores` does by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FORMATS = (
    "fp32",
    "bf16",
    "fp16",
    "fp8",
    "bf16 checkpointing",
    "fp8 checkpointing",
    "bf16 channels_last",
)
JOBS = (
    *(
        f"{kind} {rest}"
        for kind in ("sd1", "sdxl")
        for rest in (*FORMATS, "diffusers", "diffusers checkpointing", "scores")
    ),
    *(f"sd1 method={name} bf16" for name in ("retention", "lora_ewc_dc", "lora_dsc_ewc_dc")),
    "sdxl method=retention bf16",
    "sd1 bf16 compile",
    "sd1 bf16 within=4",
    "sdxl fp8 checkpointing within=8",
    "sdxl fp8 checkpointing within=6",
)
SKIPPED, STEPS, RANK, CUDA = 5, 20, 16, "cuda"


def learned(path: Path, words: list[str], size: int) -> dict[str, Any]:
    """One concept, and by a method that protects an earlier one two, of which the second counts."""
    from comfy_continual_lora import pipeline
    from comfy_continual_lora.progress import Progress
    from comfy_continual_lora.requests import LearnRequest
    from comfy_continual_lora.settings import LearnSettings

    values = dict(word.split("=") for word in words if "=" in word)
    method = values.get("method", "lora")
    if "within" in values:
        torch.cuda.set_per_process_memory_fraction(
            (float(values["within"]) - 0.5)
            * 2**30
            / torch.cuda.get_device_properties(0).total_memory
        )
    switches: dict[str, Any] = {
        word: True for word in words if word in ("checkpointing", "compile", "channels_last")
    }
    number = next(word for word in words if word in ("fp32", "bf16", "fp16", "fp8"))
    settings = LearnSettings(
        method=method,
        steps=SKIPPED + STEPS,
        batch=1,
        rank=RANK,
        precision=number,
        snapshot_every=10**6,
        **switches,
    )
    marks: list[tuple[str, float]] = []
    before = [0]

    def see(progress: Progress) -> None:
        torch.cuda.synchronize()
        if progress.stage == "learn" and marks[-1][0] != "learn":
            before[0] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        marks.append((progress.stage, time.perf_counter()))

    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / path.name
        file.symlink_to(path)
        noise = (
            torch.rand(size // 8, size // 8, 3, generator=torch.Generator().manual_seed(0))
            .mul(255)
            .byte()
            .numpy()
        )
        Image.fromarray(noise).resize((size, size)).save(folder / "picture.png")
        asked = [
            LearnRequest(file, [folder / "picture.png"], token, "mug", settings, device=CUDA)
            for token in ("V1", "V2")[: 1 if method == "lora" else 2]
        ]
        for request in asked:
            marks[:] = [("begin", time.perf_counter())]
            planned = pipeline.plan(request)
            torch.cuda.reset_peak_memory_stats()
            pipeline.learn_concept(request, see)
        marks.append(("end", time.perf_counter()))
    steps = [b[1] - a[1] for a, b in pairwise(marks) if a[0] == b[0] == "learn"][SKIPPED - 1 :]
    stages: dict[str, float] = {}
    for (_, began), (stage, ended) in pairwise(marks):
        stages[stage] = stages.get(stage, 0.0) + ended - began
    return {
        "seconds": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "before_gib": before[0] / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "planned_gib": planned.peak / 2**30,
        "planned_seconds": [t / (SKIPPED + STEPS) for t in planned.seconds],
        "stages": stages,
    }


def diffusers(path: Path, words: list[str], size: int) -> dict[str, Any]:
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    from comfy_continual_lora.checkpoint.backbone import KV_MODULES
    from comfy_continual_lora.checkpoint.load import load_backbone

    unet = load_backbone(path, device=CUDA, precision="bf16").unet  # the same modules and weights
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=KV_MODULES)
    )
    lora = [p for p in unet.parameters() if p.requires_grad]
    for p in lora:
        p.data = p.data.float()
    if "checkpointing" in words:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(lora, lr=1e-4, weight_decay=1e-2)
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    latents = torch.randn(1, 4, size // 8, size // 8, device=CUDA)
    features = torch.randn(
        1, 77, unet.config["cross_attention_dim"], device=CUDA, dtype=torch.bfloat16
    )
    added = None
    if unet.config["addition_embed_type"]:
        sizes = torch.tensor([[size, size, 0, 0, size, size]], device=CUDA)
        added = {
            "text_embeds": torch.randn(1, 1280, device=CUDA, dtype=torch.bfloat16),
            "time_ids": sizes,
        }
    unet.train()
    marks = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(SKIPPED + STEPS):
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=CUDA)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(CUDA, torch.bfloat16):
            predicted = unet(
                noisy.bfloat16(), timesteps, features, added_cond_kwargs=added, return_dict=False
            )[0]
        loss = F.mse_loss(predicted.float(), noise, reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    steps = [b - a for a, b in pairwise(marks)][SKIPPED - 1 :]
    return {
        "seconds": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def scores(path: Path, _words: list[str], size: int) -> dict[str, Any]:
    from comfy_continual_lora.checkpoint.backbone import FrozenText
    from comfy_continual_lora.checkpoint.load import load_backbone
    from comfy_continual_lora.classifier import classify
    from comfy_continual_lora.settings import ScoreSettings
    from comfy_continual_lora.textspace import THINGS

    backbone = load_backbone(path, device=CUDA, precision="auto")
    prompts = [f"a photo of a {thing}" for thing in THINGS[:16]]
    features = dict(zip(prompts, FrozenText(backbone, {})(prompts), strict=True))
    latent, taken = torch.randn(4, size // 8, size // 8, device=CUDA), []
    for seed in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = classify(backbone, latent, features, 1e-3, ScoreSettings(seed=seed))
        taken.append(time.perf_counter() - began)
    calls = sum(result.trials)
    return {
        "seconds": statistics.median(taken[1:]),
        "calls": calls,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure learning at full size on a GPU.")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the checkpoints (deleted at the end where none is given)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-gpu.json",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, *words = arguments.one.split()
        work = {"diffusers": diffusers, "scores": scores}.get(words[0], learned)
        print(
            json.dumps(
                work(
                    arguments.keep.resolve() / f"{kind}.safetensors",
                    words,
                    1024 if kind == "sdxl" else 512,
                )
            )
        )
        return
    import helpers_full_size as full_size

    card = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "card": card.name,
        "gib": card.total_memory / 2**30,
        "rank": RANK,
        "steps": STEPS,
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "peft")
        },
        "jobs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        keep = arguments.keep or Path(folder)
        for job in arguments.jobs.split(","):
            path = keep / f"{job.split()[0]}.safetensors"
            if not path.exists():
                full_size.write(job.split()[0], path)
            done = subprocess.run(
                [sys.executable, __file__, "--one", job, "--keep", str(keep)],
                capture_output=True,
                text=True,
            )
            row = (
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else {"failed": done.stderr.strip().splitlines()[-1]}
            )
            found["jobs"][job] = row
            print(job, row, flush=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

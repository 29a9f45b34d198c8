"""How fast and how small learning is on a GPU, at the full size of SD1.5 and SDXL with random
weights.

    python benchmarks/speed/gpu.py [--jobs "sd1 bf16,sd1 diffusers"] [--keep FOLDER]

Input: nothing. Output: results/<date>-gpu.json.

A job is a kind of checkpoint and what is done, in a process of its own that has the GPU to itself.
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
AT_BOTH_SIZES = (*FORMATS, "diffusers", "diffusers checkpointing", "scores")
JOBS = (
    *(f"sd1 {work}" for work in AT_BOTH_SIZES),
    *(f"sdxl {work}" for work in AT_BOTH_SIZES),
    *(f"sd1 method={name} bf16" for name in ("retention", "lora_ewc_dc", "lora_dsc_ewc_dc")),
    "sdxl method=retention bf16",
    "sd1 bf16 compile",
    "sd1 bf16 within=4",
    "sdxl fp8 checkpointing within=8",
    "sdxl fp8 checkpointing within=6",
)
SKIPPED, STEPS = 5, 20
RANK = 16
CUDA = "cuda"
GIB = 2**30


def learned(path: Path, words: list[str], size: int) -> dict[str, Any]:
    """One concept, and by a method that protects an earlier one two, of which the second counts."""
    from comfy_continual_lora import pipeline
    from comfy_continual_lora.progress import Progress
    from comfy_continual_lora.requests import LearnRequest
    from comfy_continual_lora.settings import LearnSettings

    values = dict(word.split("=") for word in words if "=" in word)
    method = values.get("method", "lora")
    if "within" in values:
        _limit_memory(float(values["within"]) - 0.5)
    switches: dict[str, Any] = {
        word: True for word in words if word in ("checkpointing", "compile", "channels_last")
    }
    precision = next(word for word in words if word in ("fp32", "bf16", "fp16", "fp8"))
    settings = LearnSettings(
        method=method,
        steps=SKIPPED + STEPS,
        batch=1,
        rank=RANK,
        precision=precision,
        snapshot_every=10**6,
        **switches,
    )
    marks: list[tuple[str, float]] = []
    peak_before = 0  # of the learning

    def record(progress: Progress) -> None:
        nonlocal peak_before
        torch.cuda.synchronize()
        if progress.stage == "learn" and marks[-1][0] != "learn":
            peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        marks.append((progress.stage, time.perf_counter()))

    with tempfile.TemporaryDirectory() as name:
        checkpoint, picture = Path(name) / path.name, Path(name) / "picture.png"
        checkpoint.symlink_to(path)
        _noise(size).save(picture)
        for token in ("V1",) if method == "lora" else ("V1", "V2"):
            request = LearnRequest(checkpoint, [picture], token, "mug", settings, device=CUDA)
            marks[:] = [("begin", time.perf_counter())]
            planned = pipeline.plan(request)
            torch.cuda.reset_peak_memory_stats()
            pipeline.learn_concept(request, record)
        marks.append(("end", time.perf_counter()))
    steps = [b[1] - a[1] for a, b in pairwise(marks) if a[0] == b[0] == "learn"][SKIPPED - 1 :]
    stages: dict[str, float] = {}
    for (_, began), (stage, ended) in pairwise(marks):
        stages[stage] = stages.get(stage, 0.0) + ended - began
    return {
        "seconds": statistics.median(steps),
        "spread": [min(steps), max(steps)],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "before_gib": peak_before / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "planned_gib": planned.peak / GIB,
        "planned_seconds": [seconds / (SKIPPED + STEPS) for seconds in planned.seconds],
        "stages": stages,
    }


def _limit_memory(gib: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)


def _noise(size: int) -> Image.Image:
    shape = (size // 8, size // 8, 3)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    return Image.fromarray(pixels.numpy()).resize((size, size))


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
    marks: list[float] = []
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
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
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
    latent = torch.randn(4, size // 8, size // 8, device=CUDA)
    seconds = []
    for seed in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = classify(backbone, latent, features, 1e-3, ScoreSettings(seed=seed))
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds[1:]),
        "calls": sum(result.trials),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def run_job(job: str, folder: Path) -> dict[str, Any]:
    """The figures of one job, measured in this process."""
    kind, *words = job.split()
    work = {"diffusers": diffusers, "scores": scores}.get(words[0], learned)
    checkpoint = folder.resolve() / f"{kind}.safetensors"
    return work(checkpoint, words, 1024 if kind == "sdxl" else 512)


def run_in_process(job: str, folder: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, __file__, "--one", job, "--keep", str(folder)],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def run_all(jobs: list[str], folder: Path, out: Path) -> None:
    import helpers_full_size as full_size

    card = torch.cuda.get_device_properties(0)
    packages = ("torch", "diffusers", "transformers", "peft")
    results: dict[str, Any] = {
        "card": card.name,
        "gib": card.total_memory / GIB,
        "rank": RANK,
        "steps": STEPS,
        "versions": {name: version(name) for name in packages},
        "jobs": {},
    }
    for job in jobs:
        kind = job.split()[0]
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            full_size.write(kind, path)
        row = run_in_process(job, folder)
        results["jobs"][job] = row
        print(job, row, flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure learning at full size on a GPU.")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument(
        "--keep", type=Path, help="folder for the checkpoints (deleted at the end unless given)"
    )
    out = Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-gpu.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_job(arguments.one, arguments.keep)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run_all(arguments.jobs.split(","), arguments.keep or Path(folder), arguments.out)


if __name__ == "__main__":
    main()

"""How fast and how small is a step, beside others' on the same machine, checkpoint, batch and
number format; and how many calls a DC decision takes.

    python benchmarks/speed/run.py [--checkpoints mini,sd15] [--peers ours,kohya] [--rounds 3]
    [--threads 1] [--keep FOLDER]

in: nothing (SD1.5 is full-size with random weights; others' programs are found where PROGRAMS says,
each with its own venv or .venv) -
out: results/<date>-<checkpoint>.json, and -scores.json.

Peers, one process each, in turns, so that noise of the machine meets all; the first steps of each
are not counted:

    ours              `learn --method lora`: latents kept, the word learns too, so the text encoder
    is gone through forward and back
    ours compiled     the same with --compile; the compiling, in the first step, is not counted
    diffusers         the loop of diffusers' train_text_to_image_lora.py, LoRA on K and V of
    cross-attention alone: pictures and prompts encoded again
    diffusers cached  the same with latents and text features computed once: as fast as that loop
    could be
    comfyui           the Train LoRA node of a real ComfyUI with gradient checkpointing off: it
    trains every layer and bias, nothing else can be asked
    kohya             train_network.py of kohya-ss/sd-scripts with networks.lora, the U-Net alone,
    latents kept: it trains every linear layer and 1x1
                      convolution of the transformer blocks. It can't keep the text features of an
                      SD1, so the text encoder is gone through forward
    kohya kv          the same on K and V of cross-attention alone: no option names layers, but
    --dim_from_weights takes those that a given LoRA
                      has, and one of K and V is written for it

SD1's shape is written into sd-scripts as constants, and it knows no VAE but the large one. For the
mini-SD the constants are set to that net's, and a
small VAE with random weights stands in; it is used once, before the steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PEERS = ("ours", "ours compiled", "diffusers", "diffusers cached", "comfyui", "kohya", "kohya kv")
# what it is, the variable that says where, where else it is looked for in the home folder, a file
# it is known by
PROGRAMS = {
    "comfyui": ("ComfyUI", "COMFYUI_PATH", "comfy/ComfyUI", "main.py"),
    "kohya": ("sd-scripts", "KOHYA_PATH", "sd-scripts", "train_network.py"),
    "published": (
        "Diffusion Classifier",
        "DIFFUSION_CLASSIFIER_PATH",
        "diffusion-classifier",
        "eval_prob_adaptive.py",
    ),
}
JOBS = {  # pixels a side, pictures a step, steps that are not counted, steps that are
    "mini": {"size": 128, "batch": 4, "skipped": 3, "steps": 10},
    "sd15": {"size": 128, "batch": 1, "skipped": 1, "steps": 4},
}
RANK, PROMPT = 16, "a photo of a V1 mug"


# --- one peer, in a process of its own
# --------------------------------------------------------------------------------------------------


def _status(name: str) -> int:
    """Bytes, as Linux tells them of this process."""
    return 1024 * next(
        int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)
    )


class Meter:
    """Seconds of CPU and of the clock between two steps, and the peak of memory over all, less what
    the imports took.
    """

    def __init__(self, skipped: int) -> None:
        self.skipped, self.before, self.marks = skipped, _status("VmRSS"), []

    def begin(self) -> None:
        """The model is loaded; what loading took does not count."""
        Path("/proc/self/clear_refs").write_text("5")
        self.marks.append((time.process_time(), time.perf_counter()))

    def step(self, *_: object, **__: object) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def read(self) -> dict[str, float]:
        steps = [
            (b[0] - a[0], b[1] - a[1]) for a, b in zip(self.marks, self.marks[1:], strict=False)
        ][self.skipped :]
        cpu, clock = (statistics.median(s) for s in zip(*steps, strict=True))
        return {
            "cpu_seconds": cpu,
            "clock_seconds": clock,
            "peak_mib": (_status("VmHWM") - self.before) / 2**20,
        }


def ours(path: str, job: dict[str, int], compile: bool = False) -> dict[str, float]:
    import torch

    from comfy_continual_lora.adapters.adapter import new_adapter
    from comfy_continual_lora.checkpoint.load import load_backbone
    from comfy_continual_lora.learn import TrainingInputs, learn
    from comfy_continual_lora.settings import LearnSettings

    meter = Meter(job["skipped"])
    backbone, generator = load_backbone(path, device="cpu"), torch.Generator().manual_seed(0)
    steps = job["skipped"] + job["steps"]
    settings = LearnSettings(
        method="lora",
        rank=RANK,
        batch=job["batch"],
        steps=steps,
        precision="fp32",
        compile=compile,
        snapshot_every=steps + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        latents = backbone.encode_images(_pictures(job))
        word, adapter = (
            backbone.word_start("mug", generator),
            new_adapter(backbone, RANK, generator),
        )
        meter.begin()
        learn(
            backbone,
            TrainingInputs(latents, [[PROMPT]], "V1", {}, adapter, word),
            settings.resolved("sd1"),
            Path(folder) / "snapshot",
            meter.step,
        )
    return meter.read()


def diffusers(path: str, job: dict[str, int], cached: bool = False) -> dict[str, float]:
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    from comfy_continual_lora.checkpoint.backbone import KV_MODULES
    from comfy_continual_lora.checkpoint.load import load_backbone

    meter = Meter(job["skipped"])
    loaded = load_backbone(path, device="cpu")  # the same modules and weights
    unet, text, tokenizer = loaded.unet, loaded.text_encoders[0].model, loaded.tokenizer
    vae: Any = loaded.vae
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=KV_MODULES)
    )
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    pictures = _pictures(job)
    ids = tokenizer(
        [PROMPT] * job["batch"],
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    ).input_ids

    def encoded() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            found = vae.encode(pictures)
            latents = found.latents if hasattr(found, "latents") else found.latent_dist.sample()
            return latents * vae.config["scaling_factor"], text(ids, return_dict=False)[0]

    kept = encoded()
    meter.begin()
    unet.train()
    for _ in range(job["skipped"] + job["steps"]):
        latents, features = kept if cached else encoded()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),)).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(
            unet(noisy, timesteps, features, return_dict=False)[0].float(),
            noise.float(),
            reduction="mean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        loss.item()
        meter.step()
    return meter.read()


def comfyui(path: str, job: dict[str, int]) -> dict[str, float]:
    """Runs in ComfyUI's own Python, in its folder."""
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, os.getcwd())
    import comfy.options  # pyright: ignore[reportMissingImports]

    comfy.options.enable_args_parsing()
    import comfy.sd  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]
    import torch
    from comfy_extras.nodes_train import TrainLoraNode  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    meter = Meter(job["skipped"] + 1)  # its progress bar says 0 first
    with torch.inference_mode():  # as ComfyUI runs its nodes
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True
        )
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
        latents = vae.encode((_pictures(job).movedim(1, -1) + 1) / 2)
    comfy.utils.set_progress_bar_global_hook(meter.step)
    meter.begin()
    values = {
        "model": model,
        "latents": {"samples": latents},
        "positive": positive,
        "batch_size": job["batch"],
        "grad_accumulation_steps": 1,
        "steps": job["skipped"] + job["steps"],
        "learning_rate": 1e-4,
        "rank": RANK,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    with torch.inference_mode():
        TrainLoraNode.execute(**{name: [value] for name, value in values.items()})
    return meter.read()


def kohya(path: str, job: dict[str, int], kv: bool = False) -> dict[str, float]:
    """Runs in the Python of sd-scripts, in its folder."""
    sys.path.insert(0, os.getcwd())
    import train_network  # pyright: ignore[reportMissingImports]
    from diffusers import AutoencoderKL
    from library import model_util, original_unet  # pyright: ignore[reportMissingImports]
    from PIL import Image

    meter, steps = Meter(job["skipped"]), job["skipped"] + job["steps"]

    class Bar(train_network.tqdm):
        """Its progress bar begins when everything is loaded, and moves after every step."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            meter.begin()

        def update(self, n: float | None = 1) -> bool | None:
            meter.step()
            return super().update(n)

    train_network.tqdm = Bar
    if Path(path).stem == "mini":
        original_unet.BLOCK_OUT_CHANNELS = (320, 960)
        original_unet.DOWN_BLOCK_TYPES, original_unet.UP_BLOCK_TYPES = (
            ["CrossAttnDownBlock2D"] * 2,
            ["CrossAttnUpBlock2D"] * 2,
        )
        (
            original_unet.LAYERS_PER_BLOCK,
            original_unet.LAYERS_PER_BLOCK_UP,
            model_util.UNET_PARAMS_NUM_RES_BLOCKS,
        ) = 1, 2, 1
        model_util.VAE_PARAMS_CH = 32
        model_util.convert_ldm_vae_checkpoint = lambda _, config: AutoencoderKL(
            **config
        ).state_dict()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, tokenizer = (
            folder / "pictures" / f"{steps}_{PROMPT}",
            folder / "openai_clip-vit-large-patch14",
        )  # names it expects
        pictures.mkdir(parents=True)
        for number, picture in enumerate(_pictures(job)):
            Image.fromarray(((picture.movedim(0, -1) + 1) * 127.5).byte().numpy()).save(
                pictures / f"{number}.png"
            )
        tokenizer.symlink_to(ROOT / "comfy_continual_lora" / "checkpoint" / "tokenizer")
        options = [
            f"--pretrained_model_name_or_path={path}",
            f"--tokenizer_cache_dir={folder}",
            f"--train_data_dir={pictures.parent}",
            f"--resolution={job['size']}",
            f"--train_batch_size={job['batch']}",
            f"--max_train_steps={steps}",
            "--max_data_loader_n_workers=0",
            "--cache_latents",
            "--network_module=networks.lora",
            f"--network_dim={RANK}",
            f"--network_alpha={RANK}",
            "--network_train_unet_only",
            "--optimizer_type=AdamW",
            "--learning_rate=1e-4",
            "--mixed_precision=no",
            "--sdpa",
            "--seed=0",
            f"--output_dir={folder}",
        ]
        if kv:
            _kohya_kv(folder / "kv.safetensors")
            options += [f"--network_weights={folder / 'kv.safetensors'}", "--dim_from_weights"]
        arguments = train_network.setup_parser().parse_args(options)
        train_network.train_util.verify_command_line_training_args(arguments)
        train_network.NetworkTrainer().train(arguments)
    return meter.read()


def _kohya_kv(path: Path) -> None:
    """Write a LoRA of K and V that changes nothing yet, under sd-scripts' names."""
    import torch
    from library import model_util, original_unet  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = original_unet.UNet2DConditionModel(**model_util.create_unet_diffusers_config(False))
    lora = {}
    for name, layer in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            name = f"lora_unet_{name.replace('.', '_')}"
            lora[f"{name}.lora_down.weight"] = torch.randn(RANK, layer.in_features) / RANK
            lora[f"{name}.lora_up.weight"] = torch.zeros(layer.out_features, RANK)
            lora[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(lora, path)


def _pictures(job: dict[str, int]) -> Any:
    import torch

    return (
        torch.rand(
            (job["batch"], 3, job["size"], job["size"]), generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )


# --- DC scores
# --------------------------------------------------------------------------------------------------


Way = Callable[
    [Any, int], tuple[str, int]
]  # latent (4, h, w), its number -> what it is, and how often the net was asked about one prompt


def scores(path: Path, pictures: int, trials: int) -> dict[str, Any]:
    """Which of the world's 16 things is in a picture? Ours, on all trials and with staged
    elimination on the same draws; the published program.
    """
    import numpy as np
    import torch

    from comfy_continual_lora.checkpoint.backbone import FrozenText
    from comfy_continual_lora.checkpoint.load import load_backbone
    from comfy_continual_lora.classifier import classify
    from comfy_continual_lora.mini import world
    from comfy_continual_lora.settings import ScoreSettings

    backbone, rng = load_backbone(path, device="cpu"), np.random.default_rng(7)
    scenes = [world.random_scene(rng, 1) for _ in range(pictures)]
    drawn = (
        torch.from_numpy(np.stack([world.draw_scene(scene, rng) for scene in scenes]))
        .permute(0, 3, 1, 2)
        .float()
        .div(127.5)
        .sub(1)
    )
    latents, names = backbone.encode_images(drawn), list(world.SHAPES)
    features = dict(
        zip(
            names, FrozenText(backbone, {})([f"a photo of a {name}" for name in names]), strict=True
        )
    )

    def ours_in(stages: int, trials: int = trials) -> Way:
        def way(latent: Any, number: int) -> tuple[str, int]:
            said = classify(
                backbone,
                latent,
                features,
                1e-3,
                ScoreSettings(trials=trials, stages=stages, seed=number),
            )
            return said.best, sum(said.trials)

        return way

    ways, failed = (
        {
            "all prompts": ours_in(1),
            "2 stages": ours_in(2),
            "3 stages": ours_in(3),
            "all stages": ours_in(16),
        },
        {},
    )
    ways |= {
        "all stages, half the trials": ours_in(16, trials // 2),
        "all stages, a quarter": ours_in(16, trials // 4),
    }
    try:
        ways |= _published(backbone.unet, features, trials)
    except FileNotFoundError as error:
        failed["published"] = {"failed": str(error)}
    found: dict[str, dict[str, list]] = {
        name: {"best": [], "calls": [], "cpu": []} for name in ways
    }
    for number, latent in enumerate(latents):
        for name, way in ways.items():
            started = time.process_time()
            best, calls = way(latent, number)
            found[name]["cpu"].append(time.process_time() - started)
            found[name]["best"].append(best)
            found[name]["calls"].append(calls)
    truth, full = [scene.things[0].look.shape for scene in scenes], found["all prompts"]
    return {
        "pictures": pictures,
        "prompts": len(names),
        "trials": trials,
        "ways": failed
        | {
            name: {
                "calls_a_picture": statistics.mean(way["calls"]),
                "of_all_prompts": statistics.mean(way["calls"]) / statistics.mean(full["calls"]),
                "calls_a_cpu_second": sum(way["calls"]) / sum(way["cpu"]),
                "right": sum(a == b for a, b in zip(way["best"], truth, strict=True)) / pictures,
                "as_all_prompts": sum(
                    a == b for a, b in zip(way["best"], full["best"], strict=True)
                )
                / pictures,
            }
            for name, way in found.items()
        },
    }


def _published(unet: Any, features: dict[str, Any], trials: int) -> dict[str, Way]:
    """`eval_prob_adaptive` of diffusion-classifier/diffusion-classifier on our net and prompts (77,
    d), at its own timesteps and with our seeds.

    Adaptive: five prompts are left after a tenth of the trials, as in its commands for CIFAR-10 and
    Pets (10 and 37 prompts); with its usual squared
    error, and with the absolute one that those commands ask for. Its file is taken as it is, its
    `device` set to the CPU. Stood in for while it is
    imported, as nothing here calls them: torchvision, pandas and the program's own data sets.
    """
    from unittest.mock import MagicMock, patch

    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline  # noqa: F401 - what it imports must have come before the stand-ins

    absent = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "pandas",
        "diffusion.datasets",
    )
    path = [str(_checkout("published")), *sys.path]
    with (
        patch.dict(sys.modules, {name: MagicMock() for name in absent}),
        patch.object(sys, "path", path),
    ):
        program: Any = importlib.import_module("eval_prob_adaptive")
    program.device = "cpu"
    prompts, names = torch.stack(list(features.values())), list(features)

    def its(n_samples: list[int], to_keep: list[int], loss: str) -> Way:
        settings = {
            "n_samples": n_samples,
            "to_keep": to_keep,
            "loss": loss,
            "n_trials": 1,
            "batch_size": 32,
        }
        arguments = argparse.Namespace(version="1-5", dtype="float32", **settings)
        scheduler = EulerDiscreteScheduler.from_config(program.get_scheduler_config(arguments))

        def way(latent: Any, number: int) -> tuple[str, int]:
            noise = torch.randn(
                (trials, *latent.shape), generator=torch.Generator().manual_seed(number)
            )
            best, data = program.eval_prob_adaptive(
                unet, latent[None], prompts, scheduler, arguments, all_noise=noise
            )
            return names[best], sum(len(one["pred_errors"]) for one in data.values())

        return way

    tenth = [max(1, trials // 10), trials]
    return {
        "published": its([trials], [1], "l2"),
        "published adaptive": its(tenth, [5, 1], "l2"),
        "published adaptive l1": its(tenth, [5, 1], "l1"),
    }


# --- in turns
# --------------------------------------------------------------------------------------------------


def _checkout(program: str) -> Path:
    """Where somebody else's program is; FileNotFoundError where it is not."""
    spoken, variable, usual, known_by = PROGRAMS[program]
    path = Path(os.environ.get(variable) or Path.home() / usual)
    if not (path / known_by).exists():
        raise FileNotFoundError(f"no {spoken} at {variable} or ~/{usual}")
    return path.resolve()


def _ask(peer: str, path: Path, name: str, threads: int) -> dict[str, Any]:
    from helpers_comfyui import python_of

    program = peer.removesuffix(" kv")
    try:
        host = _checkout(program) if program in PROGRAMS else None
    except FileNotFoundError as error:
        return {"failed": str(error)}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        python_of(host) if host else sys.executable,
        str(Path(__file__).resolve()),
        "--peer",
        peer,
        "--job",
        name,
    ]
    done = subprocess.run(
        [*command, "--keep", str(path.resolve())],
        capture_output=True,
        text=True,
        cwd=host or ROOT,
        env=environment,
    )
    return (
        json.loads(done.stdout.splitlines()[-1])
        if done.returncode == 0
        else {"failed": done.stderr.strip().splitlines()[-1]}
    )


def compare(name: str, path: Path, peers: list[str], rounds: int, threads: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            runs[peer].append(_ask(peer, path, name, threads))
            print(name, peer, runs[peer][-1], flush=True)
    table = {}
    for peer, all_runs in runs.items():
        good = [run for run in all_runs if "failed" not in run]
        if not good:
            table[peer] = all_runs[0]
            continue
        table[peer] = {
            key: {
                "median": statistics.median(r[key] for r in good),
                "spread": [min(r[key] for r in good), max(r[key] for r in good)],
            }
            for key in good[0]
        }
    measured = {peer: row for peer, row in table.items() if "failed" not in row}
    others = [row for peer, row in measured.items() if not peer.startswith("ours")]
    of_best = {}
    if "ours" in measured and others:
        of_best = {
            key: table["ours"][key]["median"] / min(row[key]["median"] for row in others)
            for key in ("cpu_seconds", "peak_mib")
        }
    return {
        "checkpoint": name,
        "job": JOBS[name],
        "rank": RANK,
        "format": "fp32",
        "rounds": rounds,
        "peers": table,
        "ours_of_best_peer": of_best,
    }


def _machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "peft")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a step and a DC decision beside others'.")
    parser.add_argument("--checkpoints", default="mini,sd15")
    parser.add_argument("--peers", default=",".join(PEERS), help="whose steps are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--pictures", type=int, default=24, help="pictures the DC scores judge; 0: none"
    )
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the checkpoints (deleted at the end where none is given)",
    )
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    peers = arguments.peers.split(",")
    if not {"ours"} < set(peers) - {"ours compiled"} <= set(PEERS):
        parser.error(
            f"--peers is {arguments.peers!r}; ours and at least one more of "
            f"{', '.join(PEERS[2:])} are needed"
        )
    if arguments.peer:
        work = {
            "ours": ours,
            "ours compiled": partial(ours, compile=True),
            "diffusers": diffusers,
            "diffusers cached": partial(diffusers, cached=True),
            "comfyui": comfyui,
            "kohya": kohya,
            "kohya kv": partial(kohya, kv=True),
        }[arguments.peer]
        if arguments.peer != "comfyui":
            import torch

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(work(str(arguments.keep), JOBS[arguments.job])))
        return
    import helpers_full_size as full_size
    import torch

    from comfy_continual_lora.mini.weights import write_checkpoint

    def measure(folder: Path) -> None:
        machine, out = _machine(arguments.threads), Path(__file__).parent / "results"
        out.mkdir(exist_ok=True)
        for name in filter(None, arguments.checkpoints.split(",")):
            path = folder / f"{name}.safetensors"
            if not path.exists():
                write_checkpoint(path, stock=True) if name == "mini" else full_size.write(
                    "sd1", path
                )
            row = {
                "machine": machine,
                **compare(name, path, peers, arguments.rounds, arguments.threads),
            }
            (out / f"{time.strftime('%Y-%m-%d')}-{name}.json").write_text(
                json.dumps(row, indent=1) + "\n"
            )
        if arguments.pictures:
            torch.set_num_threads(arguments.threads)
            write_checkpoint(folder / "small.safetensors")
            row = {
                "machine": machine,
                **scores(folder / "small.safetensors", arguments.pictures, arguments.trials),
            }
            (out / f"{time.strftime('%Y-%m-%d')}-scores.json").write_text(
                json.dumps(row, indent=1) + "\n"
            )
            print(json.dumps(row["ways"], indent=1))

    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.keep or Path(folder))


if __name__ == "__main__":
    main()

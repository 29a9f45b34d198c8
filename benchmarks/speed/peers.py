"""One peer's steps, in a process of its own: `python peers.py PEER JOB CHECKPOINT` prints a line of
JSON. run.py starts it, in the other program's Python and folder where it has one.

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
                      latents kept: it trains every linear layer and 1x1 convolution of the
                      transformer blocks. It can't keep the text features of an SD1, so the text
                      encoder is gone through forward
    kohya kv          the same on K and V of cross-attention alone: no option names layers, but
                      --dim_from_weights takes those that a given LoRA has, and one of K and V is
                      written for it

SD1's shape is written into sd-scripts as constants, and it knows no VAE but the large one. For the
mini-SD the constants are set to that net's, and a small VAE with random weights stands in; it is
used once, before the steps.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
JOBS = {  # pixels a side, pictures a step, steps that are not counted, steps that are
    "mini": {"size": 128, "batch": 4, "skipped": 3, "steps": 10},
    "sd15": {"size": 128, "batch": 1, "skipped": 1, "steps": 4},
}
RANK, PROMPT = 16, "a photo of a V1 mug"


def _status(name: str) -> int:
    """Bytes of memory of this process, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Meter:
    """Seconds of CPU and of the clock between two steps, and the peak of memory over all, less what
    the imports took.
    """

    def __init__(self, skipped: int) -> None:
        self.skipped, self.before = skipped, _status("VmRSS")
        self.marks: list[tuple[float, float]] = []  # CPU and clock

    def begin(self) -> None:
        """The model is loaded; what loading took does not count."""
        Path("/proc/self/clear_refs").write_text("5")
        self.marks.append((time.process_time(), time.perf_counter()))

    def step(self, *_: object, **__: object) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def read(self) -> dict[str, float]:
        cpu, clock = (
            statistics.median([end - start for start, end in pairwise(times)][self.skipped :])
            for times in zip(*self.marks, strict=True)
        )
        peak = (_status("VmHWM") - self.before) / 2**20
        return {"cpu_seconds": cpu, "clock_seconds": clock, "peak_mib": peak}


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
    ).resolved("sd1")
    with tempfile.TemporaryDirectory() as folder:
        latents = backbone.encode_images(_pictures(job))
        word = backbone.word_start("mug", generator)
        adapter = new_adapter(backbone, RANK, generator)
        inputs = TrainingInputs(latents, [[PROMPT]], "V1", {}, adapter, word)
        meter.begin()
        learn(backbone, inputs, settings, Path(folder) / "snapshot", meter.step)
    return meter.read()


def diffusers(path: str, job: dict[str, int], cached: bool = False) -> dict[str, float]:
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    from comfy_continual_lora.checkpoint.backbone import KV_MODULES
    from comfy_continual_lora.checkpoint.load import load_backbone
    from comfy_continual_lora.checkpoint.stable import StableBackbone

    meter = Meter(job["skipped"])
    loaded = load_backbone(path, device="cpu")  # the same modules and weights
    assert isinstance(loaded, StableBackbone)
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
            output = vae.encode(pictures)
            latents = output.latents if hasattr(output, "latents") else output.latent_dist.sample()
            return latents * vae.config["scaling_factor"], text(ids, return_dict=False)[0]

    kept = encoded()
    meter.begin()
    unet.train()
    for _ in range(job["skipped"] + job["steps"]):
        latents, features = kept if cached else encoded()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),)).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, features, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
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
    meter = Meter(job["skipped"] + 1)  # its progress bar shows 0 first
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

    def random_vae(_: Any, config: dict[str, Any]) -> dict[str, Any]:
        return AutoencoderKL(**config).state_dict()

    train_network.tqdm = Bar
    if Path(path).stem == "mini":
        original_unet.BLOCK_OUT_CHANNELS = (320, 960)
        original_unet.DOWN_BLOCK_TYPES = ["CrossAttnDownBlock2D"] * 2
        original_unet.UP_BLOCK_TYPES = ["CrossAttnUpBlock2D"] * 2
        original_unet.LAYERS_PER_BLOCK = 1
        original_unet.LAYERS_PER_BLOCK_UP = 2
        model_util.UNET_PARAMS_NUM_RES_BLOCKS = 1
        model_util.VAE_PARAMS_CH = 32
        model_util.convert_ldm_vae_checkpoint = random_vae
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # names it expects
        pictures = folder / "pictures" / f"{steps}_{PROMPT}"
        tokenizer = folder / "openai_clip-vit-large-patch14"
        pictures.mkdir(parents=True)
        for number, picture in enumerate(_pictures(job)):
            pixels = ((picture.movedim(0, -1) + 1) * 127.5).byte().numpy()
            Image.fromarray(pixels).save(pictures / f"{number}.png")
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

    shape = (job["batch"], 3, job["size"], job["size"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


PEERS = {
    "ours": ours,
    "ours compiled": partial(ours, compile=True),
    "diffusers": diffusers,
    "diffusers cached": partial(diffusers, cached=True),
    "comfyui": comfyui,
    "kohya": kohya,
    "kohya kv": partial(kohya, kv=True),
}


def main(peer: str, job: str, checkpoint: str) -> None:
    if peer != "comfyui":  # which reads the arguments first
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(PEERS[peer](checkpoint, JOBS[job])))


if __name__ == "__main__":
    main(*sys.argv[1:])

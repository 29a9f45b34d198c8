"""A narrow Anima in the real ComfyUI: text, pictures, the net's answer and what is drawn, with the
exported LoRA and without it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import helpers_anima as anima
import pytest
import torch
from helpers_comfyui import find_comfyui, python_of
from helpers_learn import learn_request, random_adapter, stack_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_continual_lora import pipeline, requests, sample
from comfy_continual_lora.adapters.adapter import Adapter, folded
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.stack import CheckpointInfo
from comfy_continual_lora.stock import kohya_lora

COMFYUI = find_comfyui()
PROMPTS = {
    "plain": "a photo of a V1 plushie, best quality",
    "empty": "",
    "weighted": "a (red:1.3) V1 plushie on grass, ((masterpiece))",
    "long": "a photo of a V1 plushie, " * 30,
    "longer than 512 tokens": "a (red:1.3) dog, " * 150,
    "BREAK": "a red V1 plushie BREAK on grass",
}
TIMESTEPS = torch.tensor([20, 500, 900])
STEPS = 4
IN_COMFYUI = """
import json, sys
folder, net_file, text_file, vae_file, layers, steps, *flags = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--fp32-vae", *flags]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import samplers, sd, utils
from comfy.k_diffusion import sampling
from safetensors.torch import load_file, save_file
asked, answers = load_file(f"{folder}/asked.safetensors"), {}
options = {"qwen3_06b_model_config": {"num_hidden_layers": int(layers)}}
clip = sd.load_clip([text_file], model_options=options)
plain = sd.load_diffusion_model(net_file)
vae = sd.VAE(sd=utils.load_torch_file(vae_file))
lora = load_file(f"{folder}/lora.safetensors")
patched, _ = sd.load_lora_for_models(plain, None, lora, 1.0, 0.0)
answers["patches"] = torch.tensor(len(patched.patches))
with torch.inference_mode():
    picture = asked["picture"].movedim(1, -1) / 2 + 0.5
    latent = vae.encode(picture)
    answers["latent"] = plain.model.process_latent_in(latent).squeeze(2)
    decoded = vae.decode(plain.model.process_latent_out(answers["latent"][:, :, None]))
    answers["decoded"] = decoded.reshape(picture.shape).movedim(-1, 1) * 2 - 1
    for name, prompt in json.loads(open(f"{folder}/prompts.json").read()).items():
        ((features, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        conds = plain.model.extra_conds(
            cross_attn=features,
            t5xxl_ids=more["t5xxl_ids"],
            t5xxl_weights=more["t5xxl_weights"],
            device=torch.device("cpu"),
            noise=asked["noisy"],
        )
        answers[name] = conds["c_crossattn"].cond
    for kind, patcher in (("bare", plain), ("lora", patched)):
        patcher.patch_model()
        net = patcher.model

        def denoised(x, sigma, **_):
            context = answers["plain"].expand(len(x), -1, -1)
            return net.apply_model(x, sigma, c_crossattn=context)

        noisy, sigma = asked["noisy"][:, :, None], asked["sigma"]
        denoise = denoised(noisy, sigma)
        answers[f"{kind} answer"] = ((noisy - denoise) / sigma.view(-1, 1, 1, 1, 1)).squeeze(2)
        sigmas = samplers.calculate_sigmas(net.model_sampling, "normal", int(steps))
        answers["sigmas"] = sigmas
        noise = asked["noise"][:, :, None]
        start = net.model_sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise))
        drawn = sampling.sample_euler(denoised, start, sigmas, disable=True)
        answers[f"{kind} drawn"] = drawn.squeeze(2)
        patcher.unpatch_model()
save_file({k: t.float().contiguous() for k, t in answers.items()}, f"{folder}/answers.safetensors")
"""


@torch.no_grad()
def ours(backbone: Backbone, adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """The same by this program; what is asked of ComfyUI is written to `folder`."""
    draws = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 16, 8, 8, generator=draws)  # as `draw`'s
    noisy = torch.randn(3, 16, 7, 9, generator=draws)  # sides that are no multiples of the patch
    picture = torch.rand(1, 3, 64, 64, generator=draws) * 2 - 1
    asked = {"noise": noise, "noisy": noisy, "picture": picture, "sigma": TIMESTEPS / 1000}
    save_file(asked, folder / "asked.safetensors")
    base = CheckpointInfo(preset=backbone.preset)
    save_file(kohya_lora(adapter, backbone.word_width, base), folder / "lora.safetensors")
    latent = torch.stack(backbone.encode_images(picture))
    answers = {
        "patches": torch.tensor(float(len(backbone.kv_layers))),
        "latent": latent,
        "decoded": backbone.decode_latents(latent),
    }
    answers |= {name: backbone.encode_drawn(prompt) for name, prompt in PROMPTS.items()}
    features = answers["plain"].expand(3, -1, -1)
    settings = DrawSettings(steps=STEPS, guidance=1.0, size=64).resolved(backbone.preset)
    solver: Any = sample.make_solver(settings, backbone)
    solver.set_timesteps(STEPS)
    answers["sigmas"] = solver.sigmas
    for kind, change in (("bare", None), ("lora", adapter)):
        with (
            folded(backbone, change),
            mock.patch.object(Backbone, "decode_latents", lambda _, latents: latents),
        ):
            answers[f"{kind} answer"] = backbone.predict(noisy, TIMESTEPS, features)
            prompts = [PROMPTS["plain"]]
            answers[f"{kind} drawn"] = sample.draw(backbone, {}, prompts, [7], settings)
    return answers


def differences(
    folder: Path, wanted: dict[str, Tensor], path: Path, *given: object
) -> dict[str, float]:
    """How far ComfyUI's answers are from ours, as shares of them. `given`: layers of the text encoder,
    and ComfyUI's flags.
    """
    assert COMFYUI
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    models = folder / "models"
    files = [
        path,
        models / "text_encoders" / "qwen_3_06b_base.safetensors",
        models / "vae" / "qwen_image_vae.safetensors",
    ]
    layers, *flags = given
    command = [python_of(COMFYUI), "-c", IN_COMFYUI, folder, *files, layers, STEPS, *flags]
    done = subprocess.run(
        list(map(str, command)), cwd=COMFYUI, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = load_file(folder / "answers.safetensors")
    assert answers.keys() == wanted.keys()
    return {
        name: float((answers[name] - tensor).norm() / tensor.norm())
        for name, tensor in wanted.items()
    }


@pytest.mark.slow
@pytest.mark.skipif(COMFYUI is None, reason="no ComfyUI on this machine")
def test_comfyui_reads_predicts_and_draws_as_we_do(tmp_path: Path) -> None:
    assert COMFYUI
    tokenizers = COMFYUI / "comfy" / "text_encoders"
    path = anima.write(tmp_path, anima.IN_COMFYUI, dtype=torch.bfloat16, tokenizers=tokenizers)
    backbone = load_backbone(path, device="cpu", precision="fp32")
    adapter = random_adapter(backbone, "lora", seed=1)
    adapter = {name: tensor.half().float() for name, tensor in adapter.items()}  # as exported
    wanted = ours(backbone, adapter, tmp_path)
    del backbone
    assert (wanted["lora answer"] - wanted["bare answer"]).norm() > 1e-2
    flags = "--force-fp32", "--fp32-text-enc"
    apart = differences(tmp_path, wanted, path, anima.IN_COMFYUI.text_layers, *flags)
    assert max(apart.values()) < 1e-4, apart


@pytest.mark.slow
@pytest.mark.skipif(COMFYUI is None, reason="no ComfyUI on this machine")
@pytest.mark.skipif(
    "FULL_SIZE" not in os.environ,
    reason="FULL_SIZE is not set; Anima takes 9 GB of memory, 6 GB of disk and ten minutes",
)
def test_full_size_anima_learns_and_comfyui_agrees_in_bf16(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    """On a CPU ComfyUI computes in float32 with weights in bf16, we in bf16: the net's answers are .011
    apart, .014 with the LoRA, and 7e-7 and 3e-4 if we compute in float32 too.
    """
    assert COMFYUI
    tokenizers = COMFYUI / "comfy" / "text_encoders"
    path = anima.write(tmp_path, anima.PUBLISHED, dtype=torch.bfloat16, tokenizers=tokenizers)
    settings = LearnSettings(method="lora", steps=2, size=256, rate=0.01, precision="bf16")
    pipeline.learn_concept(learn_request(path, folders, "V1", settings))
    exported = pipeline.export(requests.ExportRequest(path, tmp_path)).lora
    assert exported
    adapter = stack_of(path).adapter or {}
    assert len(adapter) == 2 * 56
    backbone = load_backbone(path, device="cpu", precision="bf16")
    adapter = {name: tensor.half().float() for name, tensor in adapter.items()}
    wanted = ours(backbone, adapter, tmp_path)
    changed = wanted["lora answer"] - wanted["bare answer"]
    assert changed.norm() > 0.02 * wanted["bare answer"].norm()
    exported.replace(tmp_path / "lora.safetensors")
    del backbone
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    flags = "--bf16-unet", "--bf16-text-enc"
    apart = differences(tmp_path, wanted, path, anima.PUBLISHED.text_layers, *flags)
    for name, share in apart.items():
        assert share < (2e-2 if name.endswith(("answer", "drawn")) else 1e-4), apart

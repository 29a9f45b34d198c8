"""A rectified flow at full size, with random weights: noised, asked and drawn as by ComfyUI's own
ModelSamplingSD3, sampler euler, scheduler normal.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import helpers_full_size as full_size
import pytest
import torch
from helpers_comfyui import find_comfyui, python_of
from safetensors.torch import load_file, save_file

from comfy_continual_lora import sample
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import noised
from comfy_continual_lora.settings import DrawSettings

COMFYUI = find_comfyui()
LARGE = pytest.mark.skipif(
    "FULL_SIZE" not in os.environ,
    reason="FULL_SIZE is not set; SDXL takes 16 GB of memory, 7 GB of disk and five minutes",
)
SHIFT, STEPS = 6.0, 4
# in ComfyUI's own Python: its sigmas, its noising, its denoised predictions, and what it draws
IN_COMFYUI = """
import sys
folder, checkpoint, shift, steps = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--force-fp32"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import samplers, sd
from comfy.k_diffusion import sampling
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from safetensors.torch import load_file, save_file
asked = load_file(f"{folder}/asked.safetensors")
plain = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)[0]
(patcher,) = ModelSamplingSD3().patch(plain, float(shift))
patcher.patch_model()
net = patcher.model
flow = net.model_sampling
added = {}
if "pooled" in asked:
    added["y"] = net.encode_adm(pooled_output=asked["pooled"], width=64, height=64)

def denoised(x, sigma, **_):
    return net.apply_model(x, sigma, c_crossattn=asked["context"].expand(len(x), -1, -1), **added)

sigmas = samplers.calculate_sigmas(flow, "normal", int(steps))
answers = {"sigmas": sigmas, "timesteps": flow.timestep(sigmas[:-1])}
noise, latent = asked["noise"], asked["latent"]
answers["noisy"] = torch.cat([flow.noise_scaling(s[None], noise, latent) for s in asked["sigma"]])
with torch.no_grad():
    answers["denoised"] = torch.cat(
        [denoised(x[None], s[None]) for x, s in zip(answers["noisy"], asked["sigma"])]
    )
    start = flow.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise))
    answers["drawn"] = sampling.sample_euler(denoised, start, sigmas, disable=True)
save_file({k: t.float().contiguous() for k, t in answers.items()}, f"{folder}/answers.safetensors")
"""


@torch.no_grad()
def ours(backbone: Backbone, folder: Path) -> dict[str, torch.Tensor]:
    """The same by this program; what is asked of ComfyUI is written to `folder`."""
    timestep = torch.tensor([20, 500, 900])
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))  # as `draw`'s
    features = backbone.encode_prompts(["a photo of a red mug"])
    asked = {
        "context": backbone.context(features),
        "latent": latent,
        "noise": noise,
        "sigma": timestep / 1000,
    }
    if width := backbone.text_encoders[-1].pooled_width:
        asked["pooled"] = features[:, -1, :width]
    save_file({k: t.contiguous() for k, t in asked.items()}, folder / "asked.safetensors")
    noisy, target = noised(backbone, latent.expand(3, -1, -1, -1), noise, timestep)
    share = asked["sigma"].view(-1, 1, 1, 1)
    # the target of learning is the prediction that denoises to the picture
    torch.testing.assert_close(noisy - share * target, latent.expand(3, -1, -1, -1))
    predicted = backbone.predict(noisy, timestep, features.expand(3, -1, -1))
    settings = DrawSettings(steps=STEPS, guidance=1.0, size=64, flow_shift=SHIFT)
    settings = settings.resolved(backbone.preset)
    solver: Any = sample.make_solver(settings, backbone)
    solver.set_timesteps(STEPS)
    with mock.patch.object(Backbone, "decode_latents", lambda _, latents: latents):
        drawn = sample.draw(backbone, {}, ["a photo of a red mug"], [7], settings)
    return {
        "sigmas": solver.sigmas,
        "timesteps": solver.timesteps,
        "noisy": noisy,
        "denoised": noisy - share * predicted,
        "drawn": drawn,
    }


@pytest.mark.slow
@pytest.mark.skipif(COMFYUI is None, reason="no ComfyUI on this machine")
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=LARGE)])
def test_a_flow_is_noised_asked_and_drawn_as_by_comfyui(tmp_path: Path, kind: str) -> None:
    assert COMFYUI
    path = full_size.write(kind, tmp_path / f"{kind}.safetensors")
    backbone = load_backbone(path, device="cpu", precision="fp32")
    wanted = ours(replace(backbone, prediction="flow_prediction"), tmp_path)
    assert wanted["drawn"].isfinite().all()
    del backbone
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # an SDXL fits only once
    command = [python_of(COMFYUI), "-c", IN_COMFYUI, tmp_path, path, SHIFT, STEPS]
    done = subprocess.run(
        list(map(str, command)), cwd=COMFYUI, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    assert answers.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            answers[name],
            tensor,
            atol=1e-4,
            rtol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )

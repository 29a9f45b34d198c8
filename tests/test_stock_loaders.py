"""The LoRA of a full-size SD1.5, SD2.1 and SDXL, as a stock ComfyUI reads it: every K and V
projection is patched, nothing is left over.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers_comfyui import find_comfyui, python_of
from helpers_full_size import SD15_UNET, SD21_UNET, SDXL_UNET
from safetensors.torch import save_file

from comfy_continual_lora.checkpoint import keys
from comfy_continual_lora.stack import CheckpointInfo
from comfy_continual_lora.stock import kohya_lora

FOUND = find_comfyui()
# in ComfyUI's own Python: the names and shapes of a U-Net -> the model ComfyUI takes it for, and
# what of it the LoRA changes; no weight is made
LOADER = """
import json, sys
folder, sys.argv = sys.argv[1], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import lora, model_detection, utils
shapes = json.load(open(f"{folder}/shapes.json"))
empty = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
config = model_detection.model_config_from_unet(empty, "model.diffusion_model.")
config.set_inference_dtype(torch.float16, None)
model = config.get_model({}, "model.diffusion_model.", device="meta")
tensors = utils.load_torch_file(f"{folder}/lora.safetensors")
patched = lora.load_lora(tensors, lora.model_lora_keys_unet(model, {}))
sizes = {k: list(v.shape) for k, v in model.state_dict().items()}
used = set().union(*(one.loaded_keys for one in patched.values()))
done = {"kind": type(config).__name__, "patched": {k: sizes[k] for k in patched}}
done["unused"] = sorted(set(tensors) - used)
json.dump(done, open(f"{folder}/done.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(FOUND is None, reason="no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI")
@pytest.mark.parametrize(
    ("config", "kind", "preset", "layers"),
    [
        (SD15_UNET, "SD15", "sd1", 32),
        (SD21_UNET, "SD20", "sd2", 32),
        (SDXL_UNET, "SDXL", "sdxl", 140),
    ],
)
def test_comfyui_patches_every_k_and_v(
    tmp_path: Path, config: dict[str, Any], kind: str, preset: str, layers: int
) -> None:
    assert FOUND
    with torch.device("meta"):
        weights = UNet2DConditionModel(**config).state_dict()
    ldm = keys.unet_names(weights)
    (tmp_path / "shapes.json").write_text(
        json.dumps(
            {keys.UNET_PREFIX + ldm[name]: list(tensor.shape) for name, tensor in weights.items()}
        )
    )
    wanted = {
        name: list(tensor.shape)
        for name, tensor in weights.items()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    assert len(wanted) == layers
    adapter = {}
    for name, (out, width) in wanted.items():
        adapter |= {
            f"{name.removesuffix('.weight')}.A": torch.ones(2, width),
            f"{name.removesuffix('.weight')}.B": torch.ones(out, 2),
        }
    save_file(
        kohya_lora(adapter, config["cross_attention_dim"], CheckpointInfo(preset)),
        tmp_path / "lora.safetensors",
    )
    done = subprocess.run(
        [python_of(FOUND), "-c", LOADER, str(tmp_path)], cwd=FOUND, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "done.json").read_text())
    assert report == {
        "kind": kind,
        "patched": {f"diffusion_model.{ldm[name]}": shape for name, shape in wanted.items()},
        "unused": [],
    }

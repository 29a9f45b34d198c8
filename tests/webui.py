"""A real AUTOMATIC1111 for the tests: found, given the mini-SD and the extension in a data folder of its own, started, driven through its API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from server import Server, free_port

from comfy_continual_lora.checkpoint.load import TOKENIZER
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.webui.install import install

FLAGS = [
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--no-half", "--use-cpu", "all", "--no-download-sd-model", "--do-not-download-clip",
    "--skip-load-model-at-start", "--api", "--server-name", "127.0.0.1",
]  # fmt: skip
_NET = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {{linear_start: 0.00085, linear_end: 0.012, timesteps: 1000, num_timesteps_cond: 1, first_stage_key: jpg, cond_stage_key: txt, image_size: 16,
     channels: 4, cond_stage_trainable: false, conditioning_key: crossattn, scale_factor: 0.18215, use_ema: false,
     unet_config: {{target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {{image_size: 16, in_channels: 4, out_channels: 4,
       model_channels: 64, attention_resolutions: [2], num_res_blocks: 1, channel_mult: [1, 3], num_heads: 8, use_spatial_transformer: true,
       transformer_depth: 1, context_dim: 256, use_checkpoint: false, legacy: false}}}},
     first_stage_config: {{target: ldm.models.autoencoder.AutoencoderKL, params: {{embed_dim: 4, ddconfig: {{double_z: true, z_channels: 4,
       resolution: 128, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 1, 1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}},
       lossconfig: {{target: torch.nn.Identity}}}}}},
     cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenCLIPEmbedder, params: {{version: {text}}}}}}}
"""
_TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 256,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip


def find_webui() -> Path | None:
    """WEBUI_PATH, else ~/stable-diffusion-webui."""
    path = Path(os.environ.get("WEBUI_PATH") or Path.home() / "stable-diffusion-webui")
    return path if (path / "webui.py").exists() and _python(path).exists() else None


def _python(webui: Path) -> Path:
    return webui / "venv" / "bin" / "python"


class WebUI(Server):
    """A running web UI; `data` holds its models, settings and extensions."""

    def __init__(self, webui: Path, data: Path, *flags: str) -> None:
        self.webui, self.data, self.flags, self.log = webui, data, flags, data / "log.txt"
        self.checkpoint = data / "models" / "Stable-diffusion" / "mini-sd.safetensors"
        if not self.checkpoint.exists():
            _put_mini(self.checkpoint, data)
            (data / "extensions").mkdir()
            install(data, copy=True)
            # what the web UI does with every extension at its start
            subprocess.run([str(_python(webui)), str(data / "extensions" / "continual-lora" / "install.py")], check=True, stdin=subprocess.DEVNULL)
        self.start()

    def start(self) -> None:
        port, cache = free_port(), self.webui / "hf-home"
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **({"HF_HOME": str(cache)} if cache.exists() else {})}
        command = [str(_python(self.webui)), "launch.py", *FLAGS, "--port", str(port), "--data-dir", str(self.data), *self.flags]
        # no request before it says so: it still adds middleware, and fails after one
        ready = lambda: "Startup time" in self.log.read_text()  # noqa: E731
        self.launch(command, port, ready, cwd=self.webui, env={**os.environ, "PYTHONPATH": "", **offline})

    def ended(self, timeout: float = 600) -> dict[str, Any]:
        """The job, once it ended."""
        deadline = time.monotonic() + timeout
        while (job := self.get("/continual-lora/v1/jobs"))["state"] not in ("done", "failed", "stopped"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job is still {job}")
            time.sleep(0.3)
        return job


def _put_mini(checkpoint: Path, data: Path) -> None:
    """The mini-SD with the .yaml of its sizes, and its TAESD where the web UI keeps such ones: there is no KL autoencoder in the file."""
    write_checkpoint(checkpoint)
    text = Path(shutil.copytree(TOKENIZER, data / "text"))
    (text / "config.json").write_text(json.dumps(_TEXT))
    checkpoint.with_suffix(".yaml").write_text(_NET.format(text=json.dumps(str(text))))
    (data / "models" / "VAE-taesd").mkdir()
    tensors = load_file(checkpoint)
    for half in ("encoder", "decoder"):
        prefix = f"first_stage_model.taesd_{half}."
        state = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
        # its unpickler knows no newer format
        torch.save(state, data / "models" / "VAE-taesd" / f"taesd_{half}.pth", _use_new_zipfile_serialization=False)
    options = {"sd_vae_decode_method": "TAESD", "sd_vae_encode_method": "TAESD", "show_progress_type": "Approx cheap"}
    (data / "config.json").write_text(json.dumps(options))

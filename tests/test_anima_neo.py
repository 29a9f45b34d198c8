"""A narrow Anima in the real Forge Neo: text and pictures, with the exported LoRA and without it, and
what our extension does there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import helpers_anima as anima
import numpy as np
import pytest
import torch
from helpers_learn import random_adapter
from helpers_webui import API, WebUI, drawn_with, learn, of_the_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_continual_lora import sample
from comfy_continual_lora.adapters.adapter import Adapter, folded
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.files import HOST, PRESET, WORDS
from comfy_continual_lora.settings import DrawSettings
from comfy_continual_lora.stack import CheckpointInfo
from comfy_continual_lora.stock import kohya_lora
from comfy_continual_lora.webui.install import install

pytestmark = pytest.mark.slow

SIZES = anima.Sizes(**{**vars(anima.IN_COMFYUI), "vae": 96})  # Neo does not read the VAE's width
PROMPTS = {
    "plain": "a photo of a V1 plushie, best quality",
    "empty": "",
    "weighted": "a (red:1.3) V1 plushie on grass, ((masterpiece)), [blue]",
    "longer than 512 tokens": "a (red:1.3) dog, " * 150,
    "BREAK": "a red V1 plushie BREAK on grass",
}
AS_A_WORD = "a red V1 plushie(BREAK:-1)on grass"  # what Neo reads in the last one
TWO_THINGS = "a photo of a V1 ball and a V2 fish"
STEPS = 4
# Neo takes Anima's width and depths for granted; what it encodes and patches is answered
NARROW = """
import torch
from backend.nn.llm import llama
from huggingface_guess import detection
from modules import script_callbacks, shared
from safetensors.torch import save_file

detect, config = detection.detect_unet_config, llama.Qwen3_06BConfig

def detect_narrow(state, prefix):
    stem = state[prefix + "x_embedder.proj.1.weight"]
    blocks = detection.count_blocks(list(state), prefix + "blocks.{}.")
    wide = {**state, prefix + "x_embedder.proj.1.weight": torch.empty(2048, stem.shape[1], device="meta")}
    return {**detect(wide, prefix), "model_channels": stem.shape[0], "num_blocks": blocks}

detection.detect_unet_config = detect_narrow
llama.Qwen3_06BConfig = lambda: config(num_hidden_layers=LAYERS)

def encoded(body: dict):
    features = {k: shared.sd_model.get_learned_conditioning([v])[0] for k, v in body["prompts"].items()}
    save_file({k: v.float().cpu().contiguous() for k, v in features.items()}, body["path"])

def patches():
    return sorted(shared.sd_model.forge_objects_after_applying_lora.unet.patches)

def add(demo, app):
    app.add_api_route("/encoded", encoded, methods=["POST"])
    app.add_api_route("/patches", patches)

script_callbacks.on_app_started(add)
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """Forge Neo with the narrow Anima and our extension, whose worker has this Python."""
    webui, root = of_the_family("Neo"), tmp_path_factory.mktemp("neo")
    host = WebUI(webui, root / "webui")
    host.put_extension("narrow", NARROW.replace("LAYERS", str(SIZES.text_layers)))
    anima.write(root / "ComfyUI", SIZES, dtype=torch.bfloat16)
    host.checkpoint = anima.models_as_in_neo(root / "ComfyUI", host.data)
    install(host.data, copy=True)
    models = host.data / "models"
    options = {
        "VERSION_UID": "PY313",
        "forge_preset": "anima",
        "sd_model_checkpoint": host.checkpoint.name,
        "forge_additional_modules": [
            str(models / "text_encoder" / "qwen_3_06b_base.safetensors"),
            str(models / "VAE" / "qwen_image_vae.safetensors"),
        ],
        "show_progress_type": "Approx cheap",
    }
    (host.data / "config.json").write_text(json.dumps(options))
    (host.data / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTINUAL_LORA_PYTHON", sys.executable)
        patch.setenv("COMMANDLINE_ARGS", "--fp32-unet --fp32-text-enc --fp32-vae")
        host.start()
    yield host
    host.stop()


@pytest.fixture(scope="module")
def backbone(host: WebUI) -> Backbone:
    """The same Anima, with Neo's own tokenizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOST, str(host.webui))
        return load_backbone(host.checkpoint, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def lora(host: WebUI, backbone: Backbone) -> Adapter:
    """A LoRA of two things, which lies in the host as known.safetensors."""
    adapter = {k: t.half().float() for k, t in random_adapter(backbone, "lora", seed=1).items()}
    tensors = kohya_lora(adapter, backbone.word_width, CheckpointInfo(preset="anima"))
    metadata = {WORDS: json.dumps({"V1": "ball", "V2": "fish"}), PRESET: "anima"}
    folder = host.data / "models" / "Lora"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "known.safetensors", metadata)
    host.post("/sdapi/v1/refresh-loras", {})
    return adapter


def test_it_reads_prompts_as_we_do(host: WebUI, backbone: Backbone) -> None:
    drawn_with(host, "", steps=1, width=64, height=64)  # loads it
    path = host.data / "encoded.safetensors"
    host.post("/encoded", {"prompts": PROMPTS, "path": str(path)})
    encoded = load_file(path)
    differences = {}
    for name, prompt in PROMPTS.items():
        ours = backbone.encode_drawn(AS_A_WORD if name == "BREAK" else prompt)
        assert encoded[name].shape == ours.shape
        differences[name] = float((encoded[name] - ours).norm() / ours.norm())
    print(differences)
    assert max(differences.values()) < 1e-5, differences


def test_it_draws_as_we_do(host: WebUI, backbone: Backbone, lora: Adapter) -> None:
    """Its rotary frequencies are in float16, which moves the net's answer by 5e-4. Two things in one
    prompt are kept apart, unless that is turned off.
    """
    settings = DrawSettings(steps=STEPS, guidance=1.0, size=64).resolved(backbone.preset)
    asked = {
        "seed": 7,
        "steps": STEPS,
        "width": 64,
        "height": 64,
        "cfg_scale": 1,
        "distilled_cfg_scale": settings.flow_shift,
        "sampler_name": "Euler",
        "scheduler": "Normal",
    }
    pictures, equal = {}, {}
    cases = {
        "bare": PROMPTS["plain"],
        "lora": PROMPTS["plain"],
        "two": TWO_THINGS,
        "mixed": TWO_THINGS,
    }
    for name, prompt in cases.items():
        change, mark = (None, "") if name == "bare" else (lora, " <lora:known:1>")
        off = {"override_settings": {"continual_lora_apart": False}} if name == "mixed" else {}
        pictures[name], told = drawn_with(host, prompt + mark, **asked, **off)
        assert ("Concepts kept apart: " in told) == (name == "two")
        nouns = {"V1": "ball", "V2": "fish"} if name == "two" else None
        with folded(backbone, change):
            ours = sample.draw(backbone, {}, [prompt], [7], settings, nouns=nouns)[0]
        difference = np.abs(as_bytes(ours) - pictures[name])
        assert difference.max() <= 1
        equal[name] = (difference == 0).mean()
    assert len(host.get("/patches")) == len(backbone.kv_layers)
    print(equal, effect := (pictures["bare"] != pictures["lora"]).mean())
    assert min(equal.values()) > 0.97, equal
    assert effect > 0.3
    assert (pictures["two"] != pictures["mixed"]).mean() > 0.1


def as_bytes(picture: Tensor) -> np.ndarray:
    """A picture (3, h, w) in -1..1 as web UIs round it, (h, w, 3) in 0..255."""
    return ((picture + 1) * 127.5).permute(1, 2, 0).numpy().astype(int)


def test_our_extension_teaches_it(host: WebUI, pictures: Path) -> None:
    asked = {**learn(pictures, "V1", "", size=64, steps=3), "checkpoint": host.checkpoint.name}
    host.post(f"{API}/learn", asked)
    job = host.ended()
    assert job["state"] == "done", job
    lora = Path(job["results"]["export"]["lora"])
    assert lora.parent == host.data / "models" / "Lora"
    assert json.loads(lora.with_suffix(".json").read_text())["sd version"] == "anima"
    drawn_with(host, f"a V1 ball <lora:{lora.stem}:1>", steps=1, width=64, height=64)
    assert len(host.get("/patches")) == 2 * SIZES.layers
    assert "Traceback" not in host.log.read_text()

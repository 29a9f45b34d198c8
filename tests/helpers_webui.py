"""A real AUTOMATIC1111, Forge, reForge or Forge Neo for the tests.

It is found, given a small checkpoint, the extension and a neighbour in a data folder of its own,
started, driven through its API and in a browser.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_browser import page, wait_for_text
from helpers_server import Server, free_port
from helpers_thin import STOCK, write_thin
from PIL import Image
from safetensors.torch import load_file

from comfy_continual_lora import history
from comfy_continual_lora.checkpoint.single_file import TOKENIZER
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.store import read_records
from comfy_continual_lora.versions import versions
from comfy_continual_lora.webui.install import install
from comfy_continual_lora.webui.labels import METHOD_LABELS

API = "/continual-lora/v1"
QUICK = {"method": "lora", "steps": 6, "batch": 2, "rank": 4}
PLACE = {"checkpoint": "mini-sd.safetensors"}
_FLAGS = [
    "--skip-prepare-environment",
    "--skip-torch-cuda-test",
    "--api",
    "--server-name",
    "127.0.0.1",
]
_A1111 = [
    "--no-half",
    "--use-cpu",
    "all",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--skip-load-model-at-start",
]
_NEIGHBOUR = """
import gradio
from modules import script_callbacks

def tab():
    with gradio.Blocks() as page:
        word = gradio.Textbox("", elem_id="neighbour_word")
        gradio.Button("Neighbour says", elem_id="neighbour_button").click(lambda: "still here", None, word)
    return [(page, "Neighbour", "neighbour")]

script_callbacks.on_ui_tabs(tab)
script_callbacks.on_app_started(lambda demo, app: app.add_api_route("/neighbour", lambda: {"still": "here"}))
"""
_NET = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {{linear_start: 0.00085, linear_end: 0.012, timesteps: 1000, num_timesteps_cond: 1,
     first_stage_key: jpg, cond_stage_key: txt, image_size: 16, channels: 4,
     cond_stage_trainable: false, conditioning_key: crossattn, scale_factor: 0.18215, use_ema: false,
     unet_config: {{target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params:
      {{image_size: 16, in_channels: 4, out_channels: 4, model_channels: 64,
       attention_resolutions: [1, 2], num_res_blocks: 1, channel_mult: [1, 3], num_heads: 8,
       use_spatial_transformer: true, transformer_depth: 1, context_dim: 256,
       use_checkpoint: false, legacy: false}}}},
     first_stage_config: {{target: ldm.models.autoencoder.AutoencoderKL, params:
      {{embed_dim: 4, ddconfig: {{double_z: true, z_channels: 4, resolution: 128, in_channels: 3,
        out_ch: 3, ch: 32, ch_mult: [1, 1, 1, 1], num_res_blocks: 1, attn_resolutions: [],
        dropout: 0.0}},
       lossconfig: {{target: torch.nn.Identity}}}}}},
     cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenCLIPEmbedder, params:
      {{version: {text}}}}}}}
"""
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 256,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}

# the variable that names a web UI, and its folder in the home folder
FAMILY = {
    "Forge": ("FORGE_PATH", "stable-diffusion-webui-forge"),
    "reForge": ("REFORGE_PATH", "stable-diffusion-webui-reForge"),
    "Neo": ("NEO_PATH", "sd-webui-forge-neo"),
}


def of_the_family(name: str) -> Path:
    """Skips the test where there is none."""
    variable, default = FAMILY[name]
    found = find_webui(variable, default)
    if found is None:
        pytest.skip(f"no {name} with a venv at {variable} or ~/{default}")
    return found


def find_webui(
    variable: str = "WEBUI_PATH", default: str = "stable-diffusion-webui"
) -> Path | None:
    """The folder the variable names, else the default one in the home folder, if a web UI with a
    venv is there.
    """
    path = Path(os.environ.get(variable) or Path.home() / default)
    return path if (path / "webui.py").exists() and _python(path).exists() else None


def _python(webui: Path) -> Path:
    return webui / "venv" / "bin" / "python"


def freeze(webui: Path) -> str:
    """What is installed in the web UI's own environment."""
    return subprocess.run(
        [str(_python(webui)), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout


class WebUI(Server):
    """A web UI, running after `start`; `data` holds its models, settings and extensions."""

    def __init__(self, webui: Path, data: Path) -> None:
        self.webui, self.data, self.log = webui, data, data / "log.txt"
        self.forge = (webui / "modules_forge").exists()  # or one of its family
        self.neo = self.forge and not (webui / "modules" / "sd_hijack.py").exists()
        self.checkpoint = data / "models" / "Stable-diffusion" / "mini-sd.safetensors"

    def put_the_mini_and_us(self) -> None:
        _put_checkpoint(self.checkpoint, self.data, forge=self.forge)
        self.put_extension("neighbour", _NEIGHBOUR)
        install(self.data, copy=True)
        # what the web UI does with every extension at its start
        ours = self.data / "extensions" / "continual-lora" / "install.py"
        subprocess.run([str(_python(self.webui)), str(ours)], check=True, stdin=subprocess.DEVNULL)

    def put_extension(self, name: str, script: str) -> None:
        path = self.data / "extensions" / name / "scripts" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(script)

    def start(self, cache: Path | None = None) -> None:
        """`cache` holds what transformers would download."""
        port = free_port()
        cache = cache or self.webui / "hf-home"
        env = {
            **os.environ,
            "PYTHONPATH": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        if cache.exists():
            env["HF_HOME"] = str(cache)
        cpu = "--cpu" if self.neo else "--always-cpu"
        forge = [cpu, "--gradio-allowed-path", str(self.webui)]
        command = [
            str(_python(self.webui)),
            "launch.py",
            *_FLAGS,
            *(forge if self.forge else _A1111),
            "--port",
            str(port),
            "--data-dir",
            str(self.data),
        ]
        # no request before it says so: it still adds middleware, and fails after one
        ready = lambda: "Startup time" in self.log.read_text()  # noqa: E731
        self.launch(command, port, ready, cwd=self.webui, env=env)

    def ended(self, timeout: float = 600) -> dict[str, Any]:
        """The job, once it ended."""
        deadline = time.monotonic() + timeout
        while (job := self.get(f"{API}/jobs"))["state"] not in ("done", "failed", "stopped"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job is still {job}")
            time.sleep(0.3)
        return job


def learn(pictures: Path, token: str, stack: str, **settings: Any) -> dict[str, Any]:
    """The body of a quick request to learn."""
    images = [base64.b64encode(p.read_bytes()).decode() for p in sorted(pictures.glob("*.png"))]
    return {
        **PLACE,
        "images": images,
        "token": token,
        "noun": "ball",
        "stack": stack,
        "settings": {**QUICK, **settings},
    }


def drawn(host: WebUI, prompt: str) -> np.ndarray:
    return drawn_with(host, prompt)[0]


def drawn_with(host: WebUI, prompt: str, **asked: Any) -> tuple[np.ndarray, str]:
    """The picture and its infotext."""
    request = {
        "prompt": prompt,
        "seed": 1,
        "steps": 6,
        "width": 128,
        "height": 128,
        "cfg_scale": 4,
        "sampler_name": "DDIM",
        **asked,
    }
    way = "img2img" if "init_images" in asked else "txt2img"
    answer = host.post(f"/sdapi/v1/{way}", request)
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    return np.asarray(image.convert("RGB"), int), json.loads(answer["info"])["infotexts"][0]


def keeps_things_apart(host: WebUI, pictures: Path) -> None:
    """Two learned things in one prompt, with the LoRA of both: said in the infotext, another picture
    than with the option off; nothing else is drawn otherwise.
    """
    for token, noun in (("V1", "ball"), ("V2", "box")):
        asked = learn(pictures, token, "apart", rate=0.01, token_rate=0.05, steps=6)
        host.post(f"{API}/learn", {**asked, "noun": noun})
        job = host.ended()
        assert job["state"] == "done", job
    result = job["results"]["export"]
    first, second = result["triggers"]
    lora = f"<lora:{Path(result['lora']).stem}:1>"
    off = {"override_settings": {"continual_lora_apart": False}}
    both = f"a photo of a ({first}:1.1) and a {second} on grass {lora}"
    apart, told = drawn_with(host, both)
    mixed, silent = drawn_with(host, both, **off)
    names = ", ".join(trigger.split()[0] for trigger in (first, second))
    assert f'Concepts kept apart: "{names}"' in told
    listed = re.search(r'TI(?: hashes)?: "(.*?)"', told)
    assert listed
    assert sorted(re.sub(": [0-9a-f]+", "", listed[1]).split(", ")) == sorted(names.split(", "))
    assert "kept apart" not in silent
    assert np.abs(apart - mixed).mean() > 0.5
    assert np.array_equal(apart, drawn_with(host, both)[0])
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6}
    hires["hr_upscaler"] = "None" if host.neo else "Latent"  # which Neo no longer has
    if host.forge:  # its API has no default
        hires["hr_additional_modules"] = ["Use same choices"]
    larger, told = drawn_with(host, both, **hires, hr_second_pass_steps=4)
    assert larger.shape == (192, 192, 3)
    assert "kept apart" in told
    one = f"a photo of a {first} on grass {lora}"
    assert np.array_equal(drawn_with(host, one)[0], drawn_with(host, one, **off)[0])
    without = both.replace(lora, "")
    assert np.array_equal(drawn_with(host, without)[0], drawn_with(host, without, **off)[0])
    assert "are drawn mixed" not in host.log.read_text()
    _tells_what_it_reads(host, first.split()[0], lora)


def _tells_what_it_reads(host: WebUI, word: str, lora: str) -> None:
    """Where the web UI reads a word as we do, and where it does otherwise, which is told."""
    for prompt in (f"a {word}-coloured ball", f"a ({word}'s:1.1) ball", f"a {word}0 ball"):
        _, told = drawn_with(host, f"{prompt} {lora}", negative_prompt="easynegative, model v2")
        assert re.search(rf'TI( hashes)?: "?{word}\b', told), told
    log = host.log.read_text()
    assert log.count(f'In "{word}0" the web UI reads {word} and more') == 1
    assert "not a learned word" not in log


def learns_and_draws(host: WebUI, pictures: Path) -> None:
    """Without a restart, and with the model loaded before: the LoRA changes the picture, the word
    changes it too, and the web UI's model is back afterwards.
    """
    before = drawn(host, "a photo of a V1 ball")
    host.post(f"{API}/learn", learn(pictures, "V1", "", rate=0.01, token_rate=0.05, steps=10))
    job = host.ended()
    assert job["state"] == "done", job
    lora = Path(job["results"]["export"]["lora"])
    assert lora.parent == host.data / "models" / "Lora"
    assert lora.with_suffix(".json").exists()
    assert [one.parent.name for one in host.data.rglob("V1.safetensors")] == ["embeddings"]
    host.post("/sdapi/v1/refresh-checkpoints", {})
    assert [one["model_name"] for one in host.get("/sdapi/v1/sd-models")] == ["mini-sd"]
    with_word = drawn(host, "a photo of a V1 ball")
    with_both = drawn(host, f"a photo of a V1 ball <lora:{lora.stem}:1>")
    assert np.abs(with_word - before).mean() > 1
    assert np.abs(with_both - with_word).mean() > 1
    learned = host.get(f"{API}/concepts?checkpoint=mini-sd.safetensors")
    assert [concept["token"] for concept in learned] == ["V1"]


def is_calm_without_a_model(host: WebUI, pictures: Path) -> None:
    """With the web UI's model unloaded, a job works and its end tells of no trouble; then the web UI
    draws again.
    """
    before = host.log.read_text()
    host.post("/sdapi/v1/unload-checkpoint", {})
    host.post(f"{API}/learn", learn(pictures, "V1", "calm"))
    job = host.ended()
    assert job["state"] == "done", job
    assert "Traceback" not in host.log.read_text().removeprefix(before)
    assert drawn(host, "a photo of a V1 ball").std() > 1


def stops_when_interrupted(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V3", "stopped", steps=3000))
    until_it_learns(host)
    host.post("/sdapi/v1/interrupt", {})
    assert host.ended()["state"] == "stopped"


def until_it_learns(host: WebUI) -> dict[str, Any]:
    """The job, once it takes steps."""
    while not (job := host.get(f"{API}/jobs"))["progress"].get("loss"):
        assert job["state"] in ("starting", "running"), job
        time.sleep(0.2)
    return job


def learns_in_a_browser(host: WebUI, pictures: Path, screenshot: Path) -> None:
    """From dropped pictures, one with a caption of its own, to the finished concept; a tab of
    another extension goes on beside it.

    The first picture is dropped, cleared and dropped again.
    """
    with page(host.address, height=1600) as opened:
        opened.wait_for_selector("#txt2img_generate", timeout=120_000)
        opened.click("button:has-text('Continual LoRA')")
        files = sorted(pictures.glob("*.png"))
        text = files[0].with_suffix(".txt")
        text.write_text("a photo of B1 on sand")
        drop = "#continual_lora_files input[type=file]"
        opened.set_input_files(drop, str(files[0]))
        # as before the next concept
        opened.click("#continual_lora_files button[aria-label='Clear']", timeout=60_000)
        opened.wait_for_timeout(2_000)
        opened.set_input_files(drop, [str(path) for path in (*files, text)])
        opened.fill("#continual_lora_token textarea", "B1")
        opened.fill("#continual_lora_noun textarea", "ball")
        caption = "#continual_lora_caption_{} textarea"
        opened.wait_for_function(
            f"document.querySelector('{caption.format(0)}')?.value === 'a photo of B1 on sand'",
            timeout=60_000,
        )
        opened.fill(caption.format(1), "B1 ball in front of a wall")
        opened.click("text=Method, and settings for experts")
        fill_settings(opened, steps=4, batch=2, rank=4, fisher_samples=4, preview_every=2)
        opened.fill("#continual_lora_stack textarea", "browser")
        opened.click("#continual_lora_learn")
        wait_for_text(opened, "#continual_lora_status", "Learned B1 ball", 1_800_000)
        wait_for_text(opened, "#continual_lora_card_0", "4 steps, ", 60_000)
        opened.screenshot(path=str(screenshot), full_page=True)
        _sends(opened)
        stack = host.checkpoint.with_name("mini-sd.browser.concepts.safetensors")
        prompts = read_records(stack)[0].prompts
        assert {"a photo of B1 on sand", "B1 ball in front of a wall"} <= set(prompts)
        assert copies_of(host, "browser") == []
        asks_first(opened, stack, "B1")
        opened.reload()  # the last job's stack is chosen again
        opened.wait_for_selector("#txt2img_generate", timeout=120_000)
        opened.click("button:has-text('Continual LoRA')")
        wait_for_text(opened, "#continual_lora_card_0", "B1 ball", 60_000)
        opened.click("button:has-text('Neighbour')")
        opened.click("#neighbour_button")
        opened.wait_for_function(
            "document.querySelector('#neighbour_word textarea, #neighbour_word input').value === "
            "'still here'",
            timeout=60_000,
        )
    assert host.get("/neighbour") == {"still": "here"}


def _sends(opened: Any) -> None:
    """The prompt of a card, with the LoRA of its export, to txt2img."""
    opened.click("#continual_lora_send_0")
    opened.wait_for_function(
        "document.querySelector('#txt2img_prompt textarea').value.startsWith("
        "'a photo of a B1 ball <lora:mini-sd.browser-B1-')",
        timeout=60_000,
    )
    opened.wait_for_selector("#txt2img_generate", state="visible")
    opened.click("button:has-text('Continual LoRA')")


def fill_settings(opened: Any, **values: int) -> None:
    for name, value in values.items():
        opened.fill(f"#continual_lora_{name} input", str(value))


def copies_of(host: WebUI, stack: str) -> list[Path]:
    """The folders with copies of pictures that were learned for a named stack; other tests'
    unfinished runs keep theirs.
    """
    owners = (host.data / "continual-lora" / "copies").rglob("of.json")
    return [file.parent for file in owners if f".{stack}." in json.loads(file.read_text())["stack"]]


def asks_first(opened: Any, stack: Path, token: str = "V1") -> None:
    """On a page whose stack holds one concept: forgetting, undoing and going back do nothing before
    they are confirmed.
    """

    def shows(where: str, text: str) -> None:
        wait_for_text(opened, f"#continual_lora_{where}", text)

    def holds(*tokens: str) -> None:
        assert [record.token for record in read_records(stack)] == list(tokens)

    opened.click("#continual_lora_forget_0")
    shows("question", f"This removes {token} ball")
    holds(token)
    opened.click("#continual_lora_no")
    opened.wait_for_selector("#continual_lora_yes", state="hidden")
    holds(token)
    opened.click("text=History of the stack")
    opened.click("#continual_lora_undo")
    shows("question", f"Undo takes back: learned {token} ball")
    number = next(one.number for one in versions(stack) if one.current)
    history.undo(stack)  # by another program, meanwhile
    opened.click("#continual_lora_yes")
    shows("said", "There is nothing to undo")
    history.restore(stack, number)
    opened.click("#continual_lora_undo")
    shows("question", f"Undo takes back: learned {token} ball")
    holds(token)
    opened.click("#continual_lora_yes")
    shows("said", f"Undone: learned {token} ball. The stack now holds no concept.")
    shows("none", "Nothing learned yet")
    holds()
    opened.fill("#continual_lora_version input", "77")
    opened.click("#continual_lora_restore")
    shows("said", "There is no version 77")
    number = next(one.number for one in versions(stack) if one.tokens == [token])
    opened.fill("#continual_lora_version input", str(number))
    opened.click("#continual_lora_restore")
    shows("question", f"This goes back to version {number}")
    holds()
    opened.click("#continual_lora_yes")
    shows("said", f"Went back to version {number}")
    holds(token)


def _put_checkpoint(checkpoint: Path, data: Path, *, forge: bool) -> None:
    """For AUTOMATIC1111 the mini-SD with a .yaml of its sizes; Forge knows models by their widths and
    gets a thin one of SD1.x'. And their TAESD, since they have no KL autoencoder.

    AUTOMATIC1111 finds a LoRA's layers by SD1.x's numbers of blocks, of which the mini-SD has fewer:
    some of its layers go without.
    """
    if forge:
        checkpoint.parent.mkdir(parents=True)
        write_thin(checkpoint, *STOCK)
    else:
        write_checkpoint(checkpoint)
        text = Path(shutil.copytree(TOKENIZER, data / "text"))
        (text / "config.json").write_text(json.dumps(_TEXT))
        checkpoint.with_suffix(".yaml").write_text(_NET.format(text=json.dumps(str(text))))
    (data / "models" / "VAE-taesd").mkdir()
    tensors = load_file(checkpoint)
    for half in ("encoder", "decoder"):
        prefix = f"first_stage_model.taesd_{half}."
        state = {
            name.removeprefix(prefix): t.float()
            for name, t in tensors.items()
            if name.startswith(prefix)
        }
        path = data / "models" / "VAE-taesd" / f"taesd_{half}.pth"
        # its unpickler knows no newer format
        torch.save(state, path, _use_new_zipfile_serialization=False)
    options: dict[str, Any] = {
        "sd_vae_decode_method": "TAESD",
        "sd_vae_encode_method": "TAESD",
        "show_progress_type": "Approx cheap",
        "VERSION_UID": "PY313",  # without it Neo takes this file for an older version's, and asks
    }
    if forge:
        # the recommended method first encodes a thousand prompts, and the text encoder is of full size
        options["continual_lora_plan"] = next(k for k, v in METHOD_LABELS.items() if v == "lora")
    (data / "config.json").write_text(json.dumps(options))
    (data / "tmp").mkdir()  # as webui.sh does, and Neo relies on

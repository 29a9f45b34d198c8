"""Full-size SD1.5, SD2.1 and SDXL: what is learned on them does in diffusers, in a stock ComfyUI
and in an AUTOMATIC1111 exactly what it does in our own net, and the learned word means in their
prompts what it means in ours; long prompts, weights, BREAK and clip skip give the same features.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_full_size as full_size
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers_areas import follows_areas
from helpers_comfyui import REPOSITORY, find_comfyui, python_of
from helpers_habits import HABITS, IN_WEB_UIS, MOVED, WEIGHTS, Habits, moved_by_web_uis, own
from helpers_webui import WebUI, find_webui
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.checkpoint.single_file import TOKENIZER
from comfy_continual_lora.checkpoint.text import TextEncoder
from comfy_continual_lora.settings import LearnSettings

COMFYUI, A1111 = find_comfyui(), find_webui()
LARGE = pytest.mark.skipif(
    "FULL_SIZE" not in os.environ,
    reason="FULL_SIZE is not set; SDXL takes 16 GB of memory, 7 GB of disk and five minutes",
)
PROMPT = "a photo of a red V1 ball on grass, and v1"
# in ComfyUI's own Python: its text features of the prompt, and its net's answers to what ours was
# asked, without the LoRA and with it
IN_COMFYUI = """
import json, sys
folder, checkpoint, repository, prompt, sys.argv = *sys.argv[1:5], ["main.py", "--cpu", "--force-fp32"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import sd, utils
from safetensors.torch import load_file, save_file
asked = load_file(f"{folder}/asked.safetensors")
sys.path.append(repository)
from comfy_continual_lora.comfy_nodes.words import with_words
clip = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_model=False)[1]
clip = with_words(clip, {"V1": asked["word"]})
context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
answers = {"said": context.float().contiguous()}
for name, (prompt, skip) in json.load(open(f"{folder}/habits.json")).items():
    other = clip.clone()
    if skip == 2:
        other.clip_layer(-2)
    tokens = other.tokenize(prompt)
    answers[name] = other.encode_from_tokens(tokens).float().contiguous()
if "pooled" in asked:
    answers["said_pooled"] = pooled.float().contiguous()
del clip
plain = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)[0]
lora = utils.load_torch_file(f"{folder}/lora.safetensors")
taught, _ = sd.load_lora_for_models(plain, None, lora, 1.0, 0.0)
for name, patcher in (("plain", plain), ("taught", taught)):
    patcher.patch_model()
    net = patcher.model
    added = {"context": asked["context"]}
    if "pooled" in asked:
        added["y"] = net.encode_adm(pooled_output=asked["pooled"], width=64, height=64)
    with torch.no_grad():
        answer = net.diffusion_model(asked["noisy"], asked["timestep"], **added)
    answers[name] = answer.float().contiguous()
    patched = len(patcher.patches)
    patcher.unpatch_model()
save_file(answers, f"{folder}/answers.safetensors", {"patched": str(patched)})
"""
# the same of SDXL's text encoders alone
TEXT_IN_COMFYUI = """
import json, sys
folder, repository, sys.argv = *sys.argv[1:3], ["main.py", "--cpu", "--force-fp32"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import sd, utils
from safetensors.torch import load_file, save_file
sys.path.append(repository)
from comfy_continual_lora.comfy_nodes.words import with_words
states = [utils.load_torch_file(f"{folder}/clip_{letter}.safetensors") for letter in "lg"]
clip = sd.load_text_encoder_state_dicts(states, clip_type=sd.CLIPType.STABLE_DIFFUSION)
clip = with_words(clip, load_file(f"{folder}/words.safetensors"))
answers = {}
for name, (prompt, _) in json.load(open(f"{folder}/habits.json")).items():
    context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    answers |= {name: context.float().contiguous(), f"{name}, pooled": pooled.float().contiguous()}
save_file(answers, f"{folder}/answers.safetensors")
"""
# an extension that answers the same in AUTOMATIC1111, with its own loader of checkpoints, LoRAs and
# embeddings
IN_A1111 = """
import json, sys
import torch
from modules import prompt_parser, script_callbacks, shared
from safetensors.torch import load_file, save_file

@torch.no_grad()
def answer(body: dict):
    asked = load_file(f"{body['folder']}/asked.safetensors")
    model, loras = shared.sd_model, sys.modules["networks"]
    prompt = prompt_parser.SdConditioning([body["prompt"]], width=64, height=64)
    said = model.get_learned_conditioning(prompt)
    answers, added = {}, {}
    if "pooled" in asked:
        pooled, sizes = said["vector"].split([1280, 1536], 1)
        answers["said_pooled"] = pooled
        added["y"] = torch.cat([asked["pooled"], sizes], 1)
        said = said["crossattn"]
    answers["said"] = said
    for name, (text, skip) in json.load(open(f"{body['folder']}/habits.json")).items():
        shared.opts.CLIP_stop_at_last_layers = skip
        text = prompt_parser.SdConditioning([text], width=64, height=64)
        said = model.get_learned_conditioning(text)
        answers[name] = said["crossattn"] if isinstance(said, dict) else said
    shared.opts.CLIP_stop_at_last_layers = 1
    net = model.model.diffusion_model
    for name, wanted in (("plain", []), ("taught", ["lora"])):
        loras.load_networks(wanted, [1.0], [1.0], [None])
        answers[name] = net(asked["noisy"], asked["timestep"], context=asked["context"], **added)
    answers = {name: tensor.contiguous() for name, tensor in answers.items()}
    patched = {"patched": str(len(loras.loaded_networks[0].modules))}
    save_file(answers, f"{body['folder']}/answers.safetensors", patched)

script_callbacks.on_app_started(lambda demo, app: app.add_api_route("/answer", answer, methods=["POST"]))
"""
# what AUTOMATIC1111 asks transformers for by name: the shape of SD1's text encoder, whose weights
# the checkpoint has
CLIP = {
    **full_size.SD15_TEXT,
    "model_type": "clip_text_model",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "projection_dim": 768,
}


def in_comfyui(comfyui: Path, folder: Path, checkpoint: Path) -> None:
    """Write answers.safetensors."""
    command = [
        python_of(comfyui),
        "-c",
        IN_COMFYUI,
        str(folder),
        str(checkpoint),
        str(REPOSITORY),
        PROMPT,
    ]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def in_a1111(webui: Path, folder: Path, checkpoint: Path) -> None:
    """Write answers.safetensors."""
    host = WebUI(webui, folder / "webui")
    host.put_extension("answer", IN_A1111)
    places = {
        checkpoint: "models/Stable-diffusion",
        folder / "lora.safetensors": "models/Lora",
        folder / "V1.safetensors": "embeddings",
    }
    for file, place in places.items():
        (host.data / place).mkdir(parents=True)
        os.link(file, host.data / place / file.name)
    # its own way to find out whether an SD2 predicts noise fails without a GPU
    if checkpoint.stem == "sd2":
        configs = webui / "repositories" / "stable-diffusion-stability-ai" / "configs"
        config = configs / "stable-diffusion" / "v2-inference.yaml"
        shutil.copy(config, host.data / "models" / "Stable-diffusion" / "sd2.yaml")
    # its usual way keeps a copy of every weight, which is more than 24 GB for an SDXL in float32
    (host.data / "config.json").write_text(json.dumps({"lora_functional": "xl" in checkpoint.stem}))
    cached = folder / "cache" / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(TOKENIZER, cached / "snapshots" / "0")
    (cached / "snapshots" / "0" / "config.json").write_text(json.dumps(CLIP))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    host.start(folder / "cache")
    try:
        host.post("/answer", {"folder": str(folder), "prompt": PROMPT})
    finally:
        host.stop()


def _habits(
    backbone: Backbone, words: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[Callable[..., None], Habits]]:
    """Our features of what is tried, and what each program is asked."""
    takes_clip_skip = backbone.preset == "sd1"
    both, alone = (
        {name: one for name, one in habits.items() if takes_clip_skip or one[1] == 1}
        for habits in (HABITS, IN_WEB_UIS)
    )
    features = own(backbone, words, {**both, **alone})
    features["moved by a comma"] = moved_by_web_uis(backbone, words)
    alone["moved by a comma"] = (MOVED, 1)
    # ComfyUI's rule: the weight of what differs from the empty prompt (comfy/sd1_clip.py)
    plain, empty = (
        backbone.context(backbone.encode_drawn(prompt, words))
        for prompt in ("a V1 ball on grass at night", "")
    )
    count = len(words["V1"])
    weights = torch.ones(1, plain.shape[1], 1)
    weights[:, 2 : 3 + count] = 1.3
    weights[:, 4 + count] = 1.1 * 1.1
    features["weights by its own rule"] = empty + (plain - empty) * weights
    of_comfyui = {**both, "weights by its own rule": (WEIGHTS, 1)}
    return features, {in_comfyui: of_comfyui, in_a1111: {**both, **alone}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers"), [("sd1", 32), ("sd2", 32), pytest.param("sdxl", 140, marks=LARGE)]
)
def test_other_programs_nets_answer_as_ours(
    tmp_path: Path, folders: dict[str, Path], kind: str, layers: int
) -> None:
    path = full_size.write(kind, tmp_path / f"{kind}.safetensors")
    settings = LearnSettings(method="lora", steps=2, size=64, rate=0.01, precision="fp32")
    pipeline.learn_concept(
        requests.LearnRequest(path, folders["V1"], "V1", "ball", settings, device="cpu")
    )
    exported = pipeline.export(requests.ExportRequest(path, tmp_path)).lora
    assert exported
    save_file(
        {name: tensor.float() for name, tensor in load_file(exported).items()},
        tmp_path / "lora.safetensors",
    )
    adapter = {
        name: tensor.half().float()
        for name, tensor in (store.open_stack(store.stack_path(path)).adapter or {}).items()
    }
    assert len(adapter) == 2 * layers

    backbone = load_backbone(path, device="cpu", precision="fp32")
    noisy, timestep = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500]),
    )
    features, word = (
        backbone.encode_prompts(["a photo of a red mug"]),
        store.open_stack(store.stack_path(path)).tokens["V1"].half().float(),
    )
    with torch.no_grad():
        said = backbone.encode_prompts([PROMPT], {"V1": word})
        plain = backbone.predict(noisy, timestep, features)
        with attached(backbone, adapter):
            taught = backbone.predict(noisy, timestep, features)
        assert plain.isfinite().all()
        assert (taught - plain).abs().max() > 1e-3
        texts = [encoder.model for encoder in backbone.text_encoders]
        if kind == "sdxl":
            pipe = StableDiffusionXLPipeline(
                backbone.vae,
                *texts,
                *[backbone.tokenizer] * 2,
                backbone.unet,
                None,
                add_watermarker=False,
            )
        else:
            pipe = StableDiffusionPipeline(
                backbone.vae,
                *texts,
                backbone.tokenizer,
                backbone.unet,
                None,
                None,
                None,
                requires_safety_checker=False,
            )
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert sum(name.endswith("lora_A") for name, _ in backbone.unet.named_modules()) == layers
        assert (backbone.predict(noisy, timestep, features) - taught).abs().max() <= 1e-4

    asked, wanted = (
        {"noisy": noisy, "timestep": timestep, "context": backbone.context(features), "word": word},
        {"said": backbone.context(said)},
    )
    if kind == "sdxl":
        asked["pooled"], wanted["said_pooled"] = (
            text[:, -1, : backbone.text_encoders[-1].pooled_width] for text in (features, said)
        )
    wanted |= {"plain": plain, "taught": taught}
    habits, theirs = _habits(backbone, {"V1": word})
    save_file(
        {name: tensor.contiguous() for name, tensor in asked.items()},
        tmp_path / "asked.safetensors",
    )
    del backbone, pipe, texts
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # an SDXL fits only once
    for program, ask in ((COMFYUI, in_comfyui), (A1111, in_a1111)):
        if program is None:
            continue
        tried = {name: habits[name] for name in theirs[ask]}
        (tmp_path / "habits.json").write_text(json.dumps(theirs[ask]))
        ask(program, tmp_path, path)
        answers = load_file(tmp_path / "answers.safetensors")
        with safe_open(tmp_path / "answers.safetensors", framework="pt") as file:
            assert file.metadata() == {"patched": str(layers)}
        (tmp_path / "answers.safetensors").unlink()  # the next one gives its own
        expected = {**wanted, **tried}
        assert answers.keys() == expected.keys()
        apart = {
            name: float((answers[name] - tensor).abs().max()) for name, tensor in expected.items()
        }
        print(ask.__name__, apart)  # what was measured, with -s
        assert max(apart.values()) <= 1e-4, (ask.__name__, apart)
    if missing := [
        name
        for name, program in (("ComfyUI", COMFYUI), ("AUTOMATIC1111", A1111))
        if program is None
    ]:
        pytest.skip(
            f"no {' and no '.join(missing)} on this machine; diffusers and what else is here agreed"
        )


@pytest.mark.slow
@pytest.mark.skipif(COMFYUI is None, reason="no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI")
def test_comfyui_reads_a_prompt_with_sdxl_s_text_encoders_as_we_do(tmp_path: Path) -> None:
    assert COMFYUI
    small, big = full_size.sdxl_texts()
    for letter, model in (("l", small), ("g", big)):
        state = {
            name if name.startswith("text_") else f"text_model.{name}": tensor.contiguous()
            for name, tensor in model.state_dict().items()
        }
        save_file(state, tmp_path / f"clip_{letter}.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    tokenizer.model_max_length = 77
    encoders = [TextEncoder(small, 49407, True), TextEncoder(big, 0, True)]
    rest: Any = torch.nn.Linear(1, 1)
    backbone = Backbone(Path("xl"), rest, rest, encoders, tokenizer, "sdxl", 1024, "0")
    words = {"V1": 0.02 * torch.randn(3, 2048, generator=torch.Generator().manual_seed(1))}
    save_file(words, tmp_path / "words.safetensors")
    with torch.no_grad():
        wanted, theirs = _habits(backbone, words)
    asked = theirs[in_comfyui]
    (tmp_path / "habits.json").write_text(json.dumps(asked))
    pooled = {
        name: backbone.encode_drawn(prompt, words)[:, -1, :1280]
        for name, (prompt, _) in asked.items()
    }
    command = [python_of(COMFYUI), "-c", TEXT_IN_COMFYUI, str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    # not normed, so values are larger than those of SD1.x
    apart = {
        name: float((answers[name] - wanted[name]).abs().max() / wanted[name].abs().max())
        for name in asked
    }
    for name, one in pooled.items():
        if name != "weights by its own rule":  # the weights of ours are AUTOMATIC1111's
            apart[f"{name}, pooled"] = float((answers[f"{name}, pooled"] - one).abs().max())
    print("in_comfyui, SDXL", apart)
    assert max(apart.values()) <= 1e-4, apart


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", pytest.param("sdxl", marks=LARGE)])
def test_several_learned_things_follow_areas(tmp_path: Path, kind: str) -> None:
    path = full_size.write(kind, tmp_path / f"{kind}.safetensors")
    follows_areas(load_backbone(path, device="cpu", precision="fp32"), 16, 24)

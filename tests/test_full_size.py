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
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.checkpoint.single_file import TOKENIZER
from comfy_continual_lora.checkpoint.stable import StableBackbone
from comfy_continual_lora.checkpoint.text import TextEncoder
from comfy_continual_lora.settings import LearnSettings

COMFYUI, A1111 = find_comfyui(), find_webui()
LARGE = pytest.mark.skipif(
    "FULL_SIZE" not in os.environ,
    reason="FULL_SIZE is not set; SDXL takes 16 GB of memory, 7 GB of disk and five minutes",
)
PROMPT = "a photo of a red V1 ball on grass, and v1"
# in ComfyUI's own Python: its text features of the prompts
SAID_IN_COMFYUI = """
asked = load_file(f"{folder}/asked.safetensors")
clip = with_words(clip, {"V1": asked["word"]})
answers = {}
for name, (prompt, skip) in json.load(open(f"{folder}/habits.json")).items():
    other = clip.clone()
    if skip == 2:
        other.clip_layer(-2)
    context, pooled = other.encode_from_tokens(other.tokenize(prompt), return_pooled=True)
    answers[name] = context.float().contiguous()
    if asked["word"].shape[1] == 2048:  # SDXL
        answers[f"{name}, pooled"] = pooled.float().contiguous()
"""
IMPORTS_IN_COMFYUI = """
import json, sys
folder, checkpoint, repository, sys.argv = *sys.argv[1:4], ["main.py", "--cpu", "--force-fp32"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import sd, utils
from safetensors.torch import load_file, save_file
sys.path.append(repository)
from comfy_continual_lora.comfy_nodes.words import with_words
"""
# and its net's answers to what ours was asked, without the LoRA and with it
IN_COMFYUI = f"""{IMPORTS_IN_COMFYUI}
clip = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_model=False)[1]
{SAID_IN_COMFYUI}
del clip
plain = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)[0]
lora = utils.load_torch_file(f"{{folder}}/lora.safetensors")
taught, _ = sd.load_lora_for_models(plain, None, lora, 1.0, 0.0)
for name, patcher in (("plain", plain), ("taught", taught)):
    patcher.patch_model()
    net = patcher.model
    added = {{"context": asked["context"]}}
    if "pooled" in asked:
        added["y"] = net.encode_adm(pooled_output=asked["pooled"], width=64, height=64)
    with torch.no_grad():
        answer = net.diffusion_model(asked["noisy"], asked["timestep"], **added)
    answers[name] = answer.float().contiguous()
    patched = len(patcher.patches)
    patcher.unpatch_model()
save_file(answers, f"{{folder}}/answers.safetensors", {{"patched": str(patched)}})
"""
# the same of SDXL's text encoders alone
TEXT_IN_COMFYUI = f"""{IMPORTS_IN_COMFYUI}
states = [utils.load_torch_file(f"{{folder}}/clip_{{letter}}.safetensors") for letter in "lg"]
clip = sd.load_text_encoder_state_dicts(states, clip_type=sd.CLIPType.STABLE_DIFFUSION)
{SAID_IN_COMFYUI}
save_file(answers, f"{{folder}}/answers.safetensors")
"""
# an extension that answers the same in AUTOMATIC1111, with its own loader of checkpoints, LoRAs and
# embeddings; the net only if it is asked
IN_A1111 = """
import json, sys
import torch
from modules import prompt_parser, script_callbacks, shared
from safetensors.torch import load_file, save_file

@torch.no_grad()
def answer(body: dict):
    folder, model, loras = body["folder"], shared.sd_model, sys.modules["networks"]
    asked, answers, added = load_file(f"{folder}/asked.safetensors"), {}, {}
    for name, (text, skip) in json.load(open(f"{folder}/habits.json")).items():
        shared.opts.CLIP_stop_at_last_layers = skip
        prompt = prompt_parser.SdConditioning([text], width=64, height=64)
        said = model.get_learned_conditioning(prompt)
        if isinstance(said, dict):  # SDXL
            answers[f"{name}, pooled"], sizes = said["vector"].split([1280, 1536], 1)
            said = said["crossattn"]
        answers[name] = said
    shared.opts.CLIP_stop_at_last_layers = 1
    if "pooled" in asked:
        added["y"] = torch.cat([asked["pooled"], sizes], 1)
    patched = {}
    if "noisy" in asked:
        net = model.model.diffusion_model
        for name, wanted in (("plain", []), ("taught", ["lora"])):
            loras.load_networks(wanted, [1.0], [1.0], [None])
            given = asked["noisy"], asked["timestep"], asked["context"]
            answers[name] = net(*given, **added)
        patched["patched"] = str(len(loras.loaded_networks[0].modules))
    answers = {name: tensor.contiguous() for name, tensor in answers.items()}
    save_file(answers, f"{folder}/answers.safetensors", patched)

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


def in_comfyui(
    comfyui: Path, folder: Path, checkpoint: Path | str, script: str = IN_COMFYUI
) -> None:
    """Write answers.safetensors."""
    command = [python_of(comfyui), "-c", script, str(folder), str(checkpoint), str(REPOSITORY)]
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
        if file.exists():
            os.link(file, host.data / place / file.name)
    # its own way to find out whether an SD2 predicts noise fails without a GPU
    if checkpoint.stem == "sd2":
        configs = webui / "repositories" / "stable-diffusion-stability-ai" / "configs"
        config = configs / "stable-diffusion" / "v2-inference.yaml"
        shutil.copy(config, host.data / "models" / "Stable-diffusion" / "sd2.yaml")
    if checkpoint.stem == "thin-sdxl":
        configs = webui / "repositories" / "generative-models" / "configs" / "inference"
        config = (configs / "sd_xl_base.yaml").read_text()
        for stock, thin in full_size.THIN_IN_SGM.items():
            assert config.count(stock) == 1
            config = config.replace(stock, thin)
        (host.data / "models" / "Stable-diffusion" / "thin-sdxl.yaml").write_text(config)
    # its usual way keeps a copy of every weight, which is more than 24 GB for an SDXL in float32
    (host.data / "config.json").write_text(json.dumps({"lora_functional": "xl" in checkpoint.stem}))
    cached = folder / "cache" / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(TOKENIZER, cached / "snapshots" / "0")
    (cached / "snapshots" / "0" / "config.json").write_text(json.dumps(CLIP))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    host.start(folder / "cache")
    try:
        host.post("/answer", {"folder": str(folder)})
    finally:
        host.stop()


def _habits(
    backbone: StableBackbone, words: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[Callable[..., None], Habits]]:
    """Our features of what is tried, and what each program is asked."""
    asked = {**HABITS, **IN_WEB_UIS}
    # SD2.x and SDXL have one layer, whatever clip skip 2 says in either program
    taken = {
        name: (prompt, skip if backbone.preset == "sd1" else 1)
        for name, (prompt, skip) in asked.items()
    }
    features = own(backbone, words, taken)
    said = backbone.encode_prompts([PROMPT], words)
    features["said"] = backbone.context(said).contiguous()
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
    features["moved by a comma"] = moved_by_web_uis(backbone, words)
    of_comfyui = {**HABITS, "said": (PROMPT, 1), "weights by its own rule": (WEIGHTS, 1)}
    of_a1111 = {**asked, "said": (PROMPT, 1), "moved by a comma": (MOVED, 1)}
    if width := backbone.text_encoders[-1].pooled_width:
        for name, (prompt, _) in {**of_comfyui, **of_a1111}.items():
            row = backbone.encode_drawn(prompt, words)[:, -1, :width]
            features[f"{name}, pooled"] = row.contiguous()
    return features, {in_comfyui: of_comfyui, in_a1111: of_a1111}


def _asked(
    folder: Path, habits: Habits, features: dict[str, Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Write what a program is asked; the features that it is to answer."""
    (folder / "habits.json").write_text(json.dumps(habits))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "asked.safetensors")
    names = [f"{name}{what}" for name in habits for what in ("", ", pooled")]
    return {name: features[name] for name in names if name in features}


def _agrees(folder: Path, ask: Callable[..., None], expected: dict[str, Tensor]) -> None:
    """Whether answers.safetensors has what is expected, to a ten thousandth of its largest value;
    the next program writes its own.
    """
    answers = load_file(folder / "answers.safetensors")
    (folder / "answers.safetensors").unlink()
    assert answers.keys() == expected.keys()
    apart = {
        name: float((answers[name] - tensor).abs().max() / tensor.abs().max())
        for name, tensor in expected.items()
    }
    print(ask.__name__, apart)  # what was measured, with -s
    assert max(apart.values()) <= 1e-4, (ask.__name__, apart)


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
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # an SDXL fits only once
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

    asked = {
        "noisy": noisy,
        "timestep": timestep,
        "context": backbone.context(features),
        "word": word,
    }
    if kind == "sdxl":
        asked["pooled"] = features[:, -1, : backbone.text_encoders[-1].pooled_width]
    with torch.no_grad():
        habits, theirs = _habits(backbone, {"V1": word})
    del backbone, pipe, texts
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # an SDXL fits only once
    for program, ask in ((COMFYUI, in_comfyui), (A1111, in_a1111)):
        if program is None:
            continue
        expected = _asked(tmp_path, theirs[ask], habits, asked)
        ask(program, tmp_path, path)
        with safe_open(tmp_path / "answers.safetensors", framework="pt") as file:
            assert file.metadata() == {"patched": str(layers)}
        _agrees(tmp_path, ask, {**expected, "plain": plain, "taught": taught})
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
    backbone = StableBackbone(
        path=Path("xl"),
        unet=rest,
        vae=rest,
        text_encoders=encoders,
        tokenizer=tokenizer,
        preset="sdxl",
        size=1024,
        fingerprint="0",
    )
    with torch.no_grad():
        features, theirs = _habits(backbone, {"V1": _word_of_sdxl()})
    expected = _asked(tmp_path, theirs[in_comfyui], features, {"word": _word_of_sdxl()})
    in_comfyui(COMFYUI, tmp_path, "", TEXT_IN_COMFYUI)
    _agrees(tmp_path, in_comfyui, expected)


@pytest.mark.slow
@pytest.mark.skipif(
    A1111 is None, reason="no AUTOMATIC1111 at WEBUI_PATH or ~/stable-diffusion-webui"
)
def test_a1111_reads_a_prompt_with_sdxl_s_text_encoders_as_we_do(tmp_path: Path) -> None:
    assert A1111
    path = full_size.write("thin-sdxl", tmp_path / "thin-sdxl.safetensors")
    word = _word_of_sdxl()
    small, big = word.split([768, 1280], 1)
    embedding = {"clip_l": small.contiguous(), "clip_g": big.contiguous()}
    save_file(embedding, tmp_path / "V1.safetensors")
    backbone = load_backbone(path, device="cpu", precision="fp32")
    with torch.no_grad():
        features, theirs = _habits(backbone, {"V1": word})
    del backbone
    gc.collect()
    expected = _asked(tmp_path, theirs[in_a1111], features, {"word": word})
    in_a1111(A1111, tmp_path, path)
    _agrees(tmp_path, in_a1111, expected)


def _word_of_sdxl() -> Tensor:
    return 0.02 * torch.randn(3, 2048, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", pytest.param("sdxl", marks=LARGE)])
def test_several_learned_things_follow_areas(tmp_path: Path, kind: str) -> None:
    path = full_size.write(kind, tmp_path / f"{kind}.safetensors")
    follows_areas(load_backbone(path, device="cpu", precision="fp32"), 16, 24)

"""Full-size SD1.5, SD2.1 and SDXL: what is learned on them does in diffusers and in a stock ComfyUI exactly what it does in our own net, and
the learned word says in ComfyUI's prompts what it says in ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import full_size
import pytest
import torch
from comfyui import REPOSITORY, find_comfyui, python_of
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfy_continual_lora import pipeline, store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.lora import attached
from comfy_continual_lora.settings import LearnSettings

FOUND = find_comfyui()
LARGE = pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="FULL_SIZE is not set; SDXL takes 16 GB of memory, 7 GB of disk and five minutes")
PROMPT = "a photo of a red V1 ball on grass, and v1"
# in ComfyUI's own Python: its text features of the prompt, and its net's answers to what ours was asked, without the LoRA and with it
COMFYUI = """
import sys
folder, checkpoint, repository, prompt, sys.argv = *sys.argv[1:5], ["main.py", "--cpu", "--force-fp32"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy import sd, utils
from safetensors.torch import load_file, save_file
asked = load_file(f"{folder}/asked.safetensors")
sys.path.append(repository)
from comfy_continual_lora.comfy_nodes.host import with_words
clip = with_words(sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_model=False)[1], {"V1": asked["word"]})
context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
answers = {"said": context.float().contiguous()} | ({"said_pooled": pooled.float().contiguous()} if "pooled" in asked else {})
del clip
plain = sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)[0]
taught, _ = sd.load_lora_for_models(plain, None, utils.load_torch_file(f"{folder}/lora.safetensors"), 1.0, 0.0)
for name, patcher in (("plain", plain), ("taught", taught)):
    patcher.patch_model()
    net = patcher.model
    added = {"y": net.encode_adm(pooled_output=asked["pooled"], width=64, height=64)} if "pooled" in asked else {}
    with torch.no_grad():
        answers[name] = net.diffusion_model(asked["noisy"], asked["timestep"], context=asked["context"], **added).float().contiguous()
    patched = len(patcher.patches)
    patcher.unpatch_model()
save_file(answers, f"{folder}/answers.safetensors", {"patched": str(patched)})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), [("sd1", 32), ("sd2", 32), pytest.param("sdxl", 140, marks=LARGE)])
def test_other_programs_nets_answer_as_ours(tmp_path: Path, folders: dict[str, Path], kind: str, layers: int) -> None:
    path = full_size.write(kind, tmp_path / f"{kind}.safetensors")
    settings = LearnSettings(method="lora", steps=2, size=64, rate=0.01, precision="bf16")
    pipeline.learn_concept(pipeline.LearnRequest(path, folders["V1"], "V1", "ball", settings, device="cpu"))
    exported = pipeline.export(path, tmp_path).lora
    assert exported
    save_file({name: tensor.float() for name, tensor in load_file(exported).items()}, tmp_path / "lora.safetensors")
    adapter = {name: tensor.half().float() for name, tensor in (store.open_stack(store.stack_path(path)).adapter or {}).items()}
    assert len(adapter) == 2 * layers

    backbone = load_backbone(path, device="cpu", precision="fp32")
    noisy, timestep = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    features, word = backbone.encode_prompts(["a photo of a red mug"]), store.open_stack(store.stack_path(path)).tokens["V1"]
    with torch.no_grad():
        said = backbone.encode_prompts([PROMPT], {"V1": word})
        plain = backbone.predict(noisy, timestep, features)
        with attached(backbone, adapter):
            taught = backbone.predict(noisy, timestep, features)
        assert plain.isfinite().all()
        assert (taught - plain).abs().max() > 1e-3
        texts = [encoder.model for encoder in backbone.text_encoders]
        if kind == "sdxl":
            pipe = StableDiffusionXLPipeline(backbone.vae, *texts, *[backbone.tokenizer] * 2, backbone.unet, None, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(backbone.vae, *texts, backbone.tokenizer, backbone.unet, None, None, None, requires_safety_checker=False)
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert sum(name.endswith("lora_A") for name, _ in backbone.unet.named_modules()) == layers
        assert (backbone.predict(noisy, timestep, features) - taught).abs().max() <= 1e-4

    asked, wanted = {"noisy": noisy, "timestep": timestep, "context": backbone.context(features), "word": word}, {"said": backbone.context(said)}
    if kind == "sdxl":
        asked["pooled"], wanted["said_pooled"] = (text[:, -1, : backbone.text_encoders[-1].pooled_width] for text in (features, said))
    wanted |= {"plain": plain, "taught": taught}
    save_file({name: tensor.contiguous() for name, tensor in asked.items()}, tmp_path / "asked.safetensors")
    del backbone, pipe, texts
    if FOUND is None:
        pytest.skip("no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI; diffusers agreed")
    done = subprocess.run(
        [python_of(FOUND), "-c", COMFYUI, str(tmp_path), str(path), str(REPOSITORY), PROMPT], cwd=FOUND, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    with safe_open(tmp_path / "answers.safetensors", framework="pt") as file:
        assert file.metadata() == {"patched": str(layers)}
    assert answers.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (answers[name] - tensor).abs().max() <= 1e-4, name

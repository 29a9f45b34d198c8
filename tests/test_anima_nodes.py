"""Our nodes on a narrow Anima in a real ComfyUI, which is found as for test_comfyui.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers_anima as anima
import numpy as np
import pytest
import torch
from helpers_comfyui import ComfyUI, error_of, find_comfyui, text_of, to_prompt
from PIL import Image
from safetensors.torch import load_file, save_file

FOUND = find_comfyui()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI"),
]
TEMPLATE = Path(__file__).parents[1] / "workflows" / "7-anima-learn-and-draw.json"
NET = "anima-base-v1.0.safetensors"  # as the template names it
NARROW = f"""
from functools import partial
from comfy.text_encoders import llama
llama.Qwen3_06BConfig = partial(
    llama.Qwen3_06BConfig, num_hidden_layers={anima.IN_COMFYUI.text_layers}
)
NODE_CLASS_MAPPINGS = {{}}
"""
# the default method reads a thousand prompts of the vocabulary, which takes minutes with this net, and
# so do the nodes that solve unless `language` is 0
QUICK = {"method": "lora", "steps": 2, "batch": 1, "rank": 4, "score_pictures": 1, "rate": 0.03}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A server whose models are a narrow Anima, and which takes a text encoder of few layers."""
    assert FOUND
    base = tmp_path_factory.mktemp("comfyui")
    tokenizers = FOUND / "comfy" / "text_encoders"
    path = anima.write(base, anima.IN_COMFYUI, dtype=torch.bfloat16, tokenizers=tokenizers)
    path.rename(path.with_name(NET))
    shutil.rmtree(base / "comfy")  # the tokenizers are ComfyUI's own
    narrow = base / "custom_nodes" / "narrow" / "__init__.py"
    narrow.parent.mkdir(parents=True)
    narrow.write_text(NARROW)
    server = ComfyUI(FOUND, base)
    yield server
    server.stop()


def load(stack: str) -> dict[str, Any]:
    """Node 1: a stack of the net."""
    inputs = {"checkpoint": f"{NET} [diffusion_models]", "stack_name": stack}
    return {"1": {"class_type": "ContinualLora_LoadStack", "inputs": inputs}}


def learn(stack: str) -> dict[str, Any]:
    """Nodes 1 to 5: V1 is learned, then V2; nodes 6 and 7 say what was done."""
    graph = load(stack)
    for number, (token, which) in enumerate((("V1", 1), ("V2", 2))):
        examples, node = str(2 + 2 * number), str(3 + 2 * number)
        graph[examples] = {
            "class_type": "ContinualLora_Examples",
            "inputs": {"which": which, "count": 2},
        }
        graph[node] = {
            "class_type": "ContinualLora_Learn",
            "inputs": {
                "stack": [str(2 * number + 1), 0],
                "images": [examples, 0],
                "token": token,
                "noun": [examples, 1],
                **QUICK,
            },
        }
        graph[str(6 + number)] = {"class_type": "PreviewAny", "inputs": {"source": [node, 3]}}
    return graph


def draw(prompt: str, model: dict[str, Any] | None) -> dict[str, Any]:
    """Nodes 20 to 29: sample with the net (20), or with a node that takes it (21)."""
    source = ["21", 0] if model else ["20", 0]
    clip = ["21", 1] if model and "clip" in model["inputs"] else ["22", 0]
    text = {"class_type": "CLIPTextEncode"}
    return {
        "20": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": NET, "weight_dtype": "default"},
        },
        **({"21": model} if model else {}),
        "22": {
            "class_type": "CLIPLoader",
            "inputs": {"clip_name": "qwen_3_06b_base.safetensors", "type": "stable_diffusion"},
        },
        "23": {"class_type": "VAELoader", "inputs": {"vae_name": "qwen_image_vae.safetensors"}},
        "24": {**text, "inputs": {"clip": clip, "text": prompt}},
        "25": {**text, "inputs": {"clip": clip, "text": "blurry"}},
        "26": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "27": {
            "class_type": "KSampler",
            "inputs": {
                "model": source,
                "positive": ["24", 0],
                "negative": ["25", 0],
                "latent_image": ["26", 0],
                "seed": 1,
                "steps": 4,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "28": {"class_type": "VAEDecode", "inputs": {"samples": ["27", 0], "vae": ["23", 0]}},
        "29": {"class_type": "SaveImage", "inputs": {"images": ["28", 0], "filename_prefix": "a"}},
    }


def apply(**inputs: Any) -> dict[str, Any]:
    """Apply Concepts with the stack of node 1."""
    both = {"model": ["20", 0], "clip": ["22", 0], "stack": ["1", 0], "strength": 1.0}
    return {"class_type": "ContinualLora_Apply", "inputs": {**both, **inputs}}


def picture(host: ComfyUI, graph: dict[str, Any], node: str = "29") -> np.ndarray:
    (path,) = host.pictures(host.run(graph), node)
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_the_template_runs_to_its_picture(host: ComfyUI) -> None:
    graph = to_prompt(json.loads(TEMPLATE.read_text()), host.get("/object_info"))
    for node in graph.values():
        if node["class_type"] == "ContinualLora_Learn":
            node["inputs"].update(QUICK)
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
        if node["class_type"] == "EmptyLatentImage":
            assert (node["inputs"]["width"], node["inputs"]["height"]) == (1024, 1024)
            node["inputs"].update(width=128, height=96)
    (node,) = (key for key, one in graph.items() if one["class_type"] == "PreviewImage")
    drawn = picture(host, graph, node)
    assert drawn.shape == (96, 128, 3)
    assert drawn.std() > 1


def test_the_net_is_in_our_list_and_its_stacks_are_not(host: ComfyUI) -> None:
    host.run(learn("two"))
    types = host.get("/object_info")
    (ours, stacks) = (
        types["ContinualLora_LoadStack"]["input"][kind][name][1]["options"]
        for kind, name in (("required", "checkpoint"), ("optional", "stack"))
    )
    assert ours == ["mini-sd.safetensors", f"{NET} [diffusion_models]"]
    assert "two" in stacks
    # ComfyUI has no way to leave a file out
    stock = types["UNETLoader"]["input"]["required"]["unet_name"][0]
    assert f"{NET.removesuffix('.safetensors')}.two.concepts.safetensors" in stock


def test_the_exported_lora_draws_what_apply_draws(host: ComfyUI) -> None:
    """One of two learned things, with CLIP unchanged; the LoRA has every K and V."""
    graph = learn("two")
    graph["10"] = {"class_type": "ContinualLora_Export", "inputs": {"stack": ["5", 0]}}
    graph |= {
        number: {"class_type": "PreviewAny", "inputs": {"source": ["10", output]}}
        for number, output in (("11", 0), ("12", 1))
    }
    done = host.run(graph)
    assert "Learned V1" in text_of(done, "6")
    assert "Learned V2" in text_of(done, "7")
    name = text_of(done, "11")
    assert "embedding:" not in text_of(done, "12")
    keys = load_file(host.base / "models" / "loras" / name)
    assert len({key.split(".")[0] for key in keys}) == 2 * anima.IN_COMFYUI.layers
    stock = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["20", 0], "lora_name": name, "strength_model": 1.0},
    }
    prompt = "a photo of a V1 ball on grass"
    ours = picture(host, {**load("two"), **draw(prompt, apply())})
    mixed = picture(host, {**load("two"), **draw(prompt, apply(mixed=True))})
    assert np.array_equal(ours, mixed)
    assert np.array_equal(ours, picture(host, draw(prompt, stock)))
    assert np.abs(ours - picture(host, draw(prompt, None))).mean() > 1
    assert "not a learned word" not in host.log.read_text()
    assert "This MODEL is not" not in host.log.read_text()


def test_another_net_is_told(host: ComfyUI) -> None:
    path = host.base / "models" / "diffusion_models" / "other.safetensors"
    weights = load_file(path.with_name(NET))
    save_file({name: 1.1 * one for name, one in weights.items()}, path)
    host.run(learn("two"))
    graph = {**load("two"), **draw("a photo of a V1 ball", apply(strength=0.9))}
    graph["20"]["inputs"]["unet_name"] = path.name
    host.run(graph)
    assert f"This MODEL is not {NET}, for which the stack" in host.log.read_text()
    path.unlink()


def test_every_node_works_on_a_stack_of_anima(host: ComfyUI) -> None:
    """Or says in a sentence why not."""
    host.run(learn("nodes"))
    examples = {
        "2": {"class_type": "ContinualLora_Examples", "inputs": {"which": 2, "count": 2}},
    }

    def says(kind: str, output: int, **inputs: Any) -> str:
        node = {"class_type": f"ContinualLora_{kind}", "inputs": {"stack": ["1", 0], **inputs}}
        show = {"class_type": "PreviewAny", "inputs": {"source": ["3", output]}}
        done = host.finished(host.queue({**load("nodes"), **examples, "3": node, "4": show}))
        return error_of(done) or text_of(done, "4")

    pictures = {"images": ["2", 0]}
    assert "Solved for V2 teapot alone" in says("Select", 1, tokens="V2", language=0.0)
    assert "picture 2: " in says("Scores", 0, **pictures, trials=4)
    assert "consolidated" in says("Consolidate", 2, **pictures, dsc_steps=2, batch=1).lower()
    assert "Solved for 2 concepts" in says("ClosedForm", 1, language=0.0)
    quick = {"pictures": 1, "steps": 1, "trials": 2, "size": 64}
    assert "V2 teapot" in says("Evaluate", 1, **quick)
    lora = {"lora": says("Export", 0), "token": "W1", "noun": "", "embedding": "", "trigger": "x"}
    assert "a concept's name is plain text" in says("Import", 1, **lora, strength=1.0)
    assert "Forgot V1" in says("Forget", 1, token="V1", language=0.0)
    assert "Undo takes back: forgot V1 ball" in says("Undo", 1, token="")
    assert "forgot V1 ball" in says("History", 1)


def test_several_learned_things_in_one_prompt_are_kept_apart(host: ComfyUI) -> None:
    """With areas that are found, in a batch, and given: one for all of it draws that thing's own prompt."""
    host.run(learn("two"))
    both, one = "a photo of a V1 ball and a (V2 teapot:1.2)", "a photo of a V1 ball and a teapot"

    def graph(prompt: str = both, **inputs: Any) -> dict[str, Any]:
        return {**load("two"), **draw(prompt, apply(**inputs))}

    apart, mixed = picture(host, graph()), picture(host, graph(mixed=True))
    assert np.abs(apart - mixed).mean() > 0.1
    assert np.array_equal(picture(host, graph(one)), picture(host, graph(one, mixed=True)))
    batch = graph()
    batch["26"]["inputs"]["batch_size"] = 2
    first, _ = host.pictures(host.run(batch), "29")
    assert np.abs(apart - np.asarray(Image.open(first).convert("RGB"), int)).mean() < 1

    masked = graph()
    masked |= {
        "30": {
            "class_type": "ContinualLora_Areas",
            "inputs": {"model": ["21", 0], "latent": ["27", 0]},
        },
        "31": {"class_type": "MaskToImage", "inputs": {"mask": ["30", 0]}},
        "32": {"class_type": "PreviewImage", "inputs": {"images": ["31", 0]}},
    }
    masks = [np.asarray(Image.open(path)) for path in host.pictures(host.run(masked), "32")]
    assert [mask.shape[:2] for mask in masks] == [(64, 64)] * 2

    given = graph(masks=["45", 0])
    for number, value in ((40, 1.0), (41, 0.0)):
        given[str(number)] = {
            "class_type": "SolidMask",
            "inputs": {"value": value, "width": 8, "height": 8},
        }
        given[str(number + 2)] = {
            "class_type": "MaskToImage",
            "inputs": {"mask": [str(number), 0]},
        }
    given["44"] = {"class_type": "ImageBatch", "inputs": {"image1": ["42", 0], "image2": ["43", 0]}}
    given["45"] = {"class_type": "ImageToMask", "inputs": {"image": ["44", 0], "channel": "red"}}
    own = picture(host, graph("a photo of a V1 ball and a (teapot:1.2)", mixed=True))
    assert np.abs(picture(host, given) - own).max() <= 2
    assert "are drawn mixed" not in host.log.read_text()

"""Are long prompts and weighted words held as well as short prompts are?

    python benchmarks/retention/chunks.py OUT.json [--concepts 2] [--steps 300]

in: nothing - out: OUT.json, and the same as a table on the screen. Development concepts are learned one
after the other by the default method. After each, over prompts that name nothing learned,

    change    mean over layers of  E || delta c ||^2 / E || W0 c ||^2

with c the text features of their words (start and padding left out), as the first, second and third
chunk of a long prompt, and with a word weighted by AUTOMATIC1111's rule and by ComfyUI's. And once
several are learned, over prompts that name the first one,

    lost      mean over layers of  E || (delta - delta_1) c ||^2 / E || delta_1 c ||^2

with delta_1 the adapter right after it was learned, with its name in the first or the second chunk.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.adapters.adapter import Adapter, factored, layers_of
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.emphasis import CHUNK
from comfy_continual_lora.language import STYLES, TAGS
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.textspace import COLORS, DETAILS, PLACES, THINGS

COUNT = 64  # prompts of each kind


def things(seed: int) -> list[str]:
    """Things that are not learned, in places."""
    draw = random.Random(seed)
    return [
        f"a photo of a {draw.choice(COLORS)} {draw.choice(THINGS)} {draw.choice(PLACES)}"
        for _ in range(COUNT)
    ]


def details(backbone: Backbone, seed: int, tokens: int) -> str:
    """Details as users write them, of exactly so many tokens."""
    draw = random.Random(seed)
    text = ""
    while True:
        more = f"{text} {draw.choice((*DETAILS, *STYLES, *TAGS)).replace(',', '')}".strip()
        if len(backbone.token_ids(more)) > tokens:
            break
        text = more
    return f"{text} {'very ' * (tokens - len(backbone.token_ids(text)))}".strip()


def rows_of(
    backbone: Backbone, words: Mapping[str, Tensor], chunk: int, prompts: Sequence[str]
) -> Tensor:
    """The features of the words in one chunk of each prompt, (rows, d)."""
    rows = []
    for prompt in prompts:
        features = backbone.context(backbone.encode_drawn(prompt, words))[0]
        length = len(backbone.chunks(prompt, words)[chunk])
        start = chunk * (CHUNK + 2) + 1
        rows.append(features[start : start + length])
    return torch.cat(rows)


def by_comfyui(backbone: Backbone, weight: float, prompts: Sequence[str]) -> Tensor:
    """The features of words of this weight by ComfyUI's rule: more of what differs from an empty
    prompt.
    """
    empty = backbone.context(backbone.encode_drawn(""))[0]
    rows = []
    for prompt in prompts:
        features = backbone.context(backbone.encode_drawn(prompt))[0]
        where = slice(1, 1 + len(backbone.chunks(prompt, {})[0]))
        rows.append(empty[where] + weight * (features[where] - empty[where]))
    return torch.cat(rows)


def moved(adapter: Adapter, rows: Tensor, sizes: Mapping[str, Tensor]) -> float:
    """Mean over layers of sum || delta c ||^2 / sizes[layer]."""
    shares = []
    for layer, parts in layers_of(adapter).items():
        left, right = factored(parts, rows.shape[1])
        shares.append((rows @ right.T @ left.T).square().sum() / sizes[layer])
    return float(torch.stack(shares).mean())


def change(backbone: Backbone, adapter: Adapter, rows: Tensor) -> float:
    sizes = {
        layer: (rows @ module.weight.float().T).square().sum()
        for layer, module in backbone.kv_layers.items()
    }
    return moved(adapter, rows, sizes)


def lost(adapter: Adapter, first: Adapter, rows: Tensor) -> float:
    width, shares = rows.shape[1], []
    now = layers_of(adapter)
    for layer, parts in layers_of(first).items():
        (left, right), (left_now, right_now) = factored(parts, width), factored(now[layer], width)
        own = rows @ right.T @ left.T
        shares.append((rows @ right_now.T @ left_now.T - own).square().sum() / own.square().sum())
    return float(torch.stack(shares).mean())


@torch.no_grad()
def unlearned(backbone: Backbone, adapter: Adapter) -> dict[str, float]:
    """The change of each kind of prompt."""
    plain = things(1)
    long = [details(backbone, seed, CHUNK) for seed in range(COUNT)]
    other = [details(backbone, 1000 + seed, CHUNK) for seed in range(COUNT)]
    behind = [f"{one} BREAK {thing}" for one, thing in zip(long, plain, strict=True)]
    third = [f"{a} BREAK {b} BREAK {c}" for a, b, c in zip(long, other, plain, strict=True)]
    flowing = [f"{one} {two}" for one, two in zip(long, other, strict=True)]
    weighted = [f"({one}:1.4)" for one in plain]
    kinds = {
        "things, a short prompt": rows_of(backbone, {}, 0, plain),
        "things, second chunk": rows_of(backbone, {}, 1, behind),
        "things, third chunk": rows_of(backbone, {}, 2, third),
        "details, first chunk": rows_of(backbone, {}, 0, flowing),
        "details, second chunk": rows_of(backbone, {}, 1, flowing),
        "things at 1.4, AUTOMATIC1111": rows_of(backbone, {}, 0, weighted),
        "things at 1.4, ComfyUI": by_comfyui(backbone, 1.4, plain),
        "things at 0.6, ComfyUI": by_comfyui(backbone, 0.6, plain),
    }
    return {name: change(backbone, adapter, rows) for name, rows in kinds.items()}


@torch.no_grad()
def of_the_first(backbone: Backbone, stack: store.ConceptStack) -> dict[str, float]:
    """How much is lost of what the first concept's own adapter did to its prompts."""
    first = stack.records[0]
    own, now = stack.pool[first.id], stack.adapter
    assert now
    names = [f"a photo of a {first.name} {place}" for place in PLACES]
    behind = [f"{details(backbone, seed, CHUNK)} BREAK {name}" for seed, name in enumerate(names)]
    middle = [f"{details(backbone, seed, 40)} {name}" for seed, name in enumerate(names)]
    texts = {
        "a short prompt": (0, names),
        "behind 40 tokens, first chunk": (0, middle),
        "second chunk": (1, behind),
    }
    return {
        name: lost(now, own, rows_of(backbone, stack.tokens, chunk, prompts))
        for name, (chunk, prompts) in texts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        backbone = load_backbone(checkpoint, device="cpu")
        settings = LearnSettings(steps=arguments.steps)
        for number in range(arguments.concepts):
            concept, token = world.concepts("development")[number], f"V{number + 1}"
            pictures = world.save_pictures(concept, Path(folder) / token)
            request = requests.LearnRequest(
                checkpoint, pictures, token, concept.noun, settings, device="cpu"
            )
            pipeline.learn_concept(request)
            stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
            assert stack.adapter
            result = {"concepts": number + 1, "change": unlearned(backbone, stack.adapter)}
            if number:
                result["lost"] = of_the_first(backbone, stack)
            results.append(result)
            print(json.dumps(result, indent=1), flush=True)
    found = {"steps": arguments.steps, "results": results}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

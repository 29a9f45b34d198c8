"""Are long prompts and weighted words held as well as short prompts are?

    python benchmarks/retention/chunks.py OUT.json [--concepts 2] [--steps 300] [--first 0]

in: nothing - out: OUT.json, and the same as a table on the screen. Development concepts are learned one
after the other by the default method. After each, over prompts that name nothing learned,

    change    mean over layers of  E || delta c ||^2 / E || W0 c ||^2

with c the text features of their words (start and padding left out), as the first, second and third
chunk of a long prompt, and with a word weighted by AUTOMATIC1111's rule and by ComfyUI's. And once
several are learned, over prompts that name the first one,

    lost      mean over layers of  E || (delta - delta_1) c ||^2 / E || delta_1 c ||^2

with delta_1 the adapter right after it was learned, with its name in the first or the second chunk:
of all words there, and of the name, of what stands before it and of what stands behind it. A layer in
which delta_1 does little weighs as much there as any other; so also, as the shares of W0 c of `change`,
how much there was to lose, `taught`, of delta_1, and `moved`, of delta - delta_1.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.adapters.adapter import Adapter, factored, layers_of
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.checkpoint.stable import StableBackbone
from comfy_continual_lora.emphasis import CHUNK, Token
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
    backbone: Backbone,
    words: Mapping[str, Tensor],
    chunk: int,
    prompts: Sequence[str],
    part: Callable[[Sequence[Token]], slice] = lambda tokens: slice(None),
) -> Tensor:
    """The features of the words in one chunk of each prompt, or in a part of it, (rows, d)."""
    assert isinstance(backbone, StableBackbone)
    rows = []
    for prompt in prompts:
        features = backbone.context(backbone.encode_drawn(prompt, words))[0]
        tokens = backbone.chunks(prompt, words)[chunk]
        start = chunk * (CHUNK + 2) + 1
        rows.append(features[start : start + len(tokens)][part(tokens)])
    return torch.cat(rows)


def by_comfyui(backbone: Backbone, weight: float, prompts: Sequence[str]) -> Tensor:
    """The features of words of this weight by ComfyUI's rule: more of what differs from an empty
    prompt.
    """
    assert isinstance(backbone, StableBackbone)
    empty = backbone.context(backbone.encode_drawn(""))[0]
    rows = []
    for prompt in prompts:
        features = backbone.context(backbone.encode_drawn(prompt))[0]
        where = slice(1, 1 + len(backbone.chunks(prompt, {})[0]))
        rows.append(empty[where] + weight * (features[where] - empty[where]))
    return torch.cat(rows)


def outputs(adapter: Adapter, rows: Tensor) -> dict[str, Tensor]:
    """delta c by layer, (rows, d')."""
    factors = {layer: factored(p, rows.shape[1]) for layer, p in layers_of(adapter).items()}
    return {layer: rows @ right.T @ left.T for layer, (left, right) in factors.items()}


def relative(some: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> float:
    """Mean over layers of sum || some ||^2 / sum || to ||^2."""
    shares = [one.square().sum() / to[layer].square().sum() for layer, one in some.items()]
    return float(torch.stack(shares).mean())


def bare_outputs(backbone: Backbone, rows: Tensor) -> dict[str, Tensor]:
    """W0 c by layer, (rows, d')."""
    return {layer: rows @ one.weight.float().T for layer, one in backbone.kv_layers.items()}


def change(backbone: Backbone, adapter: Adapter, rows: Tensor) -> float:
    return relative(outputs(adapter, rows), bare_outputs(backbone, rows))


def losses(backbone: Backbone, adapter: Adapter, first: Adapter, rows: Tensor) -> dict[str, float]:
    """`lost`, `taught` and `moved`."""
    own, now = outputs(first, rows), outputs(adapter, rows)
    bare = bare_outputs(backbone, rows)
    apart = {layer: now[layer] - one for layer, one in own.items()}
    return {
        "lost": relative(apart, own),
        "taught": relative(own, bare),
        "moved": relative(apart, bare),
    }


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
def of_the_first(backbone: Backbone, stack: store.ConceptStack) -> dict[str, dict[str, float]]:
    """How much is lost of what the first concept's own adapter did to its prompts and to their parts."""
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
    noun = len(backbone.token_ids(first.noun))

    def name_of(tokens: Sequence[Token]) -> slice:
        """The learned word and its noun."""
        places = [place for place, token in enumerate(tokens) if token.vector >= 0]
        return slice(places[0], places[-1] + 1 + noun)

    parts: dict[str, Callable[[Sequence[Token]], slice]] = {
        "": lambda tokens: slice(None),
        ": the name": name_of,
        ": before the name": lambda tokens: slice(name_of(tokens).start),
        ": behind the name": lambda tokens: slice(name_of(tokens).stop, None),
    }
    rows = {
        kind + of: rows_of(backbone, stack.tokens, chunk, prompts, part)
        for kind, (chunk, prompts) in texts.items()
        for of, part in parts.items()
    }
    return {name: losses(backbone, now, own, some) for name, some in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--first", type=int, default=0, help="the development concept to begin with"
    )
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        backbone = load_backbone(checkpoint, device="cpu")
        settings = LearnSettings(steps=arguments.steps)
        for number in range(arguments.concepts):
            concept = world.concepts("development")[arguments.first + number]
            token = f"V{number + 1}"
            pictures = world.save_pictures(concept, Path(folder) / token)
            request = requests.LearnRequest(
                checkpoint, pictures, token, concept.noun, settings, device="cpu"
            )
            pipeline.learn_concept(request)
            stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
            assert stack.adapter
            result = {"concepts": number + 1, "change": unlearned(backbone, stack.adapter)}
            if number:
                result["first"] = of_the_first(backbone, stack)
            results.append(result)
            print(json.dumps(result, indent=1), flush=True)
    found = {"steps": arguments.steps, "first": arguments.first, "results": results}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

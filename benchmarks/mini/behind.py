"""What the mini-SD reads of a caption that stands among words it never saw.

    python benchmarks/mini/behind.py benchmarks/mini [--captions 32]

in: the shipped weights - out: OUT/behind.json: the tokens of a prompt and the shares that the attribute
reader reads right, by how many details (`textspace.DETAILS`) stand in front of the caption or behind
it, and for the forms of prompts that the retention benchmark calls held out. The captions are of one
thing each; drawings of the same caption start from the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from quality import unseen_scenes

from comfy_continual_lora import sample, textspace
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import parts, weights, world
from comfy_continual_lora.settings import DrawSettings

sys.path.append(str(Path(__file__).parents[1] / "retention"))
from words import HELD_OUT_FORMS  # pyright: ignore[reportMissingImports]

COUNTS = (2, 5, 10)


def details(count: int, number: int) -> str:
    """That many of them, others for each caption."""
    every = textspace.DETAILS
    return ", ".join(every[(number + k) % len(every)] for k in range(count))


def prompts_of(scenes: Sequence[world.Scene]) -> dict[str, list[str]]:
    """By what stands around the captions."""
    captions = [scene.caption for scene in scenes]
    found = {"alone": captions}
    for count in COUNTS:
        texts = [details(count, number) for number in range(len(captions))]
        pairs = list(zip(texts, captions, strict=True))
        found[f"{count} details in front"] = [f"{text}, {caption}" for text, caption in pairs]
        found[f"{count} details behind"] = [f"{caption}, {text}" for text, caption in pairs]
    for form in HELD_OUT_FORMS:
        filled = form.replace("[]", "{1}").replace("{}", "{0}")
        found[form] = [
            filled.format(scene.things[0].phrase, world.BACKGROUNDS[scene.background])
            for scene in scenes
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what is read among other words.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--captions", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mini.safetensors"
        weights.write_checkpoint(path)
        backbone = load_backbone(path)
    scenes = [scene for scene in unseen_scenes(4 * arguments.captions) if len(scene.things) == 1]
    scenes = scenes[: arguments.captions]
    settings, reader = DrawSettings().resolved("mini"), weights.load_reader()
    rows = {}
    for name, prompts in prompts_of(scenes).items():
        lengths = [len(backbone.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        drawn = sample.draw(backbone, {}, prompts, range(len(prompts)), settings)
        row = {"tokens": round(sum(lengths) / len(lengths), 1)}
        rows[name] = row | parts.read_accuracy(reader, drawn, scenes)
        print(name, rows[name], flush=True)
        (arguments.out / "behind.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

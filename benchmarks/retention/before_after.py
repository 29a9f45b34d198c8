"""The README's picture: the first of seven things, as it is drawn right after it was learned, and
after six more were learned, by `retention` and by plain LoRA.

    python benchmarks/retention/before_after.py OUT

Input: nothing. The things are the first seven of the reporting split in the order of seed 0, as in
`run.py`, learned with the mini-SD's default settings. Output: OUT/before-after.png, a picture it was
learned from, then two drawings each; and what is needed to go on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from subjects import of_world

from comfy_continual_lora import concepts, pipeline, report, sample
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.consolidation import as_of
from comfy_continual_lora.files import stack_path
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.requests import LearnRequest
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.store import open_stack

THINGS = of_world("reporting", 0, 7)
PLACES = ("on grass", "on sand")


def main(out: Path) -> None:
    ours, plain = (_learned(out / method, method) for method in ("retention", "lora"))
    real = concepts.read_image(THINGS[0].save(out / "real")[0])
    pictures = [real, *_drawn(ours, 1), *_drawn(ours, len(THINGS)), *_drawn(plain, len(THINGS))]
    report.grid(pictures, len(pictures)).save(out / "before-after.png")


def _learned(folder: Path, method: str) -> Path:
    """The checkpoint that has learned all of them."""
    checkpoint = folder / "mini.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    for number, thing in enumerate(THINGS, 1):
        thing.save(folder / f"V{number}")
        settings = LearnSettings(method=method)
        request = LearnRequest(
            checkpoint, folder / f"V{number}", f"V{number}", thing.noun, settings
        )
        pipeline.learn_concept(request)
    return checkpoint


def _drawn(checkpoint: Path, count: int) -> list[Image.Image]:
    """The first thing, as it is drawn after so many."""
    backbone, stack = load_backbone(checkpoint), as_of(open_stack(stack_path(checkpoint)), count)
    prompts = [f"a photo of a V1 {THINGS[0].noun} {place}" for place in PLACES]
    settings = DrawSettings().resolved(backbone.preset)
    with attached(backbone, stack.adapter):
        drawn = sample.draw(backbone, stack.tokens, prompts, [1] * len(prompts), settings)
    return [concepts.to_pil(one) for one in drawn]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
